"""Random fields and distances that are defined in millimetres, so that they do not depend on a voxel grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

NODES = 48
NODES_PER_LENGTH = 5.0


class SmoothField:
    """Stationary, periodic Gaussian random field with zero mean and unit variance.

    White noise on a lattice is low-pass (or band-pass) filtered and read between the nodes by linear interpolation:
    the field is a continuous function of position, and the draw does not depend on where it will be evaluated.

    Args:
        rng: generator that draws the lattice.
        length: size of the field's features in mm; the field repeats after about 10 lengths.
        band_pass: take features of about `length` only, and no larger ones.
    """

    def __init__(self, rng: np.random.Generator, length: float, band_pass: bool = False) -> None:
        """Draws the field."""
        noise = rng.standard_normal((NODES,) * 3)
        nodes = ndimage.gaussian_filter(noise, NODES_PER_LENGTH / 2.355, mode="wrap")
        if band_pass:
            nodes -= ndimage.gaussian_filter(noise, NODES_PER_LENGTH / 1.5, mode="wrap")
        nodes = (nodes - nodes.mean()) / nodes.std()
        self.step = length / NODES_PER_LENGTH
        self.slope = float(np.sqrt(sum((g**2).mean() for g in np.gradient(nodes)))) / self.step
        self.nodes = nodes.astype(np.float32)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Evaluates the field at `points` [3, n] in mm; returns [n] float32."""
        return ndimage.map_coordinates(self.nodes, points / np.float32(self.step), order=1, mode="grid-wrap")

    def sheet(self, points: np.ndarray) -> np.ndarray:
        """Approximate distance in mm to the surface on which the field is zero, [n]."""
        return np.abs(self(points)) / self.slope


def ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """First-order signed distance in mm to an ellipsoid, negative inside; `points` [3, n]."""
    radii = np.asarray(radii, np.float32)[:, None]
    scaled = (points - np.asarray(centre, np.float32)[:, None]) / radii
    radius = np.linalg.norm(scaled, axis=0)
    return radius * (radius - 1) / np.maximum(np.linalg.norm(scaled / radii, axis=0), 1e-4)


def capsule(points: np.ndarray, start: Sequence[float], end: Sequence[float], radii: tuple[float, float]) -> np.ndarray:
    """Signed distance in mm to a tube from `start` to `end` whose radius runs from `radii[0]` to `radii[1]`."""
    origin = np.asarray(start, np.float32)[:, None]
    axis = np.asarray(end, np.float32)[:, None] - origin
    along = np.clip((axis * (points - origin)).sum(0) / (axis**2).sum(), 0, 1)
    distance = np.linalg.norm(points - origin - axis * along, axis=0)
    return distance - (radii[0] + (radii[1] - radii[0]) * along)


def smooth_min(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    """Minimum of two distances whose crease is rounded over `width` mm."""
    blend = np.clip(0.5 + 0.5 * (second - first) / width, 0, 1)
    return second + (first - second) * blend - width * blend * (1 - blend)


def inside(distance: np.ndarray, voxel: float) -> np.ndarray:
    """Share in [0, 1] of a voxel (edge `voxel` mm) that lies where a signed distance (mm) is negative."""
    return np.clip(0.5 - distance / voxel, 0, 1)
