"""Table 2 of the paper, and its like for every other score: mean ± standard deviation over folds, best in bold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..cohort import REGIONS
from .page import Html, name_of, table, text
from .summary import BRATS, COLUMNS, SKIP, dice_of, models_of, summarise_scores, summarise_values

CONVENTIONS = {
    SKIP: "Empty regions skipped: a subject without the region does not count for it",
    BRATS: "BraTS convention: 1 where prediction and reference are both empty, 0 where only one is",
}
NO_BRATS = (
    "No table under the BraTS convention: the scores do not tell a false positive from a region rightly left empty."
)
IN_TABLE_2 = ("dice", "dice_brats", "volume_ml", "reference_ml")
SIGNED_ERROR, ABSOLUTE_ERROR = "volume_error_ml", "absolute_volume_error_ml"
LABELS = {
    "hd95": "HD95 [mm]",
    "nsd": "normalised surface Dice",
    "lesion_dice": "lesion-wise Dice",
    "lesion_hd95": "lesion-wise HD95 [mm]",
    "ece": "calibration error",
    "lesions": "lesions of the reference",
    "lesions_found": "lesions found",
    "lesions_false": "lesions falsely predicted",
    "brier": "Brier score",
    SIGNED_ERROR: "volume error [ml]",
    ABSOLUTE_ERROR: "absolute volume error [ml]",
}
HIGHER_IS_BETTER = ("dice", "nsd", "f1", "found")
LOWER_IS_BETTER = ("hd95", "ece", "calibration", "error", "brier", "false")


@dataclass(frozen=True)
class Row:
    """One model's line of a table: {"ET", "TC", "WT", "Average": (mean, sd)}, and the columns in which it is best."""

    model: str
    values: Mapping[str, tuple[float, float]]
    best: frozenset[str]


def table2(scores: Sequence[Mapping[str, Any]], convention: str, dataset: str = "") -> Html:
    """Table 2 under one convention for empty regions, or a sentence where the scores do not allow for it."""
    if not is_known(scores, convention):
        return Html(f"<p>{text(NO_BRATS)}</p>")
    rows = [
        [*([dataset] if dataset else []), name_of(row.model), *(_cell(row, column) for column in COLUMNS)]
        for row in table2_rows(scores, convention)
    ]
    return table(_heads(dataset), rows, f"{_what(scores)}. {CONVENTIONS[convention]}.")


def table2_text(scores: Sequence[Mapping[str, Any]], convention: str = SKIP, dataset: str = "") -> str:
    """Table 2 as Markdown, best in bold.

    Args:
        scores: dicts with "model", "fold", "subject", and the Dice of ET, TC and WT as `dice_of` reads it.
        convention: for empty regions, "skip" or "brats".
        dataset: first column; left out when it has no name.
    """
    if not is_known(scores, convention):
        return f"{NO_BRATS}\n"
    heads = _heads(dataset)
    lines = [heads, ["---"] * len(heads)]
    for row in table2_rows(scores, convention):
        cells = [f"**{_figures(row, c)}**" if c in row.best else _figures(row, c) for c in COLUMNS]
        lines.append([*([dataset] if dataset else []), row.model, *cells])
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    body = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
    return f"{body}\n\n{_what(scores)}. {CONVENTIONS[convention]}.\n"


def table2_rows(scores: Sequence[Mapping[str, Any]], convention: str) -> list[Row]:
    """The lines of Table 2."""
    return _ranked(summarise_scores(scores, convention), float)


def table2_records(scores: Sequence[Mapping[str, Any]], dataset: str = "") -> list[dict[str, Any]]:
    """Table 2 under every convention that the scores allow for, as rows of a CSV file."""
    records = []
    for convention in (one for one in CONVENTIONS if is_known(scores, one)):
        for row in table2_rows(scores, convention):
            own = [score for score in scores if str(score["model"]) == row.model]
            counts = {"subjects": len(own), "folds": len({str(score["fold"]) for score in own})}
            moments = {f"{c}_{m}": v for c in COLUMNS for m, v in zip(("mean", "sd"), row.values[c], strict=True)}
            records.append({"convention": convention, "dataset": dataset, "model": row.model, **counts, **moments})
    return records


