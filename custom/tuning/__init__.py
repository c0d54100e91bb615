"""One ensemble from its folds, with settings chosen on out-of-fold predictions."""

from __future__ import annotations

from .builder import EnsembleBuilder
from .choice import Choice, best_settings, choose, cross_fit
from .grid import Grid, score_region
from .out_of_fold import OutOfFoldDice
from .parts import check_own_backbone, gather_parts

__all__ = [
    "Choice",
    "EnsembleBuilder",
    "Grid",
    "OutOfFoldDice",
    "best_settings",
    "check_own_backbone",
    "choose",
    "cross_fit",
    "gather_parts",
    "score_region",
]
