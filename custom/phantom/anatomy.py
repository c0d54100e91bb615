"""A brain without a tumour, as functions of position: hull, folded cortex, ventricles, deep nuclei, cerebellum.

Positions are in the brain's own frame: millimetres, axes to the Right, Anterior and Superior, origin near the centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

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
        mirrored = mirror(p)
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
        mirrored = mirror(p)
        distance = capsule(p, (0, -38, -28), (0, -40, -40), (3.5, 4.5))
        third = ellipsoid(p, (0, -8, 0), (2.2, 15, 11))
        distance = np.minimum(distance, third)
        for start, end, radii in VENTRICLE_TUBES:
            tube = capsule(mirrored, start, end, radii) - 0.5 * self.ventricle_size
            distance = smooth_min(distance, tube, 3)
        return np.maximum(distance, 1.0 - np.abs(p[0])) if self.ventricle_size < 0 else distance

    def _nuclei(self, p: np.ndarray) -> np.ndarray:
        return np.minimum.reduce([ellipsoid(mirror(p), centre, radii) for centre, radii in NUCLEI])


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


def mirror(points: np.ndarray) -> np.ndarray:
    """Points [3, n] with those on the left brought to the right."""
    return np.concatenate([np.abs(points[:1]), points[1:]])


def ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """First-order signed distance in mm to an ellipsoid, negative inside; `points` [3, n]."""
    size = np.asarray(radii, np.float32)[:, None]
    scaled = (points - np.asarray(centre, np.float32)[:, None]) / size
    radius = np.linalg.norm(scaled, axis=0)
    return radius * (radius - 1) / np.maximum(np.linalg.norm(scaled / size, axis=0), 1e-4)


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
