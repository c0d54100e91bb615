from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest

import custom.report
from custom import cli, demo
from custom.phantom import dataset
from custom.weights import Weights

SMALL = {"shape": (64, 72, 60), "spacing": (2.5, 2.5, 2.5)}


def comnet_demo(*words, expect=0):
    try:
        cli.main(["demo", *map(str, words)])
    except SystemExit as leave:
        assert leave.code == expect
    else:
        assert expect == 0


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Folder of a demo of one small phantom, segmented with the released weights."""
    run = tmp_path_factory.mktemp("demo")
    drawn = Mock(wraps=custom.report.write_qc_picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "GEOMETRY", SMALL)
        patch.setattr(custom.report, "write_qc_picture", drawn)
        comnet_demo("--output_dir", run, "--num_subjects", 1)
    (call,) = drawn.call_args_list  # once, with the mask
    assert Path(call.kwargs["reference_path"]) == run / "phantoms" / "phantom_0_1" / dataset.MASK_FILE
    return run


@pytest.fixture
def copied(shown, tmp_path):
    """A copy of it, to be spoiled; and its subject's folder."""
    shutil.copytree(shown, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / "phantoms" / "phantom_0_1"


def test_a_fresh_phantom_is_segmented_with_the_released_weights_and_scored(shown):
    image = nib.load(shown / "phantoms" / "phantom_0_1" / "brain_t1ce.nii.gz")
    mask = nib.load(shown / "segmented" / "phantom_0_1" / "phantom_0_1_seg.nii.gz")
    assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
    assert (shown / "segmented" / "phantom_0_1" / "phantom_0_1_qc.png").is_file()
    page = (shown / "report.html").read_text()
    assert "Dice" in page and demo.PHANTOM_REMARK in page and "BraTS" in page
    _, table = demo.write_demo_report(shown, [shown / "phantoms"])
    heads, row = (line.split() for line in table.splitlines())
    assert heads == ["subject", "ET", "ml", "TC", "ml", "WT", "ml", "Dice", "ET", "Dice", "TC", "Dice", "WT"]
    assert float(row[3]) > 10 and float(row[6]) > 0.5, "the whole tumour is found, if roughly"


def test_a_demo_goes_on_where_it_stopped(copied, monkeypatch):
    run, _ = copied
    monkeypatch.setattr(demo, "GEOMETRY", SMALL)
    monkeypatch.setattr(dataset, "write_phantom", lambda *_, **__: pytest.fail("the phantom is there"))
    assert demo.write_phantoms(run / "phantoms", 1) == [run / "phantoms" / "phantom_0_1"]


def test_another_seed_gives_another_phantom(tmp_path):
    tiny = {"shape": (32, 36, 32), "spacing": (5.0, 5.0, 5.0)}
    (first,) = demo.write_phantoms(tmp_path, 1, seed=0, **tiny)
    (second,) = demo.write_phantoms(tmp_path, 1, seed=1, **tiny)
    (again,) = demo.write_phantoms(tmp_path / "again", 1, seed=1, **tiny)
    images = [nib.load(folder / "brain_t1.nii.gz").get_fdata() for folder in (first, second, again)]
    assert first.name != second.name
    assert not np.array_equal(images[0], images[1]) and np.array_equal(images[1], images[2])


def test_of_several_subjects_those_that_cannot_be_segmented_are_told(shown, capsys):
    """The one that is there is done already: nothing is computed."""
    broken = shown / "phantoms" / "broken"
    broken.mkdir()
    shutil.copy(shown / "phantoms" / "phantom_0_1" / "brain_t1.nii.gz", broken)
    try:
        comnet_demo("--data", shown / "phantoms", "--output_dir", shown, expect=3)
    finally:
        shutil.rmtree(broken)
    page = (shown / "report.html").read_text()
    assert "broken" in page and "phantom_0_1" in capsys.readouterr().out and demo.PHANTOM_REMARK not in page


def test_without_a_mask_there_are_volumes_only(copied):
    run, subject = copied
    (subject / dataset.MASK_FILE).unlink()
    page, table = demo.write_demo_report(run, [subject])
    assert "Dice" not in table and "Dice" not in page.read_text() and "data:image/jpeg" in page.read_text()


def test_a_mask_on_another_grid_is_not_scored(copied):
    run, subject = copied
    mask = nib.load(subject / dataset.MASK_FILE)
    nib.save(mask.slicer[4:], subject / dataset.MASK_FILE)
    page, table = demo.write_demo_report(run, [subject])
    assert "Dice" not in table and "another grid" in page.read_text()


def test_a_mask_of_another_palette_is_neither_scored_nor_drawn_until_it_is_named(copied, capsys):
    run, subject = copied
    mask = nib.load(subject / dataset.MASK_FILE)
    newer = np.where(np.asarray(mask.dataobj) == 4, 3, np.asarray(mask.dataobj)).astype(np.uint8)
    nib.save(nib.Nifti1Image(newer, mask.affine), subject / dataset.MASK_FILE)
    results = run / "segmented" / "phantom_0_1"
    comnet_demo("--data", run / "phantoms", "--output_dir", run)
    told = "labels that palette brats2021"
    assert "Dice" not in capsys.readouterr().out and told in (run / "report.html").read_text()
    warnings = json.loads((results / "record.json").read_text())["warnings"]
    assert any(one.startswith("the mask beside the images is not drawn") and told in one for one in warnings)
    comnet_demo("--data", run / "phantoms", "--output_dir", run, "--palette", "brats2023")
    heads, row = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    assert "Dice" in heads and float(row[6]) > 0.5 and told not in (run / "report.html").read_text()


def test_a_subject_that_lacks_a_modality_is_scored_too(copied):
    """Its images are not looked at again but for the picture."""
    run, subject = copied
    (subject / "brain_t1.nii.gz").unlink()
    page, table = demo.write_demo_report(run, [subject])
    assert "Dice" in table and "Not scored" not in page.read_text()


def test_subjects_that_the_weights_were_trained_on_are_not_scored(copied, monkeypatch):
    run, subject = copied
    monkeypatch.setattr(Weights, "trained_on", frozenset({"phantom_0_1"}))
    page, table = demo.write_demo_report(run, [subject])
    assert "Dice" not in table and "trained on this subject" in page.read_text()


def test_a_raw_demo_scans_a_phantom_once_and_segments_it_as_a_raw_study(tmp_path, monkeypatch):
    pytest.importorskip("highdicom", reason="needs the extra clinical")
    from custom.clinical import scanner
    from custom.clinical import study as study_room

    segment = Mock()
    monkeypatch.setattr(cli, "segment", segment)
    monkeypatch.setattr(demo, "RAW_VOXEL_MM", 6.0)
    for _ in range(2):
        comnet_demo("--raw", "--output_dir", str(tmp_path))
        monkeypatch.setattr(scanner, "scan_phantom", Mock(side_effect=AssertionError("scanned twice")))
    study = tmp_path / "studies" / "phantom_0"
    assert [path.name for path in (tmp_path / "studies").iterdir()] == ["phantom_0"]  # nothing unfinished beside it
    assert len({path.parent for path in study.rglob("IM*")}) == 6  # four modalities, a localizer and a derived map
    segment.assert_called_with(str(study), output_dir=str(tmp_path / "scanned"), raw=True)
    monkeypatch.setattr(study_room, "EXTRA", ("no_such_library",))
    with pytest.raises(SystemExit, match=r"no_such_library not installed: pip install 'comnet-glioma\[clinical\]'"):
        cli.main(["demo", "--raw", "--seed", "1", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="comnet segment STUDY --raw"):
        cli.main(["demo", "--raw", "--data", str(study), "--output_dir", str(tmp_path)])
