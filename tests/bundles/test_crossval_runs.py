"""`comnet crossval` from end to end on small phantoms: killed in every stage, its plain commands, what it prints."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bundle_runs import TINY

from custom import cli
from custom.crossval import runner
from custom.files import file_sha256
from custom.weights import read_checkpoint

SETTINGS = TINY | {"corrector": "custom.corrdiff.corrdiff_tiny", "vq_epochs": 1, "write_pictures": False}


@pytest.fixture(scope="module")
def words(phantoms, tmp_path_factory) -> list[str]:
    overlay = tmp_path_factory.mktemp("overlay") / "tiny.json"
    overlay.write_text(json.dumps(SETTINGS))
    return ["crossval", str(phantoms), "--models", "comnet", "--num_folds", "2", "--config", str(overlay)]


def crossval(words: list[str], run_dir: Path) -> multiprocessing.Process:
    """Start the command in a fork, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=_one_thread, args=(words, run_dir))
    process.start()
    return process


def _one_thread(words: list[str], run_dir: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ["OMP_NUM_THREADS"] = "1"
    runner._context = lambda gpu: multiprocessing.get_context("fork")  # jobs need not import everything again either
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    cli.main([*words, "--output_dir", str(run_dir)])


def finish(words: list[str], run_dir: Path) -> None:
    process = crossval(words, run_dir)
    process.join(timeout=300)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    """A cross-validation that nothing has interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(words, run_dir)
    return run_dir


def scores(run_dir: Path) -> dict[str, dict]:
    records = sorted(run_dir.glob("*/scores/fold*/*/record.json"))
    return {str(file.relative_to(run_dir)): json.loads(file.read_text())["scores"] for file in records}


def status(run_dir: Path, job: str) -> str:
    record = run_dir / "jobs" / f"{job}.json"
    return json.loads(record.read_text())["status"] if record.exists() else ""


def test_all_models_folds_and_subjects_are_there(whole):
    for model in ("mednext", "comnet"):
        assert len(list((whole / model / "scores").glob("fold*/*/record.json"))) == 6
        assert all((whole / model / f"fold{fold}" / "model.pt").is_file() for fold in range(2))
    found = scores(whole).values()
    assert {(row["model"], row["fold"]) for row in found} == {(m, k) for m in ("MedNeXt", "CoMNeT") for k in (0, 1)}
    assert (whole / "ensemble" / "model.pt").is_file() and (whole / "report" / "report.html").is_file()
    records = [json.loads(file.read_text()) for file in (whole / "jobs").glob("*.json")]
    assert len(records) == 11 and {record["status"] for record in records} == {"done"}


KILLS = [  # job in which it is stopped, what that has left by then
    ("train_mednext_fold0", "mednext/fold0/last.pt", signal.SIGKILL),
    ("train_mednext_fold1", "mednext/fold1/last.pt", signal.SIGINT),
    ("score_mednext_fold1", "mednext/scores/*/*/record.json", signal.SIGKILL),
    ("predict_coarse", "coarse/*/*.npy", signal.SIGKILL),
    ("train_comnet_fold1", "comnet/fold1/last.pt", signal.SIGKILL),
    ("score_comnet_fold0", "comnet/scores/*/*/record.json", signal.SIGKILL),
    ("ensemble", "logs/ensemble.log", signal.SIGKILL),
    ("report", "logs/report.log", signal.SIGKILL),
]


def test_killed_in_every_stage_it_ends_with_the_same_table(whole, words, tmp_path, capfd):
    run_dir = tmp_path / "run"
    stopped = [stop(words, run_dir, *kill) for kill in KILLS]
    assert sum(stopped) >= len(KILLS) - 1, f"stopped in time: {stopped}"
    assert "comnet: stopped; the same command goes on from here" in capfd.readouterr().err
    finish(words, run_dir)
    assert scores(run_dir) == scores(whole) and len(scores(whole)) == 12
    for name in ("ensemble/tuning.json", "report/table2.csv", "report/scores.csv"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    for folder in ("mednext/fold0", "comnet/fold1"):
        ours, theirs = (torch.load(run / folder / "last.pt", weights_only=True)["model"] for run in (run_dir, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_folds_are_scored_side_by_side(whole, words, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for folder in run_dir.glob("*/scores"):
        shutil.rmtree(folder)
    finish([*words, "--jobs", "2"], run_dir)
    assert scores(run_dir) == scores(whole)


def stop(words: list[str], run_dir: Path, job: str, sign: str, kill: signal.Signals) -> bool:
    """Start the command and stop it in the middle of a job; return whether that job was not done yet."""
    process, deadline = crossval(words, run_dir), time.time() + 120
    while not (status(run_dir, job) and list(run_dir.glob(sign))) and process.is_alive() and time.time() < deadline:
        time.sleep(0.02)
    assert process.is_alive(), "it ended before it could be stopped"
    os.kill(process.pid, kill)
    process.join()
    assert process.exitcode == (1 if kill == signal.SIGINT else -kill)
    return status(run_dir, job) == "started"


def test_the_recipe_for_few_subjects_ends_in_an_ensemble_that_runs_as_it_was_trained(phantoms, tmp_path):
    overlay = tmp_path / "tiny.json"
    own = {"crop_size": [32, 32, 32], "crop_margin": 8, "pad_margin": 2, "num_phantoms": 0}
    overlay.write_text(json.dumps(SETTINGS | own | {"max_epochs": 1, "vq_epochs": 0, "warmup_epochs": 0}))
    words = ["crossval", str(phantoms), "--models", "comnet", "--num_folds", "2", "--config"]
    finish([*words, f"release.json,release_finer.json,{overlay}"], tmp_path / "run")
    facts = read_checkpoint(tmp_path / "run" / "ensemble" / "model.pt")[1]
    assert facts["mirror_axes"] == [0] and facts["selection"] == "last" and facts["drop_modalities_prob"] == 0.25
    assert len(scores(tmp_path / "run")) == 12
    coarse = list((tmp_path / "run" / "coarse").glob("*/*.npy"))
    assert len(coarse) == 6, "what the corrector was trained on is what the ensemble is tuned on"


def test_done_once_it_only_tells_the_result(whole, words):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file() and file.name != "lock"}
    finish(words, whole)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_the_commands_of_a_dry_run_do_the_same(whole, words, tmp_path, capsys):
    run_dir = tmp_path / "run"
    cli.main([*words, "--output_dir", str(run_dir), "--dry_run"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if not line.startswith("#")]
    assert len(lines) == 11 and not (run_dir / "jobs").exists()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    subprocess.run(lines[1], shell=True, check=True, env=environment, stderr=subprocess.DEVNULL)
    ours, theirs = (torch.load(run / "mednext" / "fold1" / "last.pt", weights_only=True) for run in (run_dir, whole))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert file_sha256(run_dir / "datalist.json")


def test_snakemake_runs_the_exported_plan_to_the_same_table(whole, words, tmp_path, capsys):
    snakemake = os.environ.get("COMNET_SNAKEMAKE") or shutil.which("snakemake")
    if snakemake is None:
        pytest.skip("no snakemake: install the extra `cluster`, or name the program in COMNET_SNAKEMAKE")
    run_dir, snakefile = tmp_path / "run", tmp_path / "Snakefile"
    cli.main([*words, "--output_dir", str(run_dir), "--snakefile", str(snakefile)])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [snakemake, "--snakefile", str(snakefile), "--cores", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert scores(run_dir) == scores(whole)
    for name in ("ensemble/tuning.json", "report/table2.csv", "report/scores.csv"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
