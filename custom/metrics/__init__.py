"""Scores of binary regions against a reference (paper §3.4): thin, over `monai.metrics`, panoptica and scipy.

What an empty region scores, in two conventions reported side by side. *Skip* leaves out (NaN) what is not defined;
the columns ending in `_brats` follow the BraTS challenges and give every subject a number:

| empty            | dice, nsd, lesion_dice, lesion_nsd | hd95, lesion_hd95 | those in `_brats` | hd95_brats |
| ---------------- | ---------------------------------- | ----------------- | ----------------- | ---------- |
| both             | NaN                                | NaN               | 1                 | 0 mm       |
| reference only   | NaN                                | NaN               | 0                 | 373.13 mm  |
| prediction only  | 0                                  | NaN               | 0                 | 373.13 mm  |

`lesion_f1` is 0 where one of the two is empty and NaN where both are. The calibration error is defined for empty
regions too, and NaN only where the brain is empty (`calibration`). Every `sd` is that of a sample (N − 1).
"""

from __future__ import annotations

from .paired import PAPER, RULES, may_infer, paired_differences
from .scores import (
    EMPTY_HD95_MM,
    LESION_SCORES,
    SCORES,
    CalibrationErrord,
    MeanRegionDice,
    RegionDice,
    calibration_columns,
    calibration_scores,
    lesion_scores,
    score_subject,
    summarise,
)

__all__ = [
    "EMPTY_HD95_MM",
    "LESION_SCORES",
    "PAPER",
    "RULES",
    "SCORES",
    "CalibrationErrord",
    "MeanRegionDice",
    "RegionDice",
    "calibration_columns",
    "calibration_scores",
    "lesion_scores",
    "may_infer",
    "paired_differences",
    "score_subject",
    "summarise",
]
