"""MedNeXt v1, sizes S, B, M and L, with Global Response Normalisation and deep supervision."""

from __future__ import annotations

import sys

from .network import (
    MIC_DKFZ_NAMES,
    Block,
    MedNeXt,
    UpBlock,
    from_mic_dkfz,
    mednext_base,
    mednext_large,
    mednext_light,
    mednext_medium,
    mednext_slim,
    mednext_small,
    mednext_tiny,
)

if "openvino" not in sys.modules:  # importing it reports that over the network, unless this module is absent
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__all__ = [
    "MIC_DKFZ_NAMES",
    "Block",
    "MedNeXt",
    "UpBlock",
    "from_mic_dkfz",
    "mednext_base",
    "mednext_large",
    "mednext_light",
    "mednext_medium",
    "mednext_slim",
    "mednext_small",
    "mednext_tiny",
]
