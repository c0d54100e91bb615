"""Small made-up subjects on disk, in every layout that is known."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 14, 12)
LPS = np.diag([-1.0, -1.5, 2.0, 1.0])
STEMS = {
    "utsw": ("brain_t1", "brain_t1ce", "brain_t2", "brain_flair", "tumorseg_FeTS"),
    "brats2021": ("{case}_t1", "{case}_t1ce", "{case}_t2", "{case}_flair", "{case}_seg"),
    "brats2023": ("{case}-t1n", "{case}-t1c", "{case}-t2w", "{case}-t2f", "{case}-seg"),
    "plain": ("T1", "T1Gd", "T2w", "T2-FLAIR", "mask"),
}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def make_mask(enhancing: int | None = 4) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:9, 4:9, 4:9] = 2
    mask[5:8, 5:8, 5:8] = 1
    if enhancing:
        mask[6, 6, 5:8] = enhancing
    return mask


def make_subject(folder: Path, layout: str = "plain", mask: np.ndarray | None = None, seed: int = 0) -> Path:
    noise = np.random.default_rng([seed, *folder.name.encode()])
    *images, label = (stem.format(case=folder.name) + ".nii.gz" for stem in STEMS[layout])
    for name in images:
        voxels = np.zeros(SHAPE, np.int16)
        voxels[2:14, 2:12, 2:10] = noise.integers(1, 900, (12, 10, 8))
        save(folder / name, voxels)
    save(folder / label, make_mask() if mask is None else mask)
    return folder
