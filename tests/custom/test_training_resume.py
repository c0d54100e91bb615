"""What resuming looks at before it goes on, and publishing. Exactness is tested in test_training_handlers.py."""

from __future__ import annotations

import logging

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.handlers import LrScheduleHandler
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from custom.files import UserError
from custom.training import CheckpointSaver, ProgressBar, Publisher, Resumer, subjects_digest
from custom.training.handlers import plain
from custom.transforms import RandTorchIOd
from custom.weights import read_checkpoint


@pytest.fixture
def items(tmp_path):
    for name in ("a_seg", "b_seg"):
        (tmp_path / name).write_text(name)
    return [
        {"image": ["x/a_t1n", "x/a_t1c"], "label": str(tmp_path / "a_seg")},
        {"image": "y/b.nii.gz", "label": str(tmp_path / "b_seg")},
    ]


def test_digest_knows_names_labels_and_order_but_no_folders(items, tmp_path):
    digest = subjects_digest(items)
    moved = [items[0] | {"image": ["z/a_t1n", "z/a_t1c"]}, items[1]]
    assert subjects_digest(moved) == digest
    assert subjects_digest(items[::-1]) != digest and subjects_digest(items[:1]) != digest
    (tmp_path / "b_seg").write_text("mended")
    assert subjects_digest(items) != digest


def trained(path, items, weight=None):
    """Restore a network of one weight, set it if told, and save it after an epoch; return what was restored."""
    network, engine = nn.Linear(1, 1, bias=False), Engine(lambda engine, batch: None)
    nn.init.zeros_(network.weight)
    resumer = Resumer(str(path), {"model": network}, dataset=Dataset(items))
    engine.state.epoch = 0
    resumer.restore(engine)
    restored = network.weight.item(), engine.state.epoch
    if weight is not None:
        nn.init.constant_(network.weight, weight)
        engine.state.epoch = 5
        resumer.save(engine)
    return restored


def test_other_labels_are_trained_anew_and_the_log_says_so(items, tmp_path, caplog):
    assert trained(tmp_path / "last.pt", items, 3.0) == (0.0, 0)
    assert trained(tmp_path / "last.pt", items) == (3.0, 5)
    (tmp_path / "a_seg").write_text("mended")
    with caplog.at_level(logging.WARNING, "comnet"):
        assert trained(tmp_path / "last.pt", items) == (0.0, 0)
    assert "other subjects or labels" in caplog.text


def test_publishing_replaces_the_copy_and_leaves_it_where_there_is_nothing_new(tmp_path):
    source, target = tmp_path / "fold0" / "model.pt", tmp_path / "model.pt"
    target.write_text("old")
    publisher, engine = Publisher(str(source), str(target)), Engine(lambda engine, batch: None)
    publisher.attach(engine)
    engine.run([0])
    assert target.read_text() == "old"
    source.parent.mkdir()
    source.write_text("new")
    engine.run([0], max_epochs=2)
    assert target.read_text() == "new" and len(list(tmp_path.glob("*.pt"))) == 1


def rates(path, *lengths):
    """Learning rate in each epoch of a training that is asked for so many epochs, one request after the other."""
    found = {}
    for epochs in lengths:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        schedule = WarmupCosineSchedule(optimizer, warmup_steps=2, warmup_multiplier=0.1, t_total=epochs)
        engine = Engine(lambda engine, batch, optimizer=optimizer: optimizer.step())

        def note(engine, optimizer=optimizer):
            found[engine.state.epoch] = optimizer.param_groups[0]["lr"]

        engine.add_event_handler(Events.EPOCH_STARTED, note)
        LrScheduleHandler(schedule, print_lr=False).attach(engine)
        Resumer(str(path), {"optimizer": optimizer, "lr_scheduler": schedule}).attach(engine)
        engine.run([0], max_epochs=epochs)
    return found


def test_more_epochs_go_on_by_the_longer_schedule(tmp_path):
    whole = rates(tmp_path / "whole.pt", 9)
    longer = rates(tmp_path / "last.pt", 4, 9)
    assert [longer[epoch] for epoch in range(5, 10)] == pytest.approx([whole[epoch] for epoch in range(5, 10)])
    assert rates(tmp_path / "last.pt", 9) == {}


def test_the_scale_of_mixed_precision_goes_on(tmp_path):
    def engine():
        made = Engine(lambda engine, batch: None)
        made.scaler = torch.amp.GradScaler("cpu")
        Resumer(str(tmp_path / "last.pt"), {}).attach(made)
        return made

    first, second = engine(), engine()
    first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7})
    first.run([0], max_epochs=1)
    second.run([0], max_epochs=2)
    assert second.scaler.get_scale() == 128.0 and second.scaler.state_dict()["_growth_tracker"] == 7


def test_the_bar_goes_on_from_where_training_goes_on(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, initial, **_):
            bars.append((total, initial))
            self.n = initial

        def set_postfix(self, *_, **__): ...
        def update(self, count):
            bars.append(count)
            self.n += count

        def close(self): ...

    monkeypatch.setattr("tqdm.tqdm", Bar)
    for epochs in (2, 3):
        engine = Engine(lambda engine, batch: None)
        ProgressBar("fold 0").attach(engine)
        Resumer(str(tmp_path / "last.pt"), {}).attach(engine)
        engine.run([0, 0], max_epochs=epochs)
    assert bars == [(4, 0), 1, 1, 1, 1, (6, 4), 1, 1]


def test_settings_of_torchio_are_settings():
    affine = {"name": "RandomAffine", "scales": 0.1}
    described = [plain(RandTorchIOd(**affine, degrees=degrees)) for degrees in (10, 10, 45)]
    assert described[0] == described[1] != described[2]


@pytest.mark.parametrize(
    ("selection", "interval", "after", "refused"),
    [("paper", 6, 0, True), ("inner", 3, 4, True), ("paper", 5, 0, False), ("last", 9, 0, False)],
)
def test_training_that_would_leave_no_checkpoint_does_not_begin(tmp_path, selection, interval, after, refused):
    steps = []
    engine = Engine(lambda engine, batch: steps.append(batch))
    network = nn.Linear(1, 1)
    validator = Engine(lambda engine, batch: None)
    CheckpointSaver(str(tmp_path / "m.pt"), network, {}, validator, selection, interval, after=after).attach(engine)
    if refused:
        with pytest.raises(UserError, match=f"selection '{selection}' .* val_interval {interval} none of 5 is valid"):
            engine.run([0], max_epochs=5)
    else:
        engine.run([0], max_epochs=5)
    assert len(steps) == (0 if refused else 5)


def test_an_average_leaves_what_is_frozen_as_it_is(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(network[1].parameters(), lr=0.1)

    def step(engine, batch):
        optimizer.zero_grad()
        network(torch.ones(1, 64)).sum().backward()
        optimizer.step()

    engine = Engine(step)
    saver = CheckpointSaver(str(tmp_path / "model.pt"), network, {}, Engine(step), "last", momentum=0.005)
    saver.attach(engine)
    engine.run([0] * 25, max_epochs=2)
    saved, _ = read_checkpoint(tmp_path / "model.pt")
    assert torch.equal(saved["0.weight"], network[0].weight)
    assert not torch.equal(saved["1.weight"], network[1].weight)
