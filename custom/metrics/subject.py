"""All scores of one subject in one flat row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.config import NdarrayOrTensor
from monai.utils import convert_to_tensor

from ..cohort import REGIONS
from .lesions import LESION_SCORES, lesion_scores
from .regions import overlap_scores, surface_scores, volumes
from .summary import mean_of_defined

SCORES = ("dice", "dice_brats", "hd95", "hd95_brats", "nsd", "nsd_brats")


def score_subject(
    prediction: NdarrayOrTensor,
    reference: NdarrayOrTensor,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    tolerance_mm: float = 1.0,
    min_lesion_mm3: float = 50.0,
) -> dict[str, float]:
    """Score one subject's regions.

    Args:
        prediction: binary `[3, X, Y, Z]`, ET, TC and WT, on the full native grid.
        reference: the same shape.
        spacing: size of a voxel along each axis, in mm.
        tolerance_mm: distance up to which two surfaces count as the same in the surface Dice.
        min_lesion_mm3: volume below which the lesion-wise scores ignore a lesion.

    Returns:
        For each region, as `ET_dice` and so on:
        `dice` (eq. 7) and `dice_brats`, in [0, 1];
        `hd95` and `hd95_brats`, the larger of the two directed 95th percentiles of surface distances, in mm;
        `nsd` and `nsd_brats`, the surface Dice weighted by area (Nikolov et al. 2021, doi 10.2196/26151), in [0, 1];
        `volume_ml`, `reference_ml` and `volume_error_ml`, the first less the second;
        `lesion_dice` and `lesion_dice_brats`, in [0, 1], and the counts `lesions` (of the reference), `lesions_found`
        and `lesions_false`, see `lesion_scores`; NaN without panoptica.
        And `mean_dice` (eq. 8) to `mean_lesion_dice_brats`, the means over the regions that have a score.

    Raises:
        ValueError: the shapes differ or are no `[3, X, Y, Z]`, a mask is not binary, or the spacing is not three
            positive numbers.
    """
    predicted, expected = _binary(prediction, "prediction"), _binary(reference, "reference")
    if predicted.shape != expected.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and reference {tuple(expected.shape)} differ in shape")
    size = [float(length) for length in spacing]
    if len(size) != 3 or not all(0 < length < math.inf for length in size):
        raise ValueError(f"spacing {tuple(spacing)} is not three positive numbers (mm)")
    predicted, expected = _around_both(predicted, expected)
    row: dict[str, float] = {}
    for region, ours, theirs in zip(REGIONS, predicted, expected, strict=True):
        scores = overlap_scores(ours, theirs) | surface_scores(ours, theirs, size, tolerance_mm)
        scores |= volumes(ours, theirs, size) | lesion_scores(ours, theirs, size, min_lesion_mm3)
        row |= {f"{region}_{name}": value for name, value in scores.items()}
    means = {name: mean_of_defined(row[f"{region}_{name}"] for region in REGIONS) for name in SCORES + LESION_SCORES}
    return row | {f"mean_{name}": value for name, value in means.items()}


def _around_both(*masks: torch.Tensor, margin: int = 2) -> list[torch.Tensor]:
    """Crop to the box of all foreground and a margin: no score depends on the rest, and it is most of a volume."""
    where = torch.stack(masks).flatten(0, 1).any(0).nonzero()
    if not len(where):
        return list(masks)
    low, high = (where.amin(0) - margin).clamp_min(0).tolist(), (where.amax(0) + 1 + margin).tolist()
    return [mask[(slice(None), *map(slice, low, high))] for mask in masks]


def _binary(mask: NdarrayOrTensor, name: str) -> torch.Tensor:
    tensor = convert_to_tensor(mask, track_meta=False, device="cpu")
    if tensor.ndim != 4 or tensor.shape[0] != len(REGIONS):
        raise ValueError(f"{name} {tuple(tensor.shape)} is not [3, X, Y, Z], one mask for each of {', '.join(REGIONS)}")
    binary = tensor.bool()
    if not torch.equal(binary.to(tensor.dtype), tensor):
        raise ValueError(f"{name} has values other than 0 and 1: threshold it, or convert the label map to regions")
    return binary
