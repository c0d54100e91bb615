"""Pictures of one subject: MRI in three planes through the tumour with the outlines of the regions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from ..cohort import MODALITIES, MODALITY_NAMES, PALETTES, REGION_TISSUES, REGIONS, zero_background
from ..files import whole_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
REGION_COLOURS = {"ET": "#D55E00", "TC": "#F0E442", "WT": "#56B4E9"}
REGION_NAMES = {"ET": "enhancing tumour", "TC": "tumour core", "WT": "whole tumour"}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
MARKERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
BACKGROUND, INK, FAINT, ALERT = "#0b0d10", "#f2f2f2", "#b4bac2", "#ffb454"
MARGIN_MM = 11.0
QC_ROWS = {"t1c": "t1n", "flair": "t2w"}
"""What is shown, and what stands in its place where it is absent."""
LINE_WIDTHS = {"ET": 1.0, "TC": 2.3, "WT": 2.3}
REFERENCE_WIDTH, TRUTH_WIDTH = 1.2, 1.3
FILL_OPACITY = 0.38
MAX_WARNING = 95
"""Characters of a warning that fit beside the note at the bottom."""


def region_masks(label_map: np.ndarray, palette: str = "brats2023") -> dict[str, np.ndarray]:
    """Boolean mask of each region in a label map of any shape, in the order of `REGIONS`.

    Raises:
        KeyError: the palette is none of `PALETTES`.
    """
    values = PALETTES[palette]
    return {region: np.isin(label_map, [values[t] for t in REGION_TISSUES[region]]) for region in REGIONS}


def region_volumes(label_map: np.ndarray, voxel_volume_mm3: float, palette: str = "brats2023") -> dict[str, float]:
    """Volume in ml of ET, TC and WT in a label map whose voxels measure `voxel_volume_mm3`."""
    return mask_volumes(region_masks(label_map, palette), voxel_volume_mm3)


def mask_volumes(masks: Mapping[str, np.ndarray], voxel_volume_mm3: float) -> dict[str, float]:
    """Volume in ml of each of `region_masks`, whose voxels measure `voxel_volume_mm3`."""
    return {region: float(np.count_nonzero(mask) * voxel_volume_mm3 / 1000) for region, mask in masks.items()}


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
    box: tuple[slice, ...]
    spacing: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def through(cls, tumours: Sequence[np.ndarray], brain: np.ndarray, spacing: Sequence[float]) -> View:
        """The view of brain and tumours, [X, Y, Z] boolean, whose slices are `tumour_slices`; spacing in mm."""
        box = _bounding_box(np.logical_or.reduce([brain, *tumours]), MARGIN_MM / np.asarray(spacing))
        return cls(tumour_slices(*tumours, fallback=brain), box, tuple(map(float, spacing)), brain.shape)

    def cut(self, volume: np.ndarray, plane: str) -> np.ndarray:
        """The slice of [X, Y, Z] in one of `PLANES`, its rows upwards."""
        return volume[tuple(self.slices[axis] if axis == PLANES[plane] else self.box[axis] for axis in range(3))].T

    def aspect(self, plane: str) -> float:
        """Height of a pixel over its width."""
        across, up = (self.spacing[axis] for axis in range(3) if axis != PLANES[plane])
        return up / across


def tumour_slices(*masks: np.ndarray, fallback: np.ndarray) -> tuple[int, int, int]:
    """Index, along each axis, of the slice on which the tumour is largest.

    Of the masks, [X, Y, Z] boolean, the first that is not empty counts; where all are, the middle of the brain
    (`fallback`) is taken, the grid's where that is empty too.
    """
    mask = next((one for one in masks if one.any()), None)
    if mask is None:
        x, y, z = ((b.start + b.stop) // 2 for b in _bounding_box(fallback, (0, 0, 0)))
    else:
        x, y, z = (int(mask.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def qc_figure(
    images: Sequence[np.ndarray] | np.ndarray,
    label_map: np.ndarray,
    spacing: Sequence[float],
    title: str = "",
    subtitle: str = "",
    reference: np.ndarray | None = None,
    weights_note: str = "",
    palette: str = "brats2023",
    warning: str = "",
) -> Figure:
    """Draws T1c and T2-FLAIR in three planes through the tumour, with outlines of the regions and their volumes.

    Where one of them is absent, T1n or T2w stands in its place, or nothing, and the place says so.

    The display is radiological: the patient's right is on the left, and the letters on the panels say so.

    Args:
        images: four modalities, [4, X, Y, Z], axes to the Right, Anterior and Superior; zero outside the brain, and
            everywhere where one is absent.
        label_map: [X, Y, Z] in `palette`, drawn as solid lines.
        spacing: voxel size in mm.
        title: first line, such as the subject's name.
        subtitle: text on the right of the title.
        reference: ground truth, [X, Y, Z] in `palette`, drawn as dashed lines.
        weights_note: what the reader must know about the weights.
        palette: key of `PALETTES`.
        warning: what the reader must know about this mask, such as a region that post-processing erased.

    Returns:
        A figure of 1200 x 850 pixels at 100 dpi; its axes are the panels, row by row (T1c, T2-FLAIR), each with
        axial, coronal and sagittal. Slice numbers count from the left, the back and the bottom.

    Raises:
        ValueError: images, label map and reference are not four modalities and masks of one shape.
    """
    from matplotlib.lines import Line2D

    label_maps = [label_map] if reference is None else [label_map, reference]
    _check_shapes(title, images, label_maps)
    masks = [region_masks(one, palette) for one in label_maps]
    rows = _qc_rows(dict(zip(MODALITIES, images, strict=True)))
    shown = {told: np.nan_to_num(image) for told, image in rows.items()}
    tumours = [one["WT"] for one in masks]
    view = View.through(tumours, np.logical_or.reduce([image != 0 for image in shown.values()]), spacing)
    figure, panels = _canvas(view, shown)
    for axes, plane in ((axes, plane) for row in panels for axes, plane in zip(row, PLANES, strict=True)):
        for region in reversed(REGIONS):
            for one, style in zip(masks, ("solid", "dashed"), strict=False):
                width = LINE_WIDTHS[region] if style == "solid" else REFERENCE_WIDTH
                _outline(axes, view.cut(one[region], plane), region, style, width)
    volumes = [mask_volumes(one, float(np.prod(spacing))) for one in masks]
    labels = {region: f"{REGION_NAMES[region]} {volumes[0][region]:.1f} ml" for region in REGIONS}
    if reference is not None:
        labels = {region: f"{volumes[0][region]:.1f} ml (reference {volumes[1][region]:.1f} ml)" for region in labels}
    handles: list[Artist] = [
        Line2D([], [], color=REGION_COLOURS[region], linewidth=3, label=f"{region} {text}")
        for region, text in labels.items()
    ]
    if reference is not None:
        handles += [Line2D([], [], color=INK, label="predicted")]
        handles += [Line2D([], [], color=INK, label="reference", linestyle="dashed")]
    _legend(figure, handles, fontsize=13 if reference is None else 11, columnspacing=1.5, handlelength=1.8)
    _captions(figure, title, subtitle, weights_note, warning or ("" if tumours[0].any() else "No tumour in the mask"))
    return figure


def _qc_rows(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The two images that are shown, by the words that stand beside them."""
    rows = {}
    for key, instead in QC_ROWS.items():
        name = MODALITY_NAMES[key]
        if images[key].any():
            rows[name] = images[key]
        else:
            other = f", {MODALITY_NAMES[instead]} instead" if images[instead].any() else ""
            rows[f"no {name}{other}"] = images[instead]
    return rows


