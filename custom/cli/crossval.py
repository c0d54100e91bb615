"""`comnet crossval`: every model, every fold, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .validate import validate


def crossval(
    datalist: str,
    output_dir: str,
    models: str | Sequence[str] = "segresnet,mednext,comnet",
    config: str | Sequence[str] | None = None,
    jobs: int | None = None,
    dataset_dir: str | None = None,
    num_folds: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Cross-validate SegResNet, MedNeXt and CoMNeT: train and score each fold, tune the ensemble, write the report.

    Stop it at any moment: the same command goes on from there. What settings or inputs have changed is run again, with
    all that depends on it; the earlier state is moved to OUTPUT_DIR/superseded.

    Args:
        datalist: datalist as `comnet validate` writes it, or a dataset folder, which is then checked first.
        output_dir: folder for checkpoints, masks, scores, logs and report.
        models: which of segresnet, mednext and comnet, with commas; comnet needs mednext, which is added.
        config: files to lay over the bundles' configs, with commas: small.json of the bundles, or JSON files of your
            own, which are laid over every config.
        jobs: jobs side by side; by default one a GPU, or one.
        dataset_dir: where the dataset is, if the datalist does not know or it was moved.
        num_folds: folds to deal a dataset folder into, by default 5; a datalist has its own.
        seed: seed of everything.
        dry_run: print the commands and write them to OUTPUT_DIR/commands, for a cluster's own scheduler.
    """
    from ..crossval.execute import execute, write_commands
    from ..crossval.plan import choose_models, make_plan
    from ..crossval.subjects import prepare_subjects

    chosen = choose_models(_listed(models))
    datalist_file = datalist_of(str(datalist), Path(output_dir), num_folds, seed)
    subjects = prepare_subjects(datalist_file, output_dir, dataset_dir, num_folds)
    stages = make_plan(output_dir, subjects, chosen, _listed(config), seed)
    if dry_run:
        for file, stage in zip(write_commands(stages, output_dir), stages, strict=True):
            print(f"# {stage.name}: {file}", *(job.command() for job in stage.jobs), sep="\n")
        return
    execute(stages, output_dir, jobs)
    tell_results(Path(output_dir))


def datalist_of(source: str, run_dir: Path, num_folds: int | None, seed: int) -> Path:
    """Return the datalist; for a dataset folder that of the run, made now unless it is there.

    Raises:
        ValueError: the run's datalist is that of another folder.
    """
    if not Path(source).is_dir():
        return Path(source)
    from ..cohort.datalist import dataset_of

    datalist = run_dir / "datalist.json"
    if not datalist.exists():
        validate(source, str(datalist), num_folds=num_folds or 5, seed=seed)
    elif dataset_of(datalist) != Path(source).resolve():
        raise ValueError(f"{run_dir} was made for the dataset {dataset_of(datalist)}: name another --output_dir")
    return datalist


def _listed(names: str | Sequence[str] | None) -> list[str]:
    """Split what Fire hands over: text with commas, or the tuple that it has made of it."""
    words: Any = names.split(",") if isinstance(names, str) else names or ()
    return [str(word).strip() for word in words if str(word).strip()]


def tell_results(run_dir: Path) -> None:
    """Print Table 2 of a finished run, and where its report is."""
    from ..report.records import read_run
    from ..report.tables import table2_text

    print(table2_text(read_run(run_dir).scores))
    print(f"look at {run_dir / 'report' / 'report.html'}")
