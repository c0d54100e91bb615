"""Charts of many subjects: Dice by region and by fold (paper, Figures 4 and 3), and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .tables import AVERAGE, COLUMNS, NOISE, SKIP, Scores, fold_means, models_of, summarise_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, GRID = "#222222", "#d9dde2"
BETTER, WORSE, OPEN = "#0072B2", "#D55E00", "#5b6570"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
DIFFERENCE_AXIS = "difference of Dice on the same subjects (right of the line: better than the baseline)"
ROOM_FOR_LABELS = 3
"""With more models than this, the figures over their bars are written upright."""


def dice_bars(scores: Scores) -> Figure:
    """Bars of the mean Dice per region and model, the sample standard deviation over folds as error bars (Figure 4)."""
    figure, axes = _axes()
    summary = summarise_scores(scores)
    width, upright = 0.8 / len(summary), len(summary) > ROOM_FOR_LABELS
    several = has_several_folds(scores)
    for index, (model, row) in enumerate(summary.iterrows()):
        means, deviations = (row.xs(kind, level=1)[list(COLUMNS)].to_numpy() for kind in ("mean", "std"))
        centres = np.arange(len(COLUMNS)) + (index - (len(summary) - 1) / 2) * width
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        errors = {"yerr": deviations, "capsize": 4, "ecolor": INK} if several else {}
        bars = axes.bar(centres, np.nan_to_num(means), 0.92 * width, color=colour, label=model, **errors)
        labels = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        axes.bar_label(bars, labels, padding=2, color=INK, fontsize=8, rotation=90 * upright)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    _finish(axes, "Dice, mean ± sd over folds" if several else "Dice")
    axes.set_ylim(0, 1.2 if upright else 1.08)
    figure.legend(loc="outside upper center", ncols=min(len(summary), 4), frameon=False)
    return figure


def fold_strip(scores: Scores) -> Figure:
    """One point per fold (its average Dice over regions) and model, with mean ± sd beside them (Figure 3)."""
    figure, axes = _axes()
    averages, summary, models = fold_means(scores)[AVERAGE], summarise_scores(scores)[AVERAGE], models_of(scores)
    for index, model in enumerate(models):
        by_fold = averages.loc[model]
        places = index + np.linspace(-0.12, 0.28, len(by_fold))
        axes.plot(places, by_fold, "o", color=MODEL_COLOURS[index % len(MODEL_COLOURS)], markersize=9)
        for place, (fold, value) in zip(places, by_fold.items(), strict=True):
            axes.annotate(f"{fold}", (place, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        mean, deviation = summary.loc[model]
        axes.errorbar(index - 0.28, mean, np.nan_to_num(deviation), fmt="_", color=INK, markersize=22, capsize=5)
    axes.set_xticks(range(len(models)), models)
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.margins(y=0.12)
    _finish(axes, "average Dice of the fold")
    return figure


def has_several_folds(scores: Scores) -> bool:
    """Whether any model was scored on more than one fold, so that a spread over folds exists."""
    return len({(score["model"], str(score["fold"])) for score in scores}) > len(models_of(scores))


def forest_plot(rows: Sequence[Mapping[str, Any]], convention: str = SKIP) -> Figure:
    """One panel per comparison: the difference of every region, with its interval if it has one, and the zero line.

    `rows` are those of `difference_rows`, at least one under the convention for empty regions.
    """
    from matplotlib.figure import Figure

    own = [row for row in rows if row["convention"] == convention]
    pairs = list(dict.fromkeys((row["model"], row["baseline"]) for row in own))
    figure = Figure(figsize=(1.2 + 3.3 * len(pairs), 2.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, pair in zip(panels, pairs, strict=True):
        _draw_differences(axes, [row for row in own if (row["model"], row["baseline"]) == pair])
        axes.set_title(f"{pair[0]} − {pair[1]}", fontsize=10, weight="bold")
    values = (abs(row[name]) for row in own for name in ("low", "high", "difference"))
    limit = 1.15 * max([0.01, *filter(math.isfinite, values)])
    panels[0].set_xlim(-limit, limit)
    panels[0].invert_yaxis()
    figure.supxlabel(DIFFERENCE_AXIS, fontsize=9)
    return figure


def _draw_differences(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    for place, row in enumerate(rows):
        colour = BETTER if row["low"] > NOISE else WORSE if row["high"] < -NOISE else OPEN
        if math.isfinite(row["low"]):
            axes.plot((row["low"], row["high"]), (place, place), color=colour, linewidth=2.2)
        if math.isfinite(row["difference"]):
            axes.plot(row["difference"], place, "o", color=colour, markersize=7)
        x = row["difference"] if math.isfinite(row["difference"]) else 0
        label = f"{x:+.3f} (n = {row['pairs']})" if row["pairs"] else "no subject with both"
        axes.annotate(label, (x, place), (0, 7), textcoords="offset points", ha="center", fontsize=8, bbox=LABEL_BOX)
    axes.set_yticks(range(len(rows)), [row["region"] for row in rows], fontsize=9)
    axes.set_ylim(-0.6, len(rows) - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    return figure, figure.subplots()


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
