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
from .diffusion import ConditionEncoder, Denoiser, LatentDiffusion, LatentScale, reverse_timesteps
from .loss import (
    CorrDiffLoss,
    FrozenGuard,
    ListedOutput,
    StageSchedule,
    TrainingStep,
    residual_error,
    segmentation_error,
    state_digest,
)
from .out_of_fold import CoarsePredictions, LoadCoarsed
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
