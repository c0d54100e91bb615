"""Dice of one region of one subject for every threshold and smallest component, from one labelling a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from monai.transforms.utils import generate_spatial_bounding_box
from scipy import ndimage

from ..cohort import REGIONS
from ..files import UserError
from ..inference import fill_holes
from ..metrics import paired_differences
from ..weights import DEFAULT_SETTINGS

DEFAULT_THRESHOLD: float = DEFAULT_SETTINGS["thresholds"][0]
DEFAULT_VOLUME_MM3: float = DEFAULT_SETTINGS["min_volume_mm3"][0]


@dataclass(frozen=True)
class Grid:
    """Settings to try.

    Attributes:
        thresholds: a voxel is in a region from this probability on, each in (0, 1).
        volumes_mm3: smaller components are removed; 0 keeps all.
        fill_holes: for ET, TC and WT, whether holes are filled afterwards.

    Raises:
        ValueError: a value is out of range, or the defaults (0.5 and 50 mm³) are not among them.
    """

    thresholds: tuple[float, ...]
    volumes_mm3: tuple[float, ...]
    fill_holes: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not all(0 < threshold < 1 for threshold in self.thresholds) or min(self.volumes_mm3, default=-1) < 0:
            raise UserError(
                f"cannot try thresholds {list(self.thresholds)} with smallest components of {list(self.volumes_mm3)} "
                "mm³: give thresholds between 0 and 1, and volumes from 0 on"
            )
        if DEFAULT_THRESHOLD not in self.thresholds or DEFAULT_VOLUME_MM3 not in self.volumes_mm3:
            raise UserError(
                f"the defaults, threshold {DEFAULT_THRESHOLD} and {DEFAULT_VOLUME_MM3:g} mm³, must be among the "
                "settings to try: everything is judged against them"
            )
        if len(self.fill_holes) != len(REGIONS):
            raise UserError(f"fill_holes is {list(self.fill_holes)}: one answer each for {', '.join(REGIONS)}")

    @classmethod
    def of(cls, thresholds: Sequence[float], volumes_mm3: Sequence[float], holes: Sequence[bool]) -> Grid:
        """Grid from lists, in ascending order and without duplicates."""
        return cls(
            tuple(sorted({float(threshold) for threshold in thresholds})),
            tuple(sorted({float(volume) for volume in volumes_mm3})),
            tuple(bool(fill) for fill in holes),
        )

    @property
    def default(self) -> tuple[int, int]:
        """Where the defaults stand among thresholds and volumes."""
        return self.thresholds.index(DEFAULT_THRESHOLD), self.volumes_mm3.index(DEFAULT_VOLUME_MM3)

    def score(self, probabilities: np.ndarray, truth: np.ndarray, voxel_mm3: float) -> np.ndarray:
        """Dice of all regions of one subject, each on its own.

        They are not nested here as inference does: on 11 BraTS subjects with weak weights that moved no region's mean
        Dice by more than 0.0003, and it would tie the choice for one region to those for the others.

        Args:
            probabilities: ``[3, *spatial]`` of ET, TC and WT on the native grid, in [0, 1].
            truth: ``[3, *spatial]``, boolean.
            voxel_mm3: volume of a voxel.

        Returns:
            ``[3, T, V]`` for ``T`` thresholds and ``V`` volumes, in [0, 1]; where both masks are empty 1, where one is,
            0 (BraTS convention), so that false positives count.
        """
        fewest = [math.ceil(volume / voxel_mm3 - 1e-3) for volume in self.volumes_mm3]
        return np.stack(
            [
                score_region(probability, mask, self.thresholds, fewest, fill)
                for probability, mask, fill in zip(probabilities, truth, self.fill_holes, strict=True)
            ]
        )


def score_region(
    probability: np.ndarray, truth: np.ndarray, thresholds: Sequence[float], min_voxels: Sequence[int], fill: bool
) -> np.ndarray:
    """Dice ``[T, V]`` of one region ``[*spatial]``; see :meth:`Grid.score`."""
    total = int(truth.sum())
    candidate = probability >= min(thresholds)
    if not candidate.any():
        return np.full((len(thresholds), len(min_voxels)), float(total == 0))
    box = tuple(map(slice, *generate_spatial_bounding_box(candidate[None])))
    inner, expected = probability[box], truth[box]
    counts = [list(_counts(inner >= threshold, expected, min_voxels, fill)) for threshold in thresholds]
    size, overlap = np.moveaxis(np.array(counts, dtype=float), -1, 0)
    both = size + total
    return np.where(both > 0, 2 * overlap / np.maximum(both, 1), 1.0)


def _counts(mask: np.ndarray, truth: np.ndarray, min_voxels: Sequence[int], fill: bool) -> Iterator[tuple[int, int]]:
    """Voxels of ``mask``, and of those in ``truth``, once the components of fewer voxels are gone."""
    labels, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    sizes = np.bincount(labels.ravel())
    hits = np.bincount(labels[truth], minlength=len(sizes))
    known: dict[bytes, tuple[int, int]] = {}
    for fewest in min_voxels:
        keep = sizes >= fewest
        keep[0] = False
        if keep.tobytes() not in known:
            if fill:
                filled = fill_holes(keep[labels])
                known[keep.tobytes()] = int(filled.sum()), int((filled & truth).sum())
            else:
                known[keep.tobytes()] = int(sizes[keep].sum()), int(hits[keep].sum())
        yield known[keep.tobytes()]


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
        interval: 95 % bootstrap interval of the difference over subjects; none where a choice has touched it.
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


def choose(
    dice: np.ndarray, folds: Sequence[int], grid: Grid, corrected: bool = True, confidence: float | None = 0.95
) -> dict[str, Choice]:
    """Choose for every region.

    Refinement is kept where it raises mean Dice at the default settings (do no harm). Threshold and size are those of
    the highest mean Dice on the maps so chosen; they are adopted only where that procedure, chosen on the other folds
    and applied to the held-out one, beats the defaults: the highest of many means always looks better on the subjects
    that it was chosen on.

    Args:
        dice: ``[subjects, 3, 2, T, V]``, out of fold: regions; coarse and refined; thresholds; volumes of ``grid``.
        folds: fold of each subject.
        grid: the settings that were tried.
        corrected: whether there is a corrector at all.
        confidence: of the interval of the difference; None for none, see `may_infer`.
    """
    threshold, volume = grid.default
    differences = _differences(dice[..., threshold, volume], confidence)
    return {
        region: _choose_region(dice[:, index], folds, grid, differences[region], corrected)
        for index, region in enumerate(REGIONS)
    }


def cross_fit(dice: np.ndarray, folds: Sequence[int], grid: Grid) -> float | None:
    """Mean Dice of subjects at settings chosen on all other folds, ``None`` where there is only one fold.

    ``dice`` is ``[subjects, T, V]`` of one region on the ``grid``; ``folds`` the fold of each subject.
    """
    if len(set(folds)) < 2:
        return None
    scores = np.empty(len(dice))
    for fold in set(folds):
        held_out = np.asarray(folds) == fold
        threshold, volume = best_settings(dice[~held_out], grid)
        scores[held_out] = dice[held_out, threshold, volume]
    return float(scores.mean())


def best_settings(dice: np.ndarray, grid: Grid) -> tuple[int, int]:
    """Where mean Dice ``[subjects, T, V]`` is highest; of equals, the one nearest to the defaults."""
    mean = dice.mean(0)
    row, column = grid.default
    equals = np.argwhere(mean >= mean.max() - ROUNDING)
    nearest = np.lexsort((np.abs(equals[:, 1] - column), np.abs(equals[:, 0] - row)))[0]
    return int(equals[nearest, 0]), int(equals[nearest, 1])


def _choose_region(
    dice: np.ndarray, folds: Sequence[int], grid: Grid, paired: Mapping[str, Any], corrected: bool
) -> Choice:
    refine = bool(corrected and paired["difference"] > ROUNDING)
    chosen = dice[:, int(refine)]
    coarse, refined = dice[:, :, grid.default[0], grid.default[1]].mean(0).tolist()
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


def _differences(dice: np.ndarray, confidence: float | None) -> dict[str, dict[str, Any]]:
    """Refined less coarse, paired by subject, from ``[subjects, 3, 2]`` at the default settings."""
    rows = []
    for kind, name in enumerate((COARSE, REFINED)):
        for subject, scores in enumerate(dice[..., kind]):
            row = {f"{region}_dice_brats": float(score) for region, score in zip(REGIONS, scores, strict=True)}
            rows.append({"model": name, "subject": str(subject), "mean_dice_brats": float(scores.mean()), **row})
    return paired_differences(rows, REFINED, COARSE, "dice_brats", confidence=confidence)


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
    doubt = ""
    if low is not None and high is not None:
        chance = "" if low * high > 0 else ", so it may be chance"
        doubt = f" (95 % interval of the difference {low:+.4f} to {high:+.4f}{chance})"
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
