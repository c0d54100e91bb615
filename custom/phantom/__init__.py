"""Synthetic four-modality glioma subjects with their ground truth, in memory and on disk."""

from __future__ import annotations

from .dataset import simulate, write_cohort, write_phantom

__all__ = ["simulate", "write_cohort", "write_phantom"]
