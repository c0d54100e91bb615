from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import Evaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.transforms import RandGaussianNoised
from torch import nn

from custom.files import UserError
from custom.training import (
    CheckpointSaver,
    EarlyStopHandler,
    EpochSeeder,
    GradientClipper,
    ProgressBar,
    Resumer,
    Selection,
    ValidationHandler,
)
from custom.weights import CheckpointError, read_checkpoint, save_atomically


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
            state = self.engine.state  # as MONAI's evaluator takes over the trainer's epoch
            state.epoch, state.iteration, state.max_epochs = self.epoch - 1, 0, self.epoch
            self.engine.run([0])

        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)


def build(
    folder,
    epochs,
    scores=(0.1,) * 9,
    patience=9,
    stop_in_epoch=None,
    accumulation_steps=1,
    max_norm=1.0,
    seed=3,
    selection="paper",
    noise=0.1,
    **settings,
):
    torch.manual_seed(7)
    network = nn.Conv3d(1, 1, 3, padding=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    generator = torch.Generator().manual_seed(0)
    items = [{"image": torch.randn(1, 6, 6, 6, generator=generator)} for _ in range(4)]
    data = [item | {"label": (item["image"] > 0).float()} for item in items]
    dataset = Dataset(data, RandGaussianNoised("image", prob=0.5, std=noise))
    validator = Validator(scores)
    stopper = EarlyStopHandler(patience, validator.engine, selection)
    facts = {"selection": selection}
    saver = CheckpointSaver(str(folder / "model.pt"), network, facts, validator.engine, selection, momentum=0.25)
    objects = {"model": network, "optimizer": optimizer, "scheduler": scheduler, "saver": saver}
    schedule = LrScheduleHandler(scheduler, print_lr=False)
    handlers = [EpochSeeder(seed, dataset), GradientClipper(max_norm), stopper, saver, validator, schedule]
    items = Dataset([], dataset.transform)
    handlers.append(Resumer(str(folder / "last.pt"), objects, validator.engine, stopper, True, items, settings))
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


def test_clipping_bounds_what_a_fused_optimiser_has_yet_to_unscale():
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0, fused=True), torch.GradScaler("cpu", init_scale=1024.0)
    GradientClipper(max_norm=1.0)._hook(SimpleNamespace(optimizer=optimizer))
    scaler.scale((weight * torch.tensor([30.0, 40.0])).sum()).backward()
    scaler.step(optimizer)
    assert weight.tolist() == pytest.approx([-0.6, -0.8])


def test_progress_bar_covers_all_epochs(tmp_path, capsys):
    trainer, _, validator = build(tmp_path, 3)
    ProgressBar("fold 0", lambda output: output[0]["loss"], validator.engine).attach(trainer)
    trainer.run()
    shown = capsys.readouterr().err
    assert "fold 0: 100%" in shown and "12/12" in shown and "epoch=3/3" in shown and "best=0.1" in shown


@pytest.mark.parametrize("selection", ["paper", "last"])
def test_training_that_was_stopped_leaves_the_checkpoint_of_one_that_was_not(tmp_path, selection):
    scores = [0.2, 0.9, 0.3, 0.4, 0.1]
    weights_after(tmp_path / "straight", 5, scores, selection=selection)
    trainer, _, _ = build(tmp_path / "killed", 5, scores, stop_in_epoch=4, selection=selection)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    weights_after(tmp_path / "killed", 5, scores, selection=selection)
    ours, theirs = (read_checkpoint(tmp_path / name / "model.pt") for name in ("killed", "straight"))
    assert ours[1] == theirs[1] == {"selection": selection}
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])


