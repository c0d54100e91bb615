"""What the ensemble chose, as the reader sees it."""

from __future__ import annotations

import math

import pytest

from custom.report.tables import choices

REGION = {
    "threshold": 0.45,
    "min_volume_mm3": 100.0,
    "refine": True,
    "dice_coarse": 0.41,
    "dice_refined": 0.4375,
    "difference": 0.0275,
    "interval": [0.001, 0.05],
    "dice_default": 0.43,
    "dice_tuned": 0.45,
    "adopted": False,
    "reason": "it helps <here>",
}


@pytest.fixture
def shown(render):
    """Tables and reasons as they stand on the page."""

    def show(tuning):
        found = choices(tuning)
        return "".join(map(render, found.get("tables", []))) + "".join(found.get("reasons", []))

    return show


TUNING = {"num_subjects": 11, "regions": {"WT": REGION | {"refine": False}, "ET": REGION}, "convention": "brats"}


def test_figures_and_reasons(shown):
    html = shown(TUNING | {"selection": "last"})
    et, wt = (f'<th scope="row" class="name">{region}</th><td>' for region in ("ET", "WT"))
    assert html.index(f"{et}<strong>yes</strong>") < html.index(f"{wt}no")
    assert "+0.0275 [+0.0010, +0.0500]" in html and "0.4375" in html
    assert "<td>0.45</td><td>100</td><td>0.4300</td><td>0.4500</td><td>no</td>" in html
    assert "ET: it helps <here>" in html and "11 subjects. BraTS convention" in html


def test_what_is_missing_is_a_dash(shown):
    html = shown({"regions": {"ET": {"refine": True, "difference": math.nan, "interval": None}}})
    assert html.count("–") == 3 + 5 and "nan" not in html


def test_nothing_was_tuned():
    assert choices({}) == {} and choices({"regions": {}}) == {}


@pytest.mark.parametrize("rule", [{}, {"selection": "paper"}, {"selection": "unheard of"}])
def test_no_interval_where_epochs_were_chosen_on_these_subjects(shown, rule):
    reason = "Refining raises mean Dice by 0.0275 (95 % interval of the difference +0.0010 to +0.0500) and is kept."
    html = shown(TUNING | {"regions": {"ET": REGION | {"reason": reason}}} | rule)
    assert "+0.0275" in html and "0.0500" not in html and "Means only" in html
    assert "ET: Refining raises mean Dice by 0.0275 and is kept." in html
    assert "95 %" not in html
