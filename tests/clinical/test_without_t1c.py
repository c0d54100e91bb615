"""A study without contrast: prepared on what there is, and its masks brought back there."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest

from custom.clinical import registration
from custom.clinical.masks import deliver
from custom.clinical.study import prepare_study
from custom.inference import PostprocessRegions

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")


@pytest.fixture(scope="module")
def flair_first(scan, brain_mask, tmp_path_factory):
    """T2w and FLAIR alone, prepared with the brain where it lay in the FLAIR."""
    folder = tmp_path_factory.mktemp("without")
    for series in ("S003", "S004"):  # T2w and FLAIR
        shutil.copytree(scan.folder / series, folder / "study" / series)
    own = nib.load(brain_mask)
    nib.save(nib.Nifti1Image(np.asanyarray(own.dataobj), scan.poses["flair"] @ own.affine), folder / "brain.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "SAMPLES", 20_000)
        return prepare_study(
            folder / "study", folder / "out", without=("t1n", "t1c"), brain_mask=folder / "brain.nii.gz"
        )


def test_the_others_are_registered_to_flair(scan, flair_first):
    assert flair_first.reference == "flair" and tuple(flair_first.images) == ("t2w", "flair")
    found = np.array(flair_first.record["registration"]["t2w"]["matrix_ras"])
    known = scan.poses["t2w"] @ np.linalg.inv(scan.poses["flair"])
    points = np.array([[0, 0, 0], [60, 0, 0], [0, 70, 0], [0, 0, 60], [-60, -70, 0]])
    apart = nib.affines.apply_affine(found, points) - nib.affines.apply_affine(known, points)
    assert np.linalg.norm(apart, axis=1).mean() < 2  # both have voxels of 4 x 4 x 5 mm


def test_masks_and_dicom_seg_lie_on_the_flair(flair_first, tmp_path):
    import highdicom as hd
    from pydicom import dcmread

    grid = nib.load(flair_first.images["flair"])
    probabilities = np.zeros((*grid.shape, 3), np.float32)
    probabilities[60:90, 60:90, 60:90, 2] = 1
    where = nib.Nifti1Image(probabilities, grid.affine)
    mask, _ = deliver(flair_first, where, tmp_path, PostprocessRegions(), pictures=False)
    np.testing.assert_allclose(mask.affine, nib.load(flair_first.scanned("flair")).affine, atol=1e-4)
    assert np.count_nonzero(mask.dataobj) * 4 * 4 * 5 == pytest.approx(30**3, rel=0.1)
    segmentation = hd.seg.segread(tmp_path / f"{flair_first.name}_seg.dcm")
    flair = dcmread(next((flair_first.source / "S004").iterdir()), stop_before_pixels=True)
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == flair.SeriesInstanceUID
