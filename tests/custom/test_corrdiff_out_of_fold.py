from __future__ import annotations

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from custom.corrdiff import CoarsePredictions, LoadCoarsed
from custom.weights import CheckpointError, fold_checkpoint, save_atomically


@pytest.fixture
def items(tmp_path):
    """Two subjects of two folds, whose "images" are arrays on disk."""
    result = []
    for fold, name in enumerate(("a", "b")):
        path = tmp_path / f"{name}.npy"
        np.save(path, np.random.default_rng(fold).normal(size=(4, 5, 6, 7)).astype(np.float32))
        result.append({"subject": name, "image": [str(path)], "fold": fold})
    return result


@pytest.fixture
def backbones(tmp_path):
    for fold in range(2):
        torch.manual_seed(fold)
        facts = {"trained_on": ["b" if fold == 0 else "a"], "spacing": [2.0, 2.0, 2.0]}
        save_atomically(
            {"model": nn.Conv3d(4, 3, 1).state_dict(), "provenance": facts}, fold_checkpoint(tmp_path, fold)
        )
    return tmp_path


class Counting:
    """An inferer that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image, network):
        self.calls += 1
        return network(image)


def load(data):
    return {**data, "image": MetaTensor(torch.from_numpy(np.load(data["image"][0])))}


def predictions(items, backbones, **options):
    defaults = {"settings": {"spacing": [2.0, 2.0, 2.0]}, "inferer": Counting(), "cache_dir": str(backbones / "coarse")}
    return CoarsePredictions(items, nn.Conv3d(4, 3, 1), str(backbones), load, **(defaults | options))


def test_processes_share_one_list_even_where_one_of_them_is_late(items, backbones, monkeypatch):
    """The second process lists what is missing; only then may the first write."""
    written = []
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "barrier", lambda: written.append(len(list((backbones / "coarse").glob("*.npy")))))
    predictions(items, backbones).fill()
    assert written == [0, 1]


def expected(item, backbones, fold):
    network = nn.Conv3d(4, 3, 1)
    network.load_state_dict(torch.load(fold_checkpoint(backbones, fold))["model"])
    return network(torch.from_numpy(np.load(item["image"][0]))[None])[0].detach()


@pytest.mark.parametrize("source", ["out_of_fold", "in_fold"])
def test_each_subject_is_predicted_by_the_backbone_of_the_source(items, backbones, source):
    added = predictions(items, backbones, source=source, fold=1).add(items)
    for item in added:
        fold = item["fold"] if source == "out_of_fold" else 1
        coarse = LoadCoarsed("coarse")({"coarse": item["coarse"], "image": torch.zeros(4, 5, 6, 7)})["coarse"]
        assert coarse.dtype == torch.float32
        torch.testing.assert_close(coarse, expected(item, backbones, fold), atol=2e-3, rtol=2e-3)


def test_what_is_there_is_not_predicted_again(items, backbones):
    first = predictions(items, backbones)
    first.add(items[:1])
    assert first.inferer.calls == 1
    second = predictions(items, backbones)
    second.fill()
    assert second.inferer.calls == 1, "only the other subject was missing"
    third = predictions(items, backbones)
    third.fill()
    assert third.inferer.calls == 0


def test_another_backbone_or_setting_or_image_is_another_prediction(items, backbones):
    before = predictions(items, backbones).path(items[0])
    assert predictions(items, backbones, settings={"spacing": [1.0, 1.0, 1.0]}).path(items[0]) != before
    torch.manual_seed(9)
    save_atomically({"model": nn.Conv3d(4, 3, 1).state_dict(), "provenance": {}}, fold_checkpoint(backbones, 0))
    changed = predictions(items, backbones).path(items[0])
    assert changed != before
    np.save(items[0]["image"][0], np.zeros((4, 5, 6, 8), np.float32))
    assert predictions(items, backbones).path(items[0]) != changed


def test_a_backbone_never_predicts_a_subject_it_was_trained_on(items, backbones):
    swapped = [{**item, "fold": 1 - item["fold"]} for item in items]
    with pytest.raises(CheckpointError, match="fold 1 was trained on subject a"):
        predictions(swapped, backbones).fill(swapped[:1])
    predictions(swapped, backbones, source="in_fold", fold=1).fill(swapped[:1])


def test_a_backbone_of_another_spacing_is_refused(items, backbones):
    with pytest.raises(CheckpointError, match=r"trained with spacing \[2.0, 2.0, 2.0\], not \[1.0"):
        predictions(items, backbones, settings={"spacing": [1.0, 1.0, 1.0]}).fill()


def test_a_missing_backbone_is_named(items, backbones):
    fold_checkpoint(backbones, 1).unlink()
    with pytest.raises(CheckpointError, match=r"no backbone at .*fold1.*backbones_dir"):
        predictions(items, backbones).fill()


def test_an_unreadable_subject_is_named_and_leaves_no_file(items, backbones):
    coarse = predictions(items, backbones)
    path = coarse.path(items[0])
    coarse.transform = lambda data: {}[data["subject"]]
    with pytest.raises(ValueError, match="subject a cannot be read"):
        coarse.fill()
    assert not path.exists() and not any((backbones / "coarse").glob(".partial*"))


def test_an_unknown_source_is_refused(items, backbones):
    with pytest.raises(ValueError, match="out_of_fold, in_fold"):
        predictions(items, backbones, source="both")


def test_logits_on_another_grid_are_refused(items, backbones):
    path = predictions(items, backbones).add(items)[0]["coarse"]
    with pytest.raises(ValueError, match="delete that file"):
        LoadCoarsed("coarse")({"coarse": path, "image": torch.zeros(4, 5, 6, 8)})


def test_loaded_logits_keep_the_images_affine(items, backbones):
    path = predictions(items, backbones).add(items)[0]["coarse"]
    image = MetaTensor(torch.zeros(4, 5, 6, 7), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    assert torch.equal(LoadCoarsed("coarse")({"coarse": path, "image": image})["coarse"].affine, image.affine)
