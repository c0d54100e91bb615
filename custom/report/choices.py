"""What the ensemble chose on out-of-fold predictions: refinement, threshold and component size of every region."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..cohort import REGIONS
from .page import Html, bullets, join, table, text
from .tables import CONVENTIONS

CAPTION = (
    "Refined only where out-of-fold Dice says that it helps: difference of refined and coarse masks of the same "
    "subjects, with 95 % bootstrap interval"
)
REFINED = ("Region", "Refined", "Coarse Dice", "Refined Dice", "Difference")
TUNED = ("Region", "Threshold", "Smallest component [mm³]", "Default Dice", "Tuned Dice", "Tuning adopted")
TUNING_CAPTION = "Threshold and smallest component, tuned on other subjects than those they are judged on"


def choices(tuning: Mapping[str, Any]) -> Html:
    """Tables and reasons from the content of `tuning.json`, as `custom.tuning` writes it; nothing when it is empty.

    What the file lacks is shown as a dash.
    """
    regions = tuning.get("regions", {})
    chosen = {region: regions[region] for region in REGIONS if region in regions}
    if not chosen:
        return Html("")
    refinement = [
        [region, _yes(one, "refine"), _dice(one, "dice_coarse"), _dice(one, "dice_refined"), _difference(one)]
        for region, one in chosen.items()
    ]
    tuned = [
        [
            region,
            _figure(one, "threshold", "g"),
            _figure(one, "min_volume_mm3", "g"),
            _dice(one, "dice_default"),
            _dice(one, "dice_tuned"),
            _yes(one, "adopted"),
        ]
        for region, one in chosen.items()
    ]
    reasons = bullets(f"{region}: {one['reason']}" for region, one in chosen.items() if one.get("reason"))
    caption = f"{CAPTION}. {_where(tuning)}"
    return join([table(REFINED, refinement, caption), table(TUNED, tuned, TUNING_CAPTION), reasons])


def _where(tuning: Mapping[str, Any]) -> str:
    count = f"{tuning['num_subjects']} subjects" if "num_subjects" in tuning else "unknown number of subjects"
    convention = str(tuning.get("convention", "unknown"))
    return f"{count}. {CONVENTIONS.get(convention, f'Convention for empty regions: {convention}')}"


def _yes(one: Mapping[str, Any], name: str) -> Html:
    value = one.get(name)
    return text("–") if value is None else Html("<strong>yes</strong>") if value else text("no")


def _figure(one: Mapping[str, Any], name: str, form: str) -> str:
    value = one.get(name)
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def _dice(one: Mapping[str, Any], name: str) -> str:
    return _figure(one, name, ".4f")


def _difference(one: Mapping[str, Any]) -> str:
    shown = _figure(one, "difference", "+.4f")
    low, high = (math.nan if limit is None else limit for limit in one.get("interval") or (None, None))
    return shown if math.isnan(low + high) else f"{shown} [{low:+.4f}, {high:+.4f}]"
