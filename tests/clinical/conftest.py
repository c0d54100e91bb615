"""A synthetic scanner's study, scanned once for all tests, and copies of it to spoil."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def scan(tmp_path_factory):
    """A study with voxels of 4 mm in plane: four series, a localizer and a derived map."""
    from custom.clinical.scanner import scan_phantom

    return scan_phantom(tmp_path_factory.mktemp("scanner") / "Mueller_Hans", seed=2, voxel=4.0)


@pytest.fixture
def study(scan, tmp_path):
    """A copy of the study that a test may spoil."""
    return shutil.copytree(scan.folder, tmp_path / "Mueller_Hans")


@pytest.fixture(scope="session")
def brain_mask(scan, tmp_path_factory):
    """The phantom's own brain, on the grid of the head: preparation without deepbet."""
    import nibabel as nib
    import numpy as np

    from custom.clinical.scanner import head
    from custom.phantom import simulate

    images, _, affine = head(2, 4.0)
    brain = simulate(images.shape[1:], (4.0,) * 3, 2)[0][0] > 0
    path = tmp_path_factory.mktemp("brain") / "mask.nii.gz"
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), affine), path)
    return path


@pytest.fixture(scope="session")
def prepared(scan, brain_mask, tmp_path_factory):
    """The study, prepared with the phantom's own brain mask; the metric looks at fewer voxels, for speed."""
    from custom.clinical import registration
    from custom.clinical.study import prepare_study

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "SAMPLES", 20_000)
        return prepare_study(scan.folder, tmp_path_factory.mktemp("prepared"), brain_mask=brain_mask)
