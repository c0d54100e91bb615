"""Region volumes of a label map, and the table of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..cohort import PALETTES, REGION_TISSUES, REGIONS
from ..files import whole_file

VOLUME_COLUMNS = ("subject", "et_ml", "tc_ml", "wt_ml", "status", "seconds", "warnings", "weights")


def region_masks(label_map: np.ndarray, palette: str = "brats2023") -> dict[str, np.ndarray]:
    """Boolean mask of each region in a label map of any shape, in the order of `REGIONS`.

    Raises:
        KeyError: the palette is none of `PALETTES`.
    """
    values = PALETTES[palette]
    return {region: np.isin(label_map, [values[t] for t in REGION_TISSUES[region]]) for region in REGIONS}


def region_volumes(label_map: np.ndarray, voxel_volume_mm3: float, palette: str = "brats2023") -> dict[str, float]:
    """Volume in ml of ET, TC and WT in a label map whose voxels measure `voxel_volume_mm3`."""
    masks = region_masks(label_map, palette)
    return {region: float(np.count_nonzero(mask) * voxel_volume_mm3 / 1000) for region, mask in masks.items()}


def write_volumes_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one line per subject with the columns of `VOLUME_COLUMNS`; numbers have three decimals.

    Args:
        path: CSV file to write, whole or not at all.
        rows: dicts with those keys; what is absent or None (the volumes of a failed subject) stays empty. `warnings`
            is a text or a list of texts.
    """
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VOLUME_COLUMNS)
        writer.writerows([_cell(row.get(column)) for column in VOLUME_COLUMNS] for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float, np.number)):
        return f"{value:.3f}"
    return value if isinstance(value, str) else "; ".join(map(str, value))
