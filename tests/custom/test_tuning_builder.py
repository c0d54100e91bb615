from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from torch import nn
from tuning_grid import GRID, NO_FILL, THRESHOLDS, VOLUMES

from custom.comnet import CoMNeT
from custom.tuning import EnsembleBuilder, OutOfFoldDice
from custom.weights import (
    CheckpointError,
    Weights,
    fold_checkpoint,
    read_checkpoint,
    save_atomically,
)

FOLDS = 3
NAMES = ("a", "b", "c", "d", "e", "f")


class Shift(nn.Module):
    """A corrector that adds a constant to each region's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(3))

    def forward(self, image, coarse):
        return coarse + self.alpha.view(1, 3, 1, 1, 1)


def network(num_folds: int = FOLDS) -> CoMNeT:
    return CoMNeT(lambda: nn.Conv3d(4, 3, 1), num_folds, Shift())


class Subjects(Dataset):
    """Subjects made of arrays on disk; `broken` cannot be read."""

    def __init__(self, folder, broken: str = "") -> None:
        self.broken = broken
        self.read: list[str] = []
        items = [{"subject": name, "fold": number % FOLDS, "palette": "brats2021"} for number, name in enumerate(NAMES)]
        super().__init__([{**item, **write_subject(folder, item["subject"])} for item in items])

    def __getitem__(self, index):
        item = self.data[index]
        if item["subject"] == self.broken:
            raise RuntimeError("applying transform") from ValueError("flair.nii.gz is truncated")
        self.read.append(item["subject"])
        arrays = {name: torch.from_numpy(np.load(item[name])) for name in ("coarse", "label")}
        return {**item, **arrays, "image": torch.ones(4, *arrays["label"].shape[1:])}


def write_subject(folder, name: str) -> dict[str, str]:
    """A cube: ET missed by a little, TC found with a halo just below the threshold, WT below the default threshold."""
    label = np.zeros((3, 12, 12, 12), dtype=np.uint8)
    label[:, 3:9, 3:9, 3:9] = 1
    coarse = np.full(label.shape, -9.0, dtype=np.float32)
    coarse[1, 2:10, 2:10, 2:10] = -1.0
    for region, logit in enumerate((-1.0, 5.0, -0.4)):
        coarse[region][label[region] > 0] = logit
    paths = {"coarse": str(folder / f"{name}-key.npy"), "label": str(folder / f"{name}-label.npy")}
    if not (folder / f"{name}-key.npy").exists():
        np.save(paths["coarse"], coarse)
        np.save(paths["label"], label)
    return paths


def to_probabilities(subject):
    return {**subject, "pred": MetaTensor(subject["pred"].sigmoid(), affine=torch.eye(4))}


@pytest.fixture
def run_dir(tmp_path):
    """Backbones and correctors of three folds, in which ET and TC are shifted up."""
    for fold in range(FOLDS):
        torch.manual_seed(fold)
        whole = network(1)
        nn.init.constant_(whole.corrector.alpha, 3.0)
        whole.corrector.alpha.data[2] = 0.0
        facts = {"backbone": "conv", "spacing": [1.0, 1.0, 1.0], "notes": "toy", "selection": "last"}
        facts["drop_modalities_prob"] = 0.25 + fold
        facts["trained_on"] = [name for number, name in enumerate(NAMES) if number % FOLDS != fold]
        write(tmp_path / "mednext", fold, whole.backbones[0], facts)
        write(tmp_path / "comnet", fold, whole, facts | {"corrector": "shift"})
    return tmp_path


def write(folder, fold, module, facts) -> None:
    save_atomically({"model": module.state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))


def builder(run_dir, dataset=None, **options) -> EnsembleBuilder:
    facts = {"backbone": "conv", "corrector": "shift", "spacing": [1.0] * 3, "refine_each_fold": False, "notes": ""}
    settings = {
        "correctors_dir": str(run_dir / "comnet"),
        "try_thresholds": THRESHOLDS,
        "try_volumes_mm3": VOLUMES,
        "fill_holes": NO_FILL,
        "provenance": facts,
    }
    settings |= {"backbones_dir": str(run_dir / "mednext"), "models_dir": str(run_dir / "ensemble")}
    dataset = Subjects(run_dir) if dataset is None else dataset
    return EnsembleBuilder(network(), dataset, to_probabilities, **(settings | options))


def test_what_helps_is_kept_and_what_harms_is_left_out(run_dir):
    builder(run_dir).run()
    tuning = json.loads((run_dir / "ensemble" / "tuning.json").read_text())
    et, tc, wt = (tuning["regions"][region] for region in ("ET", "TC", "WT"))
    assert (tuning["num_subjects"], tuning["convention"], tuning["selection"]) == (6, "brats", "last")
    assert et["refine"] and (et["dice_coarse"], et["dice_refined"], et["difference"]) == (0, 1, 1)
    halo = 2 * 6**3 / (6**3 + 8**3)
    assert not tc["refine"] and tc["dice_refined"] == pytest.approx(halo, abs=1e-6) and tc["dice_coarse"] == 1
    assert tc["interval"] == pytest.approx([halo - 1, halo - 1], abs=1e-6)
    assert not et["adopted"] and not tc["adopted"] and et["threshold"] == tc["threshold"] == 0.5
    assert wt["adopted"] and (wt["threshold"], wt["min_volume_mm3"]) == (0.4, 50.0)
    assert (wt["dice_default"], wt["dice_tuned"]) == (0, 1)


@pytest.mark.parametrize("rule", ["paper", None])
def test_no_interval_where_a_part_was_selected_on_these_subjects(run_dir, rule):
    state, facts = read_checkpoint(fold_checkpoint(run_dir / "comnet", 0))
    facts = {key: value for key, value in facts.items() if key != "selection"} | ({"selection": rule} if rule else {})
    save_atomically({"model": state, "provenance": facts}, fold_checkpoint(run_dir / "comnet", 0))
    builder(run_dir).run()
    tuning = json.loads((run_dir / "ensemble" / "tuning.json").read_text())
    assert tuning["selection"] == read_checkpoint(run_dir / "ensemble" / "model.pt")[1]["selection"] == "paper"
    assert tuning["regions"]["ET"]["difference"] == 1
    assert all(
        one["interval"] == [None, None] and "interval" not in one["reason"] for one in tuning["regions"].values()
    )


def test_one_file_holds_all_parts_and_says_what_it_is(run_dir):
    builder(run_dir, corrector_fold=1).run()
    state, facts = read_checkpoint(run_dir / "ensemble" / "model.pt")
    for fold in range(FOLDS):
        for name, value in read_checkpoint(fold_checkpoint(run_dir / "mednext", fold))[0].items():
            assert torch.equal(state[f"backbones.{fold}.{name}"], value)
    assert state["corrector.alpha"].tolist() == [3.0, 3.0, 0.0] and len(state) == 2 * FOLDS + 1
    assert facts["trained_on"] == sorted(NAMES) and facts["notes"] == "toy" and facts["corrector_fold"] == 1
    assert len(set(facts["backbones_sha256"])) == FOLDS and len(facts["corrector_sha256"]) == 64
    assert Weights(run_dir / "ensemble").tuned == {
        "thresholds": [0.5, 0.5, 0.4],
        "min_volume_mm3": [50.0] * 3,
        "refine_regions": [True, False, False],
    }
    described = Weights(run_dir / "ensemble")
    assert described.facts["num_folds"] == FOLDS and described.trained_on == set(NAMES)
    assert described.facts["drop_modalities_prob"] == 0.25 and described.missing_dice == {}


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_correctors_nothing_is_refined(run_dir, nothing):
    builder(run_dir, correctors_dir=nothing).run()
    state, facts = read_checkpoint(run_dir / "ensemble" / "model.pt")
    assert not state["corrector.alpha"].any() and facts["corrector_sha256"] is None
    assert facts["refine_regions"] == [False] * 3
    et = json.loads((run_dir / "ensemble" / "tuning.json").read_text())["regions"]["ET"]
    assert et["reason"].startswith("There is no corrector") and et["difference"] == 0
    assert et["dice_coarse"] == et["dice_refined"] == 0


def test_without_tuning_no_subject_is_read(run_dir):
    dataset = Subjects(run_dir)
    builder(run_dir, dataset, tune=False).run()
    assert dataset.read == []
    assert Weights(run_dir / "ensemble").tuned["refine_regions"] == [True] * 3
    tuning = json.loads((run_dir / "ensemble" / "tuning.json").read_text())
    assert tuning["num_subjects"] == 0 and tuning["regions"]["ET"]["dice_coarse"] is None
    assert tuning["regions"]["ET"]["interval"] == [None, None]


def test_a_stopped_run_goes_on_and_gives_the_same(run_dir):
    dataset = Subjects(run_dir, broken="b")
    with pytest.raises(ValueError, match=r"subject b cannot be read for tuning: flair.nii.gz is truncated"):
        builder(run_dir, dataset).run()
    assert dataset.read == ["a", "d"] and not (run_dir / "ensemble" / "model.pt").exists()
    mended = Subjects(run_dir)
    builder(run_dir, mended).run()
    assert mended.read == ["b", "e", "c", "f"]
    first = (run_dir / "ensemble" / "tuning.json").read_text()
    again = Subjects(run_dir)
    builder(run_dir, again).run()
    assert again.read == [] and (run_dir / "ensemble" / "tuning.json").read_text() == first
    builder(run_dir, Subjects(run_dir), models_dir=str(run_dir / "other")).run()
    assert (run_dir / "other" / "tuning.json").read_text() == first


def test_only_what_has_changed_is_measured_again(run_dir):
    builder(run_dir).run()
    path = fold_checkpoint(run_dir / "comnet", 2)
    state, facts = read_checkpoint(path)
    save_atomically({"model": state | {"corrector.alpha": torch.ones(3)}, "provenance": facts}, path)
    dataset = Subjects(run_dir)
    builder(run_dir, dataset).run()
    assert dataset.read == ["c", "f"]
    dataset = Subjects(run_dir)
    builder(run_dir, dataset, try_thresholds=(0.5,)).run()
    assert sorted(dataset.read) == sorted(NAMES)


def test_parts_that_do_not_belong_together_are_refused(run_dir):
    with pytest.raises(CheckpointError, match=r"fold0.model.pt was trained with spacing \[1.0, .*set spacing to that"):
        builder(run_dir, provenance={"spacing": [2.0, 2.0, 2.0]}).run()
    write(run_dir / "mednext", 1, nn.Conv3d(4, 3, 1), {})
    with pytest.raises(
        CheckpointError, match=r"comnet.fold1.model.pt was trained with another backbone than .*mednext"
    ):
        builder(run_dir).run()
    fold_checkpoint(run_dir / "comnet", 2).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*comnet.fold2|another backbone"):
        builder(run_dir).run()
    assert not (run_dir / "ensemble").exists()


def test_a_corrector_is_not_judged_on_its_own_training_subjects(run_dir):
    state, facts = read_checkpoint(fold_checkpoint(run_dir / "comnet", 1))
    leaking = {"model": state, "provenance": facts | {"trained_on": [*facts["trained_on"], "e"]}}
    save_atomically(leaking, fold_checkpoint(run_dir / "comnet", 1))
    with pytest.raises(CheckpointError, match=r"corrector of fold 1 was trained on subject e"):
        builder(run_dir).run()


def test_a_missing_corrector_is_named(run_dir):
    scores = OutOfFoldDice(Subjects(run_dir), to_probabilities, GRID, run_dir / "cache", Shift(), run_dir / "absent")
    with pytest.raises(CheckpointError, match=r"no corrector at .*absent.fold0.model.pt: train fold 0 of comnet_corr"):
        scores.measure()


def test_a_network_that_returns_nan_is_named(run_dir):
    path = fold_checkpoint(run_dir / "comnet", 0)
    state, facts = read_checkpoint(path)
    save_atomically({"model": state | {"corrector.alpha": torch.full((3,), torch.nan)}, "provenance": facts}, path)
    with pytest.raises(ValueError, match=r"subject a: a network returned NaN"):
        builder(run_dir).run()


def test_what_cannot_be_built_is_refused(run_dir):
    with pytest.raises(ValueError, match="network has no corrector"):
        bare = CoMNeT(lambda: nn.Conv3d(4, 3, 1), FOLDS)
        EnsembleBuilder(bare, Subjects(run_dir), to_probabilities, "", "", {}, correctors_dir="somewhere")
    with pytest.raises(ValueError, match="max_epochs is 50: .*one pass"):
        builder(run_dir, max_epochs=50)
    with pytest.raises(ValueError, match="no subject to tune on"):
        empty = Subjects(run_dir)
        empty.data = []
        builder(run_dir, empty).run()
