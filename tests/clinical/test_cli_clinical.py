"""`comnet prepare` and `comnet segment --raw` on the synthetic scanner's study."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from custom import cli
from custom.cohort import SubjectError
from custom.mednext import mednext_tiny
from custom.weights import NUM_FOLDS, fold_checkpoint, save_atomically

for _library in ("dcm2niix", "highdicom", "SimpleITK"):
    pytest.importorskip(_library, reason="needs the extra clinical: pip install 'comnet-glioma[clinical]'")


def comnet(*words):
    try:
        cli.main([str(word) for word in words])
    except SystemExit as leave:
        return leave.code
    return 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained folds whose output is tumour nearly everywhere: what comes back is tested, not how good it is."""
    folder = tmp_path_factory.mktemp("weights")
    for fold in range(NUM_FOLDS):
        torch.manual_seed(fold)
        network = mednext_tiny()
        with torch.no_grad():
            network.out_blocks[0].conv_out.bias += 5.0
        facts = {"backbone": "custom.mednext.mednext_tiny", "spacing": [5.0] * 3, "num_folds": NUM_FOLDS}
        save_atomically({"model": network.state_dict(), "provenance": facts}, fold_checkpoint(folder, fold))
    return folder


def test_prepare_takes_up_what_is_there_and_goes_on_after_a_bad_study(
    scan, prepared, brain_mask, tmp_path, capsys, caplog
):
    shutil.copytree(prepared.folder, tmp_path / prepared.name)
    words = ("prepare", scan.folder, "--output_dir", tmp_path, "--brain_mask", brain_mask)
    assert comnet(*words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / prepared.name)
    (tmp_path / "empty").mkdir()
    mask = ("--brain_mask", brain_mask)  # so that no library for brains is needed
    assert comnet("prepare", tmp_path / "empty", "--output_dir", tmp_path / "out", *mask) == 4
    assert "it is empty" in caplog.text
    both = ("prepare", scan.folder, tmp_path, "--t1c", 5, "--output_dir", tmp_path, *mask)
    assert "give one at a time" in str(comnet(*both))


def test_segment_raw_brings_masks_back_to_the_scanner(scan, prepared, brain_mask, weights, tmp_path):
    import highdicom as hd

    shutil.copytree(prepared.folder, tmp_path / "prepared" / prepared.name)
    words = ("segment", scan.folder, "--raw", "--output_dir", tmp_path, "--weights", weights)
    assert comnet(*words, "--brain_mask", brain_mask, "--every_series", "--runtime", "torch") == 0
    folder = tmp_path / prepared.name
    for modality in prepared.images:
        mask, scanned = (
            nib.load(folder / f"{prepared.name}_seg_{modality}.nii.gz"),
            nib.load(prepared.scanned(modality)),
        )
        np.testing.assert_allclose(mask.affine, scanned.affine, atol=1e-5)
        assert mask.shape == scanned.shape
        assert np.asanyarray(mask.dataobj).any()
    mask = np.asanyarray(nib.load(folder / f"{prepared.name}_seg_t1c.nii.gz").dataobj)
    read = hd.seg.segread(folder / f"{prepared.name}_seg.dcm").get_volume(combine_segments=True).array
    assert (read > 0).sum() == (mask > 0).sum()
    assert (folder / f"{prepared.name}_scanned.png").stat().st_size > 10_000


def test_the_python_door_takes_a_raw_study(scan, prepared, brain_mask, weights, tmp_path):
    from custom.api import Segmenter

    shutil.copytree(prepared.folder, tmp_path / "prepared" / prepared.name)
    segmenter = Segmenter(weights, runtime="torch")
    found = segmenter.segment_raw(scan.folder, tmp_path, brain_mask=brain_mask)
    scanned = nib.load(prepared.scanned("t1c"))
    np.testing.assert_allclose(found.label_map.affine, scanned.affine, atol=1e-5)
    assert found.label_map.shape == scanned.shape and found.volumes["WT"] > 0
    assert (tmp_path / prepared.name / f"{prepared.name}_seg.dcm").is_file()


def test_a_prepared_study_may_lack_a_modality(prepared, tmp_path):
    from custom.cohort import Cohort

    shutil.copytree(prepared.folder, tmp_path / prepared.name)
    (tmp_path / prepared.name / "t1n.nii.gz").unlink()
    cohort = Cohort(tmp_path)
    (item,) = cohort.inputs()
    assert item["image"][0] == "" and all(item["image"][1:]) and not cohort.exclusions


def test_a_raw_study_may_lack_a_modality(study, prepared, brain_mask, weights, tmp_path, monkeypatch, caplog):
    from unittest.mock import Mock

    from custom.clinical import registration
    from custom.clinical.reading import read_study

    for one in read_study(study, None, "study").series:
        if one.label in (prepared.record["series"]["t1n"], prepared.record["series"]["t2w"]):
            for file in one.files:
                file.unlink()
    monkeypatch.setattr(registration, "SAMPLES", 20_000)
    drawn = Mock()
    monkeypatch.setattr("custom.clinical.overlays.draw_segmentation", drawn)
    words = ("segment", study, "--raw", "--without", "t1n,t2w", "--brain_mask", brain_mask, "--allow_missing")
    assert comnet(*words, "--output_dir", tmp_path / "out", "--weights", weights, "--runtime", "torch") == 0
    assert "without T1n, T2w" in (tmp_path / "out" / "volumes.csv").read_text()
    assert drawn.call_args.args[-1][0] == "without T1n, T2w: less accurate"
    assert len(list((tmp_path / "out").glob("*/*_seg_t1c.nii.gz"))) == 1


def test_one_study_that_cannot_be_brought_back_costs_no_other_and_leaves_nothing_old(tmp_path, monkeypatch, caplog):
    from unittest.mock import Mock

    from custom.clinical import commands, masks, study

    studies = [study.Prepared(name, tmp_path / "prepared" / name, {}) for name in ("A", "B")]
    failed = SubjectError("C", "the study", "is ambiguous", "say which")
    (tmp_path / "prepared" / "C").mkdir(parents=True)
    monkeypatch.setattr(study, "prepare_studies", lambda *_, **__: (studies, [failed]))
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    (tmp_path / "weights.txt").write_text("ours\nsha256 0\n")
    for name in ("A", "B", "C"):
        (tmp_path / name).mkdir()
        for kind in ("seg_t1c.nii.gz", "seg.dcm", "scanned.png"):
            (tmp_path / name / f"{name}_{kind}").write_text("of an earlier run")
        (tmp_path / name / "record.json").write_text('{"comnet_version": "0.1.0"}')

    def run(folders):
        for one in studies:
            nib.save(image, tmp_path / one.name / f"{one.name}_prob.nii.gz")

    deliver = Mock(side_effect=[OSError("the DICOM study is gone"), None])
    monkeypatch.setattr(masks, "deliver", deliver)
    with pytest.raises(SystemExit) as leave:
        commands.segment_raw([], tmp_path, run, {"pictures": False}, {"thresholds": [0.5] * 3})
    assert leave.value.code == 3 and [call.args[0].name for call in deliver.call_args_list] == ["A", "B"]
    assert "A: no mask as scanned: the DICOM study is gone" in caplog.text
    assert {path.name for path in (tmp_path / "A").iterdir()} == {"A_prob.nii.gz", "record.json"}
    assert not (tmp_path / "C").exists() and (tmp_path / "B" / "B_seg.dcm").exists()


def test_options_of_raw_studies_go_with_raw(tmp_path):
    assert "go with --raw" in str(comnet("segment", tmp_path, "--output_dir", tmp_path, "--brain_mask", "x.nii.gz"))
