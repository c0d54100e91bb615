"""The subjects of a cross-validation one by one, worst first, with what every model made of them."""

from __future__ import annotations

import math

from ..cohort import REGIONS
from .cases import ORDER_RULE, counted_dice, mean_dice, what_went_wrong, worst_first
from .page import Html, anchor, bullets, name_of, picture, table, text
from .records import Run
from .summary import COLUMNS, models_of

ALL_WELL = "Nothing stands out in volumes and distances."


def gallery(run: Run, num_pictures: int) -> list[Html]:
    """A table of all subjects, and one article for each of the worst, with picture, Dice and findings.

    Order and findings are those of the run's last model.
    """
    ranking = worst_first(run.scores)
    shown = ranking[:num_pictures]
    rest = f"The worst {len(shown)} of {len(ranking)} subjects are shown one by one; scores.csv holds all."
    note = [Html(f"<p>{text(rest)}</p>")] if len(shown) < len(ranking) else []
    return [_overview(run, ranking, set(shown)), *note, *(_case(run, name) for name in shown)]


def _overview(run: Run, ranking: list[str], linked: set[str]) -> Html:
    models, last = models_of(run.scores), run.last_model
    rows = []
    for name in ranking:
        scores = run.of(name)
        link = Html(f'<a href="#{anchor(name)}">{text(name)}</a>') if name in linked else text(name)
        means = [f"{mean_dice(scores[model]):.3f}" if model in scores else "–" for model in models]
        rows.append([link, scores[last]["fold"], *means, "; ".join(what_went_wrong(scores[last]))])
    columns = ("Subject", "Fold", *models, f"What went wrong ({last})")
    return table(columns, rows, f"Mean Dice of every model. {ORDER_RULE}. Click a heading to sort", sortable=True)


def _case(run: Run, name: str) -> Html:
    scores, last = run.of(name), run.last_model
    findings = what_went_wrong(scores[last])
    heading = f'<h3 id="{anchor(name)}">{text(name)}</h3>'
    said = bullets(findings, "warnings") if findings else Html(f"<p>{text(ALL_WELL)}</p>")
    alt = f"{name}: T1c and T2-FLAIR in three planes, prediction of {last} outlined solid and reference dashed."
    shown = picture(run.file(last, name, "qc.png"), alt)
    return Html(f"<article>{heading}{said}{_dice_table(run, name)}{shown}</article>")


def _dice_table(run: Run, name: str) -> Html:
    rows = []
    for model, score in run.of(name).items():
        dice = [counted_dice(score, region) for region in REGIONS]
        rows.append([name_of(model), *map(_figure, (*dice, mean_dice(score)))])
    return table(("Model", *COLUMNS), rows, "Dice; – where the region is rightly empty")


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
