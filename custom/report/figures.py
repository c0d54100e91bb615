"""The picture that lets a reader check one subject's masks at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cohort import MODALITIES, REGIONS
from .volumes import region_masks, region_volumes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGION_COLOURS = {"ET": "#D55E00", "TC": "#F0E442", "WT": "#56B4E9"}
REGION_NAMES = {"ET": "enhancing tumour", "TC": "tumour core", "WT": "whole tumour"}
LINE_WIDTHS = {"ET": 1.0, "TC": 2.3, "WT": 2.3}
REFERENCE_WIDTH = 1.2
ROWS = {"T1c": "t1c", "T2-FLAIR": "flair"}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
MARKERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
BACKGROUND, INK, FAINT, ALERT = "#0b0d10", "#f2f2f2", "#b4bac2", "#ffb454"
MARGIN_MM = 11.0


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
        subtitle: text on the right of the title.
        regions: which of `REGIONS` to outline.
        reference: ground truth, [X, Y, Z] in `palette`, drawn as dashed lines.
        weights_note: what the reader must know about the weights.
        palette: key of `PALETTES`.

    Returns:
        A figure of 1200 x 850 pixels at 100 dpi; its axes are the panels, row by row (T1c, T2-FLAIR), each with
        axial, coronal and sagittal. Slice numbers count from the left, the back and the bottom.

    Raises:
        ValueError: images, label map and reference are not four modalities and masks of one shape.
    """
    label_maps = [label_map] if reference is None else [label_map, reference]
    _check_shapes(title, images, label_maps)
    masks = [region_masks(one, palette) for one in label_maps]
    shown = {name: np.nan_to_num(images[MODALITIES.index(key)]) for name, key in ROWS.items()}
    tumours = [one["WT"] for one in masks]
    brain = np.logical_or.reduce([image != 0 for image in shown.values()])
    slices = tumour_slices(*tumours, fallback=brain)
    box = _bounding_box(np.logical_or.reduce([brain, *tumours]), MARGIN_MM / np.asarray(spacing))

    figure, panels = _canvas([(b.stop - b.start) * s for b, s in zip(box, spacing, strict=True)])
    for row, (name, image) in zip(panels, shown.items(), strict=True):
        window = _window(image)
        row[0].set_ylabel(name, color=INK, fontsize=14, labelpad=6)
        for axes, plane in zip(row, PLANES, strict=True):
            cut = _cut(plane, slices, box)
            _draw_panel(axes, image[cut].T, window, _aspect(plane, spacing), plane)
            for region in (r for r in reversed(REGIONS) if r in regions):
                for one, style in zip(masks, ("solid", "dashed"), strict=False):
                    _outline(axes, one[region][cut].T, region, style)
    for axes, (plane, axis) in zip(panels[0], PLANES.items(), strict=True):
        heading = f"{plane}, slice {slices[axis] + 1} of {label_map.shape[axis]}"
        axes.set_title(heading, color=FAINT, fontsize=11, pad=5)
    _legend(figure, regions, [region_volumes(one, float(np.prod(spacing)), palette) for one in label_maps])
    _captions(figure, title, subtitle, weights_note, is_empty=not tumours[0].any())
    return figure


