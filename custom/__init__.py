"""CoMNeT: MedNeXt with GRN, CorrDiff and fold ensembling for glioma segmentation; the MONAI bundles share it."""

import getpass
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Segmenter

__version__ = "0.1.0"
__all__ = ["Segmenter", "__version__"]

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user may have no name, and MONAI asks for it when it is imported
    os.environ["LOGNAME"] = f"uid{os.getuid()}"


def __getattr__(name: str) -> Any:
    """Import `Segmenter`, and PyTorch with it, when it is asked for."""
    if name == "Segmenter":
        from .api import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
