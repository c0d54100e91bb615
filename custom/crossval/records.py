"""Which jobs are done: one small JSON file a job, written when it starts and again when it has succeeded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from .job import Job


@dataclass(frozen=True)
class Records:
    """The records of one cross-validation.

    Attributes:
        run_dir: its folder; records are ``jobs/<job>.json``.
    """

    run_dir: Path

    def is_done(self, job: Job) -> bool:
        """Whether the job has succeeded with just these settings and inputs, and its results are still there."""
        record = self._read(job)
        finished = record.get("status") == "done" and record.get("digest") == job.digest()
        return finished and not missing_results(job)

    def start(self, job: Job) -> None:
        """Note that the job starts; what it had left under other settings is moved to ``superseded``.

        Without that, training would go on from the last state of the other settings and count as finished.
        """
        earlier, digest = self._read(job).get("digest"), job.digest()
        if earlier not in (None, digest) and job.folder is not None and job.folder.exists():
            self._supersede(job.folder, f"{job.name}-{earlier[:8]}")
        self._write(job, digest=digest, status="started")

    def finish(self, job: Job, seconds: float, warning: str = "") -> None:
        """Note that the job has succeeded."""
        figures: dict[str, Any] = {"seconds": round(seconds, 1)} | ({"warning": warning} if warning else {})
        self._write(job, digest=self._read(job)["digest"], status="done", **figures)

    def _supersede(self, folder: Path, name: str) -> None:
        target, number = self.run_dir / "superseded" / name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{name}-{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)

    def _path(self, job: Job) -> Path:
        return self.run_dir / "jobs" / f"{job.name}.json"

    def _read(self, job: Job) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path(job).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _write(self, job: Job, **facts: Any) -> None:
        content = {"job": job.name, **facts, "command": job.command()}
        write_text(self._path(job), json.dumps(content, indent=1) + "\n")


def missing_results(job: Job) -> list[Path]:
    """Return what the job should have left, but has not."""
    return [path for path in job.writes if not path.exists()]
