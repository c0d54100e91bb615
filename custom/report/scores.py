"""The report on how well models did: the paper's Table 2 and Figures 2 to 4 for whatever was scored."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..cohort import REGIONS
from .charts import dice_bars, fold_strip, has_several_folds
from .page import RESEARCH_USE, Html, banner, cards, join, picture, section, table, text, weights_line, write_page
from .summary import BRATS, COLUMNS, SKIP, dice_of, models_of, summarise_scores

CONVENTIONS = {
    SKIP: "Empty regions skipped: a subject without the region does not count for it",
    BRATS: "BraTS convention: 1 where prediction and reference are both empty, 0 where only one is",
}

NO_BRATS = (
    "No table under the BraTS convention: the scores do not tell a false positive from a region rightly left empty."
)


def write_scores_report(
    path: str | os.PathLike[str],
    scores: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
    title: str = "CoMNeT: scores",
    dataset: str = "",
    weights_note: str = "",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes one self-contained HTML page of Dice scores.

    Args:
        path: HTML file to write, whole or not at all.
        scores: dicts with "model", "fold", "subject", and the Dice of ET, TC and WT as `dice_of` reads it.
        pictures: path of a QC picture, with the reference dashed, by caption (such as the subject's name).
        title: title of the page.
        dataset: what was scored, for the captions.
        weights_note: what the reader must know about the weights.
        settings: shown as a table at the end.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError(f"no scores to report in {path}: score at least one subject")
    folds = {str(score["fold"]) for score in scores}
    subjects = {str(score["subject"]) for score in scores}
    write_page(
        path,
        title,
        banner(RESEARCH_USE, weights_line(weights_note)),
        cards({"subjects": len(subjects), "folds": len(folds), "models": len(models_of(scores))}),
        section("Dice", *(_summary_table(scores, convention, dataset) for convention in CONVENTIONS)),
        section("Figures", *_charts(scores)),
        section("Subjects", _subject_table(scores)),
        section("Pictures", *(_picture(name, one) for name, one in (pictures or {}).items())),
        section("Settings", table(("setting", "value"), list((settings or {}).items()), "What the result depends on")),
    )


def _summary_table(scores: Sequence[Mapping[str, Any]], convention: str, dataset: str) -> Html:
    values = [dice_of(score, region, convention) for score in scores for region in REGIONS]
    if convention == BRATS and any(map(math.isnan, values)):
        return Html(f"<p>{text(NO_BRATS)}</p>")
    summary = summarise_scores(scores, convention)
    best = {column: max((row[column][0] for row in summary.values()), key=_rank) for column in COLUMNS}
    rows = [
        [
            model,
            *(
                _mean_and_deviation(row[column], len(summary) > 1 and row[column][0] == best[column])
                for column in COLUMNS
            ),
        ]
        for model, row in summary.items()
    ]
    where = f"{dataset}. " if dataset else ""
    folds = len({str(score["fold"]) for score in scores})
    what = f"Mean ± standard deviation across {folds} folds" if folds > 1 else "Mean over the subjects of one fold"
    caption = f"{where}{what}{', best in bold' if len(summary) > 1 else ''}. {CONVENTIONS[convention]}."
    return table(("model", *COLUMNS), rows, caption)


def _mean_and_deviation(value: tuple[float, float], best: bool) -> Html:
    mean, deviation = value
    shown = text("–" if math.isnan(mean) else f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}"))
    return Html(f"<strong>{shown}</strong>") if best else shown


def _rank(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def _charts(scores: Sequence[Mapping[str, Any]]) -> list[Html]:
    summary = summarise_scores(scores)
    spoken = "; ".join(
        f"{model}: " + ", ".join(f"{column} {row[column][0]:.3f}" for column in COLUMNS)
        for model, row in summary.items()
    )
    region_bars = picture(
        dice_bars(scores), f"Bar chart of mean Dice. {spoken}.", "Dice by region, empty regions skipped."
    )
    if not has_several_folds(scores):
        return [region_bars]
    strip = picture(
        fold_strip(scores), "Average Dice of every fold by model.", "Average Dice by fold; bars are mean ± sd."
    )
    return [region_bars, strip]


def _subject_table(scores: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for score in scores:
        dice = [dice_of(score, region) for region in REGIONS]
        defined = [value for value in dice if not math.isnan(value)]
        average = sum(defined) / len(defined) if defined else math.nan
        numbers = ["–" if math.isnan(value) else f"{value:.4f}" for value in (*dice, average)]
        rows.append([score["subject"], score["model"], score["fold"], *numbers])
    caption = "Dice of every subject; – where the region is empty. Click a heading to sort"
    return table(("subject", "model", "fold", *COLUMNS), rows, caption, sortable=True)


def _picture(name: str, path: str | os.PathLike[str]) -> Html:
    alt = f"{name}: T1c and T2-FLAIR in three planes, prediction outlined solid and reference dashed."
    return join([Html(f"<h3>{text(name)}</h3>"), picture(path, alt)])
