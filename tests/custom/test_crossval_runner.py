"""Which jobs run, which run again, what a failure leaves; processes side by side, killed, interrupted, orphaned."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from custom.crossval import runner
from custom.crossval.plan import Job
from custom.crossval.runner import JobsFailed, run_plan, visible_gpus
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
        if self.behaviour == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour.isdigit():
            raise SystemExit(int(self.behaviour))


class Chain:
    """Two trainings and a scoring of both, with a file each."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        models = [run_dir / name / "model.pt" for name in ("a", "b")]
        first = [self.job(path.parent.name, writes=(path,), folders=(path.parent,)) for path in models]
        self.jobs = [*first, self.job("c", reads=tuple(models))]

    def job(self, name: str, **kwargs) -> Fake:
        return Fake(name, self.run_dir, **({"writes": (self.run_dir / f"{name}.txt",)} | kwargs))

    def change(self, name: str, **kwargs) -> None:
        self.jobs = [replace(job, **kwargs) if job.name == name else job for job in self.jobs]

    def run(self) -> str:
        """Return which jobs have run."""
        record = self.run_dir / "ran.txt"
        record.unlink(missing_ok=True)
        run_plan(self.jobs, self.run_dir)
        return record.read_text().strip() if record.exists() else ""


@pytest.fixture
def chain(tmp_path, monkeypatch) -> Chain:
    """In forks, which know what is in this file."""
    monkeypatch.setattr(runner, "_context", lambda gpu: multiprocessing.get_context("fork"))
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
        chain.jobs[0].begin(chain.jobs[0].digest())
        (chain.run_dir / "a").mkdir()
        (chain.run_dir / "a" / "last.pt").write_text("after epoch 3")
        assert chain.run() == "a b c"
        assert (chain.run_dir / "a" / "last.pt").read_text() == "after epoch 3"

    def test_of_a_failure_only_what_needs_it_does_not_run(self, chain, capsys):
        chain.jobs = [*chain.jobs, chain.job("d", reads=(chain.run_dir / "c.txt",)), chain.job("e")]
        chain.change("a", behaviour="fails")
        with pytest.raises(JobsFailed) as caught:
            chain.run()
        assert set((chain.run_dir / "ran.txt").read_text().split()) == {"a", "b", "e"}
        told = str(caught.value)
        assert "1 of 5 jobs failed" in told and "a: the subject ate it" in told
        assert str(chain.jobs[0].log) in told
        assert "and of what it calls" in told and "UserError: the subject ate it" not in told.split("ends:")[0]
        chain.change("a", behaviour="")
        assert chain.run() == "a c d"

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
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from custom.crossval import runner
from test_crossval_runner import Chain
runner._context = lambda gpu: multiprocessing.get_context("fork")
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
from filelock import FileLock
Path({str(tmp_path / "jobs")!r}).mkdir()
with FileLock({str(tmp_path / "jobs" / "lock")!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
            other.stdout.readline()
            with pytest.raises(UserError, match="another process is running"):
                chain.run()
            other.kill()
        assert chain.run() == "a b c"


def quick(name: str, run_dir: Path, run_id: str = "initialize") -> Job:
    """A job that a worker can do in no time: set the seed of train.json."""
    return Job(name, run_dir, "comnet_mednext", ("train.json",), run_id=run_id)


class TestProcesses:
    @pytest.mark.parametrize("count", [0, -1, 1.5, True, "two"])
    def test_the_number_of_jobs_is_checked(self, count, tmp_path):
        with pytest.raises(UserError, match="give a whole number of at least 1"):
            run_plan([], tmp_path, count)

    def test_jobs_run_side_by_side_and_one_failure_leaves_the_others(self, tmp_path):
        jobs = [quick("good", tmp_path), quick("bad", tmp_path, "no_such_id"), quick("better", tmp_path)]
        with pytest.raises(JobsFailed, match=r"1 of 3 jobs failed.*\n\nbad: ") as caught:
            run_plan(jobs, tmp_path, 2)
        assert "no_such_id" in str(caught.value)
        status = {job.name: json.loads((tmp_path / "jobs" / f"{job.name}.json").read_text())["status"] for job in jobs}
        assert status == {"good": "done", "bad": "started", "better": "done"}
        assert "monai.bundle run initialize" in jobs[0].log.read_text()

    def test_a_killed_process_is_a_failed_job(self, chain):
        chain.change("b", behaviour="dies")
        with pytest.raises(JobsFailed, match="b: its process was killed; if memory ran out, use fewer --jobs"):
            chain.run()
        chain.change("b", behaviour="")
        assert chain.run() == "b c"

    def test_jobs_share_the_threads_unless_their_number_is_set(self, chain, monkeypatch):
        told = chain.run_dir / "threads.txt"
        monkeypatch.setattr("torch.get_num_threads", lambda: 8)
        monkeypatch.setattr("torch.set_num_threads", lambda number: told.write_text(str(number)))
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        run_plan(chain.jobs[:1], chain.run_dir, 3)
        assert not told.exists()
        monkeypatch.delenv("OMP_NUM_THREADS")
        run_plan(chain.jobs[1:2], chain.run_dir, 3)
        assert told.read_text() == "2"

    def test_gpus_are_named_as_cuda_names_them(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert visible_gpus() == ["0", "1"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc,7")
        assert visible_gpus() == ["5", "GPU-abc"]

    def test_each_job_sees_one_gpu_and_ends_with_its_parent(self, tmp_path):
        told = tmp_path / "told.txt"
        with parent_of(tmp_path, gpus=["3", "5"]) as parent:
            lines = wait_for(told, 2)
            parent.kill()
        assert sorted(gpu for gpu, _ in lines) == ["3", "5"]
        assert all(has_ended(int(pid)) for _, pid in lines), "a job outlived the process that had started it"

    def test_an_interrupt_ends_the_jobs_and_keeps_what_is_done(self, tmp_path):
        with parent_of(tmp_path, gpus=[]) as parent:
            lines = wait_for(tmp_path / "told.txt", 2)
            parent.send_signal(signal.SIGINT)
            assert parent.wait(timeout=30) == 1
        assert all(has_ended(int(pid)) for _, pid in lines)
        status = {file.stem: json.loads(file.read_text())["status"] for file in (tmp_path / "jobs").glob("*.json")}
        assert status == {"quick": "done", "slow0": "started", "slow1": "started"}


SLOW_JOBS = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from custom.crossval import runner
from custom.crossval.plan import Job

@dataclass(frozen=True)
class Slow(Job):
    seconds: float = 0

    def run(self):
        if self.seconds:
            line = f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}"
            (self.run_dir / "told.txt").open("a").write(line + chr(10))
        else:
            self.writes[0].write_text("")
        time.sleep(self.seconds)

if __name__ == "__main__":
    run_dir, gpus = Path(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    runner.visible_gpus = lambda: gpus
    done = run_dir / "quick.txt"
    first = [] if gpus else [Slow("quick", run_dir, writes=(done,))]
    slow = [Slow(f"slow{number}", run_dir, reads=(done,), seconds=400) for number in range(2)]
    try:
        runner.run_plan([*first, *slow], run_dir, 2)
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


def parent_of(folder: Path, gpus: list[str]) -> subprocess.Popen:
    """Start a process that has started processes; those import the file that it was started from."""
    file = folder / "parent.py"
    file.write_text(SLOW_JOBS)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, str(file), str(folder), *gpus], env=environment)


def wait_for(file: Path, count: int) -> list[list[str]]:
    deadline = time.time() + 300
    while not (file.is_file() and len(file.read_text().splitlines()) == count) and time.time() < deadline:
        time.sleep(0.05)
    return [line.split() for line in file.read_text().splitlines()]


def has_ended(pid: int) -> bool:
    deadline = time.time() + 20
    while Path(f"/proc/{pid}").exists() and time.time() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()