def test_the_last_epoch_is_not_chosen_by_any_score(tmp_path):
    falling, rising = [0.9, 0.5, 0.1, 0.0], [0.0, 0.1, 0.5, 0.9]
    for name, scores in (("falling", falling), ("rising", rising)):
        trainer, _, _ = build(tmp_path / name, 4, scores, patience=1, selection="last")
        trainer.run()
        assert trainer.state.epoch == 4
    ours, theirs = (read_checkpoint(tmp_path / name / "model.pt")[0] for name in ("falling", "rising"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def saved_weight(path):
    return read_checkpoint(path)[0]["weight"].item()


def test_a_running_average_is_saved_after_each_epoch_from_the_first_candidate_on(tmp_path):
    network, path = nn.Conv3d(1, 1, 1, bias=False), tmp_path / "model.pt"
    steps = iter([5.0, 7.0, 1.0, 1.0, 3.0, 3.0])
    engine = Engine(lambda engine, batch: nn.init.constant_(network.weight, next(steps)))
    saver = CheckpointSaver(str(path), network, {"fold": 2}, Engine(print), "last", momentum=0.25, after=1)
    saver.attach(engine)
    saved = []
    record = lambda: saved.append(saved_weight(path) if path.exists() else None)  # noqa: E731
    engine.add_event_handler(Events.EPOCH_COMPLETED, record)
    engine.run([0, 0], max_epochs=3)
    second = 7 * 0.75**2 + 1 - 0.75**2
    assert saved == [None, pytest.approx(second), pytest.approx(second * 0.75**2 + 3 * (1 - 0.75**2))]
    assert read_checkpoint(path)[1] == {"fold": 2} and network.weight.item() == 3.0


def test_a_share_of_one_saves_the_last_epoch_itself(tmp_path):
    network = nn.Conv3d(1, 1, 1, bias=False)
    steps = iter([5.0, 7.0])
    engine = Engine(lambda engine, batch: nn.init.constant_(network.weight, next(steps)))
    CheckpointSaver(str(tmp_path / "model.pt"), network, {}, Engine(print), "last").attach(engine)
    engine.run([0], max_epochs=2)
    assert saved_weight(tmp_path / "model.pt") == 7.0


def test_weights_that_are_loaded_when_training_starts_are_where_the_average_starts(tmp_path):
    network = nn.Conv3d(1, 1, 1, bias=False)
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.STARTED, lambda: nn.init.constant_(network.weight, 4.0))
    CheckpointSaver(str(tmp_path / "model.pt"), network, {}, Engine(print), "last", 0.01).attach(engine)
    engine.run([0], max_epochs=1)
    assert saved_weight(tmp_path / "model.pt") == pytest.approx(4.0)


class CountingEvaluator(Evaluator):
    def __init__(self):
        self.epochs = []

    def run(self, global_epoch=1):
        self.epochs.append(global_epoch)


def test_epochs_that_are_no_candidates_are_not_validated():
    """While only the tokeniser learns, CorrDiff changes nothing: such an epoch has the backbone's score."""
    validator, trainer = CountingEvaluator(), Engine(lambda engine, batch: None)
    ValidationHandler(validator, interval=2, after=3).attach(trainer)
    trainer.run([0], max_epochs=8)
    assert validator.epochs == [4, 6, 8]


def subjects(count):
    return [{"subject": f"s{n:02}", "label_source": "x", "has_et": n % 2 == 0} for n in range(count)]


def names(items):
    return {item["subject"] for item in items}


def test_inner_selection_sets_a_seeded_part_of_the_training_subjects_aside():
    training, held_out = subjects(20), [{"subject": "held out"}]
    rule = Selection("inner", num_folds=5, seed=1)
    kept, chosen_on = rule.training(training), rule.validation(training, held_out)
    assert len(chosen_on) == 4 and {item["has_et"] for item in chosen_on} == {True, False}
    assert names(kept) | names(chosen_on) == names(training) and not names(kept) & names(chosen_on)
    assert names(rule.training(training[::-1])) == names(kept)
    assert names(Selection("inner", seed=2).validation(training, held_out)) != names(chosen_on)
    assert rule.seen(kept, chosen_on) == sorted(names(training))


@pytest.mark.parametrize("name", ["paper", "last"])
def test_other_rules_train_on_all_and_validate_on_the_fold_left_out(name):
    training, held_out, rule = subjects(20), [{"subject": "held out"}], Selection(name)
    assert rule.training(training) == training and rule.validation(training, held_out) == held_out
    assert rule.seen(training, held_out) == sorted(names(training))


def test_what_the_weights_before_have_seen_counts_as_seen(tmp_path):
    save_atomically({"model": {}, "provenance": {"trained_on": ["s00", "held out"]}}, tmp_path / "model.pt")
    assert Selection("last").seen(subjects(2), [], str(tmp_path / "model.pt")) == ["held out", "s00", "s01"]


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="no selection 'best': choose one of paper, inner, last"):
        Selection("best")
    with pytest.raises(UserError, match="leaves none of 1 subjects to train on"):
        Selection("inner").training(subjects(1))


def test_training_does_not_go_on_with_other_settings(tmp_path):
    weights_after(tmp_path, 2, learning_rate=1e-4, fold=0)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.0001 instead of 0\.01: .*anew with --resume False"):
        weights_after(tmp_path, 3, learning_rate=1e-2, fold=0)
    with pytest.raises(CheckpointError, match="trained with other transforms: ask for the same again"):
        weights_after(tmp_path, 3, learning_rate=1e-4, fold=0, noise=0.2)
    assert (tmp_path / "model.pt").read_bytes() == before
    trainer, _, _ = build(tmp_path, 3, learning_rate=1e-4, fold=0)
    trainer.run()
    assert trainer.state.iteration == 12


def test_training_with_no_epoch_left_says_so_and_more_epochs_are_trained(tmp_path, caplog):
    weights_after(tmp_path, 2)
    with caplog.at_level(logging.WARNING, "comnet"):
        weights_after(tmp_path, 2)
    assert "has 2 epochs already: nothing is trained" in caplog.text and "--max_epochs" in caplog.text
    caplog.clear()
    trainer, _, _ = build(tmp_path, 4)
    trainer.run()
    assert trainer.state.iteration == 16 and not caplog.text


def test_training_that_was_stopped_early_says_so_and_more_patience_goes_on(tmp_path, caplog):
    scores = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    weights_after(tmp_path, 3, scores, patience=1)
    with caplog.at_level(logging.WARNING, "comnet"):
        weights_after(tmp_path, 6, scores, patience=1)
    assert "early stopping ended this training after epoch 2" in caplog.text and "--patience" in caplog.text
    trainer, _, _ = build(tmp_path, 6, scores, patience=9)
    trainer.run()
    assert trainer.state.epoch == 6


def test_state_that_0_1_0_left_goes_on(tmp_path):
    """It has no settings, and its saver kept the best score by itself."""
    weights_after(tmp_path, 2)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["settings"]
    torch.save(state | {"saver": {"_saved": [(0.1, "model.pt")]}}, tmp_path / "last.pt")
    trainer, _, _ = build(tmp_path, 3)
    trainer.run()
    assert trainer.state.iteration == 12
