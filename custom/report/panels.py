"""Panels of MRI in three planes through a tumour: the pieces that the pictures are built of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGION_COLOURS = {"ET": "#D55E00", "TC": "#F0E442", "WT": "#56B4E9"}
REGION_NAMES = {"ET": "enhancing tumour", "TC": "tumour core", "WT": "whole tumour"}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
MARKERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
BACKGROUND, INK, FAINT, ALERT = "#0b0d10", "#f2f2f2", "#b4bac2", "#ffb454"
MARGIN_MM = 11.0


@dataclass(frozen=True)
class View:
    """Which slices of a grid [X, Y, Z] are shown, and which part of them.

    Attributes:
        slices: index of the sagittal, the coronal and the axial slice.
        box: part of each axis that is shown.
        spacing: voxel size along each axis, in mm.
        shape: voxels along each axis of the whole grid.
    """

    slices: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]

    @classmethod
    def through(cls, tumours: Sequence[np.ndarray], brain: np.ndarray, spacing: Sequence[float]) -> View:
        """The view of brain and tumours whose slices are `tumour_slices`.

        Args:
            tumours: whole tumours, [X, Y, Z] boolean; the first that is not empty decides the slices.
            brain: [X, Y, Z] boolean.
            spacing: voxel size in mm.
        """
        box = _bounding_box(np.logical_or.reduce([brain, *tumours]), MARGIN_MM / np.asarray(spacing))
        slices = tumour_slices(*tumours, fallback=brain)
        return cls(slices, box, tuple(map(float, spacing)), brain.shape)

    def cut(self, volume: np.ndarray, plane: str) -> np.ndarray:
        """The slice of [X, Y, Z] in one of `PLANES`, its rows upwards."""
        return volume[tuple(self.slices[axis] if axis == PLANES[plane] else self.box[axis] for axis in range(3))].T

    def aspect(self, plane: str) -> float:
        """Height of a pixel over its width."""
        across, up = (self.spacing[axis] for axis in range(3) if axis != PLANES[plane])
        return up / across

    def heading(self, plane: str) -> str:
        """Which slice is shown; slices count from the left, the back and the bottom."""
        axis = PLANES[plane]
        return f"{plane}, slice {self.slices[axis] + 1} of {self.shape[axis]}"


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


def check_shapes(title: str, images: Sequence[np.ndarray], label_maps: Sequence[np.ndarray], num_images: int) -> None:
    """Make sure that `num_images` images and their label maps share one grid.

    Raises:
        ValueError: they do not; the message starts with the title.
    """
    shapes = [np.shape(one) for one in (*images, *label_maps)]
    if len(images) != num_images or len(set(shapes)) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{title}: expected {num_images} images and their masks on one 3-D grid, got {shapes}")


def canvas(view: View) -> tuple[Figure, np.ndarray]:
    """A dark figure of 1200 x 850 pixels at 100 dpi, and its axes [2, 3], wide enough for the planes in their order."""
    from matplotlib.figure import Figure

    x, y, z = ((b.stop - b.start) * s for b, s in zip(view.box, view.spacing, strict=True))
    figure = Figure(figsize=(12, 8.5), dpi=100, facecolor=BACKGROUND)
    panels = figure.subplots(2, 3, gridspec_kw={"width_ratios": (x / y, x / z, y / z)})
    figure.subplots_adjust(left=0.045, right=0.99, top=0.895, bottom=0.115, wspace=0.03, hspace=0.03)
    for axes, plane in zip(panels[0], PLANES, strict=True):
        axes.set_title(view.heading(plane), color=FAINT, fontsize=11, pad=5)
    return figure, panels


def draw_row(row: Sequence[Axes], name: str, image: np.ndarray, view: View) -> None:
    """Draws one image [X, Y, Z] in all planes in radiological display, its name on the left of them."""
    window = _window(image)
    row[0].set_ylabel(name, color=INK, fontsize=14, labelpad=6)
    for axes, plane in zip(row, PLANES, strict=True):
        _draw_panel(axes, view.cut(image, plane), window, view.aspect(plane), plane)


def outline(axes: Axes, mask: np.ndarray, region: str, style: str, width: float) -> None:
    """Draws the outline of a mask [rows, columns] in the colour of its region; nothing where it is empty."""
    if not mask.any():
        return
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    closed = np.pad(mask.astype(np.float32), 1)
    lines = axes.contour(
        columns, rows, closed, [0.5], colors=[REGION_COLOURS[region]], linewidths=width, linestyles=style
    )
    lines.set_label(f"{region} {style}")


def captions(figure: Figure, title: str, subtitle: str, weights_note: str, warning: str = "") -> None:
    """Writes title and subtitle on top, a warning and what the weights are at the bottom."""
    figure.text(0.012, 0.97, title, color=INK, fontsize=17, weight="bold", va="center", parse_math=False)
    figure.text(0.988, 0.97, subtitle, color=FAINT, fontsize=12, va="center", ha="right", parse_math=False)
    if warning:
        figure.text(0.012, 0.025, warning, color=ALERT, fontsize=12, weight="bold", va="center")
    note = " · ".join(part for part in (weights_note, "research use, not a medical device") if part)
    figure.text(0.988, 0.025, note, color=ALERT, fontsize=11, va="center", ha="right", parse_math=False)


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
