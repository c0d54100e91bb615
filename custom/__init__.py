"""CoMNeT: MedNeXt with GRN, CorrDiff and fold ensembling for glioma segmentation; the MONAI bundles share it."""

import getpass
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Segmenter

__version__ = "0.1.0"
__all__ = ["Segmenter", "__version__"]

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user may have no name, and MONAI asks for it when it is imported
    os.environ["LOGNAME"] = f"uid{os.getuid()}"

# Where pydicom is installed, MONAI's LoadImage complains, whatever it is to load, of a library for GPUs that is not.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader", category=UserWarning)


def __getattr__(name: str) -> Any:
    """Import `Segmenter`, and PyTorch with it, when it is asked for."""
    if name == "Segmenter":
        from .api import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
