"""Pictures, tables and self-contained HTML pages of what was segmented and how well."""

from __future__ import annotations

from .charts import dice_bars, fold_strip
from .figures import REGION_COLOURS, qc_figure, tumour_slices
from .pictures import write_qc_picture
from .scores import write_scores_report
from .segment import write_segment_report
from .summary import dice_of, fold_means, summarise_scores
from .volumes import VOLUME_COLUMNS, region_masks, region_volumes, write_volumes_csv

__all__ = [
    "REGION_COLOURS",
    "VOLUME_COLUMNS",
    "dice_bars",
    "dice_of",
    "fold_means",
    "fold_strip",
    "qc_figure",
    "region_masks",
    "region_volumes",
    "summarise_scores",
    "tumour_slices",
    "write_qc_picture",
    "write_scores_report",
    "write_segment_report",
    "write_volumes_csv",
]
