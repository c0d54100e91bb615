from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.transforms import RandGaussianNoised
from torch import nn

from custom.training import (
    CheckpointSaver,
    EarlyStopHandler,
    EpochSeeder,
    GradientClipper,
    ProgressBar,
    Resumer,
    WeightAverage,
)
from custom.weights import CheckpointError, Provenance, read_checkpoint


class Validator:
    """An evaluator whose key metric follows a script, one value a validation."""

    def __init__(self, scores):
        self.engine = Engine(lambda engine, batch: None)
        self.engine.state.best_metric, self.engine.state.best_metric_epoch = -1, -1
        self.engine.state.key_metric_name = "val_mean_dice"
        self.scores = list(scores)
        self.engine.add_event_handler(Events.EPOCH_STARTED, self.score)

    def score(self, engine):
        engine.state.metrics["val_mean_dice"] = self.scores[self.epoch - 1]
        if engine.state.metrics["val_mean_dice"] > engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = engine.state.metrics["val_mean_dice"], self.epoch

    def attach(self, trainer):
        def validate(trainer):
            self.epoch = trainer.state.epoch
            self.engine.run([0], max_epochs=1)

        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)


def build(
    folder, epochs, scores=(0.1,) * 9, patience=9, stop_in_epoch=None, accumulation_steps=1, max_norm=1.0, seed=3
):
    torch.manual_seed(7)
    network = nn.Conv3d(1, 1, 3, padding=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    generator = torch.Generator().manual_seed(0)
    items = [{"image": torch.randn(1, 6, 6, 6, generator=generator)} for _ in range(4)]
    data = [item | {"label": (item["image"] > 0).float()} for item in items]
    dataset = Dataset(data, RandGaussianNoised("image", prob=0.5))
    validator = Validator(scores)
    stopper = EarlyStopHandler(patience, validator.engine)
    saver = CheckpointSaver(str(folder), {"model": network})
    saver.attach(validator.engine)
    objects = {"model": network, "optimizer": optimizer, "scheduler": scheduler, "saver": saver}
    schedule = LrScheduleHandler(scheduler, print_lr=False)
    handlers = [EpochSeeder(seed, dataset), GradientClipper(max_norm), stopper, validator, schedule]
    handlers.append(Resumer(str(folder / "last.pt"), objects, validator.engine, stopper))
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(dataset, batch_size=1, shuffle=True),
        network=network,
        optimizer=optimizer,
        loss_function=nn.BCEWithLogitsLoss(),
        train_handlers=handlers,
        accumulation_steps=accumulation_steps,
    )
    if stop_in_epoch is not None:

        def stop(engine):
            if engine.state.epoch == stop_in_epoch:
                raise KeyboardInterrupt

        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4 * stop_in_epoch - 2), stop)
    return trainer, network, validator


def weights_after(*args, **kwargs):
    trainer, network, _ = build(*args, **kwargs)
    trainer.run()
    return copy.deepcopy(network.state_dict())


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    straight = weights_after(tmp_path / "straight", 5)
    trainer, _, _ = build(tmp_path / "killed", 5, stop_in_epoch=4)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed = weights_after(tmp_path / "killed", 5)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_the_seed_alone_decides_the_result(tmp_path):
    weights = [weights_after(tmp_path / str(run), 2, seed=seed)["weight"] for run, seed in enumerate((3, 3, 4))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_finished_training_does_not_train_again(tmp_path):
    done = weights_after(tmp_path, 3)
    trainer, network, _ = build(tmp_path, 3)
    trainer.run()
    assert trainer.state.epoch == 3
    assert torch.equal(network.weight, done["weight"])


def test_early_stopping_counts_across_a_resume_and_stays_stopped(tmp_path):
    scores = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    trainer, _, _ = build(tmp_path, 6, scores, patience=3, stop_in_epoch=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed, _, _ = build(tmp_path, 6, scores, patience=3)
    resumed.run()
    assert resumed.state.epoch == 4
    again, _, _ = build(tmp_path, 6, scores, patience=3)
    again.run()
    assert again.state.iteration == resumed.state.iteration


def test_best_checkpoint_survives_a_resume_with_worse_scores(tmp_path):
    scores = [0.2, 0.9, 0.3, 0.4]
    trainer, _, _ = build(tmp_path, 4, scores, stop_in_epoch=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    best = (tmp_path / "model.pt").read_bytes()
    resumed, _, validator = build(tmp_path, 4, scores)
    resumed.run()
    assert (tmp_path / "model.pt").read_bytes() == best
    assert validator.engine.state.best_metric == 0.9


def test_another_configuration_does_not_resume(tmp_path):
    weights_after(tmp_path, 1)
    trainer, _, _ = build(tmp_path, 2)
    handler = Resumer(str(tmp_path / "last.pt"), {"model": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"last.pt was written by another configuration.*--resume False"):
        handler.restore(trainer)


def test_clipping_bounds_the_accumulated_gradient_at_each_step(tmp_path):
    trainer, network, _ = build(tmp_path, 1, accumulation_steps=2, max_norm=0.01)
    norms = []

    def record(optimizer, args, kwargs):
        norms.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in network.parameters()])).item())

    trainer.add_event_handler(Events.STARTED, lambda engine: engine.optimizer.register_step_pre_hook(record))
    trainer.run()
    assert len(norms) == 2
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_progress_bar_covers_all_epochs(tmp_path, capsys):
    trainer, _, validator = build(tmp_path, 3)
    ProgressBar("fold 0", lambda output: output[0]["loss"], validator.engine).attach(trainer)
    trainer.run()
    shown = capsys.readouterr().err
    assert "fold 0: 100%" in shown and "12/12" in shown and "epoch=3/3" in shown and "best=0.1" in shown


def test_average_is_saved_after_each_epoch_with_its_provenance(tmp_path):
    network = nn.Conv3d(1, 1, 1, bias=False)
    nn.init.zeros_(network.weight)
    path = tmp_path / "model.pt"
    average = WeightAverage(network, 0.25, str(path), Provenance(fold=2))
    steps = iter([1.0, 1.0, 3.0, 3.0])
    engine = Engine(lambda engine, batch: nn.init.constant_(network.weight, next(steps)))
    average.attach(engine)
    engine.run([0, 0], max_epochs=1)
    assert read_checkpoint(path)[0]["weight"].item() == pytest.approx(0.25 + 0.75 * 0.25)
    assert network.weight.item() == 1.0
    other = WeightAverage(nn.Conv3d(1, 1, 1, bias=False), 0.25, str(path), Provenance())
    other.load_state_dict(average.state_dict())
    assert other.state_dict()["weight"].item() == average.state_dict()["weight"].item()
    engine.run([0, 0], max_epochs=2)
    state, provenance = read_checkpoint(path)
    assert provenance == {"fold": 2}
    assert state["weight"].item() == pytest.approx(0.4375 * 0.75**2 + 3 * (1 - 0.75**2))
