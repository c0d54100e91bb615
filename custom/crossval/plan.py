"""The plan of a cross-validation: every model and fold as jobs, each a plain bundle run.

Nothing here imports PyTorch when it is imported: a job first learns which GPU and how many threads are its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle_run import bundle_command, run_bundle
from ..files import UserError, write_text
from .inputs import INDIFFERENT, Overlays, Subjects, code_digest, config_contents, with_files

OF_COARSE = ("backbone", "image_preprocessing", "coarse_inferer", "coarse")


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
        reads: files and folders of other jobs that the result depends on.
        writes: what is there when the job is done.
        folders: what belongs to this job alone, and is moved away before the job runs anew with other settings.
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
    folders: tuple[Path, ...] = ()
    cohort: str = ""

    @property
    def stage(self) -> str:
        """What all folds of the job are called together."""
        return self.name.split("_fold")[0]

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

    def settings_digest(self) -> str:
        """Return a SHA-256 over all that the result depends on but `reads`: configs, settings, subjects, and code.

        Where things lie, the version and the number of workers do not matter: a run that was moved is still done.
        """
        contents = config_contents(self.bundle, self.configs) if self.bundle else "custom.report"
        settings = {
            key: os.path.relpath(value, self.run_dir) if isinstance(value, Path) else value
            for key, value in self.overrides.items()
            if key not in INDIFFERENT and not (isinstance(value, Path) and not value.is_relative_to(self.run_dir))
        }
        text = json.dumps([self.bundle, self.run_id, contents, settings, self.cohort], sort_keys=True)
        return hashlib.sha256(f"{text} {code_digest(text)}".encode()).hexdigest()

    def digest(self) -> str:
        """Return a SHA-256 over `settings_digest` and what the job reads, once that is there."""
        return with_files(self.settings_digest(), self.run_dir, self.reads)

    @property
    def log(self) -> Path:
        """Where the output of the job goes."""
        return self.run_dir / "logs" / f"{self.name}.log"

    def missing(self) -> Path | None:
        """Return the first of `writes` that is not there."""
        return next((path for path in self.writes if not path.exists()), None)

    @property
    def _record_file(self) -> Path:
        return self.run_dir / "jobs" / f"{self.name}.json"

    def _record(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._record_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _note(self, **facts: Any) -> None:
        write_text(self._record_file, json.dumps({"job": self.name, **facts}, indent=1) + "\n")

    def is_done(self, digest: str) -> bool:
        """Whether the job has succeeded with just these settings and inputs, and its results are still there."""
        record = self._record()
        return record.get("status") == "done" and record["digest"] == digest and self.missing() is None

    def begin(self, digest: str, command: str | None = None) -> None:
        """Note in ``jobs/<job>.json`` that the job starts; move what it left under other settings to ``superseded``.

        Without that, training would go on from the last state of the other settings, and scores of them would stay.
        """
        earlier = self._record().get("digest")
        if earlier not in (None, digest):
            target, number = self.run_dir / "superseded" / f"{self.name}-{earlier[:8]}", 1
            while target.exists():
                number += 1
                target = target.with_name(f"{self.name}-{earlier[:8]}-{number}")
            for folder in filter(Path.exists, self.folders):
                target.mkdir(parents=True, exist_ok=True)
                os.replace(folder, target / folder.name)
        self._note(digest=digest, status="started", command=command or self.command())

    def finish(self, digest: str, seconds: float, exit_code: int = 0) -> str:
        """Note that the job has succeeded; return what is to be told although it has, or nothing."""
        from ..batch import EXIT_SOME_FAILED

        warning = "some subjects failed or were excluded" if exit_code == EXIT_SOME_FAILED else ""
        told = {"seconds": round(seconds, 1)} | ({"warning": warning} if warning else {})
        self._note(digest=digest, status="done", **told, command=self.command())
        return warning

    def failure(self, exit_code: int) -> str:
        """Return why a job that has ended did not succeed; empty if it did."""
        from ..batch import EXIT_SOME_FAILED

        if exit_code in (0, EXIT_SOME_FAILED):
            return f"it ended without leaving {missing}" if (missing := self.missing()) else ""
        if exit_code < 0:
            return "its process was killed; if memory ran out, use fewer --jobs"
        return "".join(self.last_lines(1)) if exit_code == 1 else f"it left with code {exit_code}"

    def last_lines(self, count: int) -> list[str]:
        """Return how the log ends."""
        text = self.log.read_bytes()[-8192:].decode(errors="replace") if self.log.is_file() else ""
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]

    def needs(self, jobs: Iterable[Job]) -> list[Job]:
        """Return those of ``jobs`` that write what this one reads."""
        return [job for job in jobs if set(job.writes) & set(self.reads)]


def make_plan(
    run_dir: str | Path,
    subjects: Subjects,
    models: Iterable[str] = ("segresnet", "mednext", "comnet"),
    overlays: Sequence[str] = (),
    seed: int = 0,
    notes: str = "",
    selection: str | None = None,
) -> list[Job]:
    """Plan the cross-validation of some models: jobs, each after those that it needs.

    Args:
        run_dir: folder of everything that comes out.
        subjects: who is cross-validated.
        models: see `choose_models`.
        overlays: files to lay over the bundles' configs, see `Overlays`.
        seed: seed of everything.
        notes: what the checkpoints are to say of themselves.
        selection: which epoch's weights every training keeps, see `custom.training.Selection`; by default what the
            configs say.

    Raises:
        UserError: unknown model or selection, models that would be selected by different rules, or an overlay that
            cannot be laid over or does not exist.
    """
    from ..metrics import RULES

    if selection not in (None, *RULES):
        raise UserError(f"unknown selection {selection}: choose from {', '.join(RULES)}")
    planner = _Planner(Path(run_dir), subjects, Overlays(overlays, run_dir), seed, notes, selection)
    jobs: list[Job] = []
    for model in choose_models(models):
        jobs += planner.comnet() if model == "comnet" else planner.backbones(model)
    return [*jobs, planner.report(jobs)]


def choose_models(models: Iterable[str]) -> tuple[str, ...]:
    """Return the models in the order of the table, ``"mednext"`` too where ``"comnet"`` needs it.

    Raises:
        UserError: unknown model, or none.
    """
    from ..report import MODELS

    asked = set(models)
    unknown = sorted(asked - set(MODELS))
    if unknown or not asked:
        raise UserError(f"unknown model {', '.join(unknown) or '(none)'}: choose from {', '.join(MODELS)}")
    return tuple(model for model in MODELS if model in asked or (model == "mednext" and "comnet" in asked))


@dataclass(frozen=True)
class _Planner:
    run_dir: Path
    subjects: Subjects
    overlays: Overlays
    seed: int
    notes: str
    selection: str | None

    def backbones(self, model: str) -> list[Job]:
        last = ("segresnet.json",) if model == "segresnet" else ()
        train = (*self.overlays.over("comnet_mednext", "train.json"), *last)
        score = (*self.overlays.over("comnet_mednext", "inference.json", "evaluate.json"), *last)
        trained = [self.train(model, fold, "comnet_mednext", train) for fold in range(self.subjects.num_folds)]
        return trained + [self.score(model, job, "comnet_mednext", score) for job in trained]

    def comnet(self) -> list[Job]:
        """Jobs of CorrDiff and the ensemble; both read the same coarse predictions, of the code that there is now."""
        from ..weights import OF_THE_PARTS

        values = self.overlays.values("comnet_corrdiff", "train.json")
        rule = self.overlays.values("comnet_mednext", "train.json").get("selection")
        if self.selection is None and rule != values.get("selection"):
            raise UserError("a config sets another selection for MedNeXt than for CoMNeT: use --selection")
        code = code_digest(json.dumps([values[name] for name in OF_COARSE]))
        coarse = {"backbones_dir": self.run_dir / "mednext", "coarse_dir": self.run_dir / "coarse" / code[:8]}
        backbones, train = self.checkpoints("mednext"), self.overlays.over("comnet_corrdiff", "train.json")
        reads = (*backbones, coarse["coarse_dir"])
        predict = self.job(
            "predict_coarse",
            "comnet_corrdiff",
            train,
            run_id="predict_coarse",
            overrides=self.data() | {"seed": self.seed} | coarse,
            reads=backbones,
            writes=(coarse["coarse_dir"],),
        )
        folds = range(self.subjects.num_folds)
        trained = [self.train("comnet", fold, "comnet_corrdiff", train, coarse, reads) for fold in folds]
        score = self.overlays.over("comnet_corrdiff", "inference.json", "evaluate.json")
        folder = self.run_dir / "ensemble"
        places = coarse | {"correctors_dir": self.run_dir / "comnet", "models_dir": folder}
        ensemble = self.job(
            "ensemble",
            "comnet_ensemble",
            self.overlays.over("comnet_ensemble", "train.json"),
            overrides=self.data() | places | self.facts() | {name: values[name] for name in OF_THE_PARTS},
            reads=(*reads, *self.checkpoints("comnet")),
            writes=(folder / "model.pt", folder / "tuning.json"),
            folders=(folder,),
        )
        return [predict, *trained, *(self.score("comnet", job, "comnet_corrdiff", score) for job in trained), ensemble]

    def report(self, jobs: Sequence[Job]) -> Job:
        tables = [file for job in jobs for file in job.writes if file.name in ("scores.csv", "tuning.json")]
        scored = [(job.folders[0], job.overrides["fold"]) for job in jobs if job.stage.startswith("score_")]
        folds = self.subjects.folds.items()
        records = [folder / name / "record.json" for folder, fold in scored for name, of in folds if of == fold]
        return self.job("report", reads=(*tables, *records), writes=(self.run_dir / "report" / "report.html",))

    def train(
        self,
        model: str,
        fold: int,
        bundle: str,
        configs: tuple[str | Path, ...],
        places: Mapping[str, Path] | None = None,
        reads: tuple[Path, ...] = (),
    ) -> Job:
        checkpoint = self.checkpoints(model)[fold]
        rule = {"selection": self.selection} if self.selection else {}
        places = {"models_dir": self.run_dir / model, "ckpt_dir": checkpoint.parent, **(places or {})}
        return self.job(
            f"train_{model}_fold{fold}",
            bundle,
            configs,
            overrides=self.data() | {"fold": fold} | self.facts() | rule | places,
            reads=reads,
            writes=(checkpoint,),
            folders=(checkpoint.parent,),
        )

    def score(self, model: str, trained: Job, bundle: str, configs: tuple[str | Path, ...]) -> Job:
        from ..report import MODELS

        fold = trained.overrides["fold"]
        folder = self.run_dir / model / "scores" / f"fold{fold}"  # of its own: folds are scored side by side
        settings = {"fold": fold, "cohort#num_folds": self.subjects.num_folds, "batch#model": MODELS[model]}
        return self.job(
            f"score_{model}_fold{fold}",
            bundle,
            configs,
            overrides=self.places() | {"checkpoint": trained.writes[0], "output_dir": folder} | settings,
            reads=trained.writes,
            writes=(folder / "scores.csv",),
            folders=(folder,),
        )

    def job(self, name: str, bundle: str | None = None, configs: tuple[str | Path, ...] = (), **fields: Any) -> Job:
        return Job(name, self.run_dir, bundle, configs, cohort=self.subjects.digest, **fields)

    def data(self) -> dict[str, Any]:
        return self.places() | {"num_folds": self.subjects.num_folds}

    def places(self) -> dict[str, Any]:
        return {"dataset_dir": self.subjects.dataset_dir, "datalist_file": self.subjects.datalist_file}

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed} | ({"notes": self.notes} if self.notes else {})

    def checkpoints(self, model: str) -> tuple[Path, ...]:
        from ..weights import fold_checkpoint

        return tuple(fold_checkpoint(self.run_dir / model, fold) for fold in range(self.subjects.num_folds))


HEADER = """\
# A cross-validation of CoMNeT for Snakemake >= 8, written by `comnet crossval --snakefile`. Give it in the folder in
# which it was written (paths are relative to it), on a file system that all machines share, the environment active:
#
#   snakemake --snakefile {file} --cores all
#   snakemake --snakefile {file} --executor slurm --jobs 10 --default-resources slurm_partition=gpu
#
# Values of the next lines can be given as --config gpus=0 hours=72; single jobs by --set-resources and a profile. After
# a failure or a time limit training goes on from its last epoch. After other settings write this file again. That a job
# leaves with 3 means that some subjects could not be scored; its log in {logs} says which.

