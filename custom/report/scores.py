"""The report on how well models did: the paper's Table 2 and Figures 2 to 4 for whatever was scored."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..cohort import REGIONS
from ..files import UserError
from .cases import ORDER_RULE, counted_dice, mean_dice, what_went_wrong, worst_first
from .charts import dice_bars, fold_strip, has_several_folds
from .page import (
    RESEARCH_USE,
    Html,
    banner,
    bullets,
    cards,
    join,
    name_of,
    picture,
    section,
    table,
    text,
    weights_line,
    write_page,
)
from .summary import COLUMNS, models_of, summarise_scores
from .tables import CONVENTIONS, table2


def write_scores_report(
    path: str | os.PathLike[str],
    scores: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
    title: str = "CoMNeT: scores",
    dataset: str = "",
    weights_note: str = "",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes one self-contained HTML page of Dice scores, the last model's worst cases first.

    Args:
        path: HTML file to write, whole or not at all.
        scores: dicts with "model", "fold", "subject", and the Dice of ET, TC and WT as `dice_of` reads it.
        pictures: path of a QC picture, with the reference dashed, by caption (such as the subject's name).
        title: title of the page.
        dataset: what was scored, for the first column of the tables.
        weights_note: what the reader must know about the weights.
        settings: shown as a table at the end.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise UserError(f"no scores to report in {path}: score at least one subject")
    folds = {str(score["fold"]) for score in scores}
    subjects = {str(score["subject"]) for score in scores}
    ranking = worst_first(scores)
    order = [*ranking, *sorted(subjects.difference(ranking))]
    write_page(
        path,
        title,
        banner(RESEARCH_USE, weights_line(weights_note)),
        cards({"subjects": len(subjects), "folds": len(folds), "models": len(models_of(scores))}),
        section("Dice", *(table2(scores, convention, dataset) for convention in CONVENTIONS)),
        section("Figures", *_charts(scores)),
        section("Worst cases first", _subject_table(scores, order)),
        section("Pictures", *_pictures(pictures or {}, scores, order)),
        section("Settings", table(("setting", "value"), list((settings or {}).items()), "What the result depends on")),
    )


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


def _subject_table(scores: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Html:
    rows, rank = [], {name: place for place, name in enumerate(order)}
    for score in sorted(scores, key=lambda score: rank[str(score["subject"])]):
        dice = [counted_dice(score, region) for region in REGIONS]
        numbers = ["–" if math.isnan(value) else f"{value:.4f}" for value in (*dice, mean_dice(score))]
        rows.append(
            [score["subject"], name_of(str(score["model"])), score["fold"], *numbers, "; ".join(what_went_wrong(score))]
        )
    caption = f"Dice of every subject. {ORDER_RULE}. Click a heading to sort"
    return table(("subject", "model", "fold", *COLUMNS, "what went wrong"), rows, caption, sortable=True)


def _pictures(
    pictures: Mapping[str, str | os.PathLike[str]], scores: Sequence[Mapping[str, Any]], order: Sequence[str]
) -> list[Html]:
    last = {str(score["subject"]): score for score in scores}
    ranking = [name for name in order if name in pictures]
    return [
        _picture(name, pictures[name], what_went_wrong(last[name]) if name in last else [])
        for name in ranking + [name for name in pictures if name not in ranking]
    ]


def _picture(name: str, path: str | os.PathLike[str], findings: Sequence[str]) -> Html:
    alt = f"{name}: T1c and T2-FLAIR in three planes, prediction outlined solid and reference dashed."
    return join([Html(f"<h3>{text(name)}</h3>"), bullets(findings, "warnings"), picture(path, alt)])
