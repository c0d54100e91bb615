"""MedNeXt v1, sizes S, B, M and L, with Global Response Normalisation and deep supervision."""

from __future__ import annotations

from .blocks import Block, UpBlock
from .network import (
    MIC_DKFZ_NAMES,
    MedNeXt,
    from_mic_dkfz,
    mednext_base,
    mednext_large,
    mednext_medium,
    mednext_small,
    mednext_tiny,
)

__all__ = [
    "MIC_DKFZ_NAMES",
    "Block",
    "MedNeXt",
    "UpBlock",
    "from_mic_dkfz",
    "mednext_base",
    "mednext_large",
    "mednext_medium",
    "mednext_small",
    "mednext_tiny",
]
