from __future__ import annotations

import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

import custom
from custom import Segmenter, cli
from custom.cohort import SubjectError
from custom.comnet import CoMNeT
from custom.corrdiff import corrdiff_tiny
from custom.files import UserError
from custom.mednext import mednext_tiny
from custom.phantom import cohort_seeds, write_absent
from custom.weights import CheckpointError, save_atomically

SPACING = [5.0, 5.0, 5.0]
FILES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "flair": "flair"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_absent(folder, cohort_seeds(1, 1), shape=(32, 36, 32), spacing=SPACING)
    return {key: folder / "BT0001" / f"brain_{name}.nii.gz" for key, name in FILES.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = CoMNeT(mednext_tiny, 2, corrdiff_tiny())
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    parts = {"backbone": "custom.mednext.mednext_tiny", "corrector": "custom.corrdiff.corrdiff_tiny"}
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_atomically({"model": network.state_dict(), "provenance": parts | {"spacing": SPACING, "num_folds": 2}}, path)
    return path


@pytest.fixture(scope="module")
def segmenter(weights):
    return Segmenter(weights=weights, device="cpu", min_volume_mm3=[0.0, 0.0, 0.0])


def test_it_finds_what_the_command_finds(segmenter, weights, subject, tmp_path):
    found = segmenter.segment(**subject, probabilities=True)
    words = [str(subject["t1n"].parent), "--weights", str(weights), "--output_dir", str(tmp_path), "--device", "cpu"]
    cli.main(["segment", *words, "--min_volume_mm3", "[0,0,0]", "--nopictures", "--probabilities"])
    mask = nib.load(tmp_path / "BT0001" / "BT0001_seg.nii.gz")
    maps = nib.load(tmp_path / "BT0001" / "BT0001_prob.nii.gz")
    assert np.unique(mask.dataobj).size > 1, "an empty mask would prove nothing"
    assert np.array_equal(found.label_map.dataobj, mask.dataobj)
    assert np.array_equal(found.probabilities.dataobj, maps.dataobj)
    assert found.label_map.header.binaryblock == mask.header.binaryblock


def test_images_in_memory_serve_as_well_as_files(segmenter, subject):
    by_files = segmenter.segment(**subject)
    by_images = segmenter.segment(**{key: nib.load(path) for key, path in subject.items()})
    assert np.array_equal(by_files.label_map.dataobj, by_images.label_map.dataobj)
    assert by_files.volumes == by_images.volumes and by_files.probabilities is None


def test_a_subject_may_lack_modalities(segmenter, weights, subject):
    part = {key: subject[key] for key in ("t1c", "flair")}
    with pytest.raises(SubjectError, match="BT0001: .*no T1n, T2w, and these weights .*allow_missing"):
        segmenter.segment(**part)
    willing = Segmenter(weights, "cpu", min_volume_mm3=[0.0, 0.0, 0.0], allow_missing=True)
    found, full = willing.segment(**part), willing.segment(**subject)
    assert found.missing == ("t1n", "t2w") and full.missing == ()
    assert found.warnings[0].startswith("without T1n, T2w: ") and "without" not in " ".join(full.warnings)
    assert found.label_map.shape == full.label_map.shape
    assert not np.array_equal(found.label_map.dataobj, full.label_map.dataobj)
    in_memory = willing.segment(**{key: nib.load(path) for key, path in part.items()})
    assert np.array_equal(in_memory.label_map.dataobj, found.label_map.dataobj)
    with pytest.raises(SubjectError, match="Add T1c or T2-FLAIR"):
        willing.segment(t1n=subject["t1n"], t2w=subject["t2w"])


def test_volumes_are_those_of_the_label_map(segmenter, subject):
    found = segmenter.segment(**subject)
    labels, voxel_ml = np.asarray(found.label_map.dataobj), np.prod(SPACING) / 1000
    assert found.volumes["WT"] == pytest.approx(np.count_nonzero(labels) * voxel_ml)
    assert found.volumes["ET"] == pytest.approx(np.count_nonzero(labels == 3) * voxel_ml)


def test_what_is_odd_is_told(weights, subject):
    found = Segmenter(weights, "cpu", thresholds=[1.0, 1.0, 1.0]).segment(**subject)
    assert "no tumour found" in found.warnings and found.volumes["WT"] == 0
    found = Segmenter(weights, "cpu", min_volume_mm3=[1e9, 1e9, 1e9]).segment(**subject)
    assert any("WT had only components smaller than" in warning for warning in found.warnings)


def test_a_bad_image_is_named(segmenter, subject, tmp_path):
    (tmp_path / "t2.nii.gz").write_bytes(subject["t2w"].read_bytes()[:-500])
    with pytest.raises(SubjectError, match=r"t2\.nii\.gz.*truncated"):
        segmenter.segment(**subject | {"t2w": tmp_path / "t2.nii.gz"})
    with pytest.raises(UserError, match="flair is a ndarray"):
        segmenter.segment(**subject | {"flair": np.zeros((32, 36, 32))})
    assert segmenter.segment(**subject).volumes, "it serves on"


def test_a_segmenter_that_cannot_be_made_says_why(weights, tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        Segmenter(tmp_path)
    with pytest.raises(UserError, match="unknown option --thresholdz: did you mean --thresholds"):
        Segmenter(weights, thresholdz=[0.5])
    with pytest.raises(UserError, match="no device 'gpu'"):
        Segmenter(weights, device="gpu")
    with pytest.raises(CheckpointError, match="trained at a spacing of .* not "):
        Segmenter(weights, spacing=[1.25, 1.25, 1.25])
    with pytest.raises(UserError, match="no runtime 'tensorrt'"):
        Segmenter(weights, runtime="tensorrt")


def test_a_user_without_a_name_or_a_home_can_import_it():
    code = "import os, pwd; pwd.getpwuid = lambda uid: {}[uid]; import custom.api, getpass; print(getpass.getuser())"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("LOGNAME", "USER", "LNAME", "USERNAME")
    }
    environment["HOME"] = "/nowhere"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"uid{os.getuid()}", done.stderr


def test_importing_the_package_costs_nothing():
    code = "import sys, custom; assert not {'torch', 'monai', 'nibabel', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        custom.Segmentor  # noqa: B018
