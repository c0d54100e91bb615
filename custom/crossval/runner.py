"""Running a plan here: a pool of processes that takes up what is not done yet, and can be stopped at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from graphlib import TopologicalSorter
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..bundle_run import known_reason
from ..files import FileError, UserError
from .plan import Job

PRELOADED = ("monai.bundle", "custom.batch", "custom.cohort", "custom.metrics", "custom.training", "custom.transforms")


class JobsFailed(RuntimeError, UserError):
    """Some jobs failed; the message names them and their logs, and shows how the first of these ends."""


def run_plan(jobs: Sequence[Job], run_dir: str | Path, num_workers: int | None = None) -> None:
    """Run the jobs that are not done yet, each when those that it needs are done; a failure stops only what needs it.

    Each job has a process of its own, which ends with this one, however that is killed. ``num_workers`` of them run
    side by side; by default as many as there are GPUs, at least one.

    Raises:
        UserError: ``num_workers`` is no positive whole number.
        FileError: another process is running this cross-validation.
        JobsFailed: some jobs failed.
    """
    if num_workers is not None and (type(num_workers) is not int or num_workers < 1):
        raise UserError(f"jobs is {num_workers!r}: give a whole number of at least 1")
    try:
        with FileLock(Path(run_dir) / "jobs" / "lock", timeout=3):  # what was killed may need a moment to end
            failures = _run(jobs, num_workers)
    except Timeout as error:
        raise FileError(f"another process is running the cross-validation in {run_dir}") from error
    if failures:
        told = [f"\n\n{job.name}: {reason}\n  {job.log}" for job, reason in failures]
        told[0] += "".join([" ends:", *(f"\n    {line}" for line in failures[0][0].last_lines(8))])
        raise JobsFailed(f"{len(told)} of {len(jobs)} jobs failed; the same command tries them again{''.join(told)}")


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _run(jobs: Sequence[Job], num_workers: int | None) -> list[tuple[Job, str]]:
    gpus = visible_gpus()
    count = num_workers or len(gpus) or 1
    free = [gpus[number % len(gpus)] if gpus else None for number in range(count)]
    context = _context(bool(gpus))
    order = TopologicalSorter({job.name: [other.name for other in job.needs(jobs)] for job in jobs})
    order.prepare()
    todo, by_name = list(order.get_ready()), {job.name: job for job in jobs}
    running: dict[Any, tuple[Any, Job, str, str | None, float]] = {}
    failures: list[tuple[Job, str]] = []
    with tqdm(total=len(jobs), desc="crossval", unit="job", smoothing=0, dynamic_ncols=True) as bar:
        try:
            while todo or running:
                while todo and free:
                    job = by_name[todo.pop(0)]
                    digest = job.digest()
                    if job.is_done(digest):
                        bar.initial += 1  # says nothing of the time left
                        bar.update()
                        order.done(job.name)
                        todo += order.get_ready()
                        continue
                    job.begin(digest)
                    process = context.Process(target=_work, args=(job, gpu := free.pop(0), count))
                    process.start()
                    running[process.sentinel] = process, job, digest, gpu, time.perf_counter()
                bar.set_postfix_str(", ".join(job.name for _, job, *_ in running.values()))
                for sentinel in wait(list(running), 1.0 if sys.stderr.isatty() else None) if running else ():
                    process, job, digest, gpu, started = running.pop(sentinel)
                    process.join()
                    free.append(gpu)
                    if told := job.failure(process.exitcode):
                        failures.append((job, told))
                    else:
                        told = job.finish(digest, time.perf_counter() - started, process.exitcode)
                        order.done(job.name)
                        todo += order.get_ready()
                    if told:
                        bar.write(f"{job.name}: {told}", file=sys.stderr)
                    bar.update()
        finally:
            for process, *_ in running.values():
                process.kill()
                process.join()
    return failures


def _context(gpu: bool) -> Any:
    """Processes start from one that has imported everything; where that might have touched a GPU, from none."""
    if gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _work(job: Job, gpu: str | None, count: int) -> None:
    """Run a job in this process of its own; all that it and its children write goes to its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = job.log.open("a", buffering=1, encoding="utf-8")
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    print(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {job.name}")
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        job.run()
    except Exception as error:
        traceback.print_exc()
        print(known_reason(error) or f"{type(error).__name__}: {error}")
        sys.exit(1)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
