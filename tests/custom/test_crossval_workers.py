"""Processes that run jobs: side by side, killed, interrupted, orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from custom.crossval.execute import JobsFailed, execute, log_file
from custom.crossval.execute import _outcome as outcome_of
from custom.crossval.job import Job, Stage
from custom.crossval.workers import WorkerProcess, make_workers

REPOSITORY = Path(__file__).resolve().parents[2]


def quick(name: str, run_dir: Path, run_id: str = "initialize") -> Job:
    """A job that a worker can do in no time: set the seed of train.json."""
    return Job(name, run_dir, "comnet_mednext", ("train.json",), run_id=run_id)


class TestWorkers:
    def test_one_cpu_needs_no_other_process(self):
        assert [type(worker).__name__ for worker in make_workers()] == ["ThisProcess"]

    @pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "two"])
    def test_the_number_of_jobs_is_checked(self, jobs):
        with pytest.raises(ValueError, match="give a whole number of at least 1"):
            make_workers(jobs)

    def test_workers_run_side_by_side_and_one_failure_leaves_the_others(self, tmp_path):
        jobs = [quick("good", tmp_path), quick("bad", tmp_path, "no_such_id"), quick("better", tmp_path)]
        with pytest.raises(JobsFailed, match=r"1 of 3 jobs of both failed.*\n\nbad: ") as caught:
            execute([Stage("both", tuple(jobs))], tmp_path, jobs=2)
        assert "no_such_id" in str(caught.value)
        status = {job.name: json.loads((tmp_path / "jobs" / f"{job.name}.json").read_text())["status"] for job in jobs}
        assert status == {"good": "done", "bad": "started", "better": "done"}
        assert "monai.bundle run initialize" in log_file(tmp_path, jobs[0]).read_text()

    def test_a_killed_worker_is_a_failed_job_and_is_replaced(self, tmp_path):
        worker = WorkerProcess(None, 1)
        try:
            first, future = worker._pid, worker.submit(quick("victim", tmp_path), tmp_path / "log")
            os.kill(first, signal.SIGKILL)
            assert "its process was killed; if memory ran out" in outcome_of(future, worker).failure
            assert worker._pid != first and worker._executor.submit(os.getpid).result() == worker._pid
        finally:
            worker.kill()

    def test_a_worker_that_died_between_two_jobs_is_replaced(self, tmp_path):
        worker = WorkerProcess(None, 1)
        try:
            os.kill(worker._pid, signal.SIGKILL)
            with pytest.raises(BrokenProcessPool):
                while True:
                    worker._executor.submit(os.getpid).result(timeout=20)
            outcome = worker.submit(Job("report", tmp_path), tmp_path / "log").result(timeout=120)
            assert "no scores" in outcome.failure
        finally:
            worker.kill()

    def test_a_worker_sees_one_gpu_and_its_share_of_threads_and_ends_with_its_parent(self, tmp_path):
        with parent_of(tmp_path, GPU_AND_THREADS) as parent:
            gpu, threads, pid = (parent.stdout.readline().strip() for _ in range(3))
            parent.kill()
        assert (gpu, threads) == ("3", "2")
        assert has_ended(int(pid)), "the worker outlived the process that had started it"

    def test_an_interrupt_ends_the_workers_and_keeps_what_is_done(self, tmp_path):
        with parent_of(tmp_path, SLOW_JOBS) as parent:
            pids = [int(parent.stdout.readline()) for _ in range(2)]
            parent.send_signal(signal.SIGINT)
            assert parent.wait(timeout=30) == 1
        assert all(map(has_ended, pids))
        status = {file.stem: json.loads(file.read_text())["status"] for file in (tmp_path / "jobs").glob("*.json")}
        assert status == {"quick": "done", "slow0": "started", "slow1": "started"}


GPU_AND_THREADS = """
import os, time
from custom.crossval.workers import WorkerProcess
if __name__ == "__main__":
    worker = WorkerProcess("3", 2)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        print(worker._executor.submit(os.getenv, name).result(), flush=True)
    worker._executor.submit(time.sleep, 60)
    print(worker._pid, flush=True)
    time.sleep(60)
"""
SLOW_JOBS = """
import os, signal, sys, time
from dataclasses import dataclass
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from custom.crossval.execute import execute
from custom.crossval.job import Job, Stage

@dataclass(frozen=True)
class Slow(Job):
    seconds: float = 0

    def run(self):
        if self.seconds:
            with open(TERMINAL, "w") as terminal:
                print(os.getpid(), file=terminal)
        time.sleep(self.seconds)

run_dir, TERMINAL = Path(sys.argv[1]), f"/proc/{os.getppid()}/fd/1"
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    slow = [Slow(f"slow{number}", run_dir, seconds=60) for number in range(2)]
    try:
        execute([Stage("first", (Slow("quick", run_dir),)), Stage("last", tuple(slow))], run_dir, jobs=2)
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


def parent_of(folder: Path, script: str) -> subprocess.Popen:
    """Start a process that starts workers; they load its script once more."""
    file = folder / "parent.py"
    file.write_text(script)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(file), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def has_ended(pid: int) -> bool:
    deadline = time.time() + 20
    while Path(f"/proc/{pid}").exists() and time.time() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()
