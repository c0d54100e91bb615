"""Figure 2 of the paper: ground truth above, prediction below, for the subject in the middle of the ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cohort import MODALITIES, REGIONS
from .panels import INK, PLANES, REGION_COLOURS, REGION_NAMES, View, canvas, captions, check_shapes, draw_row, outline
from .volumes import region_masks, region_volumes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = "t1c"
ROWS = ("ground truth", "prediction")
FILL_OPACITY = 0.38
LINE_WIDTH = 1.3


def truth_figure(
    images: Sequence[np.ndarray] | np.ndarray,
    label_map: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    title: str,
    subtitle: str = "",
    weights_note: str = "",
    palette: str = "brats2023",
) -> Figure:
    """Draws T1c in three planes with the regions in colour, the ground truth above and the prediction below it.

    Both rows show the same slices, those on which the true tumour is largest. The display is radiological.

    Args:
        images: four modalities, [4, X, Y, Z], axes to the Right, Anterior and Superior; zero outside the brain.
        label_map: prediction, [X, Y, Z] in `palette`.
        reference: ground truth, [X, Y, Z] in `palette`.
        spacing: voxel size in mm.
        title: first line, such as the subject's name.
        subtitle: text on the right of the title.
        weights_note: what the reader must know about the weights.
        palette: key of `PALETTES`.

    Returns:
        A figure of 1200 x 850 pixels at 100 dpi; its axes are the panels, row by row, each with axial, coronal and
        sagittal.

    Raises:
        ValueError: they are not four modalities and two masks of one shape.
    """
    label_maps = (reference, label_map)
    check_shapes(title, images, label_maps, len(MODALITIES))
    masks = [region_masks(one, palette) for one in label_maps]
    brain = np.logical_or.reduce([np.nan_to_num(image) != 0 for image in images])
    view = View.through([one["WT"] for one in masks], brain, spacing)
    image = np.nan_to_num(images[MODALITIES.index(SHOWN)])

    figure, panels = canvas(view)
    for row, name, regions in zip(panels, ROWS, masks, strict=True):
        draw_row(row, name, image, view)
        for axes, plane in zip(row, PLANES, strict=True):
            _paint(axes, {region: view.cut(regions[region], plane) for region in REGIONS}, view.aspect(plane))
    _legend(figure, [region_volumes(one, float(np.prod(spacing)), palette) for one in label_maps])
    captions(figure, title, subtitle, weights_note, "" if masks[1]["WT"].any() else "No tumour in the prediction")
    return figure


def _paint(axes: Axes, masks: Mapping[str, np.ndarray], aspect: float) -> None:
    """Fill and outline the regions; the smaller lies on the larger."""
    from matplotlib.colors import to_rgb

    overlay = np.zeros((*masks["WT"].shape, 4))
    for region in reversed(REGIONS):
        overlay[masks[region]] = (*to_rgb(REGION_COLOURS[region]), FILL_OPACITY)
    axes.imshow(overlay, origin="lower", aspect=aspect, interpolation="nearest")
    for region in reversed(REGIONS):
        outline(axes, masks[region], region, "solid", LINE_WIDTH)


def _legend(figure: Figure, volumes: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.patches import Patch

    true, predicted = volumes
    handles = [
        Patch(
            color=REGION_COLOURS[region],
            label=f"{region} {REGION_NAMES[region]}\n{true[region]:.1f} ml, predicted {predicted[region]:.1f} ml",
        )
        for region in REGIONS
    ]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, 0.075),
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=11,
        columnspacing=4.0,
    )
