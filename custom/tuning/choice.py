"""What to use for one region, judged on out-of-fold Dice: refinement, threshold and smallest component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..cohort import REGIONS
from ..metrics import paired_differences
from .grid import DEFAULT_THRESHOLD, DEFAULT_VOLUME_MM3, Grid

COARSE, REFINED = "coarse", "refined"
ROUNDING = 1e-9
"""Dice that differ by no more are the same."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one region, and why; Dice are means over subjects, ``None`` where nothing was measured.

    Attributes:
        threshold: probability from which on a voxel is in the region.
        min_volume_mm3: smaller components are removed.
        refine: whether the corrector's logits are used.
        dice_coarse: without the corrector, at the default threshold and size.
        dice_refined: with it.
        difference: the second less the first.
        interval: 95 % bootstrap interval of the difference over subjects.
        dice_default: of the maps that ``refine`` chose, at the default threshold and size.
        dice_tuned: of the same maps at settings that were chosen on the other folds.
        adopted: whether ``threshold`` and ``min_volume_mm3`` are tuned ones.
        reason: one sentence.
    """

    threshold: float = DEFAULT_THRESHOLD
    min_volume_mm3: float = DEFAULT_VOLUME_MM3
    refine: bool = False
    dice_coarse: float | None = None
    dice_refined: float | None = None
    difference: float | None = None
    interval: tuple[float | None, float | None] = (None, None)
    dice_default: float | None = None
    dice_tuned: float | None = None
    adopted: bool = False
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, Dice to six digits."""
        return {
            name: round(value, 6) if isinstance(value, float) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def choose(dice: np.ndarray, folds: Sequence[int], grid: Grid, corrected: bool = True) -> dict[str, Choice]:
    """Choose for every region.

    Refinement is kept where it raises mean Dice at the default settings (do no harm). Threshold and size are those of
    the highest mean Dice on the maps so chosen; they are adopted only where that procedure, chosen on the other folds
    and applied to the held-out one, beats the defaults: the highest of many means always looks better on the subjects
    that it was chosen on.

    Args:
        dice: ``[subjects, 3, 2, T, V]``, out of fold: regions; coarse and refined; thresholds; volumes.
        folds: fold of each subject.
        grid: the settings that were tried.
        corrected: whether there is a corrector at all.
    """
    differences = _differences(dice[(..., *grid.default)])
    choices = {}
    for index, region in enumerate(REGIONS):
        difference = float(differences[region]["difference"])
        refine = corrected and difference > ROUNDING
        choices[region] = _choose_region(dice[:, index], folds, grid, refine, differences[region], corrected)
    return choices


def cross_fit(dice: np.ndarray, folds: Sequence[int], grid: Grid) -> float | None:
    """Mean Dice of subjects at settings chosen on all other folds.

    Args:
        dice: ``[subjects, T, V]`` of one region.
        folds: fold of each subject.
        grid: the settings that were tried.

    Returns:
        ``None`` where there is only one fold.
    """
    folds = np.asarray(folds)
    if len(np.unique(folds)) < 2:
        return None
    scores = np.empty(len(dice))
    for fold in np.unique(folds):
        held_out = folds == fold
        scores[held_out] = dice[(held_out, *best_settings(dice[~held_out], grid))]
    return float(scores.mean())


def best_settings(dice: np.ndarray, grid: Grid) -> tuple[int, int]:
    """Where mean Dice ``[subjects, T, V]`` is highest; of equals, the one nearest to the defaults."""
    mean = dice.mean(0)
    row, column = grid.default
    equals = np.argwhere(mean >= mean.max() - ROUNDING)
    nearest = np.lexsort((np.abs(equals[:, 1] - column), np.abs(equals[:, 0] - row)))[0]
    return int(equals[nearest, 0]), int(equals[nearest, 1])


def _choose_region(
    dice: np.ndarray, folds: Sequence[int], grid: Grid, refine: bool, paired: Mapping[str, Any], corrected: bool
) -> Choice:
    chosen = dice[:, int(refine)]
    coarse, refined = (float(dice[(slice(None), kind, *grid.default)].mean()) for kind in (0, 1))
    default, tuned = refined if refine else coarse, cross_fit(chosen, folds, grid)
    best = best_settings(chosen, grid)
    adopted = best != grid.default and tuned is not None and tuned > default + ROUNDING
    settings = best if adopted else grid.default
    threshold, volume = grid.thresholds[settings[0]], grid.volumes_mm3[settings[1]]
    reasons = (_refinement(paired, corrected), _tuning(default, tuned, best != grid.default, threshold, volume, grid))
    return Choice(
        threshold=threshold,
        min_volume_mm3=volume,
        refine=refine,
        dice_coarse=coarse,
        dice_refined=refined,
        difference=float(paired["difference"]),
        interval=_limits(paired),
        dice_default=default,
        dice_tuned=tuned,
        adopted=adopted,
        reason="; ".join(reasons) + ".",
    )


def _differences(dice: np.ndarray) -> dict[str, dict[str, Any]]:
    """Refined less coarse, paired by subject, from ``[subjects, 3, 2]`` at the default settings."""
    rows = []
    for kind, name in enumerate((COARSE, REFINED)):
        for subject, scores in enumerate(dice[..., kind]):
            row = {f"{region}_dice_brats": float(score) for region, score in zip(REGIONS, scores, strict=True)}
            rows.append({"model": name, "subject": str(subject), "mean_dice_brats": float(scores.mean()), **row})
    return paired_differences(rows, REFINED, COARSE, "dice_brats")


def _limits(paired: Mapping[str, Any]) -> tuple[float | None, float | None]:
    low, high = (None if math.isnan(limit) else round(float(limit), 6) for limit in paired["interval"])
    return low, high


def _refinement(paired: Mapping[str, Any], corrected: bool) -> str:
    if not corrected:
        return "There is no corrector"
    difference, (low, high) = paired["difference"], _limits(paired)
    if abs(difference) <= ROUNDING:
        return "Refining does not change mean Dice, so it is left out"
    verb, verdict = ("raises", "kept") if difference > 0 else ("lowers", "left out")
    doubt = "" if low is None or high is None else f" (95 % interval of the difference {low:+.4f} to {high:+.4f}"
    doubt += ")" if doubt and low * high > 0 else ", so it may be chance)" if doubt else ""
    return f"Refining {verb} mean Dice by {abs(difference):.4f}{doubt} and is {verdict}"


def _tuning(default: float, tuned: float | None, moved: bool, threshold: float, volume: float, grid: Grid) -> str:
    if len(grid.thresholds) * len(grid.volumes_mm3) == 1:
        return "no other threshold or smallest component was tried"
    if not moved:
        return "no other threshold or smallest component gives a higher mean Dice than the defaults"
    if tuned is None:
        return "the defaults stay, because with one fold nothing shows whether other settings hold on new subjects"
    figures = (
        f"mean Dice of held-out subjects {default:.4f} at the defaults, {tuned:.4f} at settings tuned without them"
    )
    if tuned > default + ROUNDING:
        return f"threshold {threshold:g} and smallest component {volume:g} mm³ are adopted ({figures})"
    return f"the defaults stay, because tuning does not hold on held-out subjects ({figures})"
