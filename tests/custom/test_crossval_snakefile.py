"""The exported Snakefile: its rules, its commands, and what a job does before it starts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from custom.crossval.inputs import Subjects
from custom.crossval.plan import Job, make_plan, start_job, write_snakefile

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[Job]:
    monkeypatch.chdir(tmp_path)
    folds = {f"BT{number}": number % 2 for number in range(4)}
    subjects = Subjects(tmp_path / "a run" / "datalist.json", tmp_path / "data", 2, folds, "digest")
    return make_plan(tmp_path / "a run", subjects)


def rules_of(file: Path) -> dict[str, dict[str, str]]:
    """Read the rules of a Snakefile: name, then what stands behind each keyword."""
    found = {}
    for block in file.read_text().split("\nrule ")[1:]:
        name, _, body = block.partition(":")
        parts = re.split(r"^    (\w+):", body, flags=re.MULTILINE)[1:]
        found[name] = {key: value.strip() for key, value in zip(parts[::2], parts[1::2], strict=True)}
    return found


def shell_of(rule: dict[str, str], log: str = "log") -> str:
    """The command as Snakemake gives it to a shell."""
    return ast.literal_eval(f"({rule['shell']})").replace("{log:q}", log).replace("{{", "{").replace("}}", "}")


def test_every_job_is_a_rule_with_its_plain_command(jobs, tmp_path):
    write_snakefile(jobs, tmp_path / "Snakefile")
    rules = rules_of(tmp_path / "Snakefile")
    assert list(rules) == ["all", *(job.name for job in jobs)]
    for job in jobs:
        rule = rules[job.name]
        assert (job.command() in shell_of(rule) and "monai.bundle run" in job.command()) or job.name == "report"
        assert json.loads(rule["params"].removeprefix("digest=")) == job.settings_digest()
        assert json.loads(rule["log"]) == f"a run/logs/{job.name}.log"
        assert set(rule) == {"input", "output", "log", "params", "threads", "resources", "retries", "shell"}


def test_a_rule_waits_for_what_its_job_needs(jobs, tmp_path):
    write_snakefile(jobs, tmp_path / "Snakefile")
    rules = rules_of(tmp_path / "Snakefile")
    marks = {name: json.loads(rule["output"][len("touch(") : -1]) for name, rule in rules.items() if name != "all"}
    assert len(set(marks.values())) == len(jobs) and json.loads(rules["all"]["input"]) == marks["report"]
    for job in jobs:
        assert json.loads(rules[job.name]["input"]) == [marks[other.name] for other in job.needs(jobs)]


def test_what_a_job_writes_is_no_output_that_snakemake_would_delete(jobs, tmp_path):
    write_snakefile(jobs, tmp_path / "Snakefile")
    outputs = {rule.get("output", "") for rule in rules_of(tmp_path / "Snakefile").values()}
    assert not any("model.pt" in output or "scores" in output.split("/")[1:-1] for output in outputs)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 1)])
def test_some_failed_subjects_are_no_failure(code, expected, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "command", lambda self: f"echo 'of {{{self.name}}}'; exit {code}")
    write_snakefile(jobs, tmp_path / "Snakefile")
    shell = shell_of(rules_of(tmp_path / "Snakefile")["predict_coarse"], log="log.txt")
    shell = shell.replace("python -m custom.crossval.plan 'a run' predict_coarse", "true")
    assert subprocess.run(["bash", "-euo", "pipefail", "-c", shell]).returncode == expected
    assert Path("log.txt").read_text() == "of {predict_coarse}\n"


def test_before_a_job_starts_its_earlier_state_is_moved_away_as_by_the_local_runner(jobs, tmp_path):
    job = next(job for job in jobs if job.name == "train_comnet_fold1")
    for number, checkpoint in enumerate(job.reads):
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text(str(number)) if checkpoint.suffix else None
    write_snakefile(jobs, tmp_path / "Snakefile")
    state = job.folders[0] / "last.pt"
    state.parent.mkdir(parents=True)
    state.write_text("after epoch 3")
    start_job(job.run_dir, job.name)
    record = json.loads((job.run_dir / "jobs" / f"{job.name}.json").read_text())
    assert record["digest"] == job.digest() and record["command"] == job.command() and state.exists()
    start_job(job.run_dir, job.name)
    assert state.exists(), "the same again, as after a time limit"
    job.reads[0].write_text("another backbone")
    start_job(job.run_dir, job.name)
    moved = list(job.run_dir.glob("superseded/train_comnet_fold1-*/fold1/last.pt"))
    assert not state.exists() and [file.read_text() for file in moved] == ["after epoch 3"]


def test_the_step_before_a_job_is_a_command(jobs, tmp_path):
    write_snakefile(jobs, tmp_path / "Snakefile")
    words = [sys.executable, "-m", "custom.crossval.plan", str(tmp_path / "a run"), "report"]
    subprocess.run(words, check=True, cwd=REPOSITORY)
    assert json.loads((tmp_path / "a run" / "jobs" / "report.json").read_text())["status"] == "started"
