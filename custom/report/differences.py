"""Which model is better on the same subjects: paired differences of Dice with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..metrics import paired_differences
from .page import Html, name_of, table, text
from .summary import BRATS, COLUMNS, SKIP, models_of
from .tables import is_known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISONS = (("CoMNeT", "MedNeXt"), ("MedNeXt", "SegResNet"), ("CoMNeT", "SegResNet"))
DIFFERENCE_COLUMNS = (
    "model", "baseline", "convention", "region", "pairs", "difference", "low", "high", "method", "p"
)  # fmt: skip
SCORE_NAMES = {SKIP: "dice", BRATS: "dice_brats"}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
AXIS = "difference of Dice on the same subjects (right of the line: better than the baseline)"
HEADS = {SKIP: "Empty regions skipped", BRATS: "BraTS convention"}
CAPTION = (
    "Mean of a subject's Dice less that of the baseline, with 95 % bootstrap interval over subjects, bold where it "
    "leaves zero out, and the number of subjects; p of the Wilcoxon signed-rank test, not corrected for many tests"
)
NOISE = 1e-9
BETTER, WORSE, OPEN = "#0072B2", "#D55E00", "#5b6570"


def difference_rows(scores: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """`metrics.paired_differences` of those of `COMPARISONS` that can be made, as rows of `DIFFERENCE_COLUMNS`.

    Args:
        scores: flat rows as of `metrics.score_subject`, with "model", "fold" and "subject".
        seed: of the bootstrap.

    Returns:
        One row per comparison, convention for empty regions, and ET, TC, WT and Average (a subject's mean over its
        regions); `low` and `high` are the limits of the 95 % interval.
    """
    known = [convention for convention in SCORE_NAMES if is_known(scores, convention)]
    present, rows = set(models_of(scores)), []
    for model, baseline in (pair for pair in COMPARISONS if present.issuperset(pair)):
        for convention in known:
            found = paired_differences(scores, model, baseline, SCORE_NAMES[convention], seed)
            names = {"model": model, "baseline": baseline, "convention": convention}
            rows += [names | {"region": column} | _row(found[_key(column)]) for column in COLUMNS]
    return rows


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """The differences, conventions side by side; bold where the interval leaves zero out. Nothing without rows."""
    conventions = list(dict.fromkeys(row["convention"] for row in rows))
    lines: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        key = (f"{row['model']} − {row['baseline']}", row["region"])
        lines.setdefault(key, []).extend((_difference(row), _p(row["p"])))
    heads = [head for one in conventions for head in (HEADS[one], "p")]
    shown = [[name_of(pair), name_of(region), *cells] for (pair, region), cells in lines.items()]
    return table(("Comparison", "Region", *heads), shown, CAPTION)


def forest_plot(rows: Sequence[Mapping[str, Any]], convention: str = SKIP) -> Figure:
    """One panel per comparison: the difference of every region with its interval, and the line of no difference.

    Args:
        rows: as of `difference_rows`, at least one under the convention.
        convention: for empty regions.
    """
    from matplotlib.figure import Figure

    own = [row for row in rows if row["convention"] == convention]
    pairs = list(dict.fromkeys((row["model"], row["baseline"]) for row in own))
    figure = Figure(figsize=(1.2 + 3.3 * len(pairs), 2.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, pair in zip(panels, pairs, strict=True):
        _draw_panel(axes, [row for row in own if (row["model"], row["baseline"]) == pair])
        axes.set_title(f"{pair[0]} − {pair[1]}", fontsize=10, weight="bold")
    values = (abs(row[name]) for row in own for name in ("low", "high", "difference"))
    limit = 1.15 * max([0.01, *filter(_finite, values)])
    panels[0].set_xlim(-limit, limit)
    panels[0].invert_yaxis()
    figure.supxlabel(AXIS, fontsize=9)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.axvline(0, color="#222222", linewidth=1)
    for place, row in enumerate(rows):
        if _finite(row["difference"]):
            colour = _colour(row)
            if _finite(row["low"]):
                axes.plot((row["low"], row["high"]), (place, place), color=colour, linewidth=2.2)
            axes.plot(row["difference"], place, "o", color=colour, markersize=7)
        x = row["difference"] if _finite(row["difference"]) else 0
        label = f"{x:+.3f} (n = {row['pairs']})" if row["pairs"] else "no subject with both"
        axes.annotate(label, (x, place), (0, 7), textcoords="offset points", ha="center", fontsize=8, bbox=PAPER)
    axes.set_yticks(range(len(rows)), [row["region"] for row in rows], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(rows) - 0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#d9dde2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _key(column: str) -> str:
    return "mean" if column == "Average" else column


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found["interval"]
    return {key: found[key] for key in ("pairs", "difference", "method", "p")} | {"low": low, "high": high}


def _difference(row: Mapping[str, Any]) -> Html:
    if not _finite(row["difference"]):
        return text("–")
    shown = f"{row['difference']:+.3f}"
    if _finite(row["low"]):
        shown += f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    shown += f" ({row['pairs']})"
    return Html(f"<strong>{text(shown)}</strong>") if _colour(row) != OPEN else text(shown)


def _colour(row: Mapping[str, Any]) -> str:
    return BETTER if row["low"] > NOISE else WORSE if row["high"] < -NOISE else OPEN


def _p(value: float) -> str:
    return "–" if not _finite(value) else f"{value:.2g}"


def _finite(value: float) -> bool:
    return math.isfinite(value)
