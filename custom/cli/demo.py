"""`comnet demo`: the whole way on synthetic subjects."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..running import bundle_root

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


def demo(output_dir: str = "runs/demo", seed: int = 0, num_subjects: int = 10, num_held_out: int = 4) -> None:
    """Show the whole way on synthetic subjects: three models cross-validated, the ensemble, masks, scores, pictures.

    Args:
        output_dir: folder for subjects, weights, masks, scores and reports; a stopped demo goes on from there.
        seed: seed of everything.
        num_subjects: phantoms that the five folds share.
        num_held_out: phantoms that no fold sees, on which each step from one backbone to the whole is scored.
    """
    from ..crossval.execute import execute
    from ..crossval.plan import make_plan
    from ..crossval.subjects import prepare_subjects
    from ..phantom import write_cohort
    from .crossval import datalist_of, tell_results

    run = Path(output_dir)
    _write_once(write_cohort, run / "subjects", num_subjects, seed=seed)
    _write_once(write_cohort, run / "held_out", num_held_out, seed=seed + 1, first_id=9001)
    subjects = prepare_subjects(datalist_of(str(run / "subjects"), run, None, seed), run)
    stages = make_plan(run, subjects, overlays=["demo.json"], seed=seed, notes=PHANTOM_NOTE)
    execute([*stages, _score_steps(run)], run, jobs=min(2, os.cpu_count() or 1))
    _report_steps(run)
    _publish(run / "ensemble" / "model.pt", bundle_root("comnet_ensemble") / "models" / "model.pt")
    tell_results(run)
    print(f"and at {run / 'steps' / 'scores.html'}: from one backbone to the whole, on subjects that no fold has seen")


def _write_once(write: Any, folder: Path, count: int, **options: Any) -> None:
    """Write phantoms unless all are there; written anew, they would count as other subjects."""
    if len(list(folder.glob("*/*.nii.gz"))) < 5 * count:
        write(folder, count, progress=True, **GEOMETRY, **options)


def _score_steps(run: Path) -> Any:
    from ..crossval.job import Job, Stage

    return Stage("score_steps", tuple(_step_job(Job, run, number, name) for number, name in enumerate(STEPS)))


def _step_job(make: Any, run: Path, number: int, name: str) -> Any:
    from ..crossval.overlays import Overlays

    weights, settings = STEPS[name]
    parts = Overlays(["demo.json"], run).values("comnet_corrdiff", "train.json")
    networks = {key: parts[key] for key in ("backbone", "corrector", "spacing", "patch_size", "num_workers")}
    output = run / "steps" / f"{number + 1}"
    places = {"dataset_dir": run / "held_out", "weights_dir": run / weights, "output_dir": output}
    facts = {"num_folds": 1 if weights.startswith("comnet") else 5, "ledger#model": name}
    return make(
        f"score_step{number + 1}",
        run,
        "comnet_ensemble",
        ("inference.json", "evaluate.json"),
        overrides=places | networks | facts | settings,
        reads=(run / weights / "model.pt",),
        writes=(output / "scores.csv",),
    )


def _report_steps(run: Path) -> None:
    from ..report import write_scores_report
    from ..report.records import read_scores

    folders = [run / "steps" / f"{number + 1}" for number in range(len(STEPS))]
    scores = [score for folder in folders for score in read_scores(folder)]
    pictures = {path.parent.name: path for path in sorted(folders[-1].glob("*/*_qc.png"))}
    page = run / "steps" / "scores.html"
    title = "CoMNeT: from one backbone to the whole"
    write_scores_report(page, scores, pictures, title, "Held-out phantoms", PHANTOM_NOTE)


def _publish(weights: Path, target: Path) -> None:
    """Make the demo's weights the default of `comnet segment`, unless other weights are there already."""
    from ..files import copy_file
    from ..weights import describe_weights

    there = target.is_file() or any(target.parent.glob("fold*/model.pt"))
    if there and describe_weights(target.parent).note != PHANTOM_NOTE:
        print(f"{target.parent} holds other weights: left as they are", file=sys.stderr)
        return
    copy_file(weights, target)
