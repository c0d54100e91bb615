"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder that holds `brats2021/` and the UTSW listing; skips where the real data are absent."""
    data = Path(os.environ.get("COMNET_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "brats2021").is_dir():
        pytest.skip(f"real data not found at {data}: set COMNET_REAL_DATA")
    return data
