"""Lesion-wise Dice on volumes made by hand, and against scipy and plain counting on random and real ones."""

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

from custom.metrics import lesion_scores, lesions, score_subject

SHAPE = (40, 40, 40)
ISOTROPIC = (1.0, 1.0, 1.0)


def boxes(*corners_and_sizes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    for corner, size in corners_and_sizes:
        mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
    return mask


def score(prediction: np.ndarray, reference: np.ndarray, spacing=ISOTROPIC, **kwargs) -> dict[str, float]:
    return lesion_scores(torch.from_numpy(prediction), torch.from_numpy(reference), spacing, **kwargs)


def counts(scores: dict[str, float]) -> tuple[float, float, float]:
    return scores["lesions"], scores["lesions_found"], scores["lesions_false"]


def plain(prediction: np.ndarray, reference: np.ndarray, smallest: int) -> tuple[float, tuple[int, int, int]]:
    """The definition, component by component, with scipy's labels."""
    (predicted, how_many), (expected, lesion_count) = (
        ndimage.label(mask, np.ones((3, 3, 3))) for mask in (prediction, reference)
    )
    members: dict[int, list[int]] = {lesion: [] for lesion in range(1, lesion_count + 1)}
    false = 0
    for component in range(1, how_many + 1):
        voxels = predicted == component
        dice = {
            lesion: 2 * np.sum(voxels & (expected == lesion)) / (voxels.sum() + np.sum(expected == lesion))
            for lesion in np.unique(expected[voxels])
            if lesion
        }
        if dice:
            members[int(max(dice, key=dice.get))].append(component)
        else:
            false += int(voxels.sum() >= smallest)
    kept = [lesion for lesion in members if np.sum(expected == lesion) >= smallest]
    total = 0.0
    for lesion in kept:
        ours, theirs = np.isin(predicted, members[lesion]), expected == lesion
        total += 2 * np.sum(ours & theirs) / (ours.sum() + theirs.sum())
    return total / (len(kept) + false), (len(kept), sum(bool(members[lesion]) for lesion in kept), false)


A = ((2, 2, 2), (4, 4, 4))
B = ((12, 2, 2), (4, 4, 4))
C = ((22, 2, 2), (4, 4, 4))


def test_missed_lesions_and_false_ones_count_zero() -> None:
    scores = score(boxes(A, C), boxes(A, B))
    assert scores["lesion_dice"] == scores["lesion_dice_brats"] == pytest.approx((1 + 0 + 0) / 3)
    assert counts(scores) == (2, 1, 1)


def test_fragments_of_a_lesion_are_scored_as_one() -> None:
    reference = boxes(((2, 2, 2), (10, 4, 4)))
    fragments = boxes(((2, 2, 2), (4, 4, 4)), ((8, 2, 2), (4, 4, 4)))
    scores = score(fragments, reference)
    assert scores["lesion_dice"] == pytest.approx(2 * 128 / (128 + 160))
    assert counts(scores) == (1, 1, 0)


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
    assert scores["lesion_dice"] == pytest.approx(2 * 160 / (256 + 250) / 2)


@pytest.mark.parametrize(
    ("size", "spacing", "counted"),
    [
        ((5, 5, 2), ISOTROPIC, 1),
        ((7, 7, 1), ISOTROPIC, 0),
        ((5, 5, 1), (1.0, 1.0, 2.0), 1),
        ((5, 5, 2), (0.9, 1.0, 1.0), 0),
        ((5, 5, 2), (1.0, 1.0, 0.9999999), 1),
    ],
)
def test_lesions_below_the_volume_are_ignored(size: tuple, spacing: tuple, counted: int) -> None:
    small, nothing = boxes(((30, 30, 30), size)), boxes(A)
    assert counts(score(nothing, boxes(A) | small, spacing)) == (1 + counted, 1, 0)
    assert counts(score(nothing | small, boxes(A), spacing)) == (1, 1, counted)


def test_smallest_volume_can_be_chosen() -> None:
    small = boxes(((30, 30, 30), (1, 1, 1)))
    assert counts(score(boxes(A), boxes(A) | small, min_lesion_mm3=0)) == (2, 1, 0)
    assert counts(score(boxes(A), boxes(B), min_lesion_mm3=65)) == (0, 0, 0)
    row = score_subject(*(np.stack([mask] * 3) for mask in (boxes(A), boxes(B))), min_lesion_mm3=65)
    assert row["ET_lesions"] == row["WT_lesions_false"] == 0


def test_what_overlaps_an_ignored_lesion_is_neither_found_nor_false() -> None:
    scores = score(boxes(((30, 30, 30), (5, 5, 5))), boxes(((30, 30, 30), (3, 3, 3))))
    assert counts(scores) == (0, 0, 0)
    assert math.isnan(scores["lesion_dice"])
    assert scores["lesion_dice_brats"] == 1


def test_small_fragments_still_find_a_lesion() -> None:
    scores = score(boxes(((2, 2, 2), (1, 1, 1))), boxes(A))
    assert counts(scores) == (1, 1, 0)
    assert scores["lesion_dice"] == pytest.approx(2 / 65)


@pytest.mark.parametrize("seed", range(6))
def test_random_volumes_score_as_the_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = (ndimage.gaussian_filter(rng.random((30, 28, 26)), 1.6) for _ in range(2))
    prediction = 0.5 * prediction + 0.5 * reference > 0.53
    reference = reference > 0.54
    expected, expected_counts = plain(prediction, reference, 20)
    scores = score(prediction, reference, min_lesion_mm3=20)
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
    scores = score(prediction, reference, min_lesion_mm3=0)
    assert counts(scores) == (found + missed, found, missed)
    assert scores["lesion_dice"] == pytest.approx(found * (2 / 3) / (found + 2 * missed))


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
    lesions._panoptica.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            row = score_subject(*(np.stack([boxes(A)] * 3) for _ in range(2)))
    finally:
        lesions._panoptica.cache_clear()
    missing = [name for name, value in row.items() if math.isnan(value)]
    assert len(missing) == 3 * 5 + 2
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
    expected, expected_counts = plain(shifted[box], enhancing[box], 50)
    scores = score(shifted, enhancing)
    assert scores["lesion_dice"] == pytest.approx(expected)
    assert counts(scores) == expected_counts
