"""The reports: a segmentation run, scores of whatever was scored, and a whole cross-validation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cohort import REGIONS, Exclusion, load_datalist
from ..cohort.datalist import dataset_of
from ..files import write_table
from .charts import dice_bars, fold_strip, forest_plot, has_several_folds
from .pages import Cell, Picture, Table, picture, weights_line, write_page
from .pictures import REGION_NAMES, save_figure, truth_figure, write_qc_picture
from .runs import (
    MEDIAN_RULE,
    ORDER_RULE,
    Run,
    counted_dice,
    mean_dice,
    median_subject,
    read_run,
    what_went_wrong,
    worst_first,
)
from .tables import (
    COLUMNS,
    CONVENTIONS,
    DIFFERENCE_COLUMNS,
    SKIP,
    Scores,
    choices,
    difference_rows,
    difference_table,
    is_known,
    models_of,
    other_scores_table,
    selection_line,
    summarise_scores,
    table2,
    table2_records,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
DONE, EARLIER = "done", "earlier run"
NO_ROWS = Table((), (), "")
BENCHMARK_SUBJECTS = 50
"""A run of fewer subjects tries the software; it is no benchmark."""


def write_segment_report(
    path: PathLike,
    rows: Sequence[Mapping[str, Any]],
    exclusions: Sequence[Any] = (),
    pictures: Mapping[str, PathLike] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "CoMNeT: segmentation report",
    scores: Scores = (),
    remarks: Sequence[str] = (),
) -> None:
    """Writes one self-contained HTML page about a segmentation run.

    Args:
        path: HTML file to write, whole or not at all.
        rows: one dict per subject as in `volumes.csv`: subject, et_ml, tc_ml, wt_ml, missing, status, seconds, warnings
            (a text or a list of texts) and weights; what is absent, None or empty is shown as a dash. `status` is
            "done" for a subject that was segmented, and "earlier run" for what this run has found in its folder: that
            stands in a table of its own.
        exclusions: subjects that were left out or failed: `Exclusion`s, or dicts with subject, file, reason and remedy.
        pictures: path of the QC picture by subject; pictures are embedded as JPEG.
        settings: shown as a table; "weights_note" goes to the top of the page.
        title: title of the page.
        scores: of subjects with a mask: "subject" and the Dice of ET, TC and WT as `dice_of` reads it.
        remarks: sentences for the top of the page.
    """
    settings, pictures = dict(settings or {}), pictures or {}
    own, earlier = ([row for row in rows if (row.get("status") == EARLIER) == old] for old in (False, True))
    done = [row for row in own if row.get("status") == DONE]
    failures: list[Mapping[str, Any]] = [asdict(one) if isinstance(one, Exclusion) else one for one in exclusions]
    named = {str(one["subject"]) for one in failures}
    unnamed = [row for row in own if row.get("status") != DONE and str(row["subject"]) not in named]
    failures += [{"subject": row["subject"], "reason": "; ".join(_warnings(row))} for row in unnamed]
    note = str(settings.get("weights_note") or next((row["weights"] for row in done if row.get("weights")), ""))
    volumes = (*(f"{region} [ml]" for region in REGIONS), "missing", "time [s]", "warnings")
    write_page(
        path,
        "segment.html",
        title=title,
        notes=[weights_line(note), *remarks],
        facts={
            "segmented": len(done),
            "failed or left out": len(failures),
            "with warnings": sum(bool(_warnings(row)) for row in done),
        },
        failures=Table(
            ("subject", "reason", "what to do", "file"),
            [[one["subject"], *(one.get(key, "") for key in ("reason", "remedy", "file"))] for one in failures],
            "Subjects with no result",
        ),
        volumes=Table(
            ("subject", *volumes),
            [_volume_cells(row, linked=True) for row in done],
            "Click a heading to sort",
            sortable=True,
        ),
        dice=Table(
            ("subject", *COLUMNS),
            [[Cell(str(score["subject"]), subject=str(score["subject"])), *_dice_cells(score)] for score in scores],
            "Against the masks; – where the region is rightly empty. Click a heading to sort",
            sortable=True,
        ),
        subjects=[_subject(row, pictures.get(str(row["subject"]))) for row in done],
        earlier=Table(
            ("subject", *volumes, "weights"),
            [[*_volume_cells(row), row.get("weights", "")] for row in earlier],
            "Results that this run has not made: they lie in the same folder, perhaps of other weights or settings",
        ),
        settings=settings,
    )


def write_scores_report(
    path: PathLike,
    scores: Scores,
    pictures: Mapping[str, PathLike] | None = None,
    title: str = "CoMNeT: scores",
    dataset: str = "",
    weights_note: str = "",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes one self-contained HTML page of Dice scores, the last model's worst cases first.

    Args:
        path: HTML file to write, whole or not at all.
        scores: dicts with "model", "fold", "subject", perhaps "selection" (`tables.SELECTIONS`), and the Dice of ET, TC
            and WT as `dice_of` reads it.
        pictures: path of a QC picture, with the reference dashed, by caption (such as the subject's name).
        title: title of the page.
        dataset: what was scored, for the first column of the tables.
        weights_note: what the reader must know about the weights.
        settings: shown as a table at the end.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError(f"no scores to report in {path}: score at least one subject")
    subjects = {str(score["subject"]) for score in scores}
    ranking = worst_first(scores)
    order = [*ranking, *sorted(subjects.difference(ranking))]
    pictures = pictures or {}
    last = {str(score["subject"]): score for score in scores}
    shown = [name for name in order if name in pictures] + [name for name in pictures if name not in subjects]
    rows = [
        [
            Cell(str(score["subject"]), subject=str(score["subject"]))
            if score["subject"] in pictures
            else score["subject"],
            score["model"],
            score["fold"],
            *_dice_cells(score),
            "; ".join(what_went_wrong(score)),
        ]
        for score in sorted(scores, key=lambda score: order.index(str(score["subject"])))
    ]
    caption = f"Dice of every subject. {ORDER_RULE}. Click a heading to sort"
    folds = {str(score["fold"]) for score in scores}
    write_page(
        path,
        "scores.html",
        title=title,
        notes=[weights_line(weights_note), selection_line(scores)],
        facts={"subjects": len(subjects), "folds": len(folds), "models": len(models_of(scores))},
        dice_heading="Dice",
        figures=_charts(scores),
        cases=Table(("subject", "model", "fold", *COLUMNS, "what went wrong"), rows, caption, sortable=True),
        gallery=[
            {
                "name": name,
                "findings": what_went_wrong(last[name]) if name in last else [],
                "dice": None,
                "picture": picture(pictures[name], _qc_alt(name)),
            }
            for name in shown
        ],
        settings=dict(settings or {}),
        dice=_dice_tables(scores, dataset),
        **dict.fromkeys(("not_scored", "differences", "others"), NO_ROWS),
        forest=None,
        choices={},
        rest="",
    )


def write_crossval_report(
    run_dir: PathLike,
    output_dir: PathLike | None = None,
    dataset_dir: PathLike | None = None,
    dataset: str = "",
    num_pictures: int = 30,
) -> Path:
    """Writes `report.html`, which stands alone, and beside it its tables as CSV and its figures as PNG.

    `table2.csv`, `scores.csv` (every subject and model), `differences.csv`, `figure2.png` (the representative
    subject), `figure3.png` (Dice by fold), `figure4.png` (Dice by region), `differences.png`; what cannot be made, such
    as differences from one model, is left out, and an older one of that name is removed. Where epochs were selected by
    the scored subjects, differences come without intervals and p values, and the page says why.

    Args:
        run_dir: folder of a cross-validation; models that have no scores yet are left out, and the page says so.
        output_dir: by default `report` in the run's folder.
        dataset_dir: dataset of the run's datalist, for Figure 2; by default what the datalist remembers.
        dataset: name of the dataset in Table 2, by default the layout of its files.
        num_pictures: how many of the worst cases get their picture, so that the page of a large run can be opened.

    Returns:
        Path of the page.

    Raises:
        UserError: no model has scores, or a file of the run is not what it should be; says which.
        OSError: a file cannot be written.
    """
    run = read_run(run_dir)
    scores, layout = run.scores, run.datalist.get("layout")
    folder = Path(run_dir) / "report" if output_dir is None else Path(output_dir)
    dataset = dataset or (f"{layout} layout" if layout else run.folder.resolve().name)
    differences = difference_rows(scores)
    _write_tables(folder, run, dataset, differences)
    by_note: dict[str, list[str]] = {}
    for model, note in run.notes.items():
        by_note.setdefault(note, []).append(model)
    ranking, named = worst_first(scores), ("layout", "num_folds", "seed", "unknown_labels", "allow_empty_mask")
    shown = ranking[:num_pictures]
    page = folder / "report.html"
    write_page(
        page,
        "scores.html",
        title="CoMNeT: cross-validation",
        notes=[
            small_run_line(len(run.subjects)),
            *(f"{', '.join(models)}. {weights_line(note)}" for note, models in by_note.items()),
            selection_line(scores),
        ],
        facts={
            "subjects": len(run.subjects),
            "of them without ET": len({one["subject"] for one in scores if one.get("ET_reference_ml") == 0}),
            "folds": len({str(score["fold"]) for score in scores}),
            "models": len(run.notes),
        },
        not_scored=Table(
            ("Model", "Number", "Subjects without scores"),
            [[model, len(missing), ", ".join(missing)] for model, missing in run.not_scored.items()],
            "Models with and without these subjects are not comparable: finish the cross-validation",
        ),
        dice_heading="Table 2: Dice",
        differences=difference_table(differences) if differences else NO_ROWS,
        forest=_forest(folder / "differences.png", differences),
        figures=[_representative(folder / "figure2.png", run, dataset_dir), *_charts(scores, folder)],
        others=other_scores_table(scores),
        choices=choices(run.tuning),
        cases=_cases(run, ranking, shown),
        rest=f"The worst {len(shown)} of {len(ranking)} subjects are shown one by one; scores.csv holds all."
        if len(shown) < len(ranking)
        else "",
        gallery=[_case(run, name) for name in shown],
        settings={name: run.datalist[name] for name in (*named, "comnet_version") if name in run.datalist},
        dice=_dice_tables(scores, dataset),
    )
    return page


def small_run_line(num_subjects: int) -> str:
    """What must be said of a run of few subjects; nothing where there are `BENCHMARK_SUBJECTS` or more."""
    few = num_subjects < BENCHMARK_SUBJECTS
    subjects = "1 subject" if num_subjects == 1 else f"{num_subjects} subjects"
    return f"{subjects}: a software check, not a benchmark." if few else ""


def _subject(row: Mapping[str, Any], path: PathLike | None) -> dict[str, Any]:
    name = str(row["subject"])
    figures = _volume_cells(row)[1 : 1 + len(REGIONS)]
    volumes = ", ".join(f"{region} {value} ml" for region, value in zip(REGIONS, figures, strict=True))
    regions = ", ".join(REGION_NAMES[region] for region in REGIONS)
    alt = f"{name}: T1c and T2-FLAIR in three planes with outlines of {regions}. Volumes: {volumes}."
    shown = Picture(alt, missing="No picture was drawn.") if path is None else picture(path, alt)
    return {"name": name, "volumes": volumes, "warnings": _warnings(row), "picture": shown}


def _volume_cells(row: Mapping[str, Any], linked: bool = False) -> list[Any]:
    name = str(row["subject"])
    numbers = [(row.get(f"{region.lower()}_ml"), 2) for region in REGIONS] + [(row.get("seconds"), 1)]
    shown = ["–" if value in (None, "") else f"{float(value):.{decimals}f}" for value, decimals in numbers]
    shown.insert(len(REGIONS), row.get("missing") or "–")
    return [Cell(name, subject=name if linked else ""), *shown, "; ".join(_warnings(row))]


def _warnings(row: Mapping[str, Any]) -> list[str]:
    warnings = row.get("warnings") or []
    return [one for one in ([warnings] if isinstance(warnings, str) else map(str, warnings)) if one]


def _dice_tables(scores: Scores, dataset: str) -> list[Table]:
    return [table2(scores, convention, dataset) for convention in CONVENTIONS if is_known(scores, convention)]


def _dice_cells(score: Mapping[str, Any]) -> list[str]:
    values = (*(counted_dice(score, region) for region in REGIONS), mean_dice(score))
    return ["–" if math.isnan(value) else f"{value:.4f}" for value in values]


def _qc_alt(name: str, of: str = "") -> str:
    return f"{name}: T1c and T2-FLAIR in three planes, prediction{of} outlined solid and reference dashed."


def _write_tables(folder: Path, run: Run, dataset: str, differences: Sequence[Mapping[str, Any]]) -> None:
    summary = table2_records(run.scores, dataset)
    write_table(folder / "table2.csv", list(summary[0]), summary)
    columns = dict.fromkeys(column for score in run.scores for column in score)
    write_table(folder / "scores.csv", list(columns), run.scores)
    (folder / "differences.csv").unlink(missing_ok=True)
    if differences:
        write_table(folder / "differences.csv", DIFFERENCE_COLUMNS, differences)


def _charts(scores: Scores, folder: Path | None = None) -> list[Picture]:
    """Figures 3 and 4, written into the folder if there is one; no Figure 3 for one fold."""
    several = has_several_folds(scores)
    spread = "; error bars are the sample standard deviation over folds" if several else ""
    means = summarise_scores(scores).xs("mean", axis="columns", level=1)
    spoken = "; ".join(
        f"{model}: " + ", ".join(f"{column} {value:.3f}" for column, value in row.items())
        for model, row in means.iterrows()
    )
    strip, bars = ("", "") if folder is None else ("Figure 3. ", "Figure 4. ")
    caption = f"{bars}Mean Dice by region, empty regions skipped{spread}."
    shown = [_chart(folder, "figure4.png", dice_bars(scores), f"Bar chart of mean Dice. {spoken}.", caption)]
    if several:
        caption = f"{strip}Average Dice of the held-out subjects of every fold; numbers are folds, bars mean ± sd."
        alt = "Average Dice of every fold by model."
        shown.insert(0, _chart(folder, "figure3.png", fold_strip(scores), alt, caption))
    elif folder is not None:
        (folder / "figure3.png").unlink(missing_ok=True)
    return shown


def _chart(folder: Path | None, name: str, figure: Figure, alt: str, caption: str) -> Picture:
    if folder is not None:
        save_figure(folder / name, figure)
    return picture(figure, alt, caption)


def _forest(path: Path, rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    path.unlink(missing_ok=True)
    if not rows:
        return None
    spoken = "; ".join(
        f"{row['model']} − {row['baseline']} {row['region']}: {row['difference']:+.3f}"
        for row in rows
        if row["convention"] == SKIP
    )
    limits = ", with 95 % bootstrap interval; coloured where it leaves zero out"
    intervals = limits if any(row["method"] is not None for row in rows) else ""
    caption = f"Mean paired difference, empty regions skipped{intervals}."
    return _chart(path.parent, path.name, forest_plot(rows), f"Forest plot of paired differences. {spoken}.", caption)


def _representative(path: Path, run: Run, dataset_dir: PathLike | None) -> Picture:
    """Figure 2, or a sentence that says why there is none."""
    model, subject = run.last_model, median_subject(run.scores)
    score, datalist_file = run.of(subject)[model], run.folder / "datalist.json"
    alt = f"{subject}: true regions above, predicted regions below, in three planes."
    path.unlink(missing_ok=True)
    try:
        datalist = load_datalist(datalist_file, dataset_of(datalist_file) if dataset_dir is None else dataset_dir)
        item = next((one for one in datalist["training"] if one["subject"] == subject), None)
        if item is None:
            raise ValueError(f"{datalist_file} does not list it")
        write_qc_picture(
            path,
            item["image"],
            run.file(model, subject, "seg.nii.gz"),
            reference_path=item["label"],
            reference_palette=item["palette"],
            draw=truth_figure,
            title=subject,
            subtitle=f"{model}, fold {score['fold']}, mean Dice {mean_dice(score):.3f}",
            weights_note=run.weights(model, subject),
        )
    except (OSError, ValueError) as error:
        return Picture(alt, missing=f"Figure 2 was not drawn ({subject}): {error}")
    caption = f"Figure 2. Ground truth (top) and prediction of {model} (bottom) on T1c. {MEDIAN_RULE}."
    return picture(path, alt, caption)


def _cases(run: Run, ranking: Sequence[str], shown: Sequence[str]) -> Table:
    models, last = models_of(run.scores), run.last_model
    rows = []
    for name in ranking:
        scores = run.of(name)
        means = [f"{mean_dice(scores[model]):.3f}" if model in scores else "–" for model in models]
        link = Cell(name, subject=name if name in shown else "")
        rows.append([link, scores[last]["fold"], *means, "; ".join(what_went_wrong(scores[last]))])
    caption = f"Mean Dice of every model. {ORDER_RULE}. Click a heading to sort"
    return Table(("Subject", "Fold", *models, f"What went wrong ({last})"), rows, caption, sortable=True)


def _case(run: Run, name: str) -> dict[str, Any]:
    """One subject of the gallery: what every model made of it; findings and picture are those of the last model."""
    scores, last = run.of(name), run.last_model
    rows = [[model, *_dice_cells(score)] for model, score in scores.items()]
    return {
        "name": name,
        "findings": what_went_wrong(scores[last]),
        "dice": Table(("Model", *COLUMNS), rows, "Dice; – where the region is rightly empty"),
        "picture": picture(run.file(last, name, "qc.png"), _qc_alt(name, f" of {last}")),
    }
