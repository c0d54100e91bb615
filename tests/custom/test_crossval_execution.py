"""Which jobs run, which run again, and what a failure leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from custom.crossval.execute import JobsFailed, execute, log_file
from custom.crossval.job import Job, Stage
from custom.crossval.records import Records
from custom.files import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fake(Job):
    """Writes a file that holds what it reads; `behaviour` says what else."""

    behaviour: str = ""
    ran: tuple = ()

    def run(self) -> None:
        print(f"output of {self.name}", flush=True)
        os.write(2, b"and of what it calls\n")
        for path in self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.name + "".join(read.read_text() for read in self.reads))
        (self.run_dir / "ran.txt").open("a").write(f"{self.name} ")
        if self.behaviour == "fails":
            raise UserError("the subject ate it")
        if self.behaviour.isdigit():
            raise SystemExit(int(self.behaviour))


class Chain:
    """Two trainings and a scoring of both, with a file each."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        models = [run_dir / name / "model.pt" for name in ("a", "b")]
        first = [self.job(path.parent.name, writes=(path,), folder=path.parent) for path in models]
        self.stages = [Stage("first", tuple(first)), Stage("last", (self.job("c", reads=tuple(models)),))]

    def job(self, name: str, **kwargs) -> Fake:
        return Fake(name, self.run_dir, **({"writes": (self.run_dir / f"{name}.txt",)} | kwargs))

    def change(self, name: str, **kwargs) -> None:
        self.stages = [
            Stage(stage.name, tuple(replace(job, **kwargs) if job.name == name else job for job in stage.jobs))
            for stage in self.stages
        ]

    def run(self) -> str:
        """Return which jobs have run."""
        record = self.run_dir / "ran.txt"
        record.unlink(missing_ok=True)
        execute(self.stages, self.run_dir, jobs=1)
        return record.read_text().strip() if record.exists() else ""


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path)


class TestExecution:
    def test_what_is_done_is_not_done_again(self, chain):
        assert chain.run() == "a b c"
        assert chain.run() == ""
        record = json.loads((chain.run_dir / "jobs" / "a.json").read_text())
        assert record["status"] == "done" and record["command"] == f"comnet report {os.path.relpath(chain.run_dir)}"

    def test_a_moved_run_is_still_done(self, chain, tmp_path_factory):
        chain.run()
        there = tmp_path_factory.mktemp("elsewhere") / "run"
        chain.run_dir.rename(there)
        assert Chain(there).run() == ""
        chain.run_dir.mkdir()

    def test_lost_results_are_made_again_with_what_depends_on_them(self, chain):
        chain.run()
        (chain.run_dir / "a" / "model.pt").unlink()
        assert chain.run() == "a", "the same bytes came back, so c is still done"
        (chain.run_dir / "c.txt").unlink()
        assert chain.run() == "c"

    def test_changed_settings_run_again_with_what_depends_on_them_and_from_the_start(self, chain):
        chain.run()
        (chain.run_dir / "b" / "last.pt").write_text("state of the old settings")
        chain.change("b", overrides={"max_epochs": 2})
        assert chain.run() == "b", "the same bytes came out"
        assert not (chain.run_dir / "b" / "last.pt").exists()
        assert [path.name for path in chain.run_dir.glob("superseded/b-*/*")] != []
        (chain.run_dir / "b" / "model.pt").write_text("other weights")
        assert chain.run() == "c"

    def test_killed_training_keeps_its_state(self, chain):
        job = chain.stages[0].jobs[0]
        Records(chain.run_dir).start(job)
        (chain.run_dir / "a").mkdir()
        (chain.run_dir / "a" / "last.pt").write_text("after epoch 3")
        assert chain.run() == "a b c"
        assert (chain.run_dir / "a" / "last.pt").read_text() == "after epoch 3"

    def test_the_content_of_configs_and_checkpoints_counts_and_their_place_does_not(self, tmp_path):
        overlay = tmp_path / "mine.json"
        overlay.write_text('{"max_epochs": 1}')
        job = Job("a", tmp_path / "run", "comnet_mednext", ("train.json", overlay), overrides={"data": tmp_path / "x"})
        digest = job.digest()
        overlay.write_text('{\n  "max_epochs": 1\n}')
        assert job.digest() == replace(job, overrides={"data": tmp_path / "y"}).digest() == digest
        overlay.write_text('{"max_epochs": 2}')
        assert job.digest() != digest
        for change in ({"run_id": "other"}, {"cohort": "other"}, {"overrides": {"fold": 1}}):
            assert replace(job, **change).digest() != job.digest()

    def test_of_a_stage_with_a_failure_the_others_run_and_later_stages_do_not(self, chain, capsys):
        chain.change("a", behaviour="fails")
        with pytest.raises(JobsFailed) as caught:
            chain.run()
        assert (chain.run_dir / "ran.txt").read_text() == "a b "
        told = str(caught.value)
        assert "1 of 2 jobs of first failed" in told and "a: the subject ate it" in told
        assert str(log_file(chain.run_dir, chain.stages[0].jobs[0])) in told
        assert "and of what it calls" in told and "ValueError: the subject ate it" not in told.split("ends:")[0]
        chain.change("a", behaviour="")
        assert chain.run() == "a c"

    def test_a_job_that_leaves_no_result_has_failed(self, chain):
        chain.change("c", writes=(chain.run_dir / "c.txt", chain.run_dir / "lost.txt"))
        fake_run = Fake.run

        def lose(job):
            fake_run(job)
            (chain.run_dir / "lost.txt").unlink(missing_ok=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fake, "run", lose)
            with pytest.raises(JobsFailed, match=r"c: it ended without leaving .*lost\.txt"):
                chain.run()
        assert chain.run() == "c"

    def test_some_failed_subjects_are_a_warning_and_no_subject_is_a_failure(self, chain, capfd):
        chain.change("a", behaviour="3")
        assert chain.run() == "a b c"
        assert "some subjects failed" in json.loads((chain.run_dir / "jobs" / "a.json").read_text())["warning"]
        assert "a: some subjects failed" in capfd.readouterr().err
        chain.change("b", behaviour="4", overrides={"x": 1})
        with pytest.raises(JobsFailed, match="b: it left with code 4"):
            chain.run()

    def test_output_goes_to_logs_and_the_bar_to_the_terminal(self, tmp_path):
        script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_crossval_execution import Chain
Chain(Path({str(tmp_path)!r})).run()
print("after")
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "after\n" and "3/3" in result.stderr and "output of" not in result.stderr
        log = (tmp_path / "logs" / "b.log").read_text()
        assert "output of b" in log and "and of what it calls" in log

    def test_two_processes_do_not_share_a_run(self, chain, tmp_path):
        script = f"""
import sys, time
from pathlib import Path
from custom.crossval.execute import _alone
with _alone(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
            other.stdout.readline()
            with pytest.raises(UserError, match="another process is running"):
                chain.run()
            other.kill()
        assert chain.run() == "a b c"
