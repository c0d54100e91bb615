"""The synthetic study end to end: DICOM in, the released network, masks on T1c's own grid, DICOM-SEG out, read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from custom.api import Segmenter
from custom.bundle_run import bundle_root
from custom.clinical import registration
from custom.clinical.masks import to_scanned
from custom.clinical.scanner import head, scan_phantom
from custom.clinical.study import load_prepared
from custom.cohort import PALETTES
from custom.phantom import simulate

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")

VOXEL = 2.0
SEED = 3

pytestmark = pytest.mark.slow


def program(name, install):
    found = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    if found is None:
        pytest.skip(f"{name} is not there: {install}")
    return found


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def regions_of(label_map, palette="brats2023"):
    values = PALETTES[palette]
    enhancing = label_map == values["enhancing"]
    return enhancing, enhancing | (label_map == values["core"]), label_map > 0


def placed(voxels, affine, image):
    """Voxels of one affine at the voxels of `image` that lie where they do; all labelled ones must lie on one."""
    at = np.linalg.inv(image.affine) @ affine @ np.array([*np.argwhere(voxels).T, np.ones(np.count_nonzero(voxels))])
    index = np.rint(at[:3]).astype(int)
    assert np.abs(at[:3] - index).max() < 0.05
    result = np.zeros(image.shape, np.uint8)
    result[tuple(index)] = voxels[voxels > 0]
    return result


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """Scan, preparation, folder of results, final mask, and the mask of the same subject handed over prepared."""
    folder = tmp_path_factory.mktemp("way")
    scan = scan_phantom(folder / "scan", seed=SEED, voxel=VOXEL)
    images, _, affine = head(SEED, VOXEL)
    brain = (simulate(images.shape[1:], (VOXEL,) * 3, SEED)[0][0] > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(brain, affine), folder / "brain.nii.gz")
    segmenter = Segmenter(bundle_root("comnet_mednext") / "models" / "model.pt", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "SAMPLES", 30_000)
        found = segmenter.segment_raw(scan.folder, folder / "out", brain_mask=folder / "brain.nii.gz")
    (prepared,) = (load_prepared(one) for one in (folder / "out" / "prepared").glob("study-*"))

    grid = nib.load(prepared.images["t1c"])
    inside = np.asanyarray(nib.load(prepared.folder / "brain_mask.nii.gz").dataobj)
    to_head = np.linalg.inv(affine) @ grid.affine
    handed_over = {
        modality: nib.Nifti1Image(
            np.where(inside, ndimage.affine_transform(image, to_head, output_shape=grid.shape, order=1), 0), grid.affine
        )
        for modality, image in zip(prepared.images, images, strict=True)
    }
    at_once = segmenter.segment(**handed_over, probabilities=True).probabilities
    return scan, prepared, folder / "out" / prepared.name, found.label_map, to_scanned(at_once, prepared)[0] >= 0.5


def test_the_mask_is_the_tumour_on_t1c_as_it_was_scanned(way):
    scan, _, _, mask, _ = way
    truth = placed(scan.truth, scan.affine, mask)
    scores = [
        dice(ours, theirs)
        for ours, theirs in zip(regions_of(np.asanyarray(mask.dataobj)), regions_of(truth, "brats2021"), strict=True)
    ]
    print("Dice with the truth", np.round(scores, 3))
    assert np.all(np.array(scores) > (0.6, 0.8, 0.85))  # ET is a rim as thin as a voxel of 2 x 2 x 5 mm


def test_the_mask_is_that_of_the_same_subject_handed_over_prepared(way):
    *_, mask, at_once = way
    scores = [dice(ours, theirs) for ours, theirs in zip(regions_of(np.asanyarray(mask.dataobj)), at_once, strict=True)]
    print("Dice with the mask of the subject handed over prepared", np.round(scores, 3))
    assert np.all(np.array(scores) > (0.85, 0.93, 0.95))


def test_the_dicom_seg_reads_back_equal_by_highdicom(way):
    import highdicom as hd

    _, prepared, folder, mask, _ = way
    volume = hd.seg.segread(folder / f"{prepared.name}_seg.dcm").get_volume(combine_segments=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    np.testing.assert_array_equal(placed(volume.array, affine, mask), np.asanyarray(mask.dataobj))


def test_the_dicom_seg_reads_back_equal_by_dcmqi(way, tmp_path):
    dcmqi = program("segimage2itkimage", "pip install dcmqi (no wheel for macOS)")
    _, prepared, folder, mask, _ = way
    words = ("--inputDICOM", folder / f"{prepared.name}_seg.dcm", "--outputDirectory", tmp_path)
    subprocess.run([dcmqi, *words, "--outputType", "nii", "--mergeSegments"], check=True, capture_output=True)
    read = nib.load(tmp_path / "1.nii.gz")
    np.testing.assert_array_equal(placed(np.asanyarray(read.dataobj), read.affine, mask), np.asanyarray(mask.dataobj))
    segments = [
        one["SegmentLabel"]
        for group in json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
        for one in group
    ]
    assert segments == ["Necrotic and non-enhancing tumor core", "Peritumoral edema", "Enhancing tumor"]


def test_dciodvfy_finds_no_error_in_the_dicom_seg(way):
    checker = program("dciodvfy", "apt install dicom3tools")
    _, prepared, folder, *_ = way
    said = subprocess.run([checker, folder / f"{prepared.name}_seg.dcm"], capture_output=True, text=True, check=False)
    lines = (said.stdout + said.stderr).splitlines()
    assert "Segmentation" in lines and not [line for line in lines if line.startswith("Error")]
