"""Worst cases first, and what went wrong in words."""

from __future__ import annotations

import math

import pytest

from custom.report.runs import mean_dice, median_subject, what_went_wrong, worst_first


def _one(region="TC", *, dice, predicted, true, hd95=1.0):
    """Scores of one region; the two others are rightly empty."""
    row = {"subject": "s"}
    for name in ("ET", "TC", "WT"):
        row |= {f"{name}_dice": math.nan, f"{name}_dice_brats": 1.0, f"{name}_hd95": math.nan}
        row |= {f"{name}_volume_ml": 0.0, f"{name}_reference_ml": 0.0}
    own = {"dice": dice, "dice_brats": dice, "hd95": hd95, "volume_ml": predicted, "reference_ml": true}
    return row | {f"{region}_{name}": value for name, value in own.items()}


class TestOrder:
    def test_worst_of_the_last_model_first(self, three_models):
        changed = [row | {"WT_dice_brats": 0.0} if row["subject"] == "a" else row for row in three_models[-5:]]
        assert worst_first([*three_models[:-5], *changed]) == ["c", "a", "d", "b", "e"]
        assert worst_first(three_models[:5]) == ["c", "d", "b", "e", "a"], "of SegResNet, where it is the last"

    def test_a_false_positive_counts_as_nothing(self, make_score):
        empty = make_score("m", 0, "empty", (None, 0.6, 0.6))
        false = make_score("m", 0, "false", (None, 0.7, 0.7)) | {"ET_dice_brats": 0.0}
        assert mean_dice(empty) == pytest.approx(0.6) and mean_dice(false) == pytest.approx(1.4 / 3)
        assert worst_first([empty, false]) == ["false", "empty"]

    def test_a_region_rightly_left_empty_is_no_merit(self, make_score):
        half = make_score("m", 0, "half", (0.4, 0.1, 0.1))
        empty = make_score("m", 0, "empty", (None, 0.1, 0.1))
        assert worst_first([half, empty]) == ["empty", "half"]
        assert mean_dice(make_score("m", 0, "all", (None, None, None))) == 1

    def test_without_any_value_comes_first_and_ties_go_by_name(self, make_score):
        nothing = {"model": "m", "fold": 0, "subject": "z", "ET": math.nan, "TC": math.nan, "WT": math.nan}
        same = [make_score("m", 0, name, (0.5, 0.5, 0.5)) for name in "ba"]
        assert worst_first([*same, nothing]) == ["z", "a", "b"]

    def test_median_of_odd_and_even(self, make_score):
        rows = [make_score("m", 0, name, (d, d, d)) for name, d in zip("pqrst", (0.5, 0.1, 0.9, 0.3, 0.7), strict=True)]
        assert median_subject(rows) == "p"
        assert median_subject(rows[:4]) == "s", "of 0.1, 0.3, 0.5, 0.9 the worse of the two in the middle"


class TestFindings:
    def test_predicted_though_there_is_none(self):
        assert what_went_wrong(_one("ET", dice=math.nan, predicted=1.234, true=0.0)) == [
            "ET predicted though there is none: 1.2 ml"
        ]

    def test_small_volumes_are_not_rounded_to_nothing(self):
        assert what_went_wrong(_one("ET", dice=math.nan, predicted=0.057, true=0.0)) == [
            "ET predicted though there is none: 0.057 ml"
        ]

    @pytest.mark.parametrize(("found", "predicted", "amount"), [(0.3, 0.4, "0.3"), (0.0, 0.0, "0.0")])
    def test_missed(self, found, predicted, amount):
        dice = 2 * found / (predicted + 4.1)
        row = _one(dice=dice, predicted=predicted, true=4.1)
        assert what_went_wrong(row) == [f"TC missed: {amount} of 4.1 ml found"]

    def test_in_the_wrong_place(self):
        row = _one("WT", dice=2 * 2 / (10 + 9), predicted=9.0, true=10.0)
        assert what_went_wrong(row) == ["WT in the wrong place: 2.0 of 10.0 ml found, 7.0 ml elsewhere"]

    def test_too_large(self):
        row = _one(dice=2 * 10 / 40, predicted=30.0, true=10.0)
        assert what_went_wrong(row) == ["TC too large: 30.0 ml for 10.0 ml (3.0 times)"]

    def test_parts_far_off(self):
        assert what_went_wrong(_one("WT", dice=0.8, predicted=10, true=10, hd95=46.8)) == [
            "WT has parts far off: HD95 47 mm"
        ]

    def test_nothing_to_say(self):
        assert what_went_wrong(_one(dice=0.8, predicted=11.0, true=10.0)) == []
        assert what_went_wrong(_one(dice=math.nan, predicted=0.0, true=0.0)) == []
        assert what_went_wrong({"subject": "s", "ET": 0.1, "TC": 0.1, "WT": 0.1}) == [], "no volumes are known"

    def test_regions_in_their_order(self):
        row = _one("WT", dice=0.0, predicted=0.0, true=3.0)
        row |= {"ET_volume_ml": 1.0, "ET_dice_brats": 0.0}
        assert [finding[:2] for finding in what_went_wrong(row)] == ["ET", "WT"]
