"""Pictures, tables and self-contained HTML pages of what was segmented and how well."""

from __future__ import annotations

from .cases import median_subject, what_went_wrong, worst_first
from .charts import dice_bars, fold_strip
from .crossval import small_run_line, write_crossval_report
from .differences import difference_rows, forest_plot
from .figures import qc_figure
from .panels import REGION_COLOURS, tumour_slices
from .pictures import write_qc_picture, write_truth_picture
from .representative import truth_figure
from .scores import write_scores_report
from .segment import write_segment_report
from .summary import dice_of, fold_means, summarise_scores
from .tables import table2_text
from .volumes import VOLUME_COLUMNS, region_masks, region_volumes, write_volumes_csv

__all__ = [
    "REGION_COLOURS",
    "VOLUME_COLUMNS",
    "dice_bars",
    "dice_of",
    "difference_rows",
    "fold_means",
    "fold_strip",
    "forest_plot",
    "median_subject",
    "qc_figure",
    "region_masks",
    "region_volumes",
    "small_run_line",
    "summarise_scores",
    "table2_text",
    "truth_figure",
    "tumour_slices",
    "what_went_wrong",
    "worst_first",
    "write_crossval_report",
    "write_qc_picture",
    "write_scores_report",
    "write_segment_report",
    "write_truth_picture",
    "write_volumes_csv",
]
