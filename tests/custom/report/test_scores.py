"""Scores: means over folds, their charts, and their page."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from custom.metrics import score_subject
from custom.report import write_scores_report
from custom.report.charts import dice_bars, fold_strip
from custom.report.tables import dice_of, summarise_scores


class TestScores:
    def test_mean_and_deviation_across_folds(self, scores):
        summary = summarise_scores(scores)
        assert tuple(summary.loc["plain", "ET"]) == pytest.approx((0.7, np.std([0.6, 0.8], ddof=1)))
        assert tuple(summary.loc["plain", "WT"]) == pytest.approx((0.875, np.std([0.85, 0.9], ddof=1)))
        averages = [np.mean([0.6, 0.6, 0.85]), np.mean([0.8, 0.5, 0.9])]
        assert tuple(summary.loc["plain", "Average"]) == pytest.approx((np.mean(averages), np.std(averages, ddof=1)))

    def test_conventions_for_empty_regions(self, scores):
        assert math.isnan(dice_of(scores[1], "ET"))
        assert math.isnan(dice_of(scores[1], "ET", "brats")), "nobody said what was predicted"
        assert dice_of(scores[1] | {"ET_dice_brats": 0.0}, "ET", "brats") == 0, "a false positive"
        known = [score | ({"ET_dice_brats": 1.0} if math.isnan(score["ET"]) else {}) for score in scores]
        brats = summarise_scores(known, partial(dice_of, convention="brats"))
        assert brats.loc["plain", ("ET", "mean")] == pytest.approx((0.6 + 1 + 0.8 + 1) / 4)
        assert summarise_scores(known).loc["plain", ("ET", "mean")] == pytest.approx(0.7)
        with pytest.raises(ValueError, match="convention"):
            dice_of(scores[0], "ET", "other")
        with pytest.raises(KeyError, match="s00.*ET_dice"):
            dice_of({"subject": "s00", "TC": 0.5}, "ET")

    def test_one_fold_and_no_value(self):
        score = {"model": "m", "fold": 0, "subject": "s", "ET": math.nan, "TC": 0.5, "WT": 0.7}
        summary = summarise_scores([score]).loc["m"]
        assert math.isnan(summary["ET", "mean"]) and math.isnan(summary["TC", "std"])
        assert summary["Average", "mean"] == pytest.approx(0.6)

    def test_bars_show_the_means(self, scores):
        axes = dice_bars(scores).axes[0]
        heights = sorted(round(bar.get_height(), 6) for bar in axes.patches)
        summary = summarise_scores(scores)
        assert heights == sorted(round(mean, 6) for mean in summary.xs("mean", axis=1, level=1).to_numpy().ravel())
        assert [label.get_text() for label in axes.get_xticklabels()] == ["ET", "TC", "WT", "Average"]

    def test_strip_shows_every_fold(self, scores):
        figure = fold_strip(scores)
        drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"])
        expected = [[0.6, 0.6, 0.85], [0.8, 0.5, 0.9], [0.9, 0.65, 0.85], [0.7, 0.75, 0.9]]
        np.testing.assert_allclose(drawn, np.mean(expected, axis=1))

    def test_page(self, read_page, tmp_path, scores, pictures):
        write_scores_report(tmp_path / "s.html", scores, pictures, dataset="UTSW <b>", weights_note="weights of fold 0")
        page = read_page(tmp_path / "s.html")
        assert not page.open and "://" not in page.source and "b" not in page.tags
        assert len(page.values("img", "alt")) == 3 and all(page.values("img", "alt"))
        assert "0.7000 ± 0.1414" in page.texts and "Weights of fold 0" in page.texts
        assert page.source.count("<strong>0.8000 ± 0.1414</strong>") == 1, "the better ET is bold"
        assert page.rows() == 1 + 2 + 1 + len(scores), "a table of two models, and one of all subjects"
        assert any(text.startswith("No table under the BraTS convention") for text in page.texts)
        assert "–" in page.texts

    def test_rows_of_metrics_give_both_tables(self, read_page, tmp_path):
        masks = np.zeros((2, 3, 8, 8, 8), bool)
        masks[0, :, 2:5, 2:5, 2:5] = masks[1, 1:, 2:5, 2:5, 2:6] = True
        row = {"model": "m", "fold": 0, "subject": "false positive ET"} | score_subject(*masks)
        write_scores_report(tmp_path / "s.html", [row])
        page = read_page(tmp_path / "s.html")
        assert page.rows() == 2 * (1 + 1) + 1 + 1
        assert "0.0000" in page.texts and "0.8571" in page.texts and "–" in page.texts

    def test_single_fold_page_has_no_deviation(self, read_page, tmp_path, scores):
        write_scores_report(tmp_path / "s.html", [score for score in scores if score["fold"] == 0])
        texts = read_page(tmp_path / "s.html").texts
        assert any("Mean over the subjects of one fold" in text for text in texts)
        assert not any("± 0" in text for text in texts)

    def test_no_scores_is_an_error(self, read_page, tmp_path):
        with pytest.raises(ValueError, match="no scores"):
            write_scores_report(tmp_path / "s.html", [])
        assert not list(tmp_path.iterdir())

    def test_worst_cases_come_first(self, read_page, tmp_path, three_models, pictures):
        volumes = {"TC_volume_ml": 0.4, "TC_reference_ml": 4.0, "TC_dice": 0.1}
        rows = [row | (volumes if row["subject"] == "c" else {}) for row in three_models]
        paths = {name: pictures["a"] for name in ("a", "other", "c")}
        write_scores_report(tmp_path / "s.html", rows, paths)
        texts = read_page(tmp_path / "s.html").texts
        start = texts.index("Worst cases first")
        assert texts[start:].index("c") < texts[start:].index("d") < texts[start:].index("a")
        assert texts.count("a") == 4 and texts.count("other") == 1, "three models and a picture"
        shown = texts[len(texts) - texts[::-1].index("c") - 1 :]
        assert shown.index("c") < shown.index("a") < shown.index("other")
        assert shown[shown.index("c") + 1] == "TC missed: 0.2 of 4.0 ml found"
