"""comnet_ensemble from its configs: five folds to masks on native grids, and what happens when something is wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import GEOMETRY, TINY, fails_with, run
from monai.data import MetaTensor
from scipy import ndimage

from custom.batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED
from custom.inference import PostprocessRegions
from custom.phantom import write_phantom
from custom.weights import CheckpointError


def segment(dataset: Path, weights: Path, output: Path, *overlays: str, **overrides) -> None:
    settings = {"dataset_dir": str(dataset), "weights_dir": str(weights), "output_dir": str(output)}
    settings |= {key: TINY[key] for key in ("backbone", "spacing", "num_workers")}
    run("comnet_ensemble", "inference.json", *overlays, **(settings | overrides))


def rows(output: Path, name: str = "volumes.csv") -> dict[str, dict[str, str]]:
    with open(output / name, newline="") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def mask_of(output: Path, subject: str) -> nib.Nifti1Image:
    return nib.load(output / subject / f"{subject}_seg.nii.gz")


@pytest.fixture(scope="module")
def oddities(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oddities")
    odd = {"LPS": (5.0, 5.0, 5.0), "PIR": (4.0, 6.0, 5.0), "RAS": (5.0, 3.0, 7.0)}
    for number, (orientation, spacing) in enumerate(odd.items()):
        shape = tuple(round(160 / size) for size in spacing)
        write_phantom(folder, orientation, shape, spacing, orientation, seed=number, oblique_degrees=7.0 * number)
    return folder


@pytest.fixture(scope="module")
def segmented(oddities, weights, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("segmented")
    segment(oddities, weights, output, write_probabilities=True)
    return output


@pytest.mark.parametrize("subject", ["LPS", "PIR", "RAS"])
def test_mask_is_on_the_inputs_own_grid(segmented, oddities, subject):
    mask, image = mask_of(segmented, subject), nib.load(oddities / subject / "brain_t1.nii.gz")
    assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.affine, image.affine)
    for field in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "qoffset_x", "xyzt_units"):
        assert np.array_equal(mask.header[field], image.header[field]), field
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}


def test_volumes_are_those_of_the_mask(segmented):
    for subject, row in rows(segmented).items():
        mask = mask_of(segmented, subject)
        voxel = np.abs(np.linalg.det(mask.affine[:3, :3]))
        assert float(row["wt_ml"]) == pytest.approx((np.asarray(mask.dataobj) > 0).sum() * voxel / 1000, abs=2e-3)
        assert row["weights"] == "untrained" and row["status"] == "done"


def test_probabilities_are_on_the_same_grid_and_give_the_mask(segmented):
    stored = nib.load(segmented / "PIR" / "PIR_prob.nii.gz")
    probabilities = MetaTensor(np.moveaxis(stored.get_fdata(dtype=np.float32), -1, 0), affine=stored.affine)
    assert probabilities.shape == (3, *mask_of(segmented, "PIR").shape)
    assert probabilities.min() >= 0 and probabilities.max() <= 1 and probabilities.std() > 0
    expected = PostprocessRegions(palette="brats2023")(probabilities)[0]
    assert np.array_equal(expected, mask_of(segmented, "PIR").dataobj)


def test_pictures_and_report_are_there(segmented):
    assert (segmented / "RAS" / "RAS_qc.png").stat().st_size > 10_000
    assert "untrained" in (segmented / "report.html").read_text()


def test_same_seed_and_weights_give_the_same_mask(segmented, oddities, weights, tmp_path):
    segment(oddities / "PIR", weights, tmp_path, write_pictures=False)
    assert np.array_equal(mask_of(tmp_path, "PIR").dataobj, mask_of(segmented, "PIR").dataobj)


def test_sliding_window_is_there_too(oddities, weights, tmp_path):
    overrides = {"inferer": "@sliding_window", "patch_size": [32, 32, 32], "write_pictures": False}
    segment(oddities / "LPS", weights, tmp_path, **overrides)
    assert mask_of(tmp_path, "LPS").shape == nib.load(oddities / "LPS" / "brain_t1.nii.gz").shape


def test_a_bad_subject_is_reported_and_the_others_are_segmented(phantoms, weights, tmp_path):
    dataset = tmp_path / "data"
    for name in ("BT0001", "BT0002", "BT0003"):
        shutil.copytree(phantoms / name, dataset / name)
    truncated = dataset / "BT0002" / "brain_flair.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    with pytest.raises(SystemExit) as code:
        segment(dataset, weights, tmp_path / "out")
    assert code.value.code == EXIT_SOME_FAILED
    statuses = {name: row["status"] for name, row in rows(tmp_path / "out").items()}
    assert statuses == {"BT0001": "done", "BT0002": "failed", "BT0003": "done"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "BT0002" in page and "brain_flair.nii.gz" in page
    assert not (tmp_path / "out" / "BT0002").exists()


def test_nothing_usable_has_a_code_of_its_own(phantoms, weights, tmp_path):
    shutil.copytree(phantoms / "BT0001", tmp_path / "data" / "BT0001")
    for name in ("t1ce", "flair"):
        (tmp_path / "data" / "BT0001" / f"brain_{name}.nii.gz").unlink()
    with pytest.raises(SystemExit) as code:
        segment(tmp_path / "data", weights, tmp_path / "out")
    assert code.value.code == EXIT_NONE_SEGMENTED
    assert "brain_t1ce" in (tmp_path / "out" / "report.html").read_text()


def test_a_second_run_does_only_what_is_missing_or_changed(phantoms, weights, tmp_path):
    dataset, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(phantoms / "BT0001", dataset / "BT0001")
    segment(dataset, weights, output)
    first = (output / "BT0001" / "record.json").stat().st_mtime_ns
    shutil.copytree(phantoms / "BT0002", dataset / "BT0002")
    segment(dataset, weights, output)
    assert (output / "BT0001" / "record.json").stat().st_mtime_ns == first
    assert set(rows(output)) == {"BT0001", "BT0002"}
    segment(dataset, weights, output, thresholds=[0.6, 0.6, 0.6])
    assert (output / "BT0001" / "record.json").stat().st_mtime_ns > first


def test_a_subject_killed_before_its_record_is_done_again(phantoms, weights, tmp_path):
    segment(phantoms / "BT0003", weights, tmp_path)
    (tmp_path / "BT0003" / "record.json").unlink()
    (tmp_path / "BT0003" / "BT0003_seg.nii.gz").write_bytes(b"half")
    segment(phantoms / "BT0003", weights, tmp_path)
    assert json.loads((tmp_path / "BT0003" / "record.json").read_text())["status"] == "done"
    assert np.asarray(mask_of(tmp_path, "BT0003").dataobj).ndim == 3


def test_evaluation_scores_only_subjects_that_no_fold_saw(phantoms, weights, tmp_path):
    segment(phantoms, weights, tmp_path, "evaluate.json")
    assert set(rows(tmp_path, "scores.csv")) == set(rows(tmp_path)) == {f"BT000{number}" for number in range(1, 7)}
    again = rows(tmp_path, "scores.csv")
    segment(phantoms, weights, tmp_path, "evaluate.json")
    assert rows(tmp_path, "scores.csv") == again


def test_evaluation_on_training_subjects_is_refused(weights, tmp_path):
    write_phantom(tmp_path / "seen", "BT100", **GEOMETRY)
    with fails_with(CheckpointError, match="trained on every one of these 1 subjects"):
        segment(tmp_path / "seen", weights, tmp_path / "out", "evaluate.json")


def test_missing_weights_and_other_sizes_are_refused(phantoms, weights, tmp_path):
    with fails_with(CheckpointError, match=r"no weights at .*nowhere.*name yours"):
        segment(phantoms, tmp_path / "nowhere", tmp_path / "out")
    with fails_with(CheckpointError, match=r"fold0.model.pt does not fit MedNeXt"):
        segment(phantoms, weights, tmp_path / "out", backbone="custom.mednext.mednext_small")


def test_an_output_folder_in_the_way_is_named(phantoms, weights, tmp_path):
    (tmp_path / "out").write_text("a file")
    with fails_with(OSError, match=r"cannot write to .*out"):
        segment(phantoms, weights, tmp_path / "out")


def test_real_subjects_come_back_on_their_own_grid(real_data, weights, tmp_path):
    for subject in ("BraTS2021_00006", "BraTS2021_01480"):
        segment(real_data / "brats2021" / subject, weights, tmp_path, write_pictures=False)
        mask = mask_of(tmp_path, subject)
        image = nib.load(real_data / "brats2021" / subject / f"{subject}_t1ce.nii.gz")
        assert mask.shape == image.shape == (240, 240, 155)
        assert np.array_equal(mask.affine, image.affine)
        modalities = sorted((real_data / "brats2021" / subject).glob("*_t1*.nii.gz"))
        modalities += [real_data / "brats2021" / subject / f"{subject}_{name}.nii.gz" for name in ("t2", "flair")]
        brain = np.logical_or.reduce([np.asarray(nib.load(path).dataobj) != 0 for path in modalities])
        labels = np.asarray(mask.dataobj)
        assert labels.any() and set(np.unique(labels)) <= {0, 1, 2, 3}
        assert not labels[~ndimage.binary_fill_holes(brain)].any()
    assert set(rows(tmp_path)) == {"BraTS2021_00006", "BraTS2021_01480"}