def truth_figure(
    images: Sequence[np.ndarray] | np.ndarray,
    label_map: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    title: str = "",
    subtitle: str = "",
    weights_note: str = "",
    palette: str = "brats2023",
) -> Figure:
    """Draws T1c in three planes with the regions in colour, the ground truth above the prediction (paper, Figure 2).

    Both rows show the same slices, those on which the true tumour is largest. Arguments, return and errors as of
    `qc_figure`; `label_map` is the prediction.
    """
    from matplotlib.patches import Patch

    label_maps = (reference, label_map)
    _check_shapes(title, images, label_maps)
    masks = [region_masks(one, palette) for one in label_maps]
    brain = np.logical_or.reduce([np.nan_to_num(image) != 0 for image in images])
    view = View.through([one["WT"] for one in masks], brain, spacing)
    image = np.nan_to_num(images[MODALITIES.index("t1c")])
    figure, panels = _canvas(view, {"ground truth": image, "prediction": image})
    for row, regions in zip(panels, masks, strict=True):
        for axes, plane in zip(row, PLANES, strict=True):
            _paint(axes, {region: view.cut(regions[region], plane) for region in REGIONS}, view.aspect(plane))
    true, predicted = (mask_volumes(one, float(np.prod(spacing))) for one in masks)
    labels = {r: f"{REGION_NAMES[r]}\n{true[r]:.1f} ml, predicted {predicted[r]:.1f} ml" for r in REGIONS}
    handles = [Patch(color=REGION_COLOURS[region], label=f"{region} {text}") for region, text in labels.items()]
    _legend(figure, handles, fontsize=11, columnspacing=4.0)
    _captions(figure, title, subtitle, weights_note, "" if masks[1]["WT"].any() else "No tumour in the prediction")
    return figure


