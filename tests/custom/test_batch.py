from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED, Batch
from custom.bundle_run import bundle_root
from custom.cohort import Exclusion
from custom.files import FileError, UserError
from custom.weights import save_atomically

SETTINGS = {"output_palette": "brats2023", "thresholds": [0.5, 0.5, 0.5]}


@pytest.fixture
def items(tmp_path):
    found = []
    for name in ("a", "b"):
        paths = [tmp_path / "data" / name / f"{key}.nii.gz" for key in ("t1n", "t1c", "t2w", "flair")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        found.append({"subject": name, "image": [str(path) for path in paths]})
    return found


@pytest.fixture
def make(tmp_path):
    weights = tmp_path / "model.pt"
    if not weights.exists():
        save_atomically(
            {"model": {"w": torch.ones(1)}, "provenance": {"notes": "for tests", "trained_on": ["a"]}}, weights
        )

    def build(settings=SETTINGS, **kwargs):
        return Batch(str(tmp_path / "out"), settings, str(weights), pictures=False, **kwargs)

    return build


def save_mask(path, made_by="CoMNeT 0.1.0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    mask.header["descrip"] = made_by.encode()
    nib.save(mask, path)


def finish(batch, name, failure=None, label=None, mask=True, warnings=(), **output):
    state = SimpleNamespace(subject=name, failure=failure, batch={"subject": [name]}, warnings=warnings)
    engine = SimpleNamespace(state=state)
    batch._start(engine)
    voxels = torch.zeros(1, 4, 4, 4)
    voxels[0, 0, 0, :] = torch.tensor([0.0, 1, 2, 3])
    pred = MetaTensor(voxels, affine=torch.diag(torch.tensor([10.0, 10, 10, 1])))
    if failure is None and mask:
        save_mask(batch.output_dir / name / f"{name}_seg.nii.gz")
    engine.state.output = [{"pred": pred, "label": label, **output}]
    batch._finish(engine)
    batch._wait()


def test_an_output_folder_in_the_way_is_named_before_anything_is_read(make):
    book = make()
    book.output_dir.write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*out.*choose another folder"):
        book.inputs()


def table(batch, name="volumes.csv"):
    with open(batch.output_dir / name, newline="") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def test_volumes_are_in_millilitres(make, items):
    book = make()
    book.begin(items)
    finish(book, "a")
    finish(book, "b")
    book.close()
    assert [float(table(book)["a"][f"{region}_ml"]) for region in ("et", "tc", "wt")] == [1.0, 2.0, 3.0]
    assert table(book)["a"]["weights"] == "for tests"


def test_done_subjects_are_not_pending_in_a_later_run(make, items):
    first = make()
    assert len(first.begin(items)) == 2
    finish(first, "a")
    second = make()
    assert [item["subject"] for item in second.begin(items)] == ["b"]
    finish(second, "b")
    second.close()
    assert set(table(second)) == {"a", "b"}


def test_results_of_earlier_runs_stay_in_the_tables(make, items):
    first = make()
    first.begin(items[:1])
    finish(first, "a")
    first.close()
    second = make()
    second.begin(items[1:])
    finish(second, "b")
    second.close()
    assert set(table(second)) == {"a", "b"}


def changed_settings(items, make):
    return make(SETTINGS | {"thresholds": [0.4, 0.5, 0.5]})


def changed_input(items, make):
    os.utime(items[0]["image"][2], ns=(1, 1))
    return make()


def changed_weights(items, make):
    book = make()
    save_atomically({"model": {"w": torch.zeros(1)}}, book.weights.path)
    return make()


def lost_mask(items, make):
    book = make()
    (book.output_dir / "a" / "a_seg.nii.gz").unlink()
    return book


def truncated_mask(items, make):
    book = make()
    mask = book.output_dir / "a" / "a_seg.nii.gz"
    mask.write_bytes(mask.read_bytes()[:-20])
    return book


def broken_record(items, make):
    book = make()
    (book.output_dir / "a" / "record.json").write_text('{"status": "do')
    return book


@pytest.mark.parametrize(
    "change", [changed_settings, changed_input, changed_weights, lost_mask, truncated_mask, broken_record]
)
def test_a_subject_is_done_again_when_something_changed(make, items, change):
    book = make()
    book.begin(items[:1])
    finish(book, "a")
    assert make().begin(items[:1]) == []
    assert len(change(items, make).begin(items[:1])) == 1


def test_a_mask_that_was_edited_by_hand_is_kept(make, items):
    book = make()
    book.begin(items[:1])
    finish(book, "a")
    path = book.output_dir / "a" / "a_seg.nii.gz"
    mask = nib.load(path)
    edited = np.random.default_rng(0).integers(0, 4, mask.shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(edited, mask.affine, mask.header), path)
    assert make().begin(items[:1]) == [] and np.array_equal(nib.load(path).dataobj, edited)


def test_a_subject_whose_picture_is_gone_is_done_again(make, items, monkeypatch):
    monkeypatch.setattr("custom.report.write_qc_picture", lambda path, *_, **__: path.write_bytes(b"a picture"))

    def begin():
        book = make()
        book.pictures = True
        return book, book.begin(items[:1])

    finish(begin()[0], "a")
    book, todo = begin()
    assert todo == []
    (book.output_dir / "a" / "a_qc.png").unlink()
    assert len(begin()[1]) == 1
    book = make()
    book.begin([])
    book.write()
    assert table(book)["a"]["status"] == "earlier run", "it is a result all the same"


def test_failed_subjects_leave_no_mask_and_a_code(make, items):
    book = make()
    book.begin(items)
    finish(book, "a")
    save_mask(book.output_dir / "b" / "b_seg.nii.gz")
    finish(book, "b", failure="out of memory")
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_SOME_FAILED
    assert not (book.output_dir / "b" / "b_seg.nii.gz").exists()
    assert table(book)["b"]["status"] == "failed" and "out of memory" in table(book)["b"]["warnings"]
    assert [item["subject"] for item in make().begin(items)] == ["b"]


def test_exclusions_count_as_failures(make, items):
    cohort = SimpleNamespace(exclusions=[Exclusion("c", "c/t1.nii.gz", "is truncated", "copy it again")])
    book = make(cohort=cohort)
    book.begin([])
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_NONE_SEGMENTED


def test_labelled_subjects_are_scored_and_scores_survive_a_resume(make, items):
    label = torch.zeros(3, 4, 4, 4)
    label[2, 0, 0, 1:] = 1
    label[1, 0, 0, 1:] = 1
    book = make(model="MedNeXt", fold=2)
    book.begin(items)
    finish(book, "a", label=label)
    later = make(model="MedNeXt", fold=2)
    later.begin(items)
    finish(later, "b", label=label)
    later.close()
    scores = table(later, "scores.csv")
    assert set(scores) == {"a", "b"} and scores["a"]["fold"] == "2" and scores["a"]["model"] == "MedNeXt"
    assert float(scores["a"]["WT_dice"]) == 1.0
    assert float(scores["a"]["TC_dice"]) == pytest.approx(2 * 2 / (2 + 3))
    assert np.isnan(float(scores["a"]["ET_dice"])) and float(scores["a"]["ET_dice_brats"]) == 0


def test_subjects_that_the_weights_were_trained_on_are_not_scored(make, items):
    assert [item["subject"] for item in make().untrained(items)] == ["b"]
    with pytest.raises(ValueError, match="trained on every one"):
        make().untrained(items[:1])


def test_record_says_what_was_used(make, items):
    book = make()
    book.begin(items)
    finish(book, "a")
    record = json.loads((book.output_dir / "a" / "record.json").read_text())
    assert record["weights"] == "for tests" and record["comnet_version"] and record["seconds"] >= 0


def test_rows_of_earlier_runs_say_so_and_are_not_scored(make, items):
    label = torch.zeros(3, 4, 4, 4)
    first = make(model="of other weights")
    first.begin(items[:1])
    finish(first, "a", label=label)
    first.close()
    save_atomically({"model": {"w": torch.zeros(1)}, "provenance": {"notes": "newer"}}, first.weights.path)
    second = make()
    second.begin(items[1:])
    finish(second, "b", label=label)
    second.close()
    rows = table(second)
    assert (rows["a"]["status"], rows["a"]["weights"]) == ("earlier run", "for tests")
    assert (rows["b"]["status"], rows["b"]["weights"]) == ("done", "newer")
    assert set(table(second, "scores.csv")) == {"b"}


def test_an_excluded_subject_keeps_nothing_of_an_earlier_run(make, items):
    first = make()
    first.begin(items)
    finish(first, "a")
    finish(first, "b")
    first.close()
    second = make(cohort=SimpleNamespace(exclusions=[Exclusion("b", "b/t1c.nii.gz", "is truncated", "copy it again")]))
    assert second.begin(items[:1]) == []
    with pytest.raises(SystemExit) as leave:
        second.close()
    assert leave.value.code == EXIT_SOME_FAILED
    assert set(table(second)) == {"a"} and not (second.output_dir / "b").exists()


def test_masks_as_scanned_go_with_the_result_that_they_were_made_of(make, items):
    cohort = SimpleNamespace(inputs=lambda: items[:1], exclusions=[])
    first = make(cohort=cohort)
    first.inputs()
    finish(first, "a")
    for kind in ("seg_t1c.nii.gz", "seg_flair.nii.gz", "seg.dcm", "scanned.png"):
        (first.output_dir / "a" / f"a_{kind}").write_text("of the first run")
    second = make(SETTINGS | {"thresholds": [0.4, 0.5, 0.5]}, cohort=cohort)
    second.inputs()
    finish(second, "a", failure="out of memory")
    assert not (second.output_dir / "a").exists()


def test_an_excluded_folder_costs_no_other_subject_of_its_name(make, items):
    first = make()
    first.begin(items)
    finish(first, "b")
    for place, stays in (("/elsewhere/b", True), ("/elsewhere/b/t1c.nii.gz", True), (items[1]["image"][1], False)):
        second = make(cohort=SimpleNamespace(exclusions=[Exclusion("b", place, "is truncated", "copy it again")]))
        second.begin(items[:1])
        assert (second.output_dir / "b" / "b_seg.nii.gz").is_file() == stays


def test_an_interrupted_subject_has_no_mask_of_an_earlier_run(make, items):
    first = make()
    first.begin(items[:1])
    finish(first, "a")
    second = make(SETTINGS | {"thresholds": [0.4, 0.5, 0.5]})
    second.begin(items[:1])
    second._start(SimpleNamespace(state=SimpleNamespace(batch={"subject": ["a"]})))
    assert not (second.output_dir / "a").exists()


def test_a_region_that_was_erased_is_told(make, items):
    book = make()
    book.begin(items[:1])
    finish(book, "a", erased=["ET"], warnings=["no skull"])
    book.close()
    told = json.loads((book.output_dir / "a" / "record.json").read_text())["warnings"]
    assert told == ["no skull", "ET had only components smaller than min_volume_mm3 and is empty"]
    assert all(one in table(book)["a"]["warnings"] for one in told)


def test_warnings_are_written_into_the_picture(make, items, monkeypatch):
    drawn = Mock()
    monkeypatch.setattr("custom.report.write_qc_picture", drawn)
    book = make()
    book.pictures = True
    book.begin(items[:1])
    finish(book, "a", erased=["ET"], warnings=["no skull"])
    assert drawn.call_args.kwargs["warning"] == (
        "no skull; ET had only components smaller than min_volume_mm3 and is empty"
    )


def test_pictures_need_no_folder_but_the_output(make, items, monkeypatch):
    monkeypatch.setattr("custom.report.write_qc_picture", Mock())
    monkeypatch.setattr("tempfile.gettempdir", Mock(side_effect=FileNotFoundError("no usable temporary directory")))
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    book = make()
    book.pictures = True
    book.begin(items[:1])
    finish(book, "a")
    fonts = Path(os.environ["MPLCONFIGDIR"])
    assert fonts.parent == Path(book.output_dir) and fonts.is_dir()


def test_missing_modalities_stand_in_record_table_and_picture(make, items, monkeypatch):
    drawn = Mock()
    monkeypatch.setattr("custom.report.write_qc_picture", drawn)
    book = make()
    book.pictures = True
    items[0]["image"][0] = items[0]["image"][2] = ""
    book.begin(items)
    finish(book, "a", image=SimpleNamespace(meta={"missing": "T1n, T2w"}))
    assert drawn.call_args.kwargs["subtitle"] == "without T1n, T2w" and drawn.call_args.args[1] == items[0]["image"]
    finish(book, "b", image=SimpleNamespace(meta={"missing": ""}))
    assert drawn.call_args.kwargs["subtitle"] == ""
    book.pictures = False
    book.close()
    record = json.loads((book.output_dir / "a" / "record.json").read_text())
    assert record["missing"] == "T1n, T2w" and [one[0] != "" for one in record["files"]] == [False, True, False, True]
    assert (table(book)["a"]["missing"], table(book)["b"]["missing"]) == ("T1n, T2w", "")


def test_a_modality_that_comes_or_goes_makes_no_other_subject_but_is_done_again(make, items):
    book = make()
    book.begin(items[:1])
    finish(book, "a")
    part = [items[0] | {"image": ["", *items[0]["image"][1:]]}]
    assert len(make().begin(part)) == 1
    book = make()
    book.begin(part)
    finish(book, "a")
    assert make().begin(part) == [] and len(make().begin(items[:1])) == 1
    rest = [items[0] | {"image": [items[0]["image"][0], "", "", ""]}]
    assert len(make().begin(rest)) == 1, "no modality in common, but the same folder"


@pytest.mark.parametrize("facts", [{}, {"selection": "last"}])
def test_scores_say_how_the_weights_were_selected(make, items, facts):
    save_atomically({"model": {"w": torch.ones(1)}, "provenance": facts}, make().weights.path)
    book = make()
    book.begin(items[:1])
    finish(book, "a", label=torch.zeros(3, 4, 4, 4))
    book.close()
    assert table(book, "scores.csv")["a"]["selection"] == facts.get("selection", "paper")


def test_a_mask_that_is_not_ours_is_neither_replaced_nor_deleted(make, items):
    theirs = make().output_dir / "a" / "a_seg.nii.gz"
    save_mask(theirs, made_by="an expert")
    before = theirs.read_bytes()
    with pytest.raises(UserError, match=r"a_seg\.nii\.gz is not CoMNeT's and would be replaced"):
        make().begin(items)
    book = make()
    finish(book, "a", failure="out of memory", mask=False)
    assert theirs.read_bytes() == before


@pytest.mark.parametrize("kind", ["record.json", "a_qc.png", "a_seg.dcm", "a_seg_t1c.nii.gz", "a_scanned.png"])
def test_no_file_of_somebody_else_is_replaced_or_deleted(make, items, kind):
    theirs = make().output_dir / "a" / kind
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{kind} is not CoMNeT's and would be replaced"):
        make(cohort=SimpleNamespace(inputs=lambda: items, exclusions=[])).inputs()
    finish(make(), "a", failure="out of memory", mask=False)
    assert theirs.read_text() == '{"mine": 1}'


def test_weights_are_noted_once_the_run_may_begin(make, items):
    cohort = SimpleNamespace(inputs=lambda: items[:1], exclusions=[])
    book = make(cohort=cohort)
    book.inputs()
    finish(book, "a")
    before = (book.output_dir / "weights.txt").read_text()
    save_atomically({"model": {"w": torch.zeros(1)}, "provenance": {"notes": "newer"}}, book.weights.path)
    refused = make(cohort=SimpleNamespace(inputs=Mock(side_effect=UserError("no subject")), exclusions=[]))
    with pytest.raises(UserError, match="no subject"):
        refused.inputs()
    assert (book.output_dir / "weights.txt").read_text() == before
    make(cohort=cohort).inputs()
    assert "newer" in (book.output_dir / "weights.txt").read_text()


def test_the_output_folder_is_no_folder_of_images(make, items, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "data" / "a")
    with pytest.raises(UserError, match="a: results would lie among its images"):
        make(cohort=SimpleNamespace(inputs=lambda: items, exclusions=[])).inputs()
    assert not (tmp_path / "data" / "a" / "weights.txt").exists()


def test_results_are_not_put_among_the_images(make, items, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match="a: results would lie among its images"):
        make().begin(items)
    assert sorted(path.name for path in (tmp_path / "data" / "a").iterdir()) == sorted(
        f"{key}.nii.gz" for key in ("t1n", "t1c", "t2w", "flair")
    )


@pytest.mark.parametrize("name", ["volumes.csv", "weights.txt", "report.html"])
def test_tables_of_someone_else_are_left_alone(make, name):
    book = make(cohort=SimpleNamespace(inputs=list))
    book.output_dir.mkdir()
    (book.output_dir / name).write_text("mine")
    with pytest.raises(UserError, match="is not CoMNeT's"):
        book.inputs()
    assert (book.output_dir / name).read_text() == "mine"


def test_another_subject_of_the_same_name_is_refused(make, items, tmp_path):
    first = make()
    first.begin(items[:1])
    finish(first, "a")
    mask = first.output_dir / "a" / "a_seg.nii.gz"
    other = []
    for path in items[0]["image"]:
        other.append(path.replace("/data/", "/elsewhere/"))
        os.makedirs(os.path.dirname(other[-1]), exist_ok=True)
        with open(other[-1], "w") as file:
            file.write("another patient")
    with pytest.raises(UserError, match=r"holds the results of another a, from .*--name"):
        make().begin([{"subject": "a", "image": other}])
    assert mask.is_file()
    shutil.rmtree(tmp_path / "elsewhere")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert make().begin([{"subject": "a", "image": other}]), "moved files are the same subject"


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ""])
def test_a_name_cannot_lead_out_of_the_folder(make, items, name):
    with pytest.raises(UserError, match="cannot be the name of a subject"):
        make().begin([items[0] | {"subject": name}])


