from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from torch import nn

from custom.checkpoints import CheckpointError, Provenance, read_checkpoint, save_atomically
from custom.comnet import CoMNeT
from custom.postprocess import PostprocessRegions
from custom.tuning import EnsembleBuilder, Grid, OutOfFoldDice, best_settings, choose, cross_fit, score_region
from custom.weights import describe_weights, fold_checkpoint, tuned_settings

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
VOLUMES = (0.0, 50.0, 400.0)
FOLDS = 3
NAMES = ("a", "b", "c", "d", "e", "f")
NO_FILL = (False, False, False)
GRID = Grid.of(THRESHOLDS, VOLUMES, NO_FILL)


def dice(ours, theirs) -> float:
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())


def blobs(seed: int, shape=(24, 26, 22)) -> np.ndarray:
    """Random probabilities with components of all sizes, and a hollow box with an island in its hole."""
    noise = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(noise, 3, 1, 1).numpy()[0, 0]
    ranks = smooth.ravel().argsort().argsort().reshape(shape) / smooth.size
    probability = (ranks**8).astype(np.float32)
    for margin, value in ((4, 0.1), (5, 0.65), (7, 0.1), (9, 0.55)):
        probability[(slice(margin, -margin),) * 3] = value
    return probability


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("size", [1.0, 2.5])
def test_each_cell_of_the_grid_is_what_postprocessing_gives(fill, size):
    probability, truth = blobs(0), blobs(1) > 0.35
    volumes = [0.0, 20.0, 50.0, 200.0]
    scores = Grid.of(THRESHOLDS, volumes, (fill,) * 3).score(
        np.stack([probability] * 3), np.stack([truth] * 3), size**3
    )
    alone = MetaTensor(torch.stack([torch.zeros(truth.shape)] * 2 + [torch.tensor(probability)]))
    alone.affine = torch.diag(torch.tensor([size, size, size, 1.0]))
    assert len(np.unique(scores[2])) > 10
    for row, threshold in enumerate(THRESHOLDS):
        for column, volume in enumerate(volumes):
            mask = np.asarray(PostprocessRegions(threshold, volume, fill)(alone)[0]) > 0
            assert scores[2, row, column] == pytest.approx(dice(mask, truth), abs=1e-12)


def test_empty_regions_count_as_in_brats():
    nothing, speck = np.zeros((9, 9, 9), dtype=bool), np.zeros((9, 9, 9), dtype=np.float32)
    speck[2:5, 2:5, 2:5] = 0.45
    scores = score_region(speck, nothing, THRESHOLDS, (0, 27, 28), fill=False)
    assert scores.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert score_region(np.zeros_like(speck), nothing, THRESHOLDS, (0,), True).tolist() == [[1]] * 5
    assert score_region(np.zeros_like(speck), speck > 0, THRESHOLDS, (0,), True).tolist() == [[0]] * 5
    assert score_region(speck, speck > 0, (0.4, 0.5), (0, 28), True).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("thresholds", "volumes", "holes", "match"),
    [
        ((0.4, 0.6), VOLUMES, NO_FILL, r"defaults, threshold 0.5 and 50 mm³, must be among"),
        (THRESHOLDS, (0.0, 100.0), NO_FILL, r"defaults"),
        ((0.5, 1.0), VOLUMES, NO_FILL, r"cannot try thresholds \[0.5, 1.0\]"),
        (THRESHOLDS, (-1.0, 50.0), NO_FILL, r"volumes from 0 on"),
        (THRESHOLDS, (), NO_FILL, r"volumes from 0 on"),
        (THRESHOLDS, VOLUMES, (True, False), r"fill_holes is \[True, False\]"),
    ],
)
def test_grids_that_cannot_be_tried_are_refused(thresholds, volumes, holes, match):
    with pytest.raises(ValueError, match=match):
        Grid.of(thresholds, volumes, holes)


def table(by_threshold) -> np.ndarray:
    """Dice [subjects, T, 1] from one row a subject."""
    return np.asarray(by_threshold, dtype=float)[..., None]