def write_qc_picture(
    path: PathLike,
    image_paths: Sequence[PathLike],
    label_map_path: PathLike,
    palette: str = "brats2023",
    reference_path: PathLike | None = None,
    reference_palette: str = "brats2021",
    draw: Callable[..., Figure] = qc_figure,
    **texts: str,
) -> None:
    """Writes a figure of NIfTI files as a PNG of 1200 x 850 pixels, whole or not at all.

    Args:
        path: PNG to write.
        image_paths: four files in the order of `MODALITIES`, with an empty name for an absent one, or one file with
            four channels; where an image has another grid than the label map, it is resampled to that of the label map
            for the picture.
        label_map_path: label map in `palette`.
        palette: key of `PALETTES` for the label map.
        reference_path: ground truth, which `truth_figure` needs.
        reference_palette: key of `PALETTES` for the ground truth.
        draw: `qc_figure` or `truth_figure`.
        texts: `title`, `subtitle`, `weights_note` and, of `qc_figure`, `warning`.

    Raises:
        ValueError: there are not four modalities.
        OSError: a file cannot be read, or the picture cannot be written.
    """
    target = nib.as_closest_canonical(nib.load(label_map_path))
    reference = None
    if reference_path is not None:
        labels = np.rint(_load_on_grid(nib.load(reference_path), target, order=0))
        tissues = PALETTES[reference_palette]
        reference = np.select([labels == tissues[t] for t in tissues], [PALETTES[palette][t] for t in tissues], 0)
    files: list[Any] = [nib.load(path) if path else None for path in image_paths]
    if len(files) == 1 and files[0].ndim == 4:
        files = nib.four_to_three(files[0])
    if len(files) != len(MODALITIES):
        raise ValueError(f"expected 4 modalities {MODALITIES}, got {len(files)} from {list(image_paths)}")
    images = [
        np.zeros(target.shape[:3], np.float32)
        if image is None
        else zero_background(_load_on_grid(image, target, order=1))[0]
        for image in files
    ]
    label_map, spacing = np.asarray(target.dataobj).squeeze(), [float(size) for size in target.header.get_zooms()[:3]]
    scan = {"images": images, "label_map": label_map, "reference": reference, "spacing": spacing, "palette": palette}
    save_figure(path, draw(**scan | texts))


