from __future__ import annotations

import json
from pathlib import Path

import pytest

from custom import cli
from custom.phantom import cohort_seeds, write_absent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_absent(folder, cohort_seeds(4, 1), shape=(16, 16, 16), spacing=(10.0, 10.0, 10.0))
    return folder


def crossval(*words):
    """Run the command in this process; return its exit code or message."""
    try:
        cli.main(["crossval", *map(str, words)])
    except SystemExit as leave:
        return leave.code
    return 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "unet"], "unknown model unet: choose from segresnet, mednext, comnet"),
        (["--models", ""], "unknown model (none)"),
        (["--config", "nowhere.json"], "config nowhere.json: no such file"),
        (["--num_folds", "9"], "holds no subject"),
        (["--jobs", "0"], "jobs is 0"),
        (["--selection", "best"], "unknown selection best: choose from paper, inner, last"),
    ],
)
def test_wrong_use_is_one_clear_line(words, message, dataset, tmp_path):
    told = crossval(
        dataset, "--output_dir", tmp_path / "run", *(["--num_folds", 2] if "--num_folds" not in words else []), *words
    )
    assert message in told and told.startswith("comnet: ") and "\n" not in told


def test_a_missing_datalist_is_one_clear_line(tmp_path):
    told = crossval(tmp_path / "none.json", "--output_dir", tmp_path / "run")
    assert "none.json does not exist: give a datalist as `comnet validate` writes it" in told


def test_a_folder_is_checked_once_and_another_one_refused(dataset, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ("--output_dir", run_dir, "--num_folds", 2, "--models", "mednext,segresnet", "--dry_run")
    assert crossval(dataset, *words) == 0
    assert json.loads((run_dir / "datalist.json").read_text())["num_folds"] == 2
    assert "run check_data" in capsys.readouterr().err
    assert crossval(dataset, *words) == 0
    shown = capsys.readouterr()
    assert "run check_data" not in shown.err
    assert shown.out.count("train.json") == 4 and shown.out.count("inference.json") == 4
    other = tmp_path / "other"
    other.mkdir()
    assert "was made for the dataset" in crossval(other, *words)


def test_validate_then_crossval_needs_no_dataset_dir(dataset, tmp_path, capsys):
    cli.main(["validate", str(dataset), "--output", str(tmp_path / "lists" / "datalist.json"), "--num_folds", "2"])
    capsys.readouterr()
    assert crossval(tmp_path / "lists" / "datalist.json", "--output_dir", tmp_path / "run", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [
        *("# train_segresnet", "# score_segresnet", "# train_mednext", "# score_mednext"),
        *("# predict_coarse", "# train_comnet", "# score_comnet", "# ensemble", "# report"),
    ]
    assert len(lines) == 9 + 15 and lines[-1].startswith("comnet report ")
    assert not (tmp_path / "run" / "jobs").exists(), "nothing has run"


def test_a_config_with_commas_is_a_list_of_files(dataset, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text('{"max_epochs": 1}')
    words = ("--models", "mednext", "--num_folds", 2, "--config", f"small.json,{mine}", "--dry_run")
    assert crossval(dataset, "--output_dir", tmp_path / "run", *words) == 0
    (laid,) = (tmp_path / "run" / "configs").glob("comnet_mednext-train-*.json")
    assert f"{laid.name}']" in capsys.readouterr().out.splitlines()[1]
    content = json.loads(laid.read_text())
    assert content["max_epochs"] == 1 and content["spacing"] == [2.0, 2.0, 2.0]


def test_a_report_without_scores_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="comnet: .*no scores"):
        cli.main(["report", str(tmp_path)])
