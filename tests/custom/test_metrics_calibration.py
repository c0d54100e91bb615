"""Calibration against plain counting in double precision, inside a chain of postprocessing, and in the Batch."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import MaskIntensityd

from custom.batch import Batch
from custom.cohort import REGIONS
from custom.metrics import CalibrationErrord, calibration_columns, calibration_scores
from custom.weights import save_atomically

GRID = (6, 7, 8)
EVERYWHERE = np.ones((1, *GRID))


def expected_calibration_error(probabilities: np.ndarray, reference: np.ndarray, num_bins: int) -> float:
    edges = np.linspace(0, 1, num_bins + 1)
    error = 0.0
    for low, high in pairwise(edges):
        inside = (probabilities >= low) & ((probabilities < high) | (high == 1))
        if inside.any():
            error += inside.mean() * abs(probabilities[inside].mean() - reference[inside].mean())
    return error


def subject(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.random((3, *GRID)) ** np.array([1, 2, 4])[:, None, None, None]
    return probabilities, rng.random((3, *GRID)) < 0.4, rng.random((1, *GRID)) < 0.6


@pytest.mark.parametrize("num_bins", [15, 20])
@pytest.mark.parametrize("seed", range(3))
def test_error_and_brier_score_are_their_definitions_over_the_brain(seed: int, num_bins: int) -> None:
    probabilities, reference, brain = subject(seed)
    scores = calibration_scores(probabilities, reference, brain, num_bins)
    for region, p, y in zip(REGIONS, probabilities, reference, strict=True):
        p, y = p[brain[0]], y[brain[0]]
        assert scores["ece"][region] == pytest.approx(expected_calibration_error(p, y, num_bins), abs=1e-6)
        assert scores["brier"][region] == pytest.approx(np.mean((p - y) ** 2), abs=1e-6)
        assert type(scores["ece"][region]) is type(scores["brier"][region]) is float


def test_forecast_that_comes_true_as_often_as_it_says_is_calibrated() -> None:
    reference = np.zeros((3, 10, 10, 10))
    reference[:, :3] = 1
    scores = calibration_scores(np.full(reference.shape, 0.3), reference, np.ones(reference.shape[1:]))
    assert scores["ece"] == pytest.approx(dict.fromkeys(REGIONS, 0), abs=1e-6)
    assert scores["brier"] == pytest.approx(dict.fromkeys(REGIONS, 0.3 * 0.7), abs=1e-6)


def test_truth_scores_zero_and_its_opposite_one() -> None:
    _, reference, _ = subject(0)
    assert calibration_scores(reference, reference, EVERYWHERE)["ece"] == dict.fromkeys(REGIONS, 0)
    opposite = calibration_scores(1.0 - reference, reference, EVERYWHERE)
    assert opposite["ece"] == opposite["brier"] == dict.fromkeys(REGIONS, 1)


def test_rounding_of_an_interpolation_is_no_other_scale() -> None:
    _, reference, _ = subject(0)
    over = reference * (1 + 2e-7)
    assert over.max() > 1
    assert calibration_scores(over, reference, EVERYWHERE)["ece"] == dict.fromkeys(REGIONS, 0)


def test_what_lies_outside_the_brain_changes_nothing() -> None:
    probabilities, reference, brain = subject(1)
    outside = np.broadcast_to(brain, reference.shape) == 0
    scores = calibration_scores(probabilities, reference, brain)
    probabilities[outside], reference[outside] = 0, 0
    assert calibration_scores(probabilities, reference, brain) == scores
    assert calibration_scores(probabilities, reference, EVERYWHERE)["ece"]["ET"] < scores["ece"]["ET"]


def test_region_that_is_absent_has_an_error_but_an_empty_brain_has_none() -> None:
    probabilities, reference, brain = subject(2)
    scores = calibration_scores(probabilities, np.zeros_like(reference), brain)
    assert scores["ece"]["ET"] == pytest.approx(probabilities[0][brain[0]].mean(), abs=1e-6)
    empty = calibration_scores(probabilities, reference, np.zeros_like(brain))
    assert all(math.isnan(value) for by_region in empty.values() for value in by_region.values())


ONES = np.ones((3, *GRID))


@pytest.mark.parametrize(
    ("probabilities", "reference", "brain", "message"),
    [
        (ONES * 1.5, ONES, EVERYWHERE, "apply the sigmoid"),
        (ONES * -0.1, ONES, EVERYWHERE, "apply the sigmoid"),
        (ONES * np.nan, ONES, EVERYWHERE, "apply the sigmoid"),
        (ONES, ONES * 4, EVERYWHERE, "convert the label map"),
        (ONES, ONES * 0.5, EVERYWHERE, "convert the label map"),
        (ONES[:1], ONES[:1], EVERYWHERE, r"not both \[3, \*spatial\]"),
        (ONES, ONES[:1], EVERYWHERE, r"not both \[3, \*spatial\]"),
        (ONES, ONES, EVERYWHERE[:, 1:], r"brain \(1, 5, 7, 8\) is not on the grid \(6, 7, 8\)"),
    ],
)
def test_unusable_input_is_refused(
    probabilities: np.ndarray, reference: np.ndarray, brain: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_scores(probabilities, reference, brain)


# --- in a chain -----------------------------------------------------------------------------------------------------


def test_transform_from_json_measures_what_the_chain_holds() -> None:
    probabilities, reference, brain = subject(3)
    item = {"pred": MetaTensor(probabilities), "label": torch.from_numpy(reference).byte()}
    item = MaskIntensityd("pred", mask_key="brain")(
        item | {"brain": torch.from_numpy(brain).byte().reshape(1, *reference.shape[1:])}
    )
    parser = ConfigParser({"calibration": {"_target_": "custom.metrics.CalibrationErrord", "keys": "pred"}})
    result = parser.get_parsed_content("calibration")(item)
    expected = calibration_scores(probabilities, reference, brain)
    assert result["calibration"] == pytest.approx(expected["ece"])
    assert result["brier"] == pytest.approx(expected["brier"])
    assert result["pred"] is item["pred"]
    assert "calibration" not in item


def test_without_a_reference_there_is_an_error() -> None:
    probabilities, _, brain = subject(4)
    with pytest.raises(KeyError, match="label"):
        CalibrationErrord("pred")({"pred": probabilities, "brain": brain})


def test_columns_of_a_row() -> None:
    item = {"calibration": {"ET": 0.1, "TC": math.nan, "WT": 0.3}, "brier": {"ET": 0.4, "TC": 0.5, "WT": 0.6}}
    columns = calibration_columns(item)
    assert list(columns) == [f"{region}_{name}" for name in ("ece", "brier") for region in (*REGIONS, "mean")]
    assert columns["mean_ece"] == pytest.approx(0.2)
    assert columns["mean_brier"] == pytest.approx(0.5)
    assert calibration_columns({"pred": 0}) == {}


def test_batch_keeps_them_among_the_scores(tmp_path) -> None:
    weights = tmp_path / "model.pt"
    save_atomically({"model": {"w": torch.ones(1)}, "provenance": {"notes": "for tests"}}, weights)
    book = Batch(str(tmp_path / "out"), {"output_palette": "brats2023"}, str(weights), pictures=False)
    names = ("a", "b")
    for name in names:
        (tmp_path / f"{name}.nii.gz").write_bytes(b"image")
    book.begin([{"subject": name, "image": str(tmp_path / f"{name}.nii.gz")} for name in names])
    output = {"pred": MetaTensor(torch.zeros(1, *GRID)), "label": torch.zeros(3, *GRID)}
    measured = output | {"calibration": {"ET": 0.125, "TC": 0.25, "WT": 0.375}}
    for name, one in zip(names, (output, measured), strict=True):
        book._finish(SimpleNamespace(state=SimpleNamespace(subject=name, failure=None, warnings=[], output=[one])))
    book.close()
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert (rows["b"]["ET_ece"], rows["b"]["mean_ece"], rows["b"]["mean_dice_brats"]) == ("0.125", "0.25", "1.0")
    assert rows["a"]["ET_ece"] == ""
    assert "ET_brier" not in rows["a"]