def tumour_slices(*masks: np.ndarray, fallback: np.ndarray) -> tuple[int, int, int]:
    """Index, along each axis, of the slice on which the tumour is largest.

    Args:
        masks: whole tumour, [X, Y, Z] boolean; the first that is not empty counts.
        fallback: brain, [X, Y, Z] boolean; its middle is taken where all masks are empty, the grid's where it is too.
    """
    mask = next((one for one in masks if one.any()), None)
    if mask is None:
        x, y, z = ((b.start + b.stop) // 2 for b in _bounding_box(fallback, (0, 0, 0)))
    else:
        x, y, z = (int(mask.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def _check_shapes(title: str, images: Sequence[np.ndarray], label_maps: Sequence[np.ndarray]) -> None:
    shapes = [np.shape(one) for one in (*images, *label_maps)]
    if len(images) != len(MODALITIES) or len(set(shapes)) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{title}: expected {len(MODALITIES)} images and their masks on one 3-D grid, got {shapes}")


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
    low, high = np.percentile(brain, (0.5, 99.2)) if brain.size else (0, 1)
    return float(low), float(max(high, low + 1e-6))


def _canvas(extent: Sequence[float]) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    x, y, z = extent
    figure = Figure(figsize=(12, 8.5), dpi=100, facecolor=BACKGROUND)
    panels = figure.subplots(2, 3, gridspec_kw={"width_ratios": (x / y, x / z, y / z)})
    figure.subplots_adjust(left=0.045, right=0.99, top=0.895, bottom=0.115, wspace=0.03, hspace=0.03)
    return figure, panels


def _cut(plane: str, slices: tuple[int, int, int], box: tuple[slice, ...]) -> tuple[int | slice, ...]:
    return tuple(slices[axis] if axis == PLANES[plane] else box[axis] for axis in range(3))


def _aspect(plane: str, spacing: Sequence[float]) -> float:
    across, up = (spacing[axis] for axis in range(3) if axis != PLANES[plane])
    return up / across


def _draw_panel(axes: Axes, image: np.ndarray, window: tuple[float, float], aspect: float, plane: str) -> None:
    low, high = window
    axes.imshow(image, "gray", vmin=low, vmax=high, origin="lower", aspect=aspect, interpolation="bilinear")
    axes.invert_xaxis()
    axes.autoscale(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    places = ((0.015, 0.5), (0.985, 0.5), (0.5, 0.985), (0.5, 0.015))
    alignments = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, place, (horizontal, vertical) in zip(MARKERS[plane], places, alignments, strict=True):
        axes.text(*place, letter, color=INK, fontsize=12, ha=horizontal, va=vertical, transform=axes.transAxes)


def _outline(axes: Axes, mask: np.ndarray, region: str, style: str) -> None:
    if not mask.any():
        return
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    closed = np.pad(mask.astype(np.float32), 1)
    width = LINE_WIDTHS[region] if style == "solid" else REFERENCE_WIDTH
    lines = axes.contour(
        columns, rows, closed, [0.5], colors=[REGION_COLOURS[region]], linewidths=width, linestyles=style
    )
    lines.set_label(f"{region} {style}")


def _legend(figure: Figure, regions: Sequence[str], volumes: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for region in (r for r in REGIONS if r in regions):
        text = f"{region} {REGION_NAMES[region]} {volumes[0][region]:.1f} ml"
        if len(volumes) > 1:
            text = f"{region} {volumes[0][region]:.1f} ml (reference {volumes[1][region]:.1f} ml)"
        handles.append(Line2D([], [], color=REGION_COLOURS[region], linewidth=3, label=text))
    if len(volumes) > 1:
        handles += [Line2D([], [], color=INK, label="predicted")]
        handles += [Line2D([], [], color=INK, label="reference", linestyle="dashed")]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, 0.075),
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=13 if len(volumes) == 1 else 11,
        columnspacing=1.5,
        handlelength=1.8,
    )


def _captions(figure: Figure, title: str, subtitle: str, weights_note: str, is_empty: bool) -> None:
    figure.text(0.012, 0.97, title, color=INK, fontsize=17, weight="bold", va="center", parse_math=False)
    figure.text(0.988, 0.97, subtitle, color=FAINT, fontsize=12, va="center", ha="right", parse_math=False)
    if is_empty:
        empty = "No tumour in the mask"
        figure.text(0.012, 0.025, empty, color=ALERT, fontsize=12, weight="bold", va="center")
    note = " · ".join(part for part in (weights_note, "research use, not a medical device") if part)
    figure.text(0.988, 0.025, note, color=ALERT, fontsize=11, va="center", ha="right", parse_math=False)