def save_figure(path: PathLike, figure: Figure) -> None:
    """Writes a figure as PNG at its own size and colour, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", facecolor="auto")


def _load_on_grid(image: nib.spatialimages.SpatialImage, target: nib.Nifti1Image, order: int) -> np.ndarray:
    image = nib.as_closest_canonical(nib.funcs.squeeze_image(image))
    grid = (target.shape[:3], target.affine)
    if image.shape != grid[0] or not np.allclose(image.affine, grid[1], atol=1e-3):
        image = resample_from_to(image, grid, order=order)
    return np.asarray(image.dataobj, dtype=np.float32)


def _check_shapes(title: str, images: Sequence[np.ndarray] | np.ndarray, label_maps: Sequence[np.ndarray]) -> None:
    shapes = [np.shape(one) for one in (*images, *label_maps)]
    if len(images) != len(MODALITIES) or len(set(shapes)) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"{title}: expected 4 images and their masks on one 3-D grid, got {shapes}")


def _canvas(view: View, rows: Mapping[str, np.ndarray]) -> tuple[Figure, np.ndarray]:
    """A dark figure with two images [X, Y, Z] in all planes, and its axes [2, 3], wide enough for the planes."""
    from matplotlib.figure import Figure

    x, y, z = ((b.stop - b.start) * s for b, s in zip(view.box, view.spacing, strict=True))
    figure = Figure(figsize=(12, 8.5), dpi=100, facecolor=BACKGROUND)
    panels = figure.subplots(2, 3, gridspec_kw={"width_ratios": (x / y, x / z, y / z)})
    figure.subplots_adjust(left=0.045, right=0.99, top=0.895, bottom=0.115, wspace=0.03, hspace=0.03)
    for axes, (plane, axis) in zip(panels[0], PLANES.items(), strict=True):
        heading = f"{plane}, slice {view.slices[axis] + 1} of {view.shape[axis]}"
        axes.set_title(heading, color=FAINT, fontsize=11, pad=5)
    for row, (name, image) in zip(panels, rows.items(), strict=True):
        brain = image[image != 0]
        low, high = np.percentile(brain, (0.5, 99.2)) if brain.size else (0, 1)
        row[0].set_ylabel(name, color=INK, fontsize=14, labelpad=6)
        for axes, plane in zip(row, PLANES, strict=True):
            grey = {"cmap": "gray", "vmin": float(low), "vmax": float(max(high, low + 1e-6))}
            axes.imshow(
                view.cut(image, plane), origin="lower", aspect=view.aspect(plane), **grey, interpolation="bilinear"
            )
            _mark_sides(axes, plane)
    return figure, panels


def _mark_sides(axes: Axes, plane: str) -> None:
    """Turn a panel to radiological display, and name its sides."""
    axes.invert_xaxis()
    axes.autoscale(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    places = ((0.015, 0.5), (0.985, 0.5), (0.5, 0.985), (0.5, 0.015))
    alignments = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, place, (horizontal, vertical) in zip(MARKERS[plane], places, alignments, strict=True):
        axes.text(*place, letter, color=INK, fontsize=12, ha=horizontal, va=vertical, transform=axes.transAxes)


def _outline(axes: Axes, mask: np.ndarray, region: str, style: str, width: float) -> None:
    """Draw the outline of a mask [rows, columns] in the colour of its region; nothing where it is empty."""
    if not mask.any():
        return
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    closed = np.pad(mask.astype(np.float32), 1)
    options = {"colors": [REGION_COLOURS[region]], "linewidths": width, "linestyles": style}
    axes.contour(columns, rows, closed, [0.5], **options).set_label(f"{region} {style}")


def _paint(axes: Axes, masks: Mapping[str, np.ndarray], aspect: float) -> None:
    """Fill and outline the regions; the smaller lies on the larger."""
    from matplotlib.colors import to_rgb

    overlay = np.zeros((*masks["WT"].shape, 4))
    for region in reversed(REGIONS):
        overlay[masks[region]] = (*to_rgb(REGION_COLOURS[region]), FILL_OPACITY)
    axes.imshow(overlay, origin="lower", aspect=aspect, interpolation="nearest")
    for region in reversed(REGIONS):
        _outline(axes, masks[region], region, "solid", TRUTH_WIDTH)


def _legend(figure: Figure, handles: Sequence[Artist], **options: float) -> None:
    place = {"loc": "center", "bbox_to_anchor": (0.5, 0.075), "ncols": len(handles)}
    figure.legend(handles=handles, frameon=False, labelcolor=INK, **place, **options)


def _captions(figure: Figure, title: str, subtitle: str, weights_note: str, warning: str) -> None:
    """Title and subtitle on top, a warning and what the weights are at the bottom."""
    figure.text(0.012, 0.97, title, color=INK, fontsize=17, weight="bold", va="center", parse_math=False)
    figure.text(0.988, 0.97, subtitle, color=FAINT, fontsize=12, va="center", ha="right", parse_math=False)
    note = " · ".join(part for part in (weights_note, "research use, not a medical device") if part)
    figure.text(0.988, 0.018, note, color=ALERT, fontsize=11, va="center", ha="right", parse_math=False)
    if warning:
        shown = warning if len(warning) <= MAX_WARNING else f"{warning[: MAX_WARNING - 1]}…"
        figure.text(0.012, 0.043, shown, color=ALERT, fontsize=12, weight="bold", va="center", parse_math=False)


def _bounding_box(mask: np.ndarray, margin: Sequence[float] | np.ndarray) -> tuple[slice, ...]:
    if not mask.any():
        return tuple(slice(0, n) for n in mask.shape)
    box = []
    for axis, (size, extra) in enumerate(zip(mask.shape, margin, strict=True)):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(0, int(used[0] - extra)), min(size, int(np.ceil(used[-1] + 1 + extra)))))
    return tuple(box)
