"""Pictures in which one glance shows whether preparation or segmentation went wrong. No face is in them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from ..cohort import MODALITIES
from ..files import whole_file
from ..report.pictures import ALERT, BACKGROUND, INK, PLANES, REGION_COLOURS
from .reading import NAMES

AROUND_BRAIN_MM = 8.0
TILE_MM = 22.0
OUTLINE = "#3ddc84"


def draw_preparation(
    path: str | Path,
    heads: Mapping[str, np.ndarray],
    brain: np.ndarray,
    affine: np.ndarray,
    title: str,
    warnings: Sequence[str] = (),
) -> None:
    """The reference with the outline of the brain mask, and every other modality in a chequerboard with it.

    Where registration went wrong, edges break at the borders of the tiles; where extraction did, the outline cuts
    through the brain. Nothing farther than 8 mm from the brain is shown.

    Args:
        path: PNG file, written whole or not at all.
        heads: registered images with the skull, by modality, [x, y, z] each.
        brain: mask, boolean [x, y, z].
        affine: of their grid, [4, 4], mm, RAS.
        title: on top.
        warnings: under the title.
    """
    from matplotlib.figure import Figure

    near = ndimage.distance_transform_edt(~brain, sampling=np.linalg.norm(affine[:3, :3], axis=0)) <= AROUND_BRAIN_MM
    mask, spacing = _canonical(brain.astype(np.uint8), affine)
    shown = {m: _canonical(np.where(near, heads[m], 0), affine)[0] for m in MODALITIES if m in heads}
    shown = {m: _scaled(image, mask > 0) for m, image in shown.items()}
    reference = next(m for m in ("t1c", "t1n", "flair", "t2w") if m in shown)
    others = [m for m in shown if m != reference]
    figure = Figure(figsize=(3.4 * (1 + len(others)), 10.6), dpi=90, facecolor=BACKGROUND)
    axes = figure.subplots(3, 1 + len(others), squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.86, wspace=0.02, hspace=0.02)
    centre = [int(n) for n in np.round(ndimage.center_of_mass(mask))]
    for row, (plane, axis) in zip(axes, PLANES.items(), strict=True):
        outline = np.take(mask, centre[axis], axis=axis)
        aspect = _aspect(spacing, axis)
        for column, modality in zip(row, (reference, *others), strict=True):
            image = np.take(shown[reference], centre[axis], axis=axis)
            if modality != reference:
                image = _chequered(image, np.take(shown[modality], centre[axis], axis=axis), np.delete(spacing, axis))
            _panel(column, image, aspect)
            width = 1.4 if modality == reference else 0.5
            column.contour(outline.T, [0.5], colors=[OUTLINE], linewidths=width)
            if plane == "axial":
                name = NAMES[modality] if modality == reference else f"{NAMES[modality]} in {NAMES[reference]}"
                column.set_title(name, color=INK, fontsize=12)
    figure.text(0.012, 0.985, title, color=INK, fontsize=15, weight="bold", va="top", parse_math=False)
    caption = "Green: the brain mask. Edges must run on across the tiles. Right of the patient is left."
    figure.text(0.012, 0.955, caption, color=INK, fontsize=9, va="top")
    figure.text(0.012, 0.935, _wrapped(warnings, 150), color=ALERT, fontsize=9, va="top", parse_math=False)
    with whole_file(path) as partial:
        figure.savefig(partial, facecolor=BACKGROUND)


def draw_segmentation(
    path: str | Path,
    scanned: nib.Nifti1Image,
    regions: np.ndarray,
    brain: np.ndarray,
    title: str,
    warnings: Sequence[str] = (),
) -> None:
    """Eight slices of the series as it was scanned, with the outlines of ET, TC and WT.

    Args:
        path: PNG file, written whole or not at all.
        scanned: the series with the skull; shown within 8 mm of the brain.
        regions: masks on its grid, boolean [3, x, y, z], in the order ET, TC, WT.
        brain: mask on its grid, boolean [x, y, z].
        title: on top.
        warnings: under the title.
    """
    from matplotlib.figure import Figure

    affine = scanned.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    near = ndimage.distance_transform_edt(~brain, sampling=spacing) <= AROUND_BRAIN_MM
    image, spacing = _canonical(np.where(near, np.asanyarray(scanned.dataobj), 0), affine)
    masks = [_canonical(region.astype(np.uint8), affine)[0] for region in regions]
    mask = _canonical(brain.astype(np.uint8), affine)[0]
    image = _scaled(image, mask > 0)
    axis = int(np.argmax(spacing)) if spacing.max() > 1.5 * spacing.min() else 2
    extent = masks[2] if masks[2].any() else mask
    used = np.flatnonzero(extent.any(axis=tuple(other for other in range(3) if other != axis)))
    slices = np.unique(np.round(np.linspace(used[0], used[-1], 10)[1:-1] if len(used) > 9 else used).astype(int))
    figure = Figure(figsize=(13, 7.6), dpi=90, facecolor=BACKGROUND)
    panels = figure.subplots(2, 4).ravel()
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.86, wspace=0.02, hspace=0.08)
    for panel in panels:
        panel.axis("off")
    for panel, k in zip(panels, slices, strict=False):  # may be fewer
        _panel(panel, np.take(image, k, axis=axis), _aspect(spacing, axis))
        panel.set_title(f"slice {k + 1} of {image.shape[axis]}", color=INK, fontsize=9, pad=2)
        for name, region in reversed(list(zip(REGION_COLOURS, masks, strict=True))):
            if (cut := np.take(region, k, axis=axis)).any():
                panel.contour(cut.T, [0.5], colors=[REGION_COLOURS[name]], linewidths=1.3)
    figure.text(0.012, 0.985, title, color=INK, fontsize=15, weight="bold", va="top", parse_math=False)
    for k, (name, colour) in enumerate(REGION_COLOURS.items()):
        figure.text(0.012 + 0.05 * k, 0.94, name, color=colour, fontsize=12, weight="bold", va="top")
    figure.text(0.988, 0.94, "Right of the patient is left. Research use.", color=INK, fontsize=9, va="top", ha="right")
    figure.text(0.2, 0.94, _wrapped(warnings, 120), color=ALERT, fontsize=9, va="top", parse_math=False)
    with whole_file(path) as partial:
        figure.savefig(partial, facecolor=BACKGROUND)


def _canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The array with its axes to the Right, Anterior and Superior, and its voxel size."""
    image = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    return np.asanyarray(image.dataobj), np.linalg.norm(image.affine[:3, :3], axis=0)


def _scaled(image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return np.clip(image / max(float(np.percentile(image[brain], 99.7)) if brain.any() else 1.0, 1e-6), 0, 1)


def _chequered(first: np.ndarray, second: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    rows, columns = (np.arange(n) * step // TILE_MM for n, step in zip(first.shape, spacing, strict=True))
    return np.where((rows[:, None] + columns[None]) % 2 == 0, first, second)


def _aspect(spacing: np.ndarray, axis: int) -> float:
    across, up = np.delete(spacing, axis)
    return float(up / across)


def _panel(axes: Any, image: np.ndarray, aspect: float) -> None:
    """Draws [across, up] in radiological display: the first axis runs from right to left."""
    axes.imshow(image.T, "gray", vmin=0, vmax=1, origin="lower", aspect=aspect, interpolation="bilinear")
    axes.invert_xaxis()
    axes.axis("off")


def _wrapped(warnings: Sequence[str], width: int) -> str:
    lines = [line for warning in warnings for line in textwrap.wrap(warning, width)]
    return "\n".join(lines[:4] + (["…"] if len(lines) > 4 else []))