ONE_VOLUME = Grid.of((0.4, 0.5, 0.6), (50.0,), NO_FILL)
LASTING = table([[0.8, 0.5, 0.2]] * 3)
PASSING = table([[1.0, 0.6, 0.0], [0.4, 0.6, 0.0], [0.5, 0.6, 0.0]])


def all_regions(dice_of_one: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([dice_of_one] * 2, axis=1)] * 3, axis=1)


def test_cross_fitting_scores_each_fold_with_what_the_others_chose():
    assert cross_fit(LASTING, [0, 1, 2], ONE_VOLUME) == pytest.approx(0.8)
    assert best_settings(PASSING, ONE_VOLUME) == (0, 0)
    assert cross_fit(PASSING, [0, 1, 2], ONE_VOLUME) == pytest.approx((0.6 + 0.4 + 0.5) / 3)
    assert cross_fit(LASTING, [4, 4, 4], ONE_VOLUME) is None


def test_subjects_of_one_fold_are_held_out_together():
    scores = table([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [0.0, 0.5, 0.9]])
    assert cross_fit(scores, [0, 0, 1], ONE_VOLUME) == pytest.approx((0.0 + 0.0 + 0.0) / 3)
    assert cross_fit(scores, [0, 1, 2], ONE_VOLUME) == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_of_equal_settings_the_one_nearest_to_the_defaults_is_taken():
    scores = np.full((2, len(THRESHOLDS), len(VOLUMES)), 0.7)
    assert best_settings(scores, GRID) == GRID.default == (2, 1)
    scores[:, 2] = 0.1
    assert best_settings(scores, GRID) == (1, 1)
    assert best_settings(scores[:, ::-1] + np.eye(5, 3) * 1e-12, GRID) == (1, 1)


def test_a_gain_that_lasts_is_adopted_and_one_that_does_not_is_not():
    lasting = choose(all_regions(LASTING), [0, 1, 2], ONE_VOLUME)["ET"]
    assert lasting.adopted and lasting.threshold == 0.4 and lasting.dice_tuned == pytest.approx(0.8)
    assert lasting.dice_default == 0.5 and "threshold 0.4" in lasting.reason and "are adopted" in lasting.reason
    passing = choose(all_regions(PASSING), [0, 1, 2], ONE_VOLUME)["TC"]
    assert not passing.adopted and passing.threshold == 0.5 and passing.min_volume_mm3 == 50.0
    assert passing.dice_tuned < passing.dice_default == pytest.approx(0.6)
    assert "does not hold on held-out subjects" in passing.reason


def test_one_fold_and_one_setting_leave_the_defaults():
    alone = choose(all_regions(LASTING), [0, 0, 0], ONE_VOLUME)["WT"]
    assert not alone.adopted and alone.dice_tuned is None and "one fold" in alone.reason
    single = Grid.of((0.5,), (50.0,), NO_FILL)
    fixed = choose(all_regions(table([[0.3], [0.4]])), [0, 1], single)["WT"]
    assert not fixed.adopted and "no other threshold" in fixed.reason and fixed.dice_tuned == pytest.approx(0.35)


def test_refinement_is_judged_at_the_default_settings_with_an_interval():
    scores = all_regions(table([[0.9, 0.5, 0.1]] * 8))
    gains = np.linspace(0.01, 0.08, 8)
    scores[:, 0, 1, 1, 0] += gains
    scores[:, 1, 1, 1, 0] -= gains
    scores[:, 2, 1, 0, 0] = 1.0
    found = choose(scores, list(range(8)), ONE_VOLUME)
    assert [found[region].refine for region in ("ET", "TC", "WT")] == [True, False, False]
    assert found["ET"].difference == pytest.approx(0.045) and found["TC"].difference == pytest.approx(-0.045)
    low, high = found["ET"].interval
    assert 0.02 < low < 0.045 < high < 0.07
    assert "raises mean Dice by 0.0450" in found["ET"].reason and "chance" not in found["ET"].reason
    assert "does not change" in found["WT"].reason
    scores[0, 0, 1, 1, 0] = 0.25
    assert "so it may be chance) and is kept" in choose(scores, list(range(8)), ONE_VOLUME)["ET"].reason


