"""Fixtures for tests that run whole bundles on small phantoms."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bundle_runs import GEOMETRY, TINY

from custom.mednext import mednext_tiny
from custom.phantom import cohort_seeds, write_absent
from custom.weights import NUM_FOLDS, fold_checkpoint, save_atomically


@pytest.fixture(autouse=True)
def same_path() -> Iterator[None]:
    """Take back what a bundle has put on Python's path: processes that are started later would inherit it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a Python that has everything installed but `custom`."""
    folder = tmp_path_factory.mktemp("site")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if entry.name != "custom" and "comnet" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of six small labelled subjects in UTSW layout, some without ET."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_absent(folder, cohort_seeds(6, 3), **GEOMETRY)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of five untrained fold checkpoints that say what they are."""
    folder = tmp_path_factory.mktemp("weights")
    for fold in range(NUM_FOLDS):
        torch.manual_seed(fold)
        facts = {"backbone": TINY["backbone"], "spacing": TINY["spacing"], "num_folds": NUM_FOLDS, "notes": "untrained"}
        facts |= {"fold": fold, "trained_on": [f"BT{100 + fold}"]}
        save_atomically({"model": mednext_tiny().state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))
    return folder
