"""One job of a cross-validation: a bundle run as plain data, which can be printed, run, and told from another."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle_run import bundle_command, config_files, run_bundle
from ..files import file_sha256
from .overlays import key_parts


@dataclass(frozen=True)
class Job:
    """A bundle run, or without a bundle the writing of the report.

    Attributes:
        name: unique in its plan; record and log are named after it.
        run_dir: folder of the whole cross-validation.
        bundle: which bundle.
        configs: as `config_files` takes them, each laid over those before it.
        run_id: what of the bundle to run.
        overrides: config values by name; a `Path` is a place, all else are settings.
        reads: files of earlier jobs that the result depends on.
        writes: files that are there when the job is done.
        folder: what belongs to this job alone, and is moved away before the job runs anew with other settings.
        cohort: digest of the subjects and their folds.
    """

    name: str
    run_dir: Path
    bundle: str | None = None
    configs: tuple[str | Path, ...] = ()
    run_id: str = "run"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[Path, ...] = ()
    writes: tuple[Path, ...] = ()
    folder: Path | None = None
    cohort: str = ""

    def command(self) -> str:
        """Return the plain command, to be given from the working folder."""
        if self.bundle is None:
            return shlex.join(["comnet", "report", os.path.relpath(self.run_dir)])
        return bundle_command(self.bundle, *self.configs, run_id=self.run_id, **self.overrides)

    def run(self) -> None:
        """Run it in this process."""
        if self.bundle is None:
            from ..report import write_crossval_report

            write_crossval_report(self.run_dir)
        else:
            run_bundle(self.bundle, *self.configs, run_id=self.run_id, **self.overrides)

    def digest(self) -> str:
        """Return a SHA-256 over all that the result depends on: configs and settings, subjects, files that it reads.

        Where things lie does not matter: a run that was moved as a whole is still done.
        """
        places = {key: self._place(value) for key, value in self.overrides.items() if isinstance(value, Path)}
        settings = {key: value for key, value in self.overrides.items() if not isinstance(value, Path)}
        reads = {self._place(path): file_sha256(path) if path.is_file() else None for path in self.reads}
        content = [self.bundle, self.run_id, self._config_contents(), places, settings, reads, self.cohort]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _config_contents(self) -> list[Any]:
        """Contents of the configs; of a user's file, which is laid over all of them, only what these ones know."""
        if self.bundle is None:
            return []
        files = zip(self.configs, config_files(self.bundle, self.configs), strict=True)
        contents = [(config, json.loads(file.read_text(encoding="utf-8"))) for config, file in files]
        known = {key for config, content in contents if not isinstance(config, Path) for key in content}
        return [
            {key: value for key, value in content.items() if not isinstance(config, Path) or key_parts(key)[0] in known}
            for config, content in contents
        ]

    def _place(self, path: Path) -> str | None:
        inside = path.is_relative_to(self.run_dir)
        return path.relative_to(self.run_dir).as_posix() if inside else None


@dataclass(frozen=True)
class Stage:
    """Jobs that need nothing of each other, only of earlier stages."""

    name: str
    jobs: tuple[Job, ...]