def test_threshold_and_size_are_chosen_on_the_maps_that_are_used():
    scores = all_regions(LASTING)
    scores[:, 0, 1] = table([[0.1, 0.6, 0.9]] * 3)
    scores[:, 1, 1] = table([[0.1, 0.4, 0.9]] * 3)
    found = choose(scores, [0, 1, 2], ONE_VOLUME)
    assert found["ET"].refine and (found["ET"].threshold, found["ET"].dice_tuned) == (0.6, pytest.approx(0.9))
    assert found["ET"].dice_default == pytest.approx(0.6)
    assert not found["TC"].refine and (found["TC"].threshold, found["TC"].dice_tuned) == (0.4, pytest.approx(0.8))


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
        facts = {"backbone": "conv", "spacing": [1.0, 1.0, 1.0], "notes": "toy"}
        facts["trained_on"] = [name for number, name in enumerate(NAMES) if number % FOLDS != fold]
        write(tmp_path / "mednext", fold, whole.backbones[0], facts)
        write(tmp_path / "comnet", fold, whole, facts | {"corrector": "shift"})
    return tmp_path


def write(folder, fold, module, facts) -> None:
    save_atomically({"model": module.state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))


def builder(run_dir, dataset=None, **options) -> EnsembleBuilder:
    facts = Provenance(backbone="conv", corrector="shift", spacing=[1.0, 1.0, 1.0], refine_each_fold=False, notes="")
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
    assert (tuning["num_subjects"], tuning["convention"]) == (6, "brats")
    assert et["refine"] and (et["dice_coarse"], et["dice_refined"], et["difference"]) == (0, 1, 1)
    halo = 2 * 6**3 / (6**3 + 8**3)
    assert not tc["refine"] and tc["dice_refined"] == pytest.approx(halo, abs=1e-6) and tc["dice_coarse"] == 1
    assert tc["interval"] == pytest.approx([halo - 1, halo - 1], abs=1e-6)
    assert not et["adopted"] and not tc["adopted"] and et["threshold"] == tc["threshold"] == 0.5
    assert wt["adopted"] and (wt["threshold"], wt["min_volume_mm3"]) == (0.4, 50.0)
    assert (wt["dice_default"], wt["dice_tuned"]) == (0, 1)


def test_one_file_holds_all_parts_and_says_what_it_is(run_dir):
    builder(run_dir, corrector_fold=1).run()
    state, facts = read_checkpoint(run_dir / "ensemble" / "model.pt")
    for fold in range(FOLDS):
        for name, value in read_checkpoint(fold_checkpoint(run_dir / "mednext", fold))[0].items():
            assert torch.equal(state[f"backbones.{fold}.{name}"], value)
    assert state["corrector.alpha"].tolist() == [3.0, 3.0, 0.0] and len(state) == 2 * FOLDS + 1
    assert facts["trained_on"] == sorted(NAMES) and facts["notes"] == "toy" and facts["corrector_fold"] == 1
    assert len(set(facts["backbones_sha256"])) == FOLDS and len(facts["corrector_sha256"]) == 64
    assert tuned_settings(run_dir / "ensemble") == {
        "thresholds": [0.5, 0.5, 0.4],
        "min_volume_mm3": [50.0] * 3,
        "refine_regions": [True, False, False],
    }
    described = describe_weights(run_dir / "ensemble")
    assert described.facts["num_folds"] == FOLDS and described.trained_on == set(NAMES)


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
    assert tuned_settings(run_dir / "ensemble")["refine_regions"] == [True] * 3
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
        builder(run_dir, provenance=Provenance(spacing=[2.0, 2.0, 2.0])).run()
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
        EnsembleBuilder(bare, Subjects(run_dir), to_probabilities, "", "", Provenance(), correctors_dir="somewhere")
    with pytest.raises(ValueError, match="max_epochs is 50: .*one pass"):
        builder(run_dir, max_epochs=50)
    with pytest.raises(ValueError, match="no subject to tune on"):
        empty = Subjects(run_dir)
        empty.data = []
        builder(run_dir, empty).run()
