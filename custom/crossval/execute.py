"""Running a plan: stage by stage, what is not done yet, on the workers there are."""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..files import FileError, UserError, write_text
from .job import Job, Stage
from .records import Records, missing_results
from .workers import Outcome, make_workers

LOG_LINES = 8
FULL_STORIES = 3


class JobsFailed(RuntimeError, UserError):
    """Some jobs of a stage failed; the message names them, their logs and the last lines of those."""


def execute(stages: Sequence[Stage], run_dir: str | Path, jobs: int | None = None) -> None:
    """Run all jobs that are not done yet; of a stage that failed the other jobs still run, later stages do not.

    Args:
        stages: the plan.
        run_dir: folder of the cross-validation.
        jobs: how many jobs run side by side, see `make_workers`.

    Raises:
        JobsFailed: some jobs failed.
        BlockingIOError: another process is running this cross-validation.
    """
    run_dir = Path(run_dir)
    total = sum(len(stage.jobs) for stage in stages)
    with _alone(run_dir), _hired(jobs) as workers, _Board(total) as board:
        for stage in stages:
            _run_stage(stage, run_dir, workers, board)


def write_commands(stages: Sequence[Stage], run_dir: str | Path) -> list[Path]:
    """Write the commands of each stage to ``<run_dir>/commands/<n>_<stage>.txt``, one line a job; return the files."""
    folder = Path(run_dir) / "commands"
    files = [folder / f"{number}_{stage.name}.txt" for number, stage in enumerate(stages, start=1)]
    for file, stage in zip(files, stages, strict=True):
        write_text(file, "".join(f"{job.command()}\n" for job in stage.jobs))
    return files


def log_file(run_dir: str | Path, job: Job) -> Path:
    """Return where the output of a job goes: ``<run_dir>/logs/<job>.log``."""
    return Path(run_dir) / "logs" / f"{job.name}.log"


def _run_stage(stage: Stage, run_dir: Path, workers: Sequence[Any], board: _Board) -> None:
    records = Records(run_dir)
    todo = deque(job for job in stage.jobs if not records.is_done(job))
    board.skip(len(stage.jobs) - len(todo))
    failures: list[tuple[Job, str]] = []
    for job, outcome in _outcomes(todo, run_dir, workers, records, board):
        missing = missing_results(job)
        failure = outcome.failure or (f"it ended without leaving {missing[0]}" if missing else "")
        if failure:
            failures.append((job, failure))
        else:
            records.finish(job, outcome.seconds, outcome.warning)
        board.tell(job, failure, outcome.warning)
    if failures:
        raise JobsFailed(_story(stage, failures, run_dir))


def _outcomes(
    todo: deque[Job], run_dir: Path, workers: Sequence[Any], records: Records, board: _Board
) -> Iterator[tuple[Job, Outcome]]:
    free, busy = list(workers), {}
    while todo or busy:
        while todo and free:
            worker, job = free.pop(), todo.popleft()
            records.start(job)
            board.show([*(other.name for _, other in busy.values()), job.name])
            busy[worker.submit(job, log_file(run_dir, job))] = worker, job
        for future in wait(busy, board.refresh_seconds, FIRST_COMPLETED).done:
            worker, job = busy.pop(future)
            yield job, _outcome(future, worker)
            free.append(worker)
        board.show([other.name for _, other in busy.values()])


def _outcome(future: Future[Outcome], worker: Any) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        worker.restart()
        return Outcome(0.0, "its process was killed; if memory ran out, use fewer --jobs")


def _story(stage: Stage, failures: Sequence[tuple[Job, str]], run_dir: Path) -> str:
    parts = [f"{len(failures)} of {len(stage.jobs)} jobs of {stage.name} failed; the same command tries them again"]
    for number, (job, failure) in enumerate(failures):
        log = log_file(run_dir, job)
        ending = _last_lines(log) if number < FULL_STORIES else []
        parts += [f"\n{job.name}: {failure}", f"  {log}{' ends:' if ending else ''}", *(f"    {one}" for one in ending)]
    return "\n".join(parts)


def _last_lines(log: Path) -> list[str]:
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return []
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-LOG_LINES:]


@contextlib.contextmanager
def _hired(jobs: int | None) -> Iterator[Sequence[Any]]:
    workers = make_workers(jobs)
    try:
        yield workers
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    for worker in workers:
        worker.close()


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    (run_dir / "jobs").mkdir(parents=True, exist_ok=True)
    with open(run_dir / "jobs" / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileError(f"another process is running the cross-validation in {run_dir}") from error
        yield


class _Board:
    """The line that tells how far everything is, on the terminal even while output goes to log files."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __enter__(self) -> _Board:
        from tqdm import tqdm

        self._stream = os.fdopen(os.dup(2), "w", encoding="utf-8")
        self._bar = tqdm(
            total=self._total, desc="crossval", unit="job", file=self._stream, smoothing=0, dynamic_ncols=True
        )
        self.refresh_seconds = 1.0 if self._stream.isatty() else None
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        self._stream.close()

    def skip(self, count: int) -> None:
        """Count jobs that were done already, which say nothing of the time left."""
        self._bar.initial += count
        self._bar.update(count)

    def show(self, running: Sequence[str]) -> None:
        """Show what is running now."""
        self._bar.set_postfix_str(", ".join(running))

    def tell(self, job: Job, failure: str, warning: str) -> None:
        """Count a job that has ended, and say what went wrong."""
        if failure or warning:
            self._bar.write(f"{job.name}: {'FAILED: ' + failure if failure else warning}", file=self._stream)
        self._bar.update()
