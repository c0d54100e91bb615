"""What resuming looks at before it goes on, and publishing. Exactness is tested in test_training_handlers.py."""

from __future__ import annotations

import logging

import pytest
from ignite.engine import Engine
from monai.data import Dataset
from torch import nn

from custom.training import Publisher, Resumer, subjects_digest


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
