"""Lesion-wise scores as the BraTS challenges count them, by panoptica (Kofler et al. 2023, arXiv 2312.02608).

Lesions are the components of 26 neighbours of reference and prediction; nothing is dilated, and none is too small to
count. Predicted and true lesions are paired one to one so that the sum of their Dice is highest, and any overlap makes
a pair. Dice, surface Dice and HD95 are means over the pairs; what was missed and what was falsely predicted lowers none
of them, but the F1 score of detection. So counts `brats-evaluation`, the challenges' own package; docs/results.md says
how that was checked. The challenge of 2023 dilated lesions first, and put every miss and false lesion into the mean.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.transforms.utils import generate_spatial_bounding_box

if TYPE_CHECKING:
    from panoptica import Panoptica_Evaluator

logger = logging.getLogger("comnet")

LESION_SCORES = ("lesion_dice", "lesion_dice_brats", "lesion_nsd", "lesion_hd95", "lesion_f1")
COUNTS = ("lesions", "lesions_found", "lesions_false")


def lesion_scores(prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Score the lesions of one region.

    Args:
        prediction: boolean `[X, Y, Z]`.
        reference: the same shape.
        spacing: size of a voxel along each axis, in mm.

    Returns:
        `lesion_dice` and `lesion_nsd`, in [0, 1], and `lesion_hd95` in mm: means over the pairs of lesions. Without a
        pair 0, 0 and NaN; NaN where the reference is empty. `lesion_dice_brats` is the same Dice, but 0 where only the
        reference is empty and 1 where both are. Surfaces count as the same up to the smallest side of a voxel.
        `lesion_f1`, of detection, in [0, 1]: pairs over the mean number of predicted and true lesions; NaN where there
        are none. `lesions`, those of the reference; `lesions_found`, those of them with a pair; `lesions_false`,
        predicted ones without. All NaN, after one warning, where panoptica is not installed.
    """
    if (evaluator := _evaluator()) is None:
        return dict.fromkeys((*LESION_SCORES, *COUNTS), math.nan)
    if not (prediction.any() or reference.any()):
        return dict.fromkeys(LESION_SCORES, math.nan) | {"lesion_dice_brats": 1.0} | dict.fromkeys(COUNTS, 0.0)
    ours, theirs = (mask.numpy().astype(np.uint8) for mask in crop_to_masks(prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of voxels of 0.5 mm, which it takes for a default
        (found,) = evaluator.evaluate(ours, theirs, voxelspacing=tuple(spacing), result_all=False).values()
    pairs, missed, false = int(found.tp), int(found.fn), int(found.fp)
    values = {"dice": float(found.sq_dsc), "nsd": float(found.sq_nsd), "hd95": float(found.sq_hd95)}
    scores = {f"lesion_{name}": value if pairs + missed else math.nan for name, value in values.items()}
    scores |= {"lesion_dice_brats": values["dice"], "lesion_f1": 2 * pairs / (2 * pairs + missed + false)}
    return scores | {name: float(n) for name, n in zip(COUNTS, (pairs + missed, pairs, false), strict=True)}


@functools.cache
def _evaluator() -> Panoptica_Evaluator | None:
    try:
        import panoptica
        from panoptica.instance_matcher import MaxBipartiteMatching
        from panoptica.utils.citation_reminder import disable_citation_reminder
        from panoptica.utils.edge_case_handling import EdgeCaseHandler, EdgeCaseResult, MetricZeroTPEdgeCaseHandling
    except ImportError as error:
        logger.warning("no lesion-wise scores (NaN): %s; pip install 'panoptica>=2.1,<3'", error)
        return None
    disable_citation_reminder()  # it would be printed among the results; it is cited above
    dice, nsd, hd95 = panoptica.Metric.DSC, panoptica.Metric.NSD, panoptica.Metric.HD95
    without_pairs = {dice: EdgeCaseResult.ZERO, nsd: EdgeCaseResult.ZERO, hd95: EdgeCaseResult.NAN}
    return panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(panoptica.CCABackend.cc3d),
        instance_matcher=MaxBipartiteMatching(dice, matching_threshold=0.0, strict_threshold=True),
        edge_case_handler=EdgeCaseHandler(
            {metric: MetricZeroTPEdgeCaseHandling(result) for metric, result in without_pairs.items()}
        ),
        instance_metrics=[dice, nsd, hd95],
        global_metrics=[],
    )


def crop_to_masks(prediction: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both masks `[X, Y, Z]` to the box around their union, which must not be empty."""
    start, end = generate_spatial_bounding_box((prediction | reference)[None])
    box = tuple(map(slice, start, end))
    return prediction[box], reference[box]
