"""Synthetic four-modality glioma subjects with their ground truth, in memory and on disk."""

from __future__ import annotations

from .dataset import simulate, training_phantoms, write_absent, write_cohort, write_phantom

__all__ = ["simulate", "training_phantoms", "write_absent", "write_cohort", "write_phantom"]
