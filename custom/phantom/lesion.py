"""A glioma as functions of position: necrotic core, enhancing rim, oedema that runs in white matter, mass effect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from .anatomy import Brain, Tissues
from .fields import SmoothField, inside


@dataclass(frozen=True)
class Lesion:
    """Shares of a voxel in [0, 1], each [n]: necrotic or non-enhancing core, oedema, enhancing tumour."""

    core: np.ndarray
    oedema: np.ndarray
    enhancing: np.ndarray


class Glioma:
    """One individual's tumour in one individual's brain.

    Args:
        rng: generator that draws the tumour.
        brain: where it grows; its centre is kept in the cerebrum, off the midline and out of the ventricles.
        enhancing: with an enhancing rim and necrosis; otherwise the whole core is non-enhancing.
    """

    def __init__(self, rng: np.random.Generator, brain: Brain, enhancing: bool = True) -> None:
        """Draws the tumour and places it."""
        self.enhancing = enhancing
        self.radius, self.reach, self.rim = rng.uniform((13, 9, 2.5), (26, 22, 5.5))
        self.push = rng.uniform(0.25, 0.5)
        rotation = Rotation.from_quat(rng.standard_normal(4)).as_matrix()
        self.shape = (np.diag(rng.uniform(0.8, 1.25, 3)) @ rotation).astype(np.float32)
        self.lobes, self.rim_field, self.nodules = (SmoothField(rng, length) for length in (24, 15, 13))
        self.fine, self.fingers = SmoothField(rng, 8), SmoothField(rng, 26)
        self.centre = _place(rng, brain)

    def before_growth(self, points: np.ndarray) -> np.ndarray:
        """Where the tissue now at `points` [3, n] mm was before the tumour pushed it outwards, [3, n]."""
        offset = points - self.centre
        closeness = np.exp(-(offset**2).sum(0) / (2 * (1.5 * self.radius) ** 2))
        return points - (self.push * closeness).astype(np.float32) * offset

    def compartments(self, points: np.ndarray, tissues: Tissues, hull: np.ndarray, voxel: float) -> Lesion:
        """Tumour shares of voxels at `points` [3, n], given the healthy tissue and the distance to the hull there."""
        distance = np.linalg.norm(self.shape @ (points - self.centre), axis=0) - self.radius
        border = distance + 0.2 * self.radius * self.lobes(points) + 0.9 * self.fine(points)
        tumour_core = inside(border, voxel) * inside(hull + 1, voxel) * (1 - tissues.ventricle)
        oedema = inside(self._oedema(points, distance, tissues), voxel) * (1 - tissues.csf) * (1 - tumour_core)
        if not self.enhancing:
            return Lesion(tumour_core, oedema, np.zeros_like(tumour_core))
        thickness = self.rim * np.clip(1 + 0.55 * self.rim_field(points), 0.15, 2)
        thickness += np.where(border > -3 * self.rim, 4 * np.clip(self.nodules(points) - 0.9, 0, 2) * self.rim, 0)
        rim = tumour_core * inside(-border - np.minimum(thickness, 0.55 * self.radius), voxel)
        return Lesion(tumour_core - rim, oedema, rim)

    def _oedema(self, points: np.ndarray, distance: np.ndarray, tissues: Tissues) -> np.ndarray:
        reach = self.reach * (1 + 0.45 * self.fingers(points)) + 1.2 * self.fine(points)
        spared = 0.9 * self.reach * np.clip(0.7 - tissues.cortex_depth / 3, 0, 1)
        crossed = np.maximum(-np.sign(self.centre[0]) * points[0], 0)
        return distance - reach + spared + 0.8 * crossed


def _place(rng: np.random.Generator, brain: Brain) -> np.ndarray:
    candidates = rng.uniform((-52, -65, -22), (52, 62, 44), (512, 3)).T.astype(np.float32)
    depth = -brain.hull(candidates)
    suitable = (depth > 15) & (depth < 38) & (np.abs(candidates[0]) > 15) & (brain.ventricle_distance(candidates) > 4)
    return candidates[:, [int(np.argmax(suitable))]]
