"""The folder of a cross-validation: read as it is, nothing skipped in silence."""

from __future__ import annotations

import json

import pytest

from custom.report import read_run


@pytest.fixture
def run_dir(tmp_path, three_models):
    """Records of three models, CoMNeT under a wrong name and without subject e."""
    for score in three_models:
        key = score["model"].lower()
        if (key, score["subject"]) != ("comnet", "e"):
            named = score | ({"model": "else"} if key == "comnet" else {})
            _write(tmp_path, key, score["subject"], {"status": "done", "weights": f"{key} weights", "scores": named})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [{"subject": name} for name in "abcdef"]}))
    return tmp_path


def _write(run_dir, key, subject, record):
    folder = run_dir / key / "scores" / f"fold{'abcdef'.index(subject) % 2}" / subject
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))


def test_scores_by_model_and_subject(run_dir):
    run = read_run(run_dir)
    names = [(score["model"], score["subject"]) for score in run.scores]
    assert names == [(model, s) for model in ("SegResNet", "MedNeXt") for s in "abcde"] + [
        ("CoMNeT", s) for s in "abcd"
    ]
    assert run.last_model == "CoMNeT" and run.subjects == list("abcde")
    assert run.notes["MedNeXt"] == "mednext weights" and run.tuning == {}
    assert list(run.of("e")) == ["SegResNet", "MedNeXt"]
    assert run.file("CoMNeT", "b", "qc.png") == run_dir / "comnet" / "scores" / "fold1" / "b" / "b_qc.png"
    assert run.weights("CoMNeT", "b") == "comnet weights"


def test_a_run_of_before_folds_had_folders_is_read_until_it_is_scored_again(run_dir):
    for folder in list((run_dir / "mednext" / "scores").glob("*/*")):
        folder.rename(run_dir / "mednext" / "scores" / folder.name)
    for folder in (run_dir / "mednext" / "scores").glob("fold*"):
        folder.rmdir()
    run = read_run(run_dir)
    assert [score["subject"] for score in run.scores if score["model"] == "MedNeXt"] == list("abcde")
    assert run.weights("MedNeXt", "b") == "mednext weights"
    _write(run_dir, "mednext", "a", {"status": "done", "weights": "new", "scores": run.of("a")["MedNeXt"]})
    run = read_run(run_dir)
    assert [score["subject"] for score in run.scores if score["model"] == "MedNeXt"] == ["a"]
    assert run.notes["MedNeXt"] == "new" and run.not_scored["MedNeXt"] == list("bcdef")


def test_what_is_missing(run_dir):
    _write(run_dir, "segresnet", "f", {"status": "done", "weights": "segresnet weights"})
    assert read_run(run_dir).not_scored == {"SegResNet": ["f"], "MedNeXt": ["f"], "CoMNeT": ["e", "f"]}


def test_a_model_that_was_not_asked_for_is_not_missing(tmp_path, three_models):
    _write(tmp_path, "mednext", "a", {"scores": three_models[5]})
    run = read_run(tmp_path)
    assert run.not_scored == {} and run.notes == {"MedNeXt": ""}


def test_no_scores_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"no scores in segresnet/scores/.*comnet crossval"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{broken", "[1]"])
def test_a_broken_file_is_named(run_dir, content):
    path = run_dir / "mednext" / "scores" / "fold1" / "b" / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"b/record\.json .*delete it"):
        read_run(run_dir)
