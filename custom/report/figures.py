"""The picture that lets a reader check one subject's masks at a glance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from ..cohort import MODALITIES, REGIONS
from .files import whole_file
from .volumes import region_masks, region_volumes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGION_COLOURS = {"ET": "#D55E00", "TC": "#F0E442", "WT": "#56B4E9"}
REGION_NAMES = {"ET": "enhancing tumour", "TC": "tumour core", "WT": "whole tumour"}
LINE_WIDTHS = {"ET": 1.1, "TC": 1.6, "WT": 2.1}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
MARKERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
ROWS = {"T1c": "t1c", "T2-FLAIR": "flair"}
BACKGROUND, INK, FAINT, ALERT = "#0b0d10", "#f2f2f2", "#b4bac2", "#ffb454"
MARGIN_MM = 6.0


def tumour_slices(*masks: np.ndarray, fallback: np.ndarray) -> tuple[int, int, int]:
    """Index, along each axis, of the slice on which the tumour is largest.

    Args:
        masks: whole tumour, [X, Y, Z] boolean; the first that is not empty counts.
        fallback: brain, [X, Y, Z] boolean; its middle is taken where all masks are empty, the grid's where it is too.
    """
    mask = next((m for m in masks if m.any()), None)
    if mask is None:
        return tuple((box.start + box.stop) // 2 for box in _bounding_box(fallback, (0, 0, 0)))
    return tuple(int(mask.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def qc_figure(
    images: Sequence[np.ndarray] | np.ndarray,
    label_map: np.ndarray,
    spacing: Sequence[float],
    title: str,
    subtitle: str = "",
    regions: Sequence[str] = REGIONS,
    reference: np.ndarray | None = None,
    weights_note: str = "",
    palette: str = "brats2023",
) -> Figure:
    """Draws T1c and T2-FLAIR in three planes through the tumour, with outlines of the regions and their volumes.

    The display is radiological: the patient's right is on the left, and the letters on the panels say so.

    Args:
        images: four modalities, [4, X, Y, Z], axes to the Right, Anterior and Superior; zero outside the brain.
        label_map: [X, Y, Z] in `palette`, drawn as solid lines.
        spacing: voxel size in mm.
        title: first line, such as the subject's name.
        subtitle: second line.
        regions: which of `REGIONS` to outline.
        reference: ground truth, [X, Y, Z] in `palette`, drawn as dashed lines.
        weights_note: what the reader must know about the weights.
        palette: key of `PALETTES`.

    Returns:
        A figure of 12 x 8.5 inches; the first six axes are the panels, row by row.

    Raises:
        ValueError: images, label map and reference differ in shape.
    """
    from matplotlib.figure import Figure

    shapes = {np.shape(a) for a in (*images, label_map, *([] if reference is None else [reference]))}
    if len(images) != len(MODALITIES) or len(shapes) != 1 or label_map.ndim != 3:
        raise ValueError(f"{title}: expected four images, label map and reference on one grid, got shapes {shapes}")
    masks = region_masks(label_map, palette)
    dashed = {} if reference is None else region_masks(reference, palette)
    shown = {name: np.nan_to_num(images[MODALITIES.index(key)]) for name, key in ROWS.items()}
    brain = np.logical_or.reduce([image != 0 for image in shown.values()])
    all_tumour = [m["WT"] for m in (masks, dashed) if m]
    box = _bounding_box(np.logical_or.reduce([brain, *all_tumour]), MARGIN_MM / np.asarray(spacing))
    slices = tumour_slices(*all_tumour, fallback=brain)

    figure = Figure(figsize=(12, 8.5), dpi=100, facecolor=BACKGROUND)
    extent = [(b.stop - b.start) * s for b, s in zip(box, spacing, strict=True)]
    panels = figure.subplots(2, 3, gridspec_kw={"width_ratios": [extent[0], extent[0], extent[1]]}, squeeze=False)
    figure.subplots_adjust(left=0.045, right=0.99, top=0.895, bottom=0.115, wspace=0.03, hspace=0.05)
    for row, (name, image) in zip(panels, shown.items(), strict=True):
        window = _window(image)
        for axes, (plane, axis) in zip(row, PLANES.items(), strict=True):
            cut = tuple(slices[a] if a == axis else box[a] for a in range(3))
            aspect = spacing[2 if axis != 2 else 1] / spacing[0 if axis != 0 else 1]
            _draw_panel(axes, image[cut].T, window, aspect, plane)
            for region in reversed(REGIONS):
                if region in regions:
                    _outline(axes, masks[region][cut].T, region, "solid")
                    _outline(axes, dashed[region][cut].T if dashed else None, region, "dashed")
            axes.set_label(f"{name} {plane} {slices[axis]}")
        row[0].set_ylabel(name, color=INK, fontsize=14, labelpad=6)
    for axes, (plane, axis) in zip(panels[0], PLANES.items(), strict=True):
        count = label_map.shape[axis]
        axes.set_title(f"{plane}, slice {slices[axis] + 1} of {count}", color=FAINT, fontsize=11, pad=5)
    volumes = [region_volumes(m, float(np.prod(spacing)), palette) for m in (label_map, reference) if m is not None]
    _annotate(figure, title, subtitle, weights_note, regions, volumes)
    return figure


def write_qc_picture(
    path: str | os.PathLike[str],
    image_paths: Sequence[str | os.PathLike[str]],
    label_map_path: str | os.PathLike[str],
    title: str = "",
    subtitle: str = "",
    weights_note: str = "",
    palette: str = "brats2023",
    reference_path: str | os.PathLike[str] | None = None,
    reference_palette: str = "brats2021",
) -> None:
    """Writes `qc_figure` of NIfTI files as a PNG of 1200 x 850 pixels, whole or not at all.

    Args:
        path: PNG to write.
        image_paths: four files in the order of `MODALITIES`, or one file with four channels; where an image has another
            grid than the label map, it is resampled to that of the label map for the picture.
        label_map_path: label map in `palette`.
        title: first line of the picture.
        subtitle: second line of the picture.
        weights_note: what the reader must know about the weights.
        palette: key of `PALETTES` for the label map.
        reference_path: ground truth, drawn dashed.
        reference_palette: key of `PALETTES` for the ground truth.

    Raises:
        ValueError: there are not four modalities.
        OSError: a file cannot be read, or the picture cannot be written.
    """
    target = nib.as_closest_canonical(nib.load(label_map_path))
    label_map = np.asarray(target.dataobj).squeeze()
    images = [_load_on_grid(image, target, order=1) for image in _modalities(image_paths)]
    reference = None
    if reference_path is not None:
        reference = _load_on_grid(nib.load(reference_path), target, order=0)
        reference = _translate(np.rint(reference), reference_palette, palette)
    spacing = [float(s) for s in target.header.get_zooms()[:3]]
    figure = qc_figure(
        images, label_map, spacing, title, subtitle, reference=reference, weights_note=weights_note, palette=palette
    )
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100, facecolor=BACKGROUND)


def _modalities(paths: Sequence[str | os.PathLike[str]]) -> list[nib.spatialimages.SpatialImage]:
    images = [nib.load(path) for path in paths]
    if len(images) == 1 and images[0].ndim == 4:
        images = nib.four_to_three(images[0])
    if len(images) != len(MODALITIES):
        raise ValueError(f"expected {len(MODALITIES)} modalities {MODALITIES}, got {len(images)} from {list(paths)}")
    return images


def _load_on_grid(image: nib.spatialimages.SpatialImage, target: nib.Nifti1Image, order: int) -> np.ndarray:
    image = nib.as_closest_canonical(nib.funcs.squeeze_image(image))
    grid = (target.shape[:3], target.affine)
    if image.shape != grid[0] or not np.allclose(image.affine, grid[1], atol=1e-3):
        image = resample_from_to(image, grid, order=order)
    return np.asarray(image.dataobj, dtype=np.float32)


def _translate(label_map: np.ndarray, source: str, target: str) -> np.ndarray:
    from ..cohort import PALETTES

    tissues = PALETTES[source]
    return np.select([label_map == tissues[t] for t in tissues], [PALETTES[target][t] for t in tissues], 0)


def _bounding_box(mask: np.ndarray, margin: Sequence[float]) -> tuple[slice, ...]:
    if not mask.any():
        return tuple(slice(0, n) for n in mask.shape)
    box = []
    for axis, (size, extra) in enumerate(zip(mask.shape, margin, strict=True)):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(0, int(used[0] - extra)), min(size, int(np.ceil(used[-1] + 1 + extra)))))
    return tuple(box)


def _window(image: np.ndarray) -> tuple[float, float]:
    brain = image[image != 0]
    return (0.0, 1.0) if brain.size == 0 else tuple(np.percentile(brain, (0.5, 99.7)).tolist())


def _draw_panel(axes: Axes, image: np.ndarray, window: tuple[float, float], aspect: float, plane: str) -> None:
    axes.set_facecolor(BACKGROUND)
    low, high = window
    axes.imshow(
        image,
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        origin="lower",
        aspect=aspect,
        interpolation="bilinear",
    )
    axes.invert_xaxis()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    alignments = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, place, (horizontal, vertical) in zip(MARKERS[plane], places, alignments, strict=True):
        axes.text(*place, letter, color=FAINT, fontsize=12, ha=horizontal, va=vertical, transform=axes.transAxes)


def _outline(axes: Axes, mask: np.ndarray | None, region: str, style: str) -> None:
    if mask is None or not mask.any():
        return
    width = LINE_WIDTHS[region] if style == "solid" else 1.3
    padded = np.pad(mask.astype(np.float32), 1)
    columns, rows = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    axes.contour(
        columns, rows, padded, levels=[0.5], colors=[REGION_COLOURS[region]], linewidths=width, linestyles=style
    ).set_label(f"{region} {style}")
    axes.set_xlim(mask.shape[1] - 0.5, -0.5)
    axes.set_ylim(-0.5, mask.shape[0] - 0.5)


def _annotate(
    figure: Figure,
    title: str,
    subtitle: str,
    weights_note: str,
    regions: Sequence[str],
    volumes: Sequence[Mapping[str, float]],
) -> None:
    from matplotlib.lines import Line2D

    figure.text(0.012, 0.972, title, color=INK, fontsize=17, weight="bold", va="center")
    figure.text(0.988, 0.972, subtitle, color=FAINT, fontsize=12, va="center", ha="right")
    handles = []
    for region in (r for r in REGIONS if r in regions):
        text = f"{region} {REGION_NAMES[region]}: {volumes[0][region]:.1f} ml"
        text += f" (reference {volumes[1][region]:.1f})" if len(volumes) > 1 else ""
        handles.append(Line2D([], [], color=REGION_COLOURS[region], linewidth=3, label=text))
    if len(volumes) > 1:
        handles.append(Line2D([], [], color=INK, linewidth=1.5, label="prediction"))
        handles.append(Line2D([], [], color=INK, linewidth=1.5, linestyle="dashed", label="reference"))
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=(0.5, 0.075), ncols=len(handles), frameon=False, labelcolor=INK,
        fontsize=12 if len(volumes) == 1 else 11, columnspacing=1.6, handlelength=1.8,
    )  # fmt: skip
    empty = "" if volumes[0]["WT"] else "No tumour found: slices through the middle of the brain.  "
    figure.text(0.012, 0.025, empty, color=ALERT, fontsize=12, va="center", weight="bold")
    note = " · ".join(part for part in (weights_note, "research use, not a medical device") if part)
    figure.text(0.988, 0.025, note, color=ALERT, fontsize=11, va="center", ha="right")
