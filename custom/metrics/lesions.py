"""Lesion-wise Dice in the manner of BraTS 2023, over panoptica (Kofler et al. 2023, arXiv 2312.02608).

Lesions are the components of 26 neighbours of reference and prediction. Each predicted component belongs to the
reference lesion that it overlaps with the highest Dice, and all components that belong to a lesion are scored as one.
The score of a region is the mean over its reference lesions, 0 for each that is missed, and its false positives, each
0: predicted components that overlap no lesion. Lesions below a volume are ignored: a reference lesion counts neither
as found nor as missed, nor what overlaps it as false; and a predicted component that small is no false positive.

Two differences from the challenge's own script, to remember when numbers are compared with its tables: it dilates the
reference by 3 voxels before it looks for lesions, so that near ones count as one, and there a component that bridges
two lesions is compared with each, here with the one it fits better while the other is missed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from monai.transforms.utils import generate_spatial_bounding_box

logger = logging.getLogger("comnet")

LESION_SCORES = ("lesion_dice", "lesion_dice_brats")
COUNTS = ("lesions", "lesions_found", "lesions_false")


def lesion_scores(
    prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float], min_lesion_mm3: float = 50.0
) -> dict[str, float]:
    """Score the lesions of one region.

    Args:
        prediction: boolean `[X, Y, Z]`.
        reference: the same shape.
        spacing: size of a voxel along each axis, in mm.
        min_lesion_mm3: volume below which a lesion is ignored.

    Returns:
        `lesion_dice` and `lesion_dice_brats`, in [0, 1], equal but for empty regions; `lesions`, those of the
        reference; `lesions_found`, those of them with any overlap that is theirs; `lesions_false`, false positives.
        All NaN, after one warning, where panoptica is not installed.
    """
    if _panoptica() is None:
        return dict.fromkeys((*LESION_SCORES, *COUNTS), math.nan)
    predicted, expected, shared = _lesion_sizes(prediction, reference)
    smallest = max(math.ceil(min_lesion_mm3 / math.prod(spacing) - 1e-3), 1)
    lesions = expected >= smallest
    false = (expected == 0) & (predicted >= smallest)
    total = (2 * shared[lesions] / (predicted + expected)[lesions]).sum()
    counted = lesions.sum() + false.sum()
    brats = float(total / counted) if counted else 1.0
    scores = {"lesion_dice": brats if lesions.any() else math.nan, "lesion_dice_brats": brats}
    found = lesions & (shared > 0)
    return scores | {name: float(mask.sum()) for name, mask in zip(COUNTS, (lesions, found, false), strict=True)}


def _lesion_sizes(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of prediction, reference and both, one entry for each lesion or false positive."""
    if not (prediction.any() or reference.any()):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    predicted, expected = _match(*(mask.numpy() for mask in crop_to_masks(prediction, reference)))
    entries = int(max(predicted.max(), expected.max())) + 1
    labels = (predicted, expected, expected[predicted == expected])
    ours, theirs, both = (np.bincount(label.ravel(), minlength=entries)[1:] for label in labels)
    return ours, theirs, both


def _match(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the components; predicted ones by the lesion they belong to, or with numbers that no lesion has."""
    panoptica = _panoptica()
    masks = panoptica.SemanticPair(prediction.astype(np.uint8), reference.astype(np.uint8))
    backend = panoptica.CCABackend.cc3d
    pair = panoptica.ConnectedComponentsInstanceApproximator(backend).approximate_instances(masks)
    if pair.n_pred_instances and pair.n_ref_instances:
        any_overlap = {"matching_threshold": 0.0, "strict_threshold": True, "allow_many_to_one": True}
        pair = panoptica.NaiveThresholdMatching(panoptica.Metric.DSC, **any_overlap).match_instances(pair)
    return pair.prediction_arr, pair.reference_arr


@functools.cache
def _panoptica() -> ModuleType | None:
    try:
        import panoptica
    except ImportError as error:
        logger.warning("no lesion-wise scores (NaN): %s; pip install 'panoptica>=2.1,<3'", error)
        return None
    return panoptica


def crop_to_masks(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both masks `[X, Y, Z]` to the box around their union, which must not be empty."""
    start, end = generate_spatial_bounding_box((prediction | reference)[None])
    box = tuple(map(slice, start, end))
    return prediction[box], reference[box]
