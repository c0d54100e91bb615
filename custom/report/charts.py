"""Figures 3 and 4 of the paper: Dice per fold, and Dice per region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .summary import COLUMNS, fold_means, models_of, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, GRID = "#222222", "#d9dde2"
ROOM_FOR_LABELS = 3
"""With more models than this, the figures over their bars are written upright."""


def dice_bars(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of the mean Dice per region and model, with the standard deviation as error bars (paper, Figure 4)."""
    from matplotlib.figure import Figure

    models = models_of(scores)
    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    width, upright = 0.8 / len(models), len(models) > ROOM_FOR_LABELS
    several = has_several_folds(scores)
    for index, model in enumerate(models):
        values = fold_means(scores, model)
        means, deviations = np.array([spread(values[column]) for column in COLUMNS]).T
        centres = np.arange(len(COLUMNS)) + (index - (len(models) - 1) / 2) * width
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        errors = {"yerr": deviations, "capsize": 4, "ecolor": INK} if several else {}
        bars = axes.bar(centres, np.nan_to_num(means), 0.92 * width, color=colour, label=model, **errors)
        labels = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        axes.bar_label(bars, labels, padding=2, color=INK, fontsize=8, rotation=90 * upright)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    _finish(axes, "Dice, mean ± sd over folds" if several else "Dice")
    axes.set_ylim(0, 1.2 if upright else 1.08)
    figure.legend(loc="outside upper center", ncols=min(len(models), 4), frameon=False)
    return figure


def fold_strip(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """One point per fold (its average Dice over regions) and model, with mean ± sd beside them (paper, Figure 3)."""
    from matplotlib.figure import Figure

    models = models_of(scores)
    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        by_fold = fold_means(scores, model)["Average"]
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        places = index + np.linspace(-0.12, 0.28, len(by_fold))
        axes.plot(places, list(by_fold.values()), "o", color=colour, markersize=9)
        for place, (fold, value) in zip(places, by_fold.items(), strict=True):
            axes.annotate(f"{fold}", (place, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        mean, deviation = spread(by_fold)
        axes.errorbar(index - 0.28, mean, np.nan_to_num(deviation), fmt="_", color=INK, markersize=22, capsize=5)
    axes.set_xticks(range(len(models)), models)
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.margins(y=0.12)
    _finish(axes, "average Dice of the fold")
    return figure


def has_several_folds(scores: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any model was scored on more than one fold, so that a spread over folds exists."""
    return len({(score["model"], str(score["fold"])) for score in scores}) > len(models_of(scores))


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
