"""The pictures of one subject from its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from ..cohort import MODALITIES, PALETTES
from ..files import whole_file
from .figures import qc_figure
from .panels import BACKGROUND
from .representative import truth_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Scan:
    """What a picture shows, with axes to the Right, Anterior and Superior.

    Attributes:
        images: four arrays [X, Y, Z] in the order of `MODALITIES`.
        label_map: [X, Y, Z].
        spacing: voxel size in mm.
        reference: ground truth in the palette of the label map, [X, Y, Z], or None.
    """

    images: list[np.ndarray]
    label_map: np.ndarray
    spacing: list[float]
    reference: np.ndarray | None


def write_qc_picture(
    path: PathLike,
    image_paths: Sequence[PathLike],
    label_map_path: PathLike,
    title: str = "",
    subtitle: str = "",
    weights_note: str = "",
    palette: str = "brats2023",
    reference_path: PathLike | None = None,
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
    scan = _load(image_paths, label_map_path, palette, reference_path, reference_palette)
    figure = qc_figure(
        scan.images,
        scan.label_map,
        scan.spacing,
        title,
        subtitle,
        reference=scan.reference,
        weights_note=weights_note,
        palette=palette,
    )
    _save(figure, path)


def write_truth_picture(
    path: PathLike,
    image_paths: Sequence[PathLike],
    label_map_path: PathLike,
    reference_path: PathLike,
    title: str = "",
    subtitle: str = "",
    weights_note: str = "",
    palette: str = "brats2023",
    reference_palette: str = "brats2021",
) -> None:
    """Writes `truth_figure` of NIfTI files (paper, Figure 2); arguments and errors as of `write_qc_picture`."""
    scan = _load(image_paths, label_map_path, palette, reference_path, reference_palette)
    figure = truth_figure(
        scan.images, scan.label_map, scan.reference, scan.spacing, title, subtitle, weights_note, palette
    )
    _save(figure, path)


def _load(
    image_paths: Sequence[PathLike],
    label_map_path: PathLike,
    palette: str,
    reference_path: PathLike | None,
    reference_palette: str,
) -> Scan:
    target = nib.as_closest_canonical(nib.load(label_map_path))
    reference = None
    if reference_path is not None:
        reference = _load_on_grid(nib.load(reference_path), target, order=0)
        reference = _translate(np.rint(reference), reference_palette, palette)
    return Scan(
        images=[_load_on_grid(image, target, order=1) for image in _modalities(image_paths)],
        label_map=np.asarray(target.dataobj).squeeze(),
        spacing=[float(s) for s in target.header.get_zooms()[:3]],
        reference=reference,
    )


def _save(figure: Figure, path: PathLike) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100, facecolor=BACKGROUND)


def _modalities(paths: Sequence[PathLike]) -> list[nib.spatialimages.SpatialImage]:
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
    tissues = PALETTES[source]
    return np.select([label_map == tissues[t] for t in tissues], [PALETTES[target][t] for t in tissues], 0)
