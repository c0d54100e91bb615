"""What MONAI lacks for training: losses of the paper, handlers, and going on exactly where training was stopped."""

from .handlers import EpochSeeder, GradientClipper, ProgressBar, Publisher, Resumer, subjects_digest
from .losses import DeepSupervisionLoss, DscPlusPlusBCELoss, dsc_plus_plus
from .selection import CheckpointSaver, EarlyStopHandler, Selection, ValidationHandler

__all__ = [
    "CheckpointSaver",
    "DeepSupervisionLoss",
    "DscPlusPlusBCELoss",
    "EarlyStopHandler",
    "EpochSeeder",
    "GradientClipper",
    "ProgressBar",
    "Publisher",
    "Resumer",
    "Selection",
    "ValidationHandler",
    "dsc_plus_plus",
    "subjects_digest",
]
