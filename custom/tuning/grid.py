"""Dice of one region of one subject for every threshold and smallest component, from one labelling a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.transforms.utils import generate_spatial_bounding_box
from scipy import ndimage

from ..cohort import REGIONS
from ..postprocess import fill_holes
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
            raise ValueError(
                f"cannot try thresholds {list(self.thresholds)} with smallest components of {list(self.volumes_mm3)} "
                "mm³: give thresholds between 0 and 1, and volumes from 0 on"
            )
        if DEFAULT_THRESHOLD not in self.thresholds or DEFAULT_VOLUME_MM3 not in self.volumes_mm3:
            raise ValueError(
                f"the defaults, threshold {DEFAULT_THRESHOLD} and {DEFAULT_VOLUME_MM3:g} mm³, must be among the "
                "settings to try: everything is judged against them"
            )
        if len(self.fill_holes) != len(REGIONS):
            raise ValueError(f"fill_holes is {list(self.fill_holes)}: one answer each for {', '.join(REGIONS)}")

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
            known[keep.tobytes()] = _filled_counts(keep[labels], truth) if fill else _sums(sizes[keep], hits[keep])
        yield known[keep.tobytes()]


def _filled_counts(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    filled = fill_holes(mask)
    return _sums(filled, filled & truth)


def _sums(*arrays: Any) -> tuple[int, int]:
    size, overlap = (int(array.sum()) for array in arrays)
    return size, overlap
