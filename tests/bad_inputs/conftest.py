"""Fixtures shared by the tests of bad inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cohort_to_spoil import BAD, GOOD, MODALITIES, make_mask, noise, save


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three good subjects; the tests spoil the middle one."""
    for number, name in enumerate((*GOOD, BAD)):
        for offset, modality in enumerate(MODALITIES):
            save(tmp_path / "data" / name / f"{modality}.nii.gz", noise(10 * number + offset))
        save(tmp_path / "data" / name / "seg.nii.gz", make_mask(1, 2, 4))
    return tmp_path / "data"
