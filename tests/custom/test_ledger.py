from __future__ import annotations

import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.batch import EXIT_NONE_SEGMENTED, EXIT_SOME_FAILED, Ledger
from custom.cohort import Exclusion
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
def ledger(tmp_path):
    weights = tmp_path / "model.pt"
    if not weights.exists():
        save_atomically(
            {"model": {"w": torch.ones(1)}, "provenance": {"notes": "for tests", "trained_on": ["a"]}}, weights
        )

    def make(settings=SETTINGS, **kwargs):
        return Ledger(str(tmp_path / "out"), settings, str(weights), pictures=False, **kwargs)

    return make


def finish(ledger, name, failure=None, label=None):
    voxels = torch.zeros(1, 4, 4, 4)
    voxels[0, 0, 0, :] = torch.tensor([0.0, 1, 2, 3])
    pred = MetaTensor(voxels, affine=torch.diag(torch.tensor([10.0, 10, 10, 1])))
    if failure is None:
        mask = ledger.output_dir / name / f"{name}_seg.nii.gz"
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(b"mask")
    engine = SimpleNamespace(
        state=SimpleNamespace(subject=name, failure=failure, output=[{"pred": pred, "label": label}])
    )
    ledger._start(engine)
    ledger._finish(engine)
    ledger._wait()


def test_an_output_folder_in_the_way_is_named_before_anything_is_read(ledger):
    book = ledger()
    book.output_dir.write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*out.*choose another folder"):
        book.open()


def table(ledger, name="volumes.csv"):
    with open(ledger.output_dir / name, newline="") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def test_volumes_are_in_millilitres(ledger, items):
    book = ledger()
    book.pending(items)
    finish(book, "a")
    finish(book, "b")
    book.close()
    assert [float(table(book)["a"][f"{region}_ml"]) for region in ("et", "tc", "wt")] == [1.0, 2.0, 3.0]
    assert table(book)["a"]["weights"] == "for tests"


def test_done_subjects_are_not_pending_in_a_later_run(ledger, items):
    first = ledger()
    assert len(first.pending(items)) == 2
    finish(first, "a")
    second = ledger()
    assert [item["subject"] for item in second.pending(items)] == ["b"]
    finish(second, "b")
    second.close()
    assert set(table(second)) == {"a", "b"}


def test_results_of_earlier_runs_stay_in_the_tables(ledger, items):
    first = ledger()
    first.pending(items[:1])
    finish(first, "a")
    first.close()
    second = ledger()
    second.pending(items[1:])
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


def broken_record(items, make):
    book = make()
    (book.output_dir / "a" / "record.json").write_text('{"status": "do')
    return book


@pytest.mark.parametrize("change", [changed_settings, changed_input, changed_weights, lost_mask, broken_record])
def test_a_subject_is_done_again_when_something_changed(ledger, items, change):
    book = ledger()
    book.pending(items[:1])
    finish(book, "a")
    assert ledger().pending(items[:1]) == []
    assert len(change(items, ledger).pending(items[:1])) == 1


def test_failed_subjects_leave_no_mask_and_a_code(ledger, items):
    book = ledger()
    book.pending(items)
    finish(book, "a")
    (book.output_dir / "b").mkdir()
    (book.output_dir / "b" / "b_seg.nii.gz").write_bytes(b"of an earlier run")
    finish(book, "b", failure="out of memory")
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_SOME_FAILED
    assert not (book.output_dir / "b" / "b_seg.nii.gz").exists()
    assert table(book)["b"]["status"] == "failed" and "out of memory" in table(book)["b"]["warnings"]
    assert [item["subject"] for item in ledger().pending(items)] == ["b"]


def test_exclusions_count_as_failures(ledger, items):
    cohort = SimpleNamespace(exclusions=[Exclusion("c", "c/t1.nii.gz", "is truncated", "copy it again")])
    book = ledger(cohort=cohort)
    book.pending([])
    with pytest.raises(SystemExit) as leave:
        book.close()
    assert leave.value.code == EXIT_NONE_SEGMENTED


def test_labelled_subjects_are_scored_and_scores_survive_a_resume(ledger, items):
    label = torch.zeros(3, 4, 4, 4)
    label[2, 0, 0, 1:] = 1
    label[1, 0, 0, 1:] = 1
    book = ledger(model="MedNeXt", fold=2)
    book.pending(items)
    finish(book, "a", label=label)
    later = ledger(model="MedNeXt", fold=2)
    later.pending(items)
    finish(later, "b", label=label)
    later.close()
    scores = table(later, "scores.csv")
    assert set(scores) == {"a", "b"} and scores["a"]["fold"] == "2" and scores["a"]["model"] == "MedNeXt"
    assert float(scores["a"]["WT_dice"]) == 1.0
    assert float(scores["a"]["TC_dice"]) == pytest.approx(2 * 2 / (2 + 3))
    assert np.isnan(float(scores["a"]["ET_dice"])) and float(scores["a"]["ET_dice_brats"]) == 0


def test_subjects_that_the_weights_were_trained_on_are_not_scored(ledger, items):
    assert [item["subject"] for item in ledger().unseen(items)] == ["b"]
    with pytest.raises(ValueError, match="trained on every one"):
        ledger().unseen(items[:1])


def test_record_says_what_was_used(ledger, items):
    book = ledger()
    book.pending(items)
    finish(book, "a")
    record = json.loads((book.output_dir / "a" / "record.json").read_text())
    assert record["weights"] == "for tests" and record["comnet_version"] and record["seconds"] >= 0
