"""Metrics against the paper's formulas and brute force, on every combination of empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.spatial.distance import cdist

from custom.cohort import REGIONS
from custom.metrics import EMPTY_HD95_MM, LESION_SCORES, SCORES, score_subject, summarise

# --- references -----------------------------------------------------------------------------------------------------


def equation_7(prediction: np.ndarray, reference: np.ndarray) -> float:
    true_positive = np.sum(prediction & reference)
    false_positive = np.sum(prediction & ~reference)
    false_negative = np.sum(~prediction & reference)
    return float(2 * true_positive / (2 * true_positive + false_positive + false_negative))


def surface_points(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Voxels of the mask with a face neighbour outside of it, in mm."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(padded)
    for axis in range(3):
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere((padded & ~inside)[1:-1, 1:-1, 1:-1]) * np.array(spacing)


def brute_force_hd95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> float:
    distances = cdist(surface_points(prediction, spacing), surface_points(reference, spacing))
    return float(max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95)))


def blobs(seed: int, shape: tuple[int, int, int] = (16, 14, 12)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, *shape), dtype=bool)
    for mask in masks:
        for _ in range(2):
            corner, size = rng.integers(1, 7, 3), rng.integers(2, 6, 3)
            mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return masks


def cube(corner: tuple[int, int, int], size: int = 6, shape: tuple[int, int, int] = (24, 24, 24)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


def same(masks: np.ndarray) -> np.ndarray:
    return np.stack([masks] * 3)


# --- one subject ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_dice_is_equation_7_and_its_mean_equation_8(seed: int) -> None:
    prediction, reference = blobs(seed), blobs(seed + 50)
    row = score_subject(prediction, reference)
    expected = [equation_7(p, r) for p, r in zip(prediction, reference, strict=True)]
    assert [row[f"{region}_dice"] for region in REGIONS] == pytest.approx(expected)
    assert [row[f"{region}_dice_brats"] for region in REGIONS] == pytest.approx(expected)
    assert row["mean_dice"] == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 4.0)])
@pytest.mark.parametrize("seed", range(3))
def test_hd95_is_that_of_brute_force(seed: int, spacing: tuple[float, ...]) -> None:
    prediction, reference = blobs(seed), blobs(seed + 50)
    row = score_subject(prediction, reference, spacing)
    for region, p, r in zip(REGIONS, prediction, reference, strict=True):
        assert row[f"{region}_hd95"] == pytest.approx(brute_force_hd95(p, r, spacing), rel=1e-5)
        assert row[f"{region}_hd95_brats"] == row[f"{region}_hd95"]


@pytest.mark.parametrize(("shift", "expected"), [((3, 0, 0), 3.0), ((0, 3, 0), 6.0), ((0, 0, 3), 7.5)])
def test_hd95_of_a_shifted_cube_is_the_shift_in_mm(shift: tuple[int, int, int], expected: float) -> None:
    moved = cube(tuple(8 + s for s in shift))
    row = score_subject(same(moved), same(cube((8, 8, 8))), spacing=(1, 2, 2.5))
    assert row["WT_hd95"] == pytest.approx(expected)


def test_hd95_forgives_five_percent_of_the_surface() -> None:
    reference = cube((2, 2, 2), size=10)
    prediction = reference.copy()
    prediction[20, 20, 20] = True
    assert score_subject(same(prediction), same(reference))["WT_hd95"] == 0


def test_surface_dice_grows_with_the_tolerance_from_nothing_to_one() -> None:
    prediction, reference = same(cube((8, 8, 8))), same(cube((8, 8, 10)))
    scores = [score_subject(prediction, reference, (1, 1, 2), t)["TC_nsd"] for t in (0.0, 1.0, 2.1, 4.1)]
    assert scores == sorted(scores)
    assert 0 < scores[0] < scores[2] < 1 and scores[3] == 1
    assert score_subject(prediction, same(cube((16, 16, 16))), tolerance_mm=1)["TC_nsd"] == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 1.1, 3.0)])
def test_cropping_to_the_masks_changes_no_surface_score(spacing: tuple[float, ...]) -> None:
    prediction, reference = (np.pad(blobs(seed), ((0, 0), (0, 9), (6, 0), (3, 11))) for seed in (1, 60))
    row = score_subject(prediction, reference, spacing)
    pair = {"y_pred": torch.from_numpy(prediction)[None], "y": torch.from_numpy(reference)[None]}
    options = {"include_background": True, "spacing": spacing}
    hd95 = compute_hausdorff_distance(**pair, **options, percentile=95)[0]
    nsd = compute_surface_dice(**pair, **options, class_thresholds=[1.0] * 3, use_subvoxels=True)[0]
    assert [row[f"{region}_hd95"] for region in REGIONS] == hd95.tolist()
    assert [row[f"{region}_nsd"] for region in REGIONS] == nsd.tolist()


def test_masks_that_reach_the_edge_of_the_image_are_scored_alike() -> None:
    prediction, reference = same(cube((0, 8, 18))), same(cube((0, 9, 18)))
    inside = [np.pad(masks, ((0, 0), (2, 2), (2, 2), (2, 2))) for masks in (prediction, reference)]
    assert score_subject(prediction, reference) == score_subject(*inside)


NAN = math.nan
EMPTY_CASES = {
    "both": (False, False, {"dice": NAN, "nsd": NAN, "hd95": NAN, "dice_brats": 1, "nsd_brats": 1, "hd95_brats": 0}),
    "reference": (
        True,
        False,
        {"dice": NAN, "nsd": NAN, "hd95": NAN, "dice_brats": 0, "nsd_brats": 0, "hd95_brats": 373.12866},
    ),
    "prediction": (
        False,
        True,
        {"dice": 0, "nsd": 0, "hd95": NAN, "dice_brats": 0, "nsd_brats": 0, "hd95_brats": 373.12866},
    ),
    "neither": (True, True, {"dice": 1, "nsd": 1, "hd95": 0, "dice_brats": 1, "nsd_brats": 1, "hd95_brats": 0}),
}


@pytest.mark.parametrize("empty", EMPTY_CASES)
def test_both_conventions_for_empty_masks(empty: str) -> None:
    predicted, expected, scores = EMPTY_CASES[empty]
    prediction, reference = same(cube((2, 2, 2))), same(cube((2, 2, 2)))
    prediction[0] &= predicted
    reference[0] &= expected
    scores = scores | {f"lesion_{name}": scores[name] for name in ("dice", "dice_brats", "nsd", "hd95")}
    scores["lesion_f1"] = scores["dice_brats"] if predicted or expected else NAN
    row = score_subject(prediction, reference)
    assert {name: row[f"ET_{name}"] for name in SCORES + LESION_SCORES} == pytest.approx(scores, nan_ok=True)


def test_penalty_is_the_diagonal_of_the_brats_grid() -> None:
    assert pytest.approx(math.hypot(240, 240, 155), abs=1e-4) == EMPTY_HD95_MM


def test_means_skip_undefined_regions_but_the_brats_means_do_not() -> None:
    prediction, reference = same(cube((8, 8, 8))), same(cube((8, 8, 8)))
    prediction[1] = cube((8, 8, 11))
    prediction[0] = reference[0] = False
    row = score_subject(prediction, reference)
    assert row["mean_dice"] == pytest.approx((0.5 + 1) / 2)
    assert row["mean_dice_brats"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert row["mean_lesion_dice"] == pytest.approx((0.5 + 1) / 2)
    assert row["mean_lesion_dice_brats"] == pytest.approx((1 + 0.5 + 1) / 3)
    nothing = np.zeros_like(prediction)
    assert math.isnan(score_subject(nothing, nothing)["mean_dice"])


def test_volumes_are_millilitres_and_the_error_is_signed() -> None:
    row = score_subject(same(cube((2, 2, 2), size=5)), same(cube((2, 2, 2), size=10)), spacing=(1, 2, 2.5))
    assert row["WT_volume_ml"] == pytest.approx(125 * 5 / 1000)
    assert row["WT_reference_ml"] == pytest.approx(1000 * 5 / 1000)
    assert row["WT_volume_error_ml"] == pytest.approx(-875 * 5 / 1000)


def test_row_is_flat_and_made_of_floats_only() -> None:
    row = score_subject(blobs(0), blobs(50))
    assert len(row) == 3 * (6 + 3 + 8) + 11
    assert all(type(value) is float for value in row.values())


def test_kinds_of_array_and_number_do_not_matter() -> None:
    prediction, reference = blobs(0), blobs(50)
    row = score_subject(prediction, reference, spacing=[1, 1, 2.5])
    assert score_subject(torch.from_numpy(prediction).float(), MetaTensor(reference), (1.0, 1.0, 2.5)) == row
    assert score_subject(prediction.astype(np.uint8), reference.astype(np.int16), np.array([1, 1, 2.5])) == row


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing", "message"),
    [
        (np.full((3, 4, 4, 4), 0.7), np.zeros((3, 4, 4, 4)), (1, 1, 1), "prediction has values other than 0 and 1"),
        (np.zeros((3, 4, 4, 4)), np.full((3, 4, 4, 4), 4), (1, 1, 1), "reference has values other than 0 and 1"),
        (np.full((3, 4, 4, 4), np.nan), np.zeros((3, 4, 4, 4)), (1, 1, 1), "other than 0 and 1"),
        (np.zeros((1, 4, 4, 4)), np.zeros((1, 4, 4, 4)), (1, 1, 1), r"\[3, X, Y, Z\]"),
        (np.zeros((3, 4, 4, 4)), np.zeros((3, 4, 4, 5)), (1, 1, 1), "differ in shape"),
        (np.zeros((3, 4, 4, 4)), np.zeros((3, 4, 4, 4)), (1, 1), "three positive"),
        (np.zeros((3, 4, 4, 4)), np.zeros((3, 4, 4, 4)), (1, 0, 1), "three positive"),
    ],
)
def test_unusable_input_is_refused(prediction: object, reference: object, spacing: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_subject(prediction, reference, spacing)


# --- many subjects --------------------------------------------------------------------------------------------------


def test_summary_is_the_sample_mean_and_deviation_of_what_is_there() -> None:
    values = [0.5, NAN, 0.8, 0.9]
    rows = [{"subject": f"BT{i}", "ET_dice": value, "rim": i == 1} for i, value in enumerate(values)]
    rows[0]["extra"] = 3
    summary = summarise(rows)
    assert list(summary) == ["ET_dice", "extra"]
    assert summary["ET_dice"] == pytest.approx({"mean": np.nanmean(values), "sd": np.nanstd(values, ddof=1), "n": 3})
    assert summary["extra"] == pytest.approx({"mean": 3, "sd": NAN, "n": 1}, nan_ok=True)


def test_summary_of_nothing_defined_says_so() -> None:
    assert summarise([{"a": NAN}])["a"] == pytest.approx({"mean": NAN, "sd": NAN, "n": 0}, nan_ok=True)
    assert summarise([]) == {}
