"""Where jobs run: in this process, or in processes of their own that import once and run one job after another."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from ..bundle_run import known_reason
from ..files import UserError
from .job import Job


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        seconds: how long it took.
        failure: why it failed; empty if it did not.
        warning: what is to be told although it succeeded.
    """

    seconds: float
    failure: str = ""
    warning: str = ""


def run_job(job: Job, log: Path) -> Outcome:
    """Run a job in this process; everything that is written to standard output or error meanwhile goes to ``log``."""
    started = time.perf_counter()
    failure = warning = ""
    with output_to(log):
        os.write(2, f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {job.name}\n".encode())
        try:
            job.run()
        except SystemExit as leave:
            from ..batch import EXIT_SOME_FAILED

            some_failed = leave.code == EXIT_SOME_FAILED
            warning = "some subjects failed or were excluded" if some_failed else ""
            failure = f"it left with code {leave.code}" if leave.code and not some_failed else ""
        except Exception as error:
            traceback.print_exc()
            failure = known_reason(error) or f"{type(error).__name__}: {error}"
        _free_memory()
    return Outcome(time.perf_counter() - started, failure, warning)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append to a file whatever this process and its children write to file descriptors 1 and 2."""
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    _flush()
    try:
        with open(log, "ab") as file:
            for stream, _ in saved:
                os.dup2(file.fileno(), stream)
        yield
    finally:
        _flush()
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)


class ThisProcess:
    """Runs jobs here, one after another; for one CPU, where a second process would only import once more."""

    def submit(self, job: Job, log: Path) -> Future[Outcome]:
        """Run the job and return when it is done."""
        future: Future[Outcome] = Future()
        future.set_result(run_job(job, log))
        return future

    def close(self) -> None:
        """Nothing to do."""

    kill = restart = close


class WorkerProcess:
    """A process that imports once and runs one job after another.

    It ends by itself when this process ends, however that is killed: no orphan goes on writing checkpoints beside the
    next run.

    Args:
        gpu: the only GPU that it sees; ``None`` leaves all as they are.
        threads: CPU threads, unless ``OMP_NUM_THREADS`` is set already.
    """

    def __init__(self, gpu: str | None, threads: int) -> None:
        self.settings = (gpu, threads)
        self.restart()

    def submit(self, job: Job, log: Path) -> Future[Outcome]:
        """Start the job; the future breaks if the process dies."""
        try:
            return self._executor.submit(run_job, job, log)
        except BrokenProcessPool:  # it died between two jobs
            self.restart()
            return self._executor.submit(run_job, job, log)

    def restart(self) -> None:
        """Start the process; after its death, another one."""
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(1, context, _prepare_worker, self.settings)
        self._pid = self._executor.submit(os.getpid).result()

    def kill(self) -> None:
        """End the process now, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the process when it is idle."""
        self._executor.shutdown()


def make_workers(jobs: int | None = None) -> list[ThisProcess] | list[WorkerProcess]:
    """Make one worker a GPU, or where there is none ``jobs`` workers that share the CPU cores.

    Args:
        jobs: how many jobs run side by side; by default as many as there are GPUs, at least one.

    Raises:
        ValueError: ``jobs`` is no positive whole number.
    """
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise UserError(f"jobs is {jobs!r}: give a whole number of at least 1")
    gpus = visible_gpus()
    count = jobs or len(gpus) or 1
    if count == 1 and not gpus:
        return [ThisProcess()]
    threads = max(1, _cores() // count)
    return [WorkerProcess(gpus[number % len(gpus)] if gpus else None, threads) for number in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _prepare_worker(gpu: str | None, threads: int) -> None:
    """Set up a worker before it imports PyTorch."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
