"""Lesion-wise scores on volumes made by hand, and against scipy and plain counting on random and real ones."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from custom.metrics import lesion_scores, score_subject
from custom.metrics import scores as lesions

SHAPE = (40, 40, 40)
ISOTROPIC = (1.0, 1.0, 1.0)


def boxes(*corners_and_sizes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    for corner, size in corners_and_sizes:
        mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return mask


def score(prediction: np.ndarray, reference: np.ndarray, spacing=ISOTROPIC) -> dict[str, float]:
    return lesion_scores(torch.from_numpy(prediction), torch.from_numpy(reference), spacing)


def counts(scores: dict[str, float]) -> tuple[float, float, float]:
    return scores["lesions"], scores["lesions_found"], scores["lesions_false"]


def plain(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, tuple[int, int, int]]:
    """The definition, component by component, with scipy's labels and scipy's best assignment."""
    (predicted, how_many), (expected, lesion_count) = (
        ndimage.label(mask, np.ones((3, 3, 3))) for mask in (prediction, reference)
    )
    dice = np.zeros((lesion_count, how_many))
    for lesion in range(lesion_count):
        for component in np.unique(predicted[(expected == lesion + 1) & (predicted > 0)]):
            ours, theirs = predicted == component, expected == lesion + 1
            dice[lesion, component - 1] = 2 * np.sum(ours & theirs) / (ours.sum() + theirs.sum())
    pairs = dice[linear_sum_assignment(dice, maximize=True)]
    pairs = pairs[pairs > 0]
    return pairs.mean(), (lesion_count, len(pairs), how_many - len(pairs))


A = ((2, 2, 2), (4, 4, 4))
B = ((12, 2, 2), (4, 4, 4))
C = ((22, 2, 2), (4, 4, 4))


def test_missed_and_false_lesions_lower_the_f1_and_not_the_dice() -> None:
    """As the challenges' package counts: boxes A found, B missed, C false."""
    scores = score(boxes(A, C), boxes(A, B))
    assert scores["lesion_dice"] == scores["lesion_dice_brats"] == scores["lesion_nsd"] == 1
    assert scores["lesion_hd95"] == 0
    assert scores["lesion_f1"] == 0.5
    assert counts(scores) == (2, 1, 1)


def test_nothing_is_dilated_before_lesions_are_told_apart() -> None:
    """The challenge of 2023 dilated the reference by three voxels: there these two are one lesion."""
    near = boxes(A, ((7, 2, 2), (4, 4, 4)))
    scores = score(boxes(A), near)
    assert counts(scores) == (2, 1, 0)
    assert scores["lesion_dice"] == 1
    assert scores["lesion_f1"] == pytest.approx(2 / 3)


def test_fragments_of_a_lesion_are_one_found_and_the_rest_false() -> None:
    reference = boxes(((2, 2, 2), (10, 4, 4)))
    fragments = boxes(((2, 2, 2), (5, 4, 4)), ((8, 2, 2), (4, 4, 4)))
    scores = score(fragments, reference)
    assert scores["lesion_dice"] == pytest.approx(2 * 80 / (80 + 160))
    assert counts(scores) == (1, 1, 1)


def test_no_lesion_is_too_small() -> None:
    small = boxes(((30, 30, 30), (1, 1, 1)))
    assert counts(score(boxes(A), boxes(A) | small)) == (2, 1, 0)
    assert counts(score(boxes(A) | small, boxes(A))) == (1, 1, 1)


def test_one_voxel_of_overlap_finds_a_lesion() -> None:
    scores = score(boxes(((5, 5, 5), (4, 4, 4))), boxes(A))
    assert counts(scores) == (1, 1, 0)
    assert scores["lesion_dice"] == pytest.approx(2 / 128)


def test_pairs_are_those_with_the_highest_sum() -> None:
    """Each by its best partner alone, the long component would take the large lesion and nothing the small one."""
    large, small = ((2, 2, 2), (8, 4, 4)), ((12, 2, 2), (6, 4, 4))
    prediction = boxes(((5, 2, 2), (11, 4, 4)), ((2, 2, 2), (2, 4, 4)))
    scores = score(prediction, boxes(large, small))
    assert counts(scores) == (2, 2, 0)
    assert scores["lesion_dice"] == pytest.approx((2 * 32 / (32 + 128) + 2 * 64 / (176 + 96)) / 2)


