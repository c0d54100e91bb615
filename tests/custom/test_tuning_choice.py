from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from tuning_grid import GRID, NO_FILL, THRESHOLDS, VOLUMES

from custom.inference import PostprocessRegions
from custom.tuning import Grid, best_settings, choose, cross_fit, score_region


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
    touched = choose(scores, list(range(8)), ONE_VOLUME, confidence=None)["ET"]
    assert touched.refine and touched.difference == found["ET"].difference and touched.interval == (None, None)
    assert "raises mean Dice by 0.0450 and is kept" in touched.reason and "interval" not in touched.reason
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
