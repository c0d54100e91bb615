"""What happens to a batch of subjects: who is to be done, what came of each, tables, pictures and exit code."""

from .batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED, Batch

__all__ = ["EXIT_NONE_SEGMENTED", "EXIT_SOME_FAILED", "Batch"]
