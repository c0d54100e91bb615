"""What the subjects are made of that the tests of bad inputs spoil."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 16, 16)
MODALITIES = ("T1", "T1c", "T2", "FLAIR")
GOOD, BAD = ("A1", "C3"), "B2"


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def noise(seed: int, dtype: type = np.int16) -> np.ndarray:
    voxels = np.zeros(SHAPE, dtype)
    voxels[2:14, 2:14, 2:14] = np.random.default_rng(seed).integers(1, 900, (12, 12, 12))
    return voxels


def make_mask(*labels: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    for position, label in enumerate(labels):
        mask[4 + position, 4:9, 4:9] = label
    return mask
