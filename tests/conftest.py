"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch: threads that wait must not starve other processes
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder that holds `brats2021/` and the UTSW listing; skips where the real data are absent."""
    data = Path(os.environ.get("COMNET_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "brats2021").is_dir():
        pytest.skip(f"real data not found at {data}: set COMNET_REAL_DATA")
    return data


with suppress(ImportError):  # absl, which TensorBoard brings, closes a stderr that is not the system's own: pytest's
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

LOGGERS = [logging.getLogger(name) for name in (None, "comnet", "ignite")]
PRISTINE = [(logger, logger.level, logger.propagate) for logger in LOGGERS]


@pytest.fixture(autouse=True)
def _pristine_logging() -> Iterator[None]:
    """Undo what a bundle's logging.conf changes for the whole process, fixtures of wider scope included."""
    _restore_logging()
    yield
    _restore_logging()


def _restore_logging() -> None:
    for logger, level, propagate in PRISTINE:
        logger.setLevel(level)
        logger.propagate = propagate
    for logger in LOGGERS[1:]:
        logger.handlers.clear()
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).disabled = False
