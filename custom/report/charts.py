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
GRID = "#d9dde2"


def dice_bars(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of the mean Dice per region and model, with the standard deviation as error bars (paper, Figure 4)."""
    from matplotlib.figure import Figure

    models = models_of(scores)
    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        values = fold_means(scores, model)
        means, deviations = np.array([spread(values[column]) for column in COLUMNS]).T
        centres = np.arange(len(COLUMNS)) + (index - (len(models) - 1) / 2) * width
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        bars = axes.bar(centres, np.nan_to_num(means), 0.92 * width, color=colour, label=model)
        axes.errorbar(centres, means, np.nan_to_num(deviations), fmt="none", ecolor="#222222", capsize=4)
        labels = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9, weight="bold")
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    _finish(axes, "Dice, mean ± sd")
    axes.set_ylim(0, 1.02)
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
        axes.plot([index] * len(by_fold), list(by_fold.values()), "o", color=colour, markersize=9, alpha=0.8)
        for fold, value in by_fold.items():
            axes.annotate(f"{fold}", (index, value), (9, 0), textcoords="offset points", va="center", fontsize=9)
        mean, deviation = spread(by_fold)
        axes.errorbar(index - 0.18, mean, np.nan_to_num(deviation), fmt="_", color="#222222", markersize=22, capsize=5)
    axes.set_xticks(range(len(models)), models)
    axes.set_xlim(-0.6, len(models) - 0.4)
    _finish(axes, "average Dice of the fold")
    return figure


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
