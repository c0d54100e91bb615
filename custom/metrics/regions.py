"""Overlap, surface and volume scores of one region."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.transforms.utils import generate_spatial_bounding_box

EMPTY_HD95_MM = 373.12866
"""Diagonal of the 240×240×155 grid at 1 mm: BraTS' distance where exactly one of the two masks is empty."""


def overlap_scores(prediction: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Dice of two boolean masks `[X, Y, Z]` in both conventions for empty ones."""
    pair = {"y_pred": prediction[None, None], "y": reference[None, None], "include_background": True}
    return {"dice": compute_dice(**pair).item(), "dice_brats": compute_dice(**pair, ignore_empty=False).item()}


def surface_scores(
    prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Surface distance and surface Dice of two boolean masks `[X, Y, Z]`; spacing and tolerance in mm."""
    empty = (not prediction.any(), not reference.any())
    if all(empty):
        return {"hd95": math.nan, "hd95_brats": 0.0, "nsd": math.nan, "nsd_brats": 1.0}
    if any(empty):
        nsd = math.nan if empty[1] else 0.0
        return {"hd95": math.nan, "hd95_brats": EMPTY_HD95_MM, "nsd": nsd, "nsd_brats": 0.0}
    ours, theirs = crop_to_masks(prediction, reference)
    pair = {"y_pred": ours[None, None], "y": theirs[None, None], "include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(**pair, percentile=95).item()
        nsd = compute_surface_dice(**pair, class_thresholds=[tolerance], use_subvoxels=True).item()
    return {"hd95": hd95, "hd95_brats": hd95, "nsd": nsd, "nsd_brats": nsd}


def volumes(prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Volumes of two boolean masks `[X, Y, Z]` and their signed difference, in ml."""
    ours, theirs = (mask.sum().item() * math.prod(spacing) / 1000 for mask in (prediction, reference))
    return {"volume_ml": ours, "reference_ml": theirs, "volume_error_ml": ours - theirs}


def crop_to_masks(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both masks `[X, Y, Z]` to the box around their union, which must not be empty."""
    start, end = generate_spatial_bounding_box((prediction | reference)[None])
    box = tuple(map(slice, start, end))
    return prediction[box], reference[box]
