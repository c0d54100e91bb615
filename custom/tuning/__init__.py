"""One ensemble from its folds, with settings chosen on out-of-fold predictions."""

from __future__ import annotations

from .builder import EnsembleBuilder, OutOfFoldDice
from .choice import Choice, Grid, best_settings, choose, cross_fit, score_region

__all__ = [
    "Choice",
    "EnsembleBuilder",
    "Grid",
    "OutOfFoldDice",
    "best_settings",
    "choose",
    "cross_fit",
    "score_region",
]