def test_empty_masks() -> None:
    nothing = boxes()
    neither, false, missed = score(nothing, nothing), score(boxes(A), nothing), score(nothing, boxes(A))
    undefined = {name for name, value in neither.items() if math.isnan(value)}
    assert undefined == {"lesion_dice", "lesion_nsd", "lesion_hd95", "lesion_f1"}
    assert neither["lesion_dice_brats"] == 1
    assert math.isnan(false["lesion_dice"]) and math.isnan(false["lesion_nsd"])
    assert false["lesion_dice_brats"] == false["lesion_f1"] == 0
    assert missed["lesion_dice"] == missed["lesion_dice_brats"] == missed["lesion_nsd"] == missed["lesion_f1"] == 0
    assert math.isnan(missed["lesion_hd95"]) and math.isnan(false["lesion_hd95"])
    assert [counts(one) for one in (neither, false, missed)] == [(0, 0, 0), (0, 0, 1), (1, 0, 0)]


def test_surfaces_are_measured_in_mm() -> None:
    ours, theirs = boxes(A), boxes(((4, 2, 2), (4, 4, 4)))
    assert score(ours, theirs, (3.0, 1.0, 1.0))["lesion_hd95"] == 3 * score(ours, theirs)["lesion_hd95"] == 6
    assert score(ours, theirs, (0.5, 1.0, 1.0))["lesion_hd95"] == 1


def test_boxes_that_touch_at_a_corner_are_one_lesion() -> None:
    corner = boxes(A, ((6, 6, 6), (4, 4, 4)))
    assert counts(score(corner, boxes(A))) == (1, 1, 0)
    assert counts(score(boxes(A), corner)) == (1, 1, 0)
    gap = boxes(A, ((7, 7, 7), (4, 4, 4)))
    assert counts(score(boxes(A), gap)) == (2, 1, 0)


def test_component_that_bridges_two_lesions_belongs_to_the_one_it_fits_better() -> None:
    large, small = ((2, 2, 2), (10, 5, 5)), ((14, 2, 2), (4, 4, 4))
    bridge = boxes(((2, 2, 2), (16, 4, 4)))
    scores = score(bridge, boxes(large, small))
    assert counts(scores) == (2, 1, 0)
    assert scores["lesion_dice"] == pytest.approx(2 * 160 / (256 + 250))


@pytest.mark.parametrize("seed", range(6))
def test_random_volumes_score_as_the_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = (ndimage.gaussian_filter(rng.random((30, 28, 26)), 1.6) for _ in range(2))
    prediction = 0.5 * prediction + 0.5 * reference > 0.53
    reference = reference > 0.54
    expected, expected_counts = plain(prediction, reference)
    scores = score(prediction, reference)
    assert expected_counts[0] > expected_counts[1] > 0
    assert expected_counts[2] > 0
    assert scores["lesion_dice"] == pytest.approx(expected)
    assert counts(scores) == expected_counts


def test_more_components_than_a_byte_can_number() -> None:
    reference = np.zeros(SHAPE, dtype=bool)
    reference[:-3:3, ::3, ::6] = True
    prediction = np.roll(reference, 1, axis=0)
    prediction[:, :, 0] |= reference[:, :, 0]
    found, missed = 13 * 14, 13 * 14 * 6
    scores = score(prediction, reference)
    assert counts(scores) == (found + missed, found, missed)
    assert scores["lesion_dice"] == pytest.approx(2 / 3)


def test_position_in_the_image_does_not_matter() -> None:
    prediction, reference = boxes(A, C), boxes(A, B)
    corner = tuple(slice(2, 26) for _ in range(3))
    assert score(np.pad(prediction, 5), np.pad(reference, 5)) == score(prediction[corner], reference[corner])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    score(boxes(A), boxes(B))
    assert capfd.readouterr() == ("", "")


def test_without_panoptica_one_warning_and_no_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "panoptica", None)
    lesions._evaluator.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            row = score_subject(*(np.stack([boxes(A)] * 3) for _ in range(2)))
    finally:
        lesions._evaluator.cache_clear()
    missing = [name for name, value in row.items() if math.isnan(value)]
    assert len(missing) == 3 * 8 + 5
    assert all("lesion" in name for name in missing)
    assert row["WT_dice"] == row["mean_dice"] == 1
    assert len(caplog.records) == 1
    assert "pip install 'panoptica" in caplog.text


@pytest.mark.slow
def test_panoptica_is_loaded_only_where_lesions_are_scored() -> None:
    code = "import sys, custom.batch, custom.metrics; sys.exit('panoptica' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_lesions_score_as_the_definition_says(real_data) -> None:
    path = next((real_data / "brats2021").glob("*01478/*_seg.nii.gz"))
    enhancing = np.asarray(nib.load(path).dataobj) == 4
    shifted = np.roll(enhancing, (2, 1, 0), (0, 1, 2))
    box = ndimage.find_objects((enhancing | shifted).astype(int))[0]
    expected, expected_counts = plain(shifted[box], enhancing[box])
    scores = score(shifted, enhancing)
    assert scores["lesion_dice"] == pytest.approx(expected)
    assert counts(scores) == expected_counts
