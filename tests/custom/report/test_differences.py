"""Paired differences: which comparisons are made, and where the forest plot draws them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from custom.report.charts import BETTER, OPEN, WORSE, forest_plot
from custom.report.tables import difference_rows, difference_table


@pytest.fixture(scope="module")
def three_models(three_models):
    """Selected without the scored subjects, so that intervals may be given."""
    return [row | {"selection": "last"} for row in three_models]


@pytest.fixture(scope="module")
def differences(three_models):
    return difference_rows(three_models)


def _one(rows, **names):
    return next(row for row in rows if all(row[key] == value for key, value in names.items()))


class TestRows:
    def test_three_comparisons_in_both_conventions(self, differences):
        pairs = list(dict.fromkeys((row["model"], row["baseline"]) for row in differences))
        assert pairs == [("CoMNeT", "MedNeXt"), ("MedNeXt", "SegResNet"), ("CoMNeT", "SegResNet")]
        assert len(differences) == 3 * 2 * 4

    def test_numbers(self, differences):
        skip = _one(differences, model="MedNeXt", convention="skip", region="ET")
        brats = _one(differences, model="MedNeXt", convention="brats", region="ET")
        assert (skip["pairs"], brats["pairs"]) == (4, 5)
        assert skip["difference"] == pytest.approx(0.02) and brats["difference"] == pytest.approx(0.016)
        assert brats["low"] < 0.016 < brats["high"]
        assert _one(differences, model="CoMNeT", region="TC")["high"] < 0

    def test_only_models_that_are_there(self, three_models):
        rows = difference_rows([row for row in three_models if row["model"] != "MedNeXt"])
        assert {(row["model"], row["baseline"]) for row in rows} == {("CoMNeT", "SegResNet")}
        assert difference_rows(three_models[:5]) == []

    def test_only_subjects_that_both_have(self, three_models):
        missing = [row for row in three_models if (row["model"], row["subject"]) != ("SegResNet", "a")]
        assert _one(difference_rows(missing), baseline="SegResNet", region="WT")["pairs"] == 4


class TestTable:
    def test_bold_where_zero_is_left_out(self, render, differences):
        html = render(difference_table(differences))
        assert html.count("<tr>") == 1 + 3 * 4
        assert "<strong>-0.020 [-0.020, -0.020] (5)</strong>" in html
        assert "<strong>+0.000 [" not in html and "+0.000 [+0.000, +0.000] (5)" in html

    def test_rounding_is_no_difference(self, render, differences):
        html = render(difference_table([differences[0] | {"difference": 1e-17, "low": 1e-17, "high": 1e-17}]))
        assert "<strong>" not in html

    def test_nothing_to_compare(self):
        assert not difference_table([]).rows


class TestForestPlot:
    def test_points_intervals_and_the_line_of_no_difference(self, differences):
        figure = forest_plot(differences)
        assert [axes.get_title() for axes in figure.axes] == [
            "CoMNeT − MedNeXt",
            "MedNeXt − SegResNet",
            "CoMNeT − SegResNet",
        ]
        axes = figure.axes[0]
        drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        own = [row for row in differences if row["baseline"] == "MedNeXt" and row["convention"] == "skip"]
        np.testing.assert_allclose(drawn, [row["difference"] for row in own])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["ET", "TC", "WT", "Average"]
        assert axes.yaxis_inverted(), "ET on top"
        low, high = axes.get_xlim()
        assert low == -high and all(low < row[end] < high for row in own for end in ("low", "high"))

    def test_colour_tells_better_from_worse(self, differences):
        row = differences[0]
        plots = [row | {"low": low, "high": high} for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))]
        points = [line for line in forest_plot(plots).axes[0].lines if line.get_marker() == "o"]
        assert [point.get_color() for point in points] == [BETTER, WORSE, OPEN]

    def test_nothing_to_pair(self, render, differences):
        nothing = {"pairs": 0, "difference": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
        figure = forest_plot([row | nothing for row in differences])
        figure.draw_without_rendering()
        assert "no subject with both" in [text.get_text() for text in figure.axes[0].texts]
        assert "–" in render(difference_table([row | nothing for row in differences]))
