"""The picture that lets a reader check one subject's masks at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cohort import MODALITIES, REGIONS
from .panels import INK, PLANES, REGION_COLOURS, REGION_NAMES, View, canvas, captions, check_shapes, draw_row, outline
from .volumes import region_masks, region_volumes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_WIDTHS = {"ET": 1.0, "TC": 2.3, "WT": 2.3}
REFERENCE_WIDTH = 1.2
ROWS = {"T1c": "t1c", "T2-FLAIR": "flair"}


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
    check_shapes(title, images, label_maps, len(MODALITIES))
    masks = [region_masks(one, palette) for one in label_maps]
    shown = {name: np.nan_to_num(images[MODALITIES.index(key)]) for name, key in ROWS.items()}
    tumours = [one["WT"] for one in masks]
    view = View.through(tumours, np.logical_or.reduce([image != 0 for image in shown.values()]), spacing)

    figure, panels = canvas(view)
    for row, (name, image) in zip(panels, shown.items(), strict=True):
        draw_row(row, name, image, view)
        for axes, plane in zip(row, PLANES, strict=True):
            for region in (r for r in reversed(REGIONS) if r in regions):
                for one, style in zip(masks, ("solid", "dashed"), strict=False):
                    width = LINE_WIDTHS[region] if style == "solid" else REFERENCE_WIDTH
                    outline(axes, view.cut(one[region], plane), region, style, width)
    _legend(figure, regions, [region_volumes(one, float(np.prod(spacing)), palette) for one in label_maps])
    captions(figure, title, subtitle, weights_note, "" if tumours[0].any() else "No tumour in the mask")
    return figure


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
