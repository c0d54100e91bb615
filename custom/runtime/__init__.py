"""How networks are executed: PyTorch, or OpenVINO on a CPU."""

from .runtime import PRECISIONS, RUNTIMES, Runtime

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime"]
