"""Worst cases first: the order of the subjects, and what went wrong with each in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cohort import REGIONS
from .summary import BRATS, dice_of, mean_of, models_of

FOUND_SHARE = 0.5
"""A region of which a smaller share was found counts as missed."""
TOO_LARGE = 2.0
"""A region whose predicted volume is more than this many times the true one counts as too large."""
FAR_MM = 20.0
"""HD95 of a region that is found for the most part, above which some of it lies far off."""
ORDER_RULE = (
    "Ordered by the mean Dice over regions, worst first; a region wrongly predicted counts 0, one rightly left empty "
    "(–) does not count"
)
MEDIAN_RULE = "The subject in the middle when ordered by mean Dice; of two in the middle, the worse"


def mean_dice(score: Mapping[str, Any]) -> float:
    """Mean of `counted_dice` over the regions; 1 where all of them are rightly empty."""
    counted = mean_of([counted_dice(score, region) for region in REGIONS])
    return mean_of([dice_of(score, region, BRATS) for region in REGIONS]) if math.isnan(counted) else counted


def counted_dice(score: Mapping[str, Any], region: str) -> float:
    """Dice by which a case is judged: 0 for a region wrongly predicted, NaN for one rightly left empty."""
    skip, brats = dice_of(score, region), dice_of(score, region, BRATS)
    return brats if brats != 1 else skip


def worst_first(scores: Sequence[Mapping[str, Any]], model: str | None = None) -> list[str]:
    """Subjects in ascending order of a model's `mean_dice`; without a value they come first, ties by name.

    Args:
        scores: of one or several models.
        model: by default the last.
    """
    model = models_of(scores)[-1] if model is None else model
    means = {str(score["subject"]): mean_dice(score) for score in scores if str(score["model"]) == model}
    return sorted(means, key=lambda name: (-math.inf if math.isnan(means[name]) else means[name], name))


def median_subject(scores: Sequence[Mapping[str, Any]], model: str | None = None) -> str:
    """The subject in the middle of `worst_first`; of two in the middle, the worse."""
    ranking = worst_first(scores, model)
    return ranking[(len(ranking) - 1) // 2]


def what_went_wrong(score: Mapping[str, Any]) -> list[str]:
    """Findings on one subject, at most one per region, from its Dice, volumes and HD95; none where all went well.

    Args:
        score: as of `metrics.score_subject`; a region without `_volume_ml` and `_reference_ml` gives no finding.
    """
    return [finding for region in REGIONS if (finding := _finding(score, region))]


def _finding(score: Mapping[str, Any], region: str) -> str:
    predicted, true = (_number(score, f"{region}_{name}") for name in ("volume_ml", "reference_ml"))
    if math.isnan(predicted + true) or not predicted + true:
        return ""
    if not true:
        return f"{region} predicted though there is none: {_ml(predicted)}"
    found = dice_of(score, region) * (predicted + true) / 2
    if found < FOUND_SHARE * true:
        return _missed(region, found, predicted, true)
    if predicted > TOO_LARGE * true:
        return f"{region} too large: {_ml(predicted)} for {_ml(true)} ({predicted / true:.1f} times)"
    distance = _number(score, f"{region}_hd95")
    if distance > FAR_MM:
        return f"{region} has parts far off: HD95 {distance:.0f} mm"
    return ""


def _missed(region: str, found: float, predicted: float, true: float) -> str:
    elsewhere = predicted - found
    if elsewhere > FOUND_SHARE * true:
        return f"{region} in the wrong place: {_amount(found)} of {_ml(true)} found, {_ml(elsewhere)} elsewhere"
    return f"{region} missed: {_amount(found)} of {_ml(true)} found"


def _number(score: Mapping[str, Any], name: str) -> float:
    value = score.get(name)
    return math.nan if value is None else float(value)


def _ml(volume: float) -> str:
    return f"{_amount(volume)} ml"


def _amount(volume: float) -> str:
    return f"{volume:.1f}" if volume >= 0.1 or volume < 5e-4 else f"{volume:.3f}"
