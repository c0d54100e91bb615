"""Pictures, tables and self-contained HTML pages of what was segmented and how well.

jinja2, matplotlib and pandas are imported where a page, a picture or a table is made, not with this package.
"""

from __future__ import annotations

from .pictures import region_masks, region_volumes, write_qc_picture
from .reports import write_crossval_report, write_scores_report, write_segment_report
from .runs import MODELS, read_run, read_scores
from .tables import table2_text

__all__ = [
    "MODELS",
    "read_run",
    "read_scores",
    "region_masks",
    "region_volumes",
    "table2_text",
    "write_crossval_report",
    "write_qc_picture",
    "write_scores_report",
    "write_segment_report",
]
