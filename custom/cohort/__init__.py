"""Subject folders → checked datalist, folds and exclusion report."""

from __future__ import annotations

from .checks import check_subject, read_scan, zero_background
from .cohort import Cohort
from .datalist import assign_folds, build_datalist, exclusions_file, load_datalist, write_datalist
from .layouts import find_subjects, subject_from_files, subjects_from_names
from .subject import (
    MODALITIES,
    MODALITY_NAMES,
    PALETTES,
    REGION_TISSUES,
    REGIONS,
    REQUIRED,
    Exclusion,
    Subject,
    SubjectError,
    missing_modalities,
    named_modalities,
    palette_values,
)

__all__ = [
    "MODALITIES",
    "MODALITY_NAMES",
    "PALETTES",
    "REGIONS",
    "REGION_TISSUES",
    "REQUIRED",
    "Cohort",
    "Exclusion",
    "Subject",
    "SubjectError",
    "assign_folds",
    "build_datalist",
    "check_subject",
    "exclusions_file",
    "find_subjects",
    "load_datalist",
    "missing_modalities",
    "named_modalities",
    "palette_values",
    "read_scan",
    "subject_from_files",
    "subjects_from_names",
    "write_datalist",
    "zero_background",
]
