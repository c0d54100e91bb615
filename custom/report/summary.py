"""Scores of subjects to means over folds: the numbers of the paper's Table 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..cohort import REGIONS

COLUMNS = (*REGIONS, "Average")
SKIP, BRATS = "skip", "brats"
ValueOf = Callable[[Mapping[str, Any], str], float]


def models_of(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the models, in the order of their first score."""
    return list(dict.fromkeys(str(score["model"]) for score in scores))


def dice_of(score: Mapping[str, Any], region: str, convention: str = SKIP) -> float:
    """Dice of one subject and region under a convention for empty regions.

    Args:
        score: the Dice as "ET" or, as `metrics.score_subject` calls it, "ET_dice", NaN where the reference is empty;
            and perhaps "ET_dice_brats", which is then 1 where the prediction is empty too, and 0 where it is not.
        region: one of `REGIONS`.
        convention: "skip" keeps the NaN. "brats" takes "ET_dice_brats"; where that is absent a NaN stays a NaN, for it
            does not tell whether something was predicted.

    Raises:
        KeyError: the score has no Dice of the region.
        ValueError: the convention is neither.
    """
    if convention not in (SKIP, BRATS):
        raise ValueError(f"convention must be {SKIP!r} or {BRATS!r}, got {convention!r}")
    names = (f"{region}_dice_brats",) * (convention == BRATS) + (region, f"{region}_dice")
    name = next((name for name in names if name in score), None)
    if name is None:
        raise KeyError(f"score of subject {score.get('subject')} has neither {region!r} nor '{region}_dice'")
    return float(score[name])


def fold_means(scores: Sequence[Mapping[str, Any]], model: str, convention: str = SKIP) -> dict[str, dict[Any, float]]:
    """Mean Dice of a model: {"ET", "TC", "WT", "Average": {fold: mean over its subjects}}.

    A fold's average is the mean over its regions' means. NaN where no subject of the fold has a value.
    """
    return means_by_fold(scores, model, partial(dice_of, convention=convention))


def means_by_fold(scores: Sequence[Mapping[str, Any]], model: str, value_of: ValueOf) -> dict[str, dict[Any, float]]:
    """What `fold_means` is for Dice, for the value that `value_of(score, region)` gives."""
    folds = sorted({score["fold"] for score in scores if str(score["model"]) == model}, key=str)
    means: dict[str, dict[Any, float]] = {column: {} for column in COLUMNS}
    for fold in folds:
        own = [score for score in scores if str(score["model"]) == model and score["fold"] == fold]
        for region in REGIONS:
            means[region][fold] = mean_of([value_of(score, region) for score in own])
        means["Average"][fold] = mean_of([means[region][fold] for region in REGIONS])
    return means


def spread(by_fold: Mapping[Any, float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1) over folds; NaN for what too few folds cannot give."""
    values = np.array([value for value in by_fold.values() if not math.isnan(value)])
    mean = float(values.mean()) if values.size else math.nan
    return mean, float(values.std(ddof=1)) if values.size > 1 else math.nan


def summarise_scores(
    scores: Sequence[Mapping[str, Any]], convention: str = SKIP
) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over folds, {model: {"ET", "TC", "WT", "Average": (mean, sd)}} (paper, Table 2)."""
    return summarise_values(scores, partial(dice_of, convention=convention))


def summarise_values(
    scores: Sequence[Mapping[str, Any]], value_of: ValueOf
) -> dict[str, dict[str, tuple[float, float]]]:
    """What `summarise_scores` is for Dice, for the value that `value_of(score, region)` gives."""
    return {
        model: {column: spread(values) for column, values in means_by_fold(scores, model, value_of).items()}
        for model in models_of(scores)
    }


def mean_of(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
