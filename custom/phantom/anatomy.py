"""A brain without a tumour, as functions of position: hull, folded cortex, ventricles, deep nuclei, cerebellum.

Positions are in the brain's own frame: millimetres, axes to the Right, Anterior and Superior, origin near the centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import SmoothField, capsule, ellipsoid, inside, smooth_min

BRAIN_BOX_MM = ((-76.0, -95.0, -82.0), (76.0, 92.0, 69.0))
VENTRICLE_TUBES = (
    ((7, 32, 0), (10, 16, 16), (4.5, 5.5)),
    ((10, 16, 16), (14, -22, 18), (5.5, 6.0)),
    ((14, -22, 18), (25, -38, 6), (6.0, 7.5)),
    ((25, -38, 6), (24, -62, 6), (6.5, 2.0)),
    ((25, -38, 4), (33, -12, -20), (5.0, 2.5)),
)
NUCLEI = (((13, 20, 8), (5.5, 10, 10)), ((26, 4, 2), (6.5, 16, 10)), ((10, -14, 5), (9, 14, 9)))


@dataclass(frozen=True)
class Tissues:
    """Shares of a voxel in [0, 1], each [n], which add up to one; and distances in mm, each [n].

    `cortex_depth` is how far under the cortex (in white matter) a point lies, negative in cortex and in sulci.
    """

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    ventricle: np.ndarray
    vessel: np.ndarray
    cortex_depth: np.ndarray


class Brain:
    """One individual's anatomy; two generators in the same state give the same brain.

    Args:
        rng: generator that draws the individual.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        """Draws the individual."""
        self.stretch = rng.uniform(0.95, 1.02, (3, 1)).astype(np.float32)
        self.sulcus_width, self.sulcus_depth, self.ventricle_size = rng.uniform((0.2, 16, -1.5), (1.0, 22, 2.0))
        self.warps = [SmoothField(rng, 70) for _ in range(3)]
        self.folds = SmoothField(rng, 16, band_pass=True)
        self.folia = SmoothField(rng, 12)
        self.depths = SmoothField(rng, 28)
        self.surface = SmoothField(rng, 25)
        self.vessels = SmoothField(rng, 22)

    def hull(self, points: np.ndarray) -> np.ndarray:
        """Signed distance in mm to the skull-stripped outline of `points` [3, n], negative inside."""
        cerebrum, cerebellum, stem = self._parts(self._straighten(points))
        return smooth_min(smooth_min(cerebrum, cerebellum, 12), stem, 6)

    def tissues(self, points: np.ndarray, anatomical: np.ndarray, voxel: float) -> Tissues:
        """Tissue shares of voxels.

        Args:
            points: where the voxels are, [3, n]; the outline is drawn here.
            anatomical: where their tissue was before a tumour pushed it aside, [3, n].
            voxel: edge of a voxel in mm, over which borders are blurred.
        """
        cerebrum, cerebellum, stem = self._parts(self._straighten(points))
        straight = self._straighten(anatomical)
        fold, sulci = self._sulci(straight, -cerebrum)
        rim = np.clip(0.3 + 1.1 * self.depths(straight), 0, 2.5)
        pial = np.minimum(np.minimum(-cerebrum - rim, fold), self._fissures(straight))
        in_cerebellum = cerebellum < cerebrum
        pial = np.where(in_cerebellum, np.minimum(-cerebellum, self._folia(straight, -cerebellum)), pial)
        pial = np.where(stem < np.minimum(cerebrum, cerebellum + 4), np.maximum(pial, 3 - stem), pial)
        cortex_depth = pial - self.sulcus_width - np.where(in_cerebellum, 2.0, 3.0)

        ventricle = inside(self._ventricles(straight), voxel)
        csf = np.maximum(inside(pial - self.sulcus_width, voxel), ventricle)
        white = (1 - csf) * inside(-cortex_depth, voxel) * (1 - 0.75 * inside(self._nuclei(straight), voxel))
        vessel = inside(np.hypot(sulci, self.vessels.sheet(straight)) - 0.9, voxel) * inside(3 + cerebrum, voxel)
        return Tissues(csf, 1 - csf - white, white, ventricle, vessel * ~in_cerebellum, cortex_depth)

    def ventricle_distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance in mm of `points` [3, n] to the lateral ventricles, negative inside."""
        return self._ventricles(self._straighten(points))

    def _straighten(self, points: np.ndarray) -> np.ndarray:
        warp = np.stack([field(points) for field in self.warps])
        return points / self.stretch + np.float32(1.8) * warp

    def _parts(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mirrored = np.abs(p)
        mirrored[1:] = p[1:]
        egg = mirrored.copy()
        egg[0] *= 1 + 0.15 * p[1] / 86
        upper = ellipsoid(egg, (7, -2, 6), (62, 87, 56))
        tentorium = 13 * np.exp(-((p[0] / 32) ** 2) - ((p[1] + 42) / 34) ** 2)
        floor = -(p[2] + 23 + 0.06 * p[1] - tentorium)
        upper = -smooth_min(-upper, -floor, 14)
        temporal = ellipsoid(mirrored, (41, 4, -24), (23, 43, 21))
        cerebrum = smooth_min(upper, temporal, 5) + 0.7 * self.surface(p)
        cerebellum = ellipsoid(mirrored, (18, -47, -36), (34, 33, 26))
        stem = capsule(p, (0, -12, -16), (0, -28, -68), (14, 9))
        return cerebrum, cerebellum, stem

    def _sulci(self, p: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        radius = np.linalg.norm(p / np.array([[64.0], [84], [56]], np.float32), axis=0)
        shell = p * np.maximum(radius, 0.2) ** np.float32(-0.7) + np.float32(1.8) * self.surface(p)
        sheet = self.folds.sheet(shell)
        beyond = np.maximum(depth - self.sulcus_depth - 5 * self.depths(p), 0)
        return np.hypot(sheet, beyond), np.hypot(sheet, np.maximum(beyond - 4, 0))

    def _folia(self, p: np.ndarray, depth: np.ndarray) -> np.ndarray:
        forward, up = p[1] + 34, p[2] + 40
        turns = 12 * np.arctan2(up, -forward) / np.pi + 0.5 * self.folia(p)
        leaf = np.hypot(forward, up) * np.abs(np.sin(np.pi * turns)) / 12
        return np.hypot(leaf, np.maximum(depth - 9 - 3 * self.depths(p), 0))

    def _fissures(self, p: np.ndarray) -> np.ndarray:
        x, y, z = p
        midline = np.abs(x + 0.8 * self.depths(p))
        callosum = ellipsoid(np.stack([0 * x, y, z]), (0, -4, 2), (1e3, 42, 25))
        midline = np.hypot(midline, np.maximum(-callosum, 0))
        sylvian = np.abs(z + 6 - 0.25 * (y - 5) + 1.5 * self.surface(p)) - 0.4
        sylvian = np.hypot(np.maximum(sylvian, 0), np.maximum(38 - np.abs(x), 0) + np.maximum(np.abs(y - 5) - 28, 0))
        island = ellipsoid(np.stack([np.abs(x), y, z]), (0, 5, 1), (39, 38, 34))
        beyond = np.maximum(np.hypot((y - 5) / 22, (z - 1) / 13) - 1, 0) * 13
        insula = np.hypot(island + 0.8 * self.surface(p), beyond + np.maximum(25 - np.abs(x), 0))
        return np.minimum(midline, np.minimum(sylvian, insula))

    def _ventricles(self, p: np.ndarray) -> np.ndarray:
        mirrored = np.abs(p)
        mirrored[1:] = p[1:]
        distance = capsule(p, (0, -38, -28), (0, -40, -40), (3.5, 4.5))
        third = ellipsoid(p, (0, -8, 0), (2.2, 15, 11))
        distance = np.minimum(distance, third)
        for start, end, radii in VENTRICLE_TUBES:
            tube = capsule(mirrored, start, end, radii) - 0.5 * self.ventricle_size
            distance = smooth_min(distance, tube, 3)
        return np.maximum(distance, 1.0 - np.abs(p[0])) if self.ventricle_size < 0 else distance

    def _nuclei(self, p: np.ndarray) -> np.ndarray:
        mirrored = np.abs(p)
        mirrored[1:] = p[1:]
        return np.minimum.reduce([ellipsoid(mirrored, centre, radii) for centre, radii in NUCLEI])
