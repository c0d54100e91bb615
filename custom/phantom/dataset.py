"""Simulated subjects: four images and a label map on a chosen grid, in memory or laid out as UTSW-Glioma's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nibabel import orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ..cohort import Cohort
from ..cohort.cohort import Item
from ..cohort.volumes import image_at, write_whole
from ..files import UserError
from .anatomy import BRAIN_BOX_MM, Brain, Glioma, Lesion, SmoothField, Tissues

SHAPE = (120, 120, 80)
SPACING = (2.0, 2.0, 2.0)
IMAGE_FILES = ("brain_t1.nii.gz", "brain_t1ce.nii.gz", "brain_t2.nii.gz", "brain_flair.nii.gz")
MASK_FILE = "tumorseg_FeTS.nii.gz"
MANUAL_MASK_FILE = "rtumorseg_manual_correction.nii.gz"


def write_phantom(
    root: str | os.PathLike[str],
    name: str,
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] = SPACING,
    orientation: str = "LPS",
    seed: int = 0,
    enhancing: bool = True,
    manual: bool = False,
    oblique_degrees: float = 0.0,
) -> Path:
    """Writes one simulated subject: four int16 images and a uint8 label map, all on one grid.

    The middle of the grid is the origin of world space, so that a seed puts its tumour at the same place in mm whatever
    the orientation, and whatever the shape and spacing as long as the field of view holds a full-sized brain.

    Args:
        root: dataset folder; made if absent.
        name: subject folder to write in `root`.
        shape: voxels along the stored axes.
        spacing: voxel size in mm along the stored axes.
        orientation: anatomical direction in which each stored axis runs, as nibabel's axcodes, such as "LPS" or "PIR".
        seed: decides anatomy, tumour and noise.
        enhancing: with enhancing tumour (label 4); otherwise labels 1 and 2 only.
        manual: also write a manual correction, which is the truth; the FeTS mask then misses the tumour's outer layer.
        oblique_degrees: rotation of the grid in world space, in the affine only.

    Returns:
        The subject's folder.

    Raises:
        ValueError: the orientation is no set of three axis codes, or the grid cannot hold a brain (see `simulate`).
    """
    to_stored = _axes_from_ras(orientation)
    stored_axes = to_stored[:, 0].astype(int)
    images, label = simulate([shape[i] for i in stored_axes], [spacing[i] for i in stored_axes], seed, enhancing)
    images = np.stack([orientations.apply_orientation(image, to_stored) for image in _as_int16(images, seed)])
    label = orientations.apply_orientation(label, to_stored)
    affine = _centred_affine(label.shape, spacing, orientation, oblique_degrees)

    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, image in zip(IMAGE_FILES, images, strict=True):
        write_whole(image_at(image, affine), folder / file)
    if manual:
        write_whole(image_at(label, affine), folder / MANUAL_MASK_FILE)
        label = label * ndimage.binary_erosion(label > 0)
    write_whole(image_at(label, affine), folder / MASK_FILE)
    return folder


def cohort_seeds(num_subjects: int, seed: int = 0, first_id: int = 1, names: str = "BT{:04d}") -> dict[str, int]:
    """Seeds of subjects by their names, for `write_absent`.

    A subject depends on `seed` and on its own number only: a larger cohort begins with the smaller one.

    Args:
        num_subjects: how many.
        seed: of the cohort.
        first_id: number of the first subject.
        names: what is made of a number; by default BT0001, BT0002, …
    """
    numbers = range(first_id, first_id + num_subjects)
    return {names.format(n): int(np.random.SeedSequence([seed, n]).generate_state(1)[0]) for n in numbers}


def write_absent(
    root: str | os.PathLike[str], seeds: Mapping[str, int], shape: Sequence[int], spacing: Sequence[float]
) -> list[Path]:
    """Writes those phantoms that are not there yet with `write_phantom`, two at a time, behind a progress bar.

    Args:
        root: dataset folder; made if absent.
        seeds: seed of each subject by its name; every fourth has no enhancing tumour.
        shape: as of `write_phantom`.
        spacing: as of `write_phantom`.

    Returns:
        The folders of all of them.
    """
    from tqdm import tqdm

    folders = [Path(root) / name for name in seeds]
    absent = [i for i, folder in enumerate(folders) if not (folder / MASK_FILE).exists()]  # the file written last

    def write(i: int) -> None:
        name = folders[i].name
        write_phantom(root, name, shape, spacing, seed=seeds[name], enhancing=i % 4 != 3)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # NumPy and SciPy let go of the interpreter lock
        list(tqdm(pool.map(write, absent), "phantoms", len(absent), unit="subject", disable=not absent))
    return folders


def training_phantoms(
    root: str | os.PathLike[str],
    num_subjects: int,
    seed: int = 0,
    shape: Sequence[int] = (240, 240, 155),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[Item]:
    """Items of phantoms, written to `root` where they are not yet, to be trained on beside patients.

    Their names, phantom_0001, …, are no patient's, and weights that were trained on them tell.

    Args:
        root: folder of the phantoms.
        num_subjects: how many; 0 writes none and gives no items.
        seed: of the first; the others' follow it.
        shape: as of `write_phantom`, and so is spacing.
        spacing: see there.
    """
    if num_subjects == 0:
        return []
    write_absent(root, {f"phantom_{n:04d}": seed + n for n in range(1, num_subjects + 1)}, shape, spacing)
    return Cohort(os.fspath(root), num_folds=min(5, num_subjects)).subjects()


def _axes_from_ras(orientation: str) -> np.ndarray:
    try:
        target = orientations.axcodes2ornt(tuple(orientation.upper()))
        if np.isnan(target).any() or len(target) != 3:
            raise ValueError
        return orientations.ornt_transform(orientations.axcodes2ornt("RAS"), target)
    except ValueError:
        raise UserError(f"orientation must be three axis codes such as 'LPS' or 'PIR', got {orientation!r}") from None


def _centred_affine(
    shape: Sequence[int], spacing: Sequence[float], orientation: str, oblique_degrees: float
) -> np.ndarray:
    world_axis, sign = orientations.axcodes2ornt(tuple(orientation.upper())).T
    directions = np.zeros((3, 3))
    directions[world_axis.astype(int), range(3)] = sign * np.asarray(spacing, float)
    tilt = Rotation.from_rotvec(oblique_degrees * np.array([2, 1, 2]) / 3, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ directions
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _as_int16(images: np.ndarray, seed: int) -> np.ndarray:
    """Scanner-like gains, one per sequence; brain voxels stay at least 1, background stays 0."""
    gains = np.random.default_rng([seed, 1]).uniform(350, 1500, 4).astype(np.float32)
    scaled = np.clip(np.rint(images * gains[:, None, None, None]), 1, np.iinfo(np.int16).max)
    return np.where(images > 0, scaled, 0).astype(np.int16)


def simulate(
    shape: Sequence[int], spacing: Sequence[float], seed: int, enhancing: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Simulates one glioma subject on a grid with axes to the Right, Anterior and Superior.

    The anatomy is a function of `seed` and of position in mm relative to the middle of the grid; the grid only samples
    it. Where the field of view is smaller than the brain (152 x 187 x 151 mm with margins), the whole brain shrinks
    with it. Below about 24 voxels a side a rim may be too thin to be labelled.

    Args:
        shape: voxels along R, A, S.
        spacing: voxel size in mm along R, A, S.
        seed: the same seed gives the same bytes.
        enhancing: with an enhancing rim; otherwise the label map has no ET.

    Returns:
        Images, float32 [4, *shape] in the order T1n, T1c, T2w, T2-FLAIR, non-negative and exactly 0 outside the brain;
        and the label map, uint8 [*shape], palette "brats2021" (1 core, 2 oedema, 4 enhancing tumour).

    Raises:
        ValueError: shape or spacing is not three positive numbers, or the grid is less than 12 voxels wide.
    """
    size, steps = _checked(shape, spacing)
    anatomy_rng, signal_rng, noise_rng = np.random.default_rng(seed).spawn(3)
    brain = Brain(anatomy_rng)
    glioma = Glioma(anatomy_rng, brain, enhancing)
    index, points, scale = _grid_points(size, steps)
    hull = brain.hull(points)
    kept = hull < 0
    index, points, hull = tuple(i[kept] for i in index), points[:, kept], hull[kept]

    voxel = float(np.prod(steps)) ** (1 / 3) / scale
    tissues = brain.tissues(points, glioma.before_growth(points), voxel)
    lesion = _one_piece(glioma.compartments(points, tissues, hull, voxel), index, size)
    clean = intensities(signal_rng, points, tissues, lesion)
    images, (x, y, z) = np.zeros((4, *size), np.float32), index
    images[:, x, y, z] = rician(noise_rng, clean, float(signal_rng.uniform(0.008, 0.02)))
    return images, _scatter(_labels(lesion), index, size)


