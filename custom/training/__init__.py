"""What MONAI lacks for training: losses of the paper, handlers, and going on exactly where training was stopped."""

from .average import WeightAverage
from .handlers import CheckpointSaver, EarlyStopHandler, EpochSeeder, GradientClipper, ProgressBar
from .losses import DeepSupervisionLoss, DscPlusPlusBCELoss, dsc_plus_plus
from .resume import Publisher, Resumer, subjects_digest

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
    "WeightAverage",
    "dsc_plus_plus",
    "subjects_digest",
]
