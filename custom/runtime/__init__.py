"""How networks are executed: PyTorch, or OpenVINO on a CPU.

Importing openvino reports that import to its maker over the network, unless `openvino_telemetry` is absent. Hospitals
would not have it so: this package makes it absent before the first import.
"""

import sys

from .runtime import PRECISIONS, RUNTIMES, Runtime

if "openvino" not in sys.modules:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime"]
