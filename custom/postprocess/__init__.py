"""From region probabilities to a label map on the subject's own grid."""

from __future__ import annotations

from .regions import (
    PostprocessRegions,
    PostprocessRegionsd,
    clean_regions,
    fill_holes,
    nest_regions,
    regions_to_label_map,
    remove_small_components,
)
from .writer import NativeGridWriter

__all__ = [
    "NativeGridWriter",
    "PostprocessRegions",
    "PostprocessRegionsd",
    "clean_regions",
    "fill_holes",
    "nest_regions",
    "regions_to_label_map",
    "remove_small_components",
]
