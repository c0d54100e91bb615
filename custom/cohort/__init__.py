"""Subject folders → checked datalist, folds and exclusion report."""

from __future__ import annotations

from .checks import Scan, check_subject, read_scan, zero_background
from .cohort import Cohort
from .datalist import assign_folds, build_datalist, exclusions_file, load_datalist, write_datalist
from .layouts import LAYOUTS, find_subjects, subject_from_files, subjects_from_names
from .subject import MODALITIES, PALETTES, REGION_TISSUES, REGIONS, Exclusion, Subject, SubjectError, palette_values

__all__ = [
    "LAYOUTS",
    "MODALITIES",
    "PALETTES",
    "REGIONS",
    "REGION_TISSUES",
    "Cohort",
    "Exclusion",
    "Scan",
    "Subject",
    "SubjectError",
    "assign_folds",
    "build_datalist",
    "check_subject",
    "exclusions_file",
    "find_subjects",
    "load_datalist",
    "palette_values",
    "read_scan",
    "subject_from_files",
    "subjects_from_names",
    "write_datalist",
    "zero_background",
]
