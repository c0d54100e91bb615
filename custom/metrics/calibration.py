"""How far predicted probabilities can be taken at their word, over the voxels of the brain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.metrics import CalibrationErrorMetric
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from ..cohort import REGIONS
from .scores import mean_of_defined

OUTPUT_KEY, BRIER_KEY = "calibration", "brier"


def calibration_scores(
    probabilities: NdarrayOrTensor, reference: NdarrayOrTensor, brain: NdarrayOrTensor, num_bins: int = 20
) -> dict[str, dict[str, float]]:
    """Expected calibration error and Brier score of each region over the brain.

    Only voxels of the brain count: outside of it probabilities are zero by construction, and as many correct zeros as
    the image has background would make every model look calibrated.

    Args:
        probabilities: `[3, *spatial]` in [0, 1], ET, TC and WT.
        reference: binary, the same shape.
        brain: `[1, *spatial]` or `[*spatial]`, nonzero inside.
        num_bins: of equal width over [0, 1].

    Returns:
        `{"ece": {"ET": ..., "TC": ..., "WT": ...}, "brier": {...}}`, all in [0, 1], 0 best: the mean over voxels of the
        distance between a bin's mean probability and its share of reference voxels (Guo et al. 2017), and the mean
        squared distance of probability and reference. NaN where the brain is empty.

    Raises:
        ValueError: the shapes do not fit, probabilities lie outside of [0, 1], or the reference is not binary.
    """
    predicted = convert_to_tensor(probabilities, track_meta=False, dtype=torch.float32)
    expected = convert_to_tensor(reference, track_meta=False, device=predicted.device)
    inside = convert_to_tensor(brain, track_meta=False, device=predicted.device)
    _check_shapes(predicted, expected, inside)
    voxels = inside.reshape(predicted.shape[1:]) != 0
    predicted, expected = predicted[:, voxels], expected[:, voxels].float()
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError("probabilities have values outside of [0, 1]: apply the sigmoid first")
    if not ((expected == 0) | (expected == 1)).all():
        raise ValueError("the reference has values other than 0 and 1: convert the label map to regions")
    errors = CalibrationErrorMetric(num_bins, metric_reduction="none")(predicted[None], expected[None])[0]
    brier = (predicted - expected).square().mean(dim=1)
    return {"ece": _by_region(errors), "brier": _by_region(brier)}


class CalibrationErrord(MapTransform):
    """Measure the calibration of a subject's probabilities, see :func:`calibration_scores`, over its brain only.

    For a chain of postprocessing, after :class:`custom.transforms.MaskToBraind` and before the threshold. Voxels
    outside the brain are left out. The numbers are plain floats, which ``custom.batch.Batch`` puts among the scores.

    `{"_target_": "custom.metrics.CalibrationErrord", "keys": "pred"}`

    Args:
        keys: one item of probabilities, ``[3, *spatial]``, on the input's own grid.
        label_key: reference regions, binary, the same shape.
        brain_key: mask from :class:`custom.transforms.LoadSubjectd`, ``[1, *spatial]``.
        output_key: item that receives ``{"ET": error, "TC": error, "WT": error}``, each in [0, 1].
        brier_key: item that receives the Brier scores in the same form.
        num_bins: of equal width over [0, 1].

    Raises:
        KeyError: on call, where an item is absent.
        ValueError: on call, see :func:`calibration_scores`.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        label_key: str = "label",
        brain_key: str = "brain",
        output_key: str = OUTPUT_KEY,
        brier_key: str = BRIER_KEY,
        num_bins: int = 20,
    ) -> None:
        super().__init__(keys)
        self.label_key = label_key
        self.brain_key = brain_key
        self.output_key = output_key
        self.brier_key = brier_key
        self.num_bins = num_bins

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the numbers beside the probabilities, which stay as they are."""
        subject = dict(data)
        for key in self.key_iterator(subject):
            scores = calibration_scores(subject[key], subject[self.label_key], subject[self.brain_key], self.num_bins)
            subject |= {self.output_key: scores["ece"], self.brier_key: scores["brier"]}
        return subject


def calibration_columns(subject: Mapping[Any, Any]) -> dict[str, float]:
    """Columns of a row of scores for what :class:`CalibrationErrord` has left in a subject under its default keys.

    Returns:
        `ET_ece` to `mean_ece` and `ET_brier` to `mean_brier`; nothing where the transform did not run.
    """
    columns: dict[str, float] = {}
    for name, key in (("ece", OUTPUT_KEY), ("brier", BRIER_KEY)):
        if (values := subject.get(key)) is not None:
            columns |= {f"{region}_{name}": float(values[region]) for region in REGIONS}
            columns[f"mean_{name}"] = mean_of_defined(columns[f"{region}_{name}"] for region in REGIONS)
    return columns


def _check_shapes(probabilities: torch.Tensor, reference: torch.Tensor, brain: torch.Tensor) -> None:
    grid = probabilities.shape[1:]
    if probabilities.shape != (len(REGIONS), *grid) or reference.shape != probabilities.shape:
        shapes = f"probabilities {tuple(probabilities.shape)} and reference {tuple(reference.shape)}"
        raise ValueError(f"{shapes} are not both [3, *spatial], one channel for each of {', '.join(REGIONS)}")
    if brain.shape not in (grid, (1, *grid)):
        raise ValueError(f"brain {tuple(brain.shape)} is not on the grid {tuple(grid)} of the probabilities")


def _by_region(values: torch.Tensor) -> dict[str, float]:
    return dict(zip(REGIONS, values.tolist(), strict=True))