gpus, cores, mem_mb = int(config.get("gpus", 1)), int(config.get("cores", 8)), int(config.get("mem_mb", 32000))
hours, times = int(config.get("hours", 48)), int(config.get("retries", 2))


rule all:
    input: {last}
"""
RULE = """

rule {name}:
    input: {inputs}
    output: touch({output})
    log: {log}
    params: digest={digest}
    threads: cores
    resources: gpu=gpus, mem_mb=mem_mb, runtime=60 * hours
    retries: times
    shell:
        {start}
        {command}
"""


def write_snakefile(jobs: Sequence[Job], file: str | Path) -> None:
    """Write the plan as a Snakefile, whose last rule is what is asked for; what it looks up goes to ``jobs/plan.json``.

    A rule is a job and its plain command. What it writes is no output of the rule, because Snakemake deletes outputs
    before it runs a rule again, and training is to go on; a mark in ``jobs`` is. A rule runs again when its digest has
    changed, or what it needs has run again; before it does, its earlier state is moved away, as in `run_plan`.
    """
    run_dir, digests = jobs[0].run_dir, [job.settings_digest() for job in jobs]
    facts = {
        job.name: {
            "digest": digest,
            "reads": [os.path.relpath(path, run_dir) for path in job.reads],
            "folders": [os.path.relpath(path, run_dir) for path in job.folders],
            "command": job.command(),
        }
        for job, digest in zip(jobs, digests, strict=True)
    }
    logs, last = os.path.relpath(run_dir / "logs"), json.dumps(_mark(jobs[-1]))
    text = HEADER.format(file=os.path.relpath(file), logs=logs, last=last)
    for job, digest in zip(jobs, digests, strict=True):
        start = shlex.join([os.path.relpath(run_dir), job.name])
        text += RULE.format(
            name=job.name,
            inputs=json.dumps([_mark(other) for other in job.needs(jobs)]),
            output=json.dumps(_mark(job)),
            log=json.dumps(os.path.relpath(job.log)),
            digest=json.dumps(digest),
            start=json.dumps(_braced(f"(python -m {__name__} {start} && ")),
            command=json.dumps(_braced(f"{job.command()})") + " >> {log:q} 2>&1 || [ $? -eq 3 ]"),
        )
    write_text(run_dir / "jobs" / "plan.json", json.dumps(facts, indent=1) + "\n")
    write_text(file, text)


def start_job(run_dir: Path, name: str) -> None:
    """Do what `run_plan` does before a job: note that it starts, move away what it left under other settings."""
    facts = json.loads((run_dir / "jobs" / "plan.json").read_text(encoding="utf-8"))[name]
    reads, folders = (tuple(run_dir / path for path in facts[key]) for key in ("reads", "folders"))
    Job(name, run_dir, reads=reads, folders=folders).begin(
        with_files(facts["digest"], run_dir, reads), facts["command"]
    )


def _braced(command: str) -> str:
    return command.replace("{", "{{").replace("}", "}}")


def _mark(job: Job) -> str:
    return os.path.relpath(job.run_dir / "jobs" / f"{job.name}.done")


if __name__ == "__main__":
    start_job(Path(sys.argv[1]), sys.argv[2])
