"""CorrDiff: latent diffusion of the coarse segmentation's residual, and the gate that adds it to the coarse logits."""

from .corrector import STAGES, CorrDiff, Refinement, TrainingOutputs
from .denoiser import ConditionEncoder, Denoiser
from .diffusion import LatentDiffusion, LatentScale, reverse_timesteps
from .inputs import binary_entropy, brain_mask, condition
from .presets import corrdiff_base, corrdiff_tiny

__all__ = [
    "STAGES",
    "ConditionEncoder",
    "CorrDiff",
    "Denoiser",
    "LatentDiffusion",
    "LatentScale",
    "Refinement",
    "TrainingOutputs",
    "binary_entropy",
    "brain_mask",
    "condition",
    "corrdiff_base",
    "corrdiff_tiny",
    "reverse_timesteps",
]