def test_a_record_that_cannot_be_written_fails_its_subject_alone(make, items, monkeypatch):
    book = make()
    book.begin(items)
    with monkeypatch.context() as patch:
        patch.setattr("custom.batch.write_text", Mock(side_effect=FileError(28, "No space left on device")))
        finish(book, "a")
    finish(book, "b")
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_SOME_FAILED
    assert table(book)["a"]["status"] == "failed" and "No space left" in table(book)["a"]["warnings"]
    assert not (book.output_dir / "a" / "a_seg.nii.gz").exists() and table(book)["b"]["status"] == "done"


def test_a_subject_whose_turn_never_came_is_no_success(make, items):
    book = make()
    book.begin(items)
    finish(book, "a")
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_SOME_FAILED and "before its turn" in table(book)["b"]["warnings"]


def test_two_runs_at_once_do_not_share_a_folder(make, tmp_path):
    book = make(cohort=SimpleNamespace(inputs=list))
    book.output_dir.mkdir()
    code = "import sys, time; from custom.files import lock_folder; lock_folder(sys.argv[1]); print(1); time.sleep(60)"
    command = [sys.executable, "-c", code, str(book.output_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="another process is working in"):
            book.inputs()
        other.kill()
    assert book.inputs() == [], "a process that was killed leaves no lock"


def test_what_a_killed_run_has_left_half_written_goes(make):
    book = make(cohort=SimpleNamespace(inputs=list, exclusions=[]))
    left = [book.output_dir / ".partial-0a-volumes.csv", book.output_dir / "a" / ".partial-0b-a_seg.nii.gz"]
    stays = [book.output_dir / "a" / "notes.txt", book.output_dir / "prepared" / ".partial-0c" / "IM1"]
    for path in (*left, *stays):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    book.inputs()
    assert [path.exists() for path in (*left, *stays)] == [False, False, True, True]


def test_tables_are_written_before_the_process_leaves(make, items):
    book = make()
    book.begin(items)
    finish(book, "a", failure="out of memory")
    finish(book, "b")
    book.write()
    assert table(book)["a"]["status"] == "failed"
    with pytest.raises(SystemExit):
        book.leave()


@pytest.mark.parametrize("bundle", ["comnet_mednext", "comnet_corrdiff", "comnet_ensemble"])
def test_several_processes_take_leave_of_each_other_before_one_leaves_with_a_code(bundle):
    config = json.loads((bundle_root(bundle) / "configs" / "multi_gpu_evaluate.json").read_text())
    steps = config["finalize"]
    assert [steps.index(step) for step in ("$@batch.write()", "$@batch.leave()")] == [0, 2]
    assert "destroy_process_group" in steps[1]
