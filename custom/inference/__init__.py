"""From a subject to its label map: windows, a loop that one bad subject cannot stop, cleaned regions, native grid."""

from .inferers import (
    SUBJECT_KEY,
    FewWindowsInferer,
    SlidingWindowsInferer,
    SubjectDataset,
    SubjectEvaluator,
    SubjectLoader,
    WholeVolumeInferer,
    describe,
)
from .postprocess import (
    PostprocessRegions,
    PostprocessRegionsd,
    clean_regions,
    fill_holes,
    nest_regions,
    regions_to_label_map,
    remove_small_components,
    told_warnings,
    volumes_ml,
)
from .writer import NativeGridWriter, SaveSubjectd

__all__ = [
    "SUBJECT_KEY",
    "FewWindowsInferer",
    "NativeGridWriter",
    "PostprocessRegions",
    "PostprocessRegionsd",
    "SaveSubjectd",
    "SlidingWindowsInferer",
    "SubjectDataset",
    "SubjectEvaluator",
    "SubjectLoader",
    "WholeVolumeInferer",
    "clean_regions",
    "describe",
    "fill_holes",
    "nest_regions",
    "regions_to_label_map",
    "remove_small_components",
    "told_warnings",
    "volumes_ml",
]