def is_known(scores: Sequence[Mapping[str, Any]], convention: str) -> bool:
    """Whether every score has the Dice that a convention asks for."""
    values = (dice_of(score, region, convention) for score in scores for region in REGIONS)
    return convention != BRATS or not any(map(math.isnan, values))


def other_scores_table(scores: Sequence[Mapping[str, Any]]) -> Html:
    """All columns `<REGION>_<score>` that are not in Table 2, by score and model; nothing when there are none."""
    rows, absent = [], []
    for name in other_score_names(scores):
        value_of = partial(_value, name=name)
        if all(math.isnan(value_of(score, region)) for score in scores for region in REGIONS):
            absent.append(label(name))
            continue
        for row in _ranked(summarise_values(scores, value_of), _merit(name)):
            own = [score for score in scores if str(score["model"]) == row.model]
            counts = {r: sum(not math.isnan(value_of(score, r)) for score in own) for r in REGIONS}
            cells = [_cell(row, column, _decimals(name), counts.get(column)) for column in COLUMNS]
            rows.append([label(name), name_of(row.model), *cells])
    caption = f"{_what(scores)}. In brackets the number of subjects that have a value"
    caption += f". Not measured: {', '.join(absent)}" if absent else ""
    return table(("Score", "Model", *COLUMNS), rows, caption)


def other_score_names(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the scores that are not in Table 2, in the order they are met; signed volumes also without sign."""
    pattern = re.compile(f"(?:{'|'.join(REGIONS)})_(.+)")
    found = dict.fromkeys(match[1] for score in scores for key in score if (match := pattern.fullmatch(key)))
    names = [name for name in found if name not in IN_TABLE_2]
    return [one for name in names for one in ((name, ABSOLUTE_ERROR) if name == SIGNED_ERROR else (name,))]


def label(name: str) -> str:
    """What a score is called in tables."""
    plain = name.removesuffix("_brats")
    return LABELS.get(plain, plain.replace("_", " ")) + (", BraTS convention" if plain != name else "")


def _value(score: Mapping[str, Any], region: str, name: str) -> float:
    plain = SIGNED_ERROR if name == ABSOLUTE_ERROR else name
    value = score.get(f"{region}_{plain}")
    value = math.nan if value is None else float(value)
    return value if plain == name else abs(value)


def _decimals(name: str) -> int:
    return 1 if name.endswith(("_mm", "_ml")) or "hd95" in name or name.startswith("lesions") else 3


def _merit(name: str) -> Any:
    if name == SIGNED_ERROR:
        return lambda mean: math.nan
    if any(part in name for part in LOWER_IS_BETTER):
        return lambda mean: -mean
    return float if any(part in name for part in HIGHER_IS_BETTER) else lambda mean: math.nan


def _ranked(summary: Mapping[str, Mapping[str, tuple[float, float]]], merit: Any) -> list[Row]:
    best = {}
    for column in COLUMNS:
        merits = [merit(values[column][0]) for values in summary.values()]
        best[column] = max((one for one in merits if not math.isnan(one)), default=math.nan)
    return [
        Row(model, values, frozenset(c for c in COLUMNS if len(summary) > 1 and merit(values[c][0]) == best[c]))
        for model, values in summary.items()
    ]


def _heads(dataset: str) -> list[str]:
    return [*(["Dataset"] if dataset else []), "Model", *COLUMNS]


def _what(scores: Sequence[Mapping[str, Any]]) -> str:
    folds = len({str(score["fold"]) for score in scores})
    what = f"Mean ± standard deviation across {folds} folds" if folds > 1 else "Mean over the subjects of one fold"
    return f"{what}{', best in bold' if len(models_of(scores)) > 1 else ''}"


def _cell(row: Row, column: str, decimals: int = 4, count: int | None = None) -> Html:
    shown = text(_figures(row, column, decimals) + ("" if count is None else f" ({count})"))
    return Html(f"<strong>{shown}</strong>") if column in row.best else shown


def _figures(row: Row, column: str, decimals: int = 4) -> str:
    mean, deviation = row.values[column]
    if math.isnan(mean):
        return "–"
    return f"{mean:.{decimals}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{decimals}f}")
