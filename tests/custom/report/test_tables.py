"""Table 2 in the paper's layout, and the table of all other scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from custom.report import table2_text
from custom.report.tables import is_known, label, other_score_names, other_scores_table, table2, table2_records


def _cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


class TestTable2:
    def test_the_layout_of_the_paper(self, three_models):
        heads, rule, *rows = _cells(table2_text(three_models, "skip", "BraTS"))
        assert heads == ["Dataset", "Model", "ET", "TC", "WT", "Average"] and set(rule) == {"---"}
        assert [row[:2] for row in rows] == [["BraTS", name] for name in ("SegResNet", "MedNeXt", "CoMNeT")]
        et = np.array([0.8, 0.6, 0.5, 0.4]) + 0.001 * np.array([0, 1, 3, 4])
        assert rows[0][2] == f"{et.mean():.4f} ± {et.std(ddof=1):.4f}"

    def test_best_is_bold_in_every_column(self, three_models):
        rows = _cells(table2_text(three_models))[2:]
        bold = [[cell.startswith("**") and cell.endswith("**") for cell in row[1:]] for row in rows]
        assert bold == [[False, True, False, False], [False, False, True, False], [True, False, True, True]]

    def test_conventions_differ_where_a_region_is_empty(self, three_models):
        skip, brats = (_cells(table2_text(three_models, name))[2] for name in ("skip", "brats"))
        assert skip[2:4] == brats[2:4] and skip[1] != brats[1]
        assert "BraTS convention: 1" in table2_text(three_models, "brats")

    def test_one_model_is_not_best(self, three_models):
        assert "**" not in table2_text(three_models[:5])

    def test_unknown_false_positives_give_no_table(self):
        row = {"model": "m", "fold": 0, "subject": "s", "ET": math.nan, "TC": 0.5, "WT": 0.5}
        assert table2_text([row], "brats").startswith("No table under the BraTS convention")
        assert is_known([row], "skip") and not is_known([row], "brats")
        assert [record["convention"] for record in table2_records([row])] == ["skip"]

    def test_names_cannot_break_the_table(self, render, three_models):
        rows = [row | {"model": "a|b"} for row in three_models[:5]]
        assert table2_text(rows).splitlines()[2].startswith(r"| a\|b |")
        html = render(table2([row | {"model": "a<b"} for row in three_models[:5]], "skip"))
        assert "a<b" not in html and "a&lt;b" in html

    def test_records_of_the_csv(self, three_models):
        records = table2_records(three_models, "BraTS")
        assert [(r["convention"], r["model"]) for r in records[2:4]] == [("skip", "CoMNeT"), ("brats", "SegResNet")]
        assert records[3]["ET_mean"] == pytest.approx((0.8 + 0.601 + 1 + 0.503 + 0.404) / 5)
        assert records[3] | {"dataset": "BraTS", "subjects": 5, "folds": 5} == records[3]


class TestOtherScores:
    @pytest.fixture
    def rows(self, three_models):
        rows = [dict(row) for row in three_models if row["model"] != "SegResNet"]
        for row in rows:
            ours = row["model"] == "CoMNeT"
            for region in ("ET", "TC", "WT"):
                row[f"{region}_hd95"] = math.nan if row["subject"] == "c" else 4.0 if ours else 5.0
                row[f"{region}_hd95_brats"] = 3.0
                row[f"{region}_volume_error_ml"] = (-2.0 if row["fold"] % 2 else 2.0) if ours else 0.5
                row[f"{region}_volume_ml"] = row[f"{region}_reference_ml"] = 7.0
                row[f"{region}_lesion_dice"] = 0.7 if ours else 0.6
                row[f"{region}_novel_thing"] = 1.0 if ours else 2.0
                row[f"{region}_ece"] = math.nan
        return rows

    def test_all_columns_that_are_there(self, rows):
        names = ["hd95", "hd95_brats", "volume_error_ml", "absolute_volume_error_ml", "lesion_dice", "novel_thing"]
        assert other_score_names(rows) == [*names, "ece"]
        assert [label(name) for name in ("hd95_brats", "lesion_dice", "novel_thing")] == [
            "HD95 [mm], BraTS convention",
            "lesion-wise Dice",
            "novel thing",
        ]

    def test_means_counts_and_the_better_one(self, render, rows):
        html = render(other_scores_table(rows))
        assert "<strong>4.0 ± 0.0 (4)</strong>" in html, "a smaller distance is better; c has none"
        assert "<strong>0.700 ± 0.000 (5)</strong>" in html and "<strong>0.600" not in html
        assert "<strong>1.000" not in html and "<strong>2.000" not in html, "nobody knows which is better"

    def test_signed_errors_cancel_and_are_not_ranked(self, render, rows):
        html = render(other_scores_table(rows))
        assert "0.4 ± 2.2 (5)" in html and "<strong>0.4" not in html and "<strong>0.5 ± 0.0 (5)</strong>" in html

    def test_what_was_not_measured_is_said(self, render, rows):
        html = render(other_scores_table(rows))
        assert "Not measured: calibration error" in html and html.count("calibration error") == 1

    def test_a_model_without_the_column(self, render, rows):
        del rows[0]["ET_lesion_dice"]
        assert "0.600 ± 0.000 (4)" in render(other_scores_table(rows))

    def test_only_dice(self, render, three_models):
        assert not other_scores_table(three_models).rows and render(other_scores_table(three_models)) == ""
