"""The report of a cross-validation: the paper's Table 2 and Figures 2 to 4, differences, and worst cases first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cohort import load_datalist
from ..cohort.datalist import dataset_of
from ..files import whole_file, write_table
from .cases import MEDIAN_RULE, mean_dice, median_subject
from .charts import dice_bars, fold_strip, has_several_folds
from .choices import choices
from .differences import DIFFERENCE_COLUMNS, difference_rows, difference_table, forest_plot
from .gallery import gallery
from .page import RESEARCH_USE, Html, banner, cards, picture, section, table, text, weights_line, write_page
from .pictures import write_truth_picture
from .records import Run, read_run
from .summary import COLUMNS, summarise_scores
from .tables import CONVENTIONS, other_scores_table, table2, table2_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCHMARK_SUBJECTS = 50
"""A run of fewer subjects tries the software; it is no benchmark."""
PathLike = str | os.PathLike[str]


def write_crossval_report(
    run_dir: PathLike,
    output_dir: PathLike | None = None,
    dataset_dir: PathLike | None = None,
    dataset: str = "",
    num_pictures: int = 30,
    palette: str = "brats2023",
    seed: int = 0,
) -> Path:
    """Writes `report.html`, which stands alone, and beside it its tables as CSV and its figures as PNG.

    `table2.csv`, `scores.csv` (every subject and model), `differences.csv`, `figure2.png` (the representative
    subject), `figure3.png` (Dice by fold), `figure4.png` (Dice by region), `differences.png`; what cannot be made, such
    as differences from one model, is left out, and an older one of that name is removed.

    Args:
        run_dir: folder of a cross-validation; models that have no scores yet are left out, and the page says so.
        output_dir: by default `report` in the run's folder.
        dataset_dir: dataset of the run's datalist, for Figure 2; by default what the datalist remembers.
        dataset: name of the dataset in Table 2, by default the layout of its files.
        num_pictures: how many of the worst cases get their picture, so that the page of a large run can be opened.
        palette: key of `PALETTES` for the label maps of the run.
        seed: of the bootstrap.

    Returns:
        Path of the page.

    Raises:
        ValueError: no model has scores, or a file of the run is not what it should be; says which.
        OSError: a file cannot be written.
    """
    run = read_run(run_dir)
    folder = Path(run_dir) / "report" if output_dir is None else Path(output_dir)
    dataset = dataset or _layout(run)
    differences = difference_rows(run.scores, seed)
    _write_tables(folder, run, dataset, differences)
    page = folder / "report.html"
    write_page(
        page,
        "CoMNeT: cross-validation",
        banner(RESEARCH_USE, small_run_line(len(run.subjects)), *_weights_lines(run)),
        cards(_facts(run)),
        section("Not scored", _not_scored_table(run)),
        section("Table 2: Dice", *(table2(run.scores, convention, dataset) for convention in CONVENTIONS)),
        section("Paired differences", *_differences(folder, differences)),
        section("Figures", *_figures(folder, run, dataset_dir, palette)),
        section("Other scores", other_scores_table(run.scores)),
        section("What the ensemble chose", choices(run.tuning)),
        section("Worst cases first", *gallery(run, num_pictures)),
        section("Settings", table(("setting", "value"), _settings(run), "What the result depends on")),
    )
    return page


def small_run_line(num_subjects: int) -> str:
    """What must be said of a run of few subjects; nothing where there are `BENCHMARK_SUBJECTS` or more."""
    few = num_subjects < BENCHMARK_SUBJECTS
    subjects = "1 subject" if num_subjects == 1 else f"{num_subjects} subjects"
    return f"{subjects}: a software check, not a benchmark." if few else ""


def _layout(run: Run) -> str:
    layout = run.datalist.get("layout")
    return f"{layout} layout" if layout else run.folder.resolve().name


def _weights_lines(run: Run) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for model, note in run.notes.items():
        by_note.setdefault(note, []).append(model)
    return [f"{', '.join(models)}. {weights_line(note)}" for note, models in by_note.items()]


def _facts(run: Run) -> dict[str, Any]:
    folds = {str(score["fold"]) for score in run.scores}
    without_et = {one["subject"] for one in run.scores if one.get("ET_reference_ml") == 0}
    return {"subjects": len(run.subjects), "of them without ET": len(without_et), "folds": len(folds)} | {
        "models": len(run.notes)
    }


def _not_scored_table(run: Run) -> Html:
    rows = [[model, len(missing), ", ".join(missing)] for model, missing in run.not_scored.items()]
    caption = "Models with and without these subjects are not comparable: finish the cross-validation"
    return table(("Model", "Number", "Subjects without scores"), rows, caption)


def _write_tables(folder: Path, run: Run, dataset: str, differences: Sequence[Mapping[str, Any]]) -> None:
    summary = table2_records(run.scores, dataset)
    write_table(folder / "table2.csv", list(summary[0]), summary)
    columns = dict.fromkeys(column for score in run.scores for column in score)
    write_table(folder / "scores.csv", list(columns), run.scores)
    if differences:
        write_table(folder / "differences.csv", DIFFERENCE_COLUMNS, differences)
    else:
        (folder / "differences.csv").unlink(missing_ok=True)


def _differences(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    path = folder / "differences.png"
    if not rows:
        path.unlink(missing_ok=True)
        return []
    spoken = "; ".join(
        f"{row['model']} − {row['baseline']} {row['region']}: {row['difference']:+.3f}"
        for row in rows
        if row["convention"] == "skip"
    )
    caption = (
        "Mean paired difference and 95 % bootstrap interval, empty regions skipped; coloured where it leaves zero out"
    )
    plot = _chart(path, forest_plot(rows), f"Forest plot of paired differences. {spoken}.", caption)
    return [plot, difference_table(rows)]


def _figures(folder: Path, run: Run, dataset_dir: PathLike | None, palette: str) -> list[Html]:
    summary = summarise_scores(run.scores)
    spoken = "; ".join(
        f"{model}: " + ", ".join(f"{column} {row[column][0]:.3f}" for column in COLUMNS)
        for model, row in summary.items()
    )
    strip, path = Html(""), folder / "figure3.png"
    if has_several_folds(run.scores):
        caption = "Figure 3. Average Dice of the held-out subjects of every fold; numbers are folds, bars mean ± sd"
        strip = _chart(path, fold_strip(run.scores), "Average Dice of every fold by model.", caption)
    else:
        path.unlink(missing_ok=True)
    caption = "Figure 4. Mean Dice by region, empty regions skipped; error bars are the standard deviation over folds"
    bars = _chart(folder / "figure4.png", dice_bars(run.scores), f"Bar chart of mean Dice. {spoken}.", caption)
    return [_representative(folder / "figure2.png", run, dataset_dir, palette), strip, bars]


def _chart(path: Path, figure: Figure, alt: str, caption: str) -> Html:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
    return picture(figure, alt, f"{caption}.")


def _representative(path: Path, run: Run, dataset_dir: PathLike | None, palette: str) -> Html:
    """Figure 2, or a sentence that says why there is none."""
    model, subject = run.last_model, median_subject(run.scores)
    score = run.of(subject)[model]
    path.unlink(missing_ok=True)
    try:
        item = _item(run, subject, dataset_dir)
        write_truth_picture(
            path,
            item["image"],
            run.file(model, subject, "seg.nii.gz"),
            item["label"],
            title=subject,
            subtitle=f"{model}, fold {score['fold']}, mean Dice {mean_dice(score):.3f}",
            weights_note=run.weights(model, subject),
            palette=palette,
            reference_palette=item["palette"],
        )
    except (OSError, ValueError) as error:
        return Html(f'<p class="missing">{text(f"Figure 2 was not drawn ({subject}): {error}")}</p>')
    caption = f"Figure 2. Ground truth (top) and prediction of {model} (bottom) on T1c. {MEDIAN_RULE}."
    return picture(path, f"{subject}: true regions above, predicted regions below, in three planes.", caption)


def _item(run: Run, subject: str, dataset_dir: PathLike | None) -> Mapping[str, Any]:
    datalist_file = run.folder / "datalist.json"
    dataset_dir = dataset_of(datalist_file) if dataset_dir is None else dataset_dir
    items = load_datalist(datalist_file, dataset_dir)["training"]
    item = next((one for one in items if one["subject"] == subject), None)
    if item is None:
        raise ValueError(f"{datalist_file} does not list it")
    return item


def _settings(run: Run) -> list[tuple[str, Any]]:
    named = ("layout", "num_folds", "seed", "unknown_labels", "allow_empty_mask", "comnet_version")
    return [(name, run.datalist[name]) for name in named if name in run.datalist]
