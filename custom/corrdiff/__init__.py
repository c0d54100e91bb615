"""CorrDiff: latent diffusion of the coarse segmentation's residual, and the gate that adds it to the coarse logits."""

from .corrector import (
    STAGES,
    CorrDiff,
    Refinement,
    TrainingOutputs,
    binary_entropy,
    brain_mask,
    condition,
    corrdiff_base,
    corrdiff_tiny,
)
from .denoiser import ConditionEncoder, Denoiser
from .diffusion import LatentDiffusion, LatentScale, reverse_timesteps
from .loss import CorrDiffLoss, residual_error, segmentation_error
from .out_of_fold import CoarsePredictions, LoadCoarsed
from .stages import FrozenGuard, ListedOutput, StageSchedule, TrainingStep, state_digest
from .vqvae import ResidualVQVAE

__all__ = [
    "STAGES",
    "CoarsePredictions",
    "ConditionEncoder",
    "CorrDiff",
    "CorrDiffLoss",
    "Denoiser",
    "FrozenGuard",
    "LatentDiffusion",
    "LatentScale",
    "ListedOutput",
    "LoadCoarsed",
    "Refinement",
    "ResidualVQVAE",
    "StageSchedule",
    "TrainingOutputs",
    "TrainingStep",
    "binary_entropy",
    "brain_mask",
    "condition",
    "corrdiff_base",
    "corrdiff_tiny",
    "residual_error",
    "reverse_timesteps",
    "segmentation_error",
    "state_digest",
]
