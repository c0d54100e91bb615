"""What the ensemble chose, as the reader sees it."""

from __future__ import annotations

import math

from custom.report.choices import choices

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


def test_figures_and_reasons():
    html = choices(
        {"num_subjects": 11, "regions": {"WT": REGION | {"refine": False}, "ET": REGION}, "convention": "brats"}
    )
    assert html.index('<th scope="row">ET</th><td><strong>yes</strong>') < html.index('<th scope="row">WT</th><td>no')
    assert "+0.0275 [+0.0010, +0.0500]" in html and "0.4375" in html
    assert "<td>0.45</td><td>100</td><td>0.4300</td><td>0.4500</td><td>no</td>" in html
    assert "ET: it helps &lt;here&gt;" in html and "11 subjects. BraTS convention" in html


def test_what_is_missing_is_a_dash():
    html = choices({"regions": {"ET": {"refine": True, "difference": math.nan, "interval": None}}})
    assert html.count("–") == 3 + 5 and "nan" not in html


def test_nothing_was_tuned():
    assert choices({}) == "" and choices({"regions": {}}) == ""
