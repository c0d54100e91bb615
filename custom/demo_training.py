"""The demo of training: the whole way on synthetic subjects, and what each part of CoMNeT adds on held-out ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .crossval.inputs import Overlays, prepare_subjects
from .crossval.plan import Job, make_plan
from .crossval.runner import run_plan
from .phantom import cohort_seeds, write_absent
from .report import read_scores, write_scores_report

PHANTOM_NOTE = "DEMO WEIGHTS: trained on synthetic phantoms only, meaningless on patients"
GEOMETRY: dict[str, Any] = {"shape": (64, 72, 56), "spacing": (2.5, 2.5, 2.5)}
UNTUNED = {"thresholds": [0.5] * 3, "min_volume_mm3": [50.0] * 3}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "MedNeXt, one fold": ("comnet/fold0", UNTUNED | {"refine_regions": [False] * 3}),
    "one fold + CorrDiff": ("comnet/fold0", UNTUNED | {"refine_regions": [True] * 3}),
    "five folds": ("ensemble", UNTUNED | {"refine_regions": [False] * 3}),
    "five folds + CorrDiff": ("ensemble", UNTUNED | {"refine_regions": [True] * 3}),
    "CoMNeT as tuned": ("ensemble", {}),
}
"""From a single backbone to the whole: which weights of the run, with which settings."""


def run_demo(run: Path, seed: int = 0, num_subjects: int = 10, num_held_out: int = 4) -> Path:
    """Cross-validate the three models on phantoms, and score each step from one backbone to the whole on others.

    A stopped demo goes on from what is in `run`. The five folds share `num_subjects` phantoms; `num_held_out` others
    are seen by none. Returns the report of the steps.
    """
    write_absent(run / "subjects", cohort_seeds(num_subjects, seed), **GEOMETRY)
    write_absent(run / "held_out", cohort_seeds(num_held_out, seed + 1, first_id=9001), **GEOMETRY)
    subjects = prepare_subjects(run / "subjects", run, seed=seed)
    plan = make_plan(run, subjects, overlays=["demo.json"], seed=seed, notes=PHANTOM_NOTE)
    parts = Overlays(["demo.json"], run).values("comnet_corrdiff", "train.json")
    networks = {key: parts[key] for key in ("backbone", "corrector", "spacing", "patch_size", "num_workers")}
    steps = [_score_step(run, number, name, networks) for number, name in enumerate(STEPS, start=1)]
    run_plan([*plan, *steps], run, min(2, os.cpu_count() or 1))
    folders = [job.overrides["output_dir"] for job in steps]
    scores = [score for folder in folders for score in read_scores(folder)]
    pictures = {path.parent.name: path for path in sorted(folders[-1].glob("*/*_qc.png"))}
    page = run / "steps" / "scores.html"
    title = "CoMNeT: from one backbone to the whole"
    write_scores_report(page, scores, pictures, title, "Held-out phantoms", PHANTOM_NOTE)
    return page


def _score_step(run: Path, number: int, name: str, networks: dict[str, Any]) -> Job:
    weights, settings = STEPS[name]
    output = run / "steps" / str(number)
    places = {"dataset_dir": run / "held_out", "weights_dir": run / weights, "output_dir": output}
    facts = {"num_folds": 1 if weights.startswith("comnet") else 5, "batch#model": name}
    return Job(
        f"score_step{number}",
        run,
        "comnet_ensemble",
        ("inference.json", "evaluate.json"),
        overrides=places | networks | facts | settings,
        reads=(run / weights / "model.pt",),
        writes=(output / "scores.csv",),
        folders=(output,),
    )
