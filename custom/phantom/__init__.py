"""Synthetic four-modality glioma subjects with their ground truth, in memory and on disk."""

from __future__ import annotations

from .dataset import cohort_seeds, simulate, training_phantoms, write_absent, write_phantom

__all__ = ["cohort_seeds", "simulate", "training_phantoms", "write_absent", "write_phantom"]
