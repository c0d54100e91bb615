from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from custom import cli
from custom.phantom import write_cohort


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_cohort(folder, 4, seed=1, shape=(16, 16, 16), spacing=(10.0, 10.0, 10.0))
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
    assert crossval(tmp_path / "lists" / "datalist.json", "--output_dir", tmp_path / "run", "--dry_run") == 0
    assert (tmp_path / "run" / "commands" / "7_report.txt").is_file()


def test_a_config_with_commas_is_a_list_of_files(dataset, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text('{"max_epochs": 1}')
    words = ("--models", "mednext", "--num_folds", 2, "--config", f"small.json,{mine}", "--dry_run")
    assert crossval(dataset, "--output_dir", tmp_path / "run", *words) == 0
    lines = (tmp_path / "run" / "commands" / "1_train_backbones.txt").read_text().splitlines()
    assert all(line.index("small.json") < line.index("mine.json") for line in lines)


def test_a_report_without_scores_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="comnet: .*no scores"):
        cli.main(["report", str(tmp_path)])


STAND_IN = """#!/usr/bin/env python3
import os, pathlib, re, subprocess, sys
folder = pathlib.Path(__file__).parent
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
number = len(list(folder.glob("ran_*"))) + 1
assert words.get("dependency") == (f"afterok:{number - 1}" if number > 1 else None), words
tasks = range(1, 1 + int(re.fullmatch(r"1-([0-9]+)", words["array"])[1]))
codes = [
    subprocess.call(["sh", "-c", words["wrap"]], env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}) for task in tasks
]
(folder / f"ran_{number}").write_text(f"{words['job-name']} {words['gres']} {codes}")
print(number)
"""


def test_the_slurm_script_runs_every_line_of_every_stage_in_order(tmp_path):
    (tmp_path / "sbatch").write_text(STAND_IN)
    (tmp_path / "sbatch").chmod(0o755)
    commands = tmp_path / "a run" / "commands"
    commands.mkdir(parents=True)
    (commands / "1_train.txt").write_text("echo \"it's 1\" >>out.txt\necho '--a#b' >>out.txt\n")
    (commands / "2_score.txt").write_text("exit 3\nexit 4\n")
    script = Path(__file__).resolve().parents[2] / "docs" / "slurm_crossval.sh"
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", script, "a run", "--gres=gpu:1"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out.txt").read_text() == "it's 1\n--a#b\n"
    told = [(tmp_path / f"ran_{number}").read_text() for number in (1, 2)]
    assert told == ["1_train gpu:1 [0, 0]", "2_score gpu:1 [0, 1]"]
