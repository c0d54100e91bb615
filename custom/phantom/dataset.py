"""Subjects on disk, laid out as UTSW-Glioma lays out its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ..files import UserError, whole_file
from .simulate import simulate

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
        _write(folder / file, image, affine)
    if manual:
        _write(folder / MANUAL_MASK_FILE, label, affine)
        label = label * ndimage.binary_erosion(label > 0)
    _write(folder / MASK_FILE, label, affine)
    return folder


def write_cohort(
    root: str | os.PathLike[str],
    num_subjects: int,
    seed: int = 0,
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] = SPACING,
    orientation: str = "LPS",
    share_without_et: float = 0.25,
    share_manual: float = 0.0,
    first_id: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Writes subjects BT0001, BT0002, … with `write_phantom`.

    A subject depends on `seed` and on its own number only: a larger cohort begins with the smaller one.

    Args:
        root: dataset folder; made if absent.
        num_subjects: how many to write.
        seed: seed of the cohort.
        shape: voxels along the stored axes.
        spacing: voxel size in mm along the stored axes.
        orientation: nibabel axcodes of the stored axes.
        share_without_et: share in [0, 1] of subjects with no enhancing tumour, spread evenly over the numbers.
        share_manual: share in [0, 1] of subjects with a manually corrected mask, likewise.
        first_id: number of the first subject.
        progress: show a progress bar.

    Returns:
        The subjects' folders.

    Raises:
        ValueError: a share is outside [0, 1].
    """
    if not (0 <= share_without_et <= 1 and 0 <= share_manual <= 1):
        raise UserError(f"shares must lie in [0, 1], got {share_without_et} without ET and {share_manual} manual")
    numbers: Sequence[int] = range(first_id, first_id + num_subjects)
    if progress:
        from tqdm import tqdm

        numbers = tqdm(numbers, desc="phantoms", unit="subject")
    return [
        write_phantom(
            root,
            f"BT{number:04d}",
            shape,
            spacing,
            orientation,
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            enhancing=not _is_drawn(number, share_without_et),
            manual=_is_drawn(number + 1, share_manual),
        )
        for number in numbers
    ]


def _is_drawn(number: int, share: float) -> bool:
    return int(number * share) > int((number - 1) * share)


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


def _write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    with whole_file(path) as partial:
        nib.save(image, partial)