def _checked(shape: Sequence[int], spacing: Sequence[float]) -> tuple[tuple[int, ...], np.ndarray]:
    if len(shape) != 3 or len(spacing) != 3 or min(shape) < 1 or min(spacing) <= 0:
        raise UserError(f"shape and spacing must each be three positive numbers, got {shape} and {spacing}")
    if (extent := np.asarray(shape) * spacing).min() / max(spacing) < 12:
        raise UserError(f"a field of view of {extent} mm is too small for voxels of {max(spacing)} mm: use more voxels")
    return tuple(int(n) for n in shape), np.asarray(spacing, np.float64)


def _grid_points(shape: tuple[int, ...], spacing: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray, float]:
    """Indices and positions (brain frame, mm) of voxels in the brain's box; and the scale of the brain, at most 1."""
    low, high = (np.array(corner) for corner in BRAIN_BOX_MM)
    scale = min(1.0, float(np.min((np.array(shape) - 2) * spacing / (high - low))))
    axes = []
    for n, step, first, last in zip(shape, spacing, low, high, strict=True):
        position = (np.arange(n) - (n - 1) / 2) * step / scale + (first + last) / 2
        axes.append(np.flatnonzero((position > first) & (position < last)))
    index = tuple(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    middle = (low + high) / 2
    points = [(i - (n - 1) / 2) * s / scale + m for i, n, s, m in zip(index, shape, spacing, middle, strict=True)]
    return index, np.stack(points).astype(np.float32), scale


def _labels(lesion: Lesion) -> np.ndarray:
    tumour_core = lesion.core + lesion.enhancing
    within_core = np.where(lesion.enhancing > lesion.core, 4, 1)
    tumour = np.where(tumour_core > lesion.oedema, within_core, 2)
    return np.where(tumour_core + lesion.oedema > 0.5, tumour, 0).astype(np.uint8)


def _one_piece(lesion: Lesion, index: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> Lesion:
    """Drops islands more than two voxels away from the largest component."""
    components, count = ndimage.label(_scatter(_labels(lesion), index, shape), np.ones((3, 3, 3)))
    if count < 2:
        return lesion
    largest = components == 1 + np.bincount(components.ravel())[1:].argmax()
    near = ndimage.binary_dilation(largest, iterations=2)[index]
    return Lesion(*(share * near for share in (lesion.core, lesion.oedema, lesion.enhancing)))


def _scatter(values: np.ndarray, index: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    volume = np.zeros(shape, values.dtype)
    volume[index] = values
    return volume


#         T1n   T1c   T2w  T2-FLAIR
CONTRAST = {
    "csf": (0.30, 0.27, 1.05, 0.16),
    "grey": (0.66, 0.58, 0.54, 0.52),
    "white": (0.88, 0.72, 0.40, 0.42),
    "vessel": (0.55, 1.30, 0.25, 0.25),
    "core": (0.46, 0.42, 0.95, 0.70),
    "oedema": (0.64, 0.55, 0.78, 0.95),
    "enhancing": (0.66, 1.45, 0.70, 0.76),
}
TEXTURE = {"csf": 0.02, "grey": 0.025, "white": 0.02, "vessel": 0, "core": 0.09, "oedema": 0.05, "enhancing": 0.14}


def intensities(rng: np.random.Generator, points: np.ndarray, tissues: Tissues, lesion: Lesion) -> np.ndarray:
    """Noise-free intensities [4, n] at `points` [3, n] mm: T1n, T1c, T2w, T2-FLAIR; white matter lies at 0.4 to 0.9."""
    texture = SmoothField(rng, 7)(points)
    healthy = (1 - lesion.core - lesion.oedema - lesion.enhancing) * (1 - tissues.vessel)
    shares = {
        "csf": healthy * tissues.csf,
        "grey": healthy * tissues.grey,
        "white": healthy * tissues.white,
        "vessel": tissues.vessel * (1 - lesion.core - lesion.oedema - lesion.enhancing),
        **vars(lesion),
    }
    images = np.zeros((4, points.shape[1]), np.float32)
    for tissue, share in shares.items():
        contrast = np.array(CONTRAST[tissue]) * rng.uniform(0.95, 1.05, 4)
        images += contrast[:, None].astype(np.float32) * (share * (1 + TEXTURE[tissue] * texture))
    return images * _bias(rng, points)


def rician(rng: np.random.Generator, images: np.ndarray, level: float) -> np.ndarray:
    """Magnitude of `images` with complex Gaussian noise of standard deviation `level` added, same shape."""
    noise = rng.standard_normal((2, *images.shape), dtype=np.float32) * np.float32(level)
    return np.hypot(images + noise[0], noise[1])


def _bias(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    strength = rng.uniform(0.03, 0.09, 4)
    return np.stack([np.exp(s * SmoothField(rng, 110)(points)) for s in strength.astype(np.float32)])
