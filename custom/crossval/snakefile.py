"""The plan as a Snakefile, for Snakemake to run on Slurm, LSF, Kubernetes, a cloud, or one machine."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from .inputs import with_files
from .plan import Job, begin

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
    """Write the plan as a Snakefile.

    A rule is a job and its plain command. What it writes is no output of the rule, because Snakemake deletes outputs
    before it runs a rule again, and training is to go on; a mark in ``jobs`` is. A rule runs again when its digest has
    changed, or what it needs has run again; before it does, its earlier state is moved away, as in `run_plan`.

    Args:
        jobs: the plan; the last job is what is asked for.
        file: Snakefile to write; what it looks up goes to ``jobs/plan.json`` of the run.
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
    text = HEADER.format(
        file=os.path.relpath(file), logs=os.path.relpath(run_dir / "logs"), last=json.dumps(_mark(jobs[-1]))
    )
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
    digest = with_files(facts["digest"], run_dir, [run_dir / path for path in facts["reads"]])
    begin(run_dir, name, digest, [run_dir / path for path in facts["folders"]], facts["command"])


def _braced(command: str) -> str:
    return command.replace("{", "{{").replace("}", "}}")


def _mark(job: Job) -> str:
    return os.path.relpath(job.run_dir / "jobs" / f"{job.name}.done")


if __name__ == "__main__":
    start_job(Path(sys.argv[1]), sys.argv[2])
