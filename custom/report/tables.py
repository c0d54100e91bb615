"""Scores to tables: the paper's Table 2, every other score, paired differences, and what the ensemble chose.

Every ± is the sample standard deviation (N − 1) over folds, and absent for one fold. Every table says by which rule the
scored epochs were selected, from the column "selection" of the scores; absent, it is "paper".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cohort import REGIONS
from ..metrics import PAPER, may_infer, paired_differences
from .pages import Cell, Table

if TYPE_CHECKING:
    from pandas import DataFrame

Scores = Sequence[Mapping[str, Any]]
ValueOf = Callable[[Mapping[str, Any], str], float]
AVERAGE = "Average"
COLUMNS = (*REGIONS, AVERAGE)
SKIP, BRATS = "skip", "brats"
CONVENTIONS = {
    SKIP: "Empty regions skipped: a subject without the region does not count for it",
    BRATS: "BraTS convention: 1 where prediction and reference are both empty, 0 where only one is",
}
SHORT = {SKIP: "Empty regions skipped", BRATS: "BraTS convention"}
NO_BRATS = (
    "No table under the BraTS convention: the scores do not tell a false positive from a region rightly left empty."
)
SELECTIONS = {
    PAPER: "the epoch with the best score on the very fold that is scored, as the paper does",
    "inner": "the epoch with the best score on a part of the training subjects",
    "last": "the last epoch, without a choice",
}
MEANS_ONLY = (
    "Means only: the epochs were chosen on the subjects that are scored here, so an interval or a p value would take "
    "the luck of that choice for a gain; train with selection “inner” or “last” to have both"
)
IN_TABLE_2 = ("dice", "dice_brats", "volume_ml", "reference_ml")
SIGNED_ERROR, ABSOLUTE_ERROR = "volume_error_ml", "absolute_volume_error_ml"
LABELS = {
    "hd95": "HD95 [mm]",
    "nsd": "normalised surface Dice",
    "lesion_dice": "lesion-wise Dice",
    "lesion_nsd": "lesion-wise surface Dice",
    "lesion_hd95": "lesion-wise HD95 [mm]",
    "lesion_f1": "F1 of lesion detection",
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
COMPARISONS = (("CoMNeT", "MedNeXt"), ("MedNeXt", "SegResNet"), ("CoMNeT", "SegResNet"))
STANDS_ON = {"CoMNeT": "MedNeXt"}
"""A model whose figures the choice of another's epochs touches too: its backbones are the other's."""
DIFFERENCE_COLUMNS = (
    "model", "baseline", "convention", "region", "selection", "pairs", "difference", "low", "high", "method", "p"
)  # fmt: skip
INTERVALS = (
    "with 95 % bootstrap interval over subjects, bold where it leaves zero out; p of the Wilcoxon signed-rank test, "
    "not corrected for many tests"
)
NOISE = 1e-9
REFINED = ("Region", "Refined", "Coarse Dice", "Refined Dice", "Difference")
TUNED = ("Region", "Threshold", "Smallest component [mm³]", "Default Dice", "Tuned Dice", "Tuning adopted")


def models_of(scores: Scores) -> list[str]:
    """Names of the models, in the order of their first score."""
    return list(dict.fromkeys(str(score["model"]) for score in scores))


def dice_of(score: Mapping[str, Any], region: str, convention: str = SKIP) -> float:
    """Dice of one subject and region under a convention for empty regions.

    Args:
        score: the Dice as "ET" or, as `metrics.score_subject` calls it, "ET_dice", NaN where the reference is empty;
            and perhaps "ET_dice_brats", which is then 1 where the prediction is empty too, and 0 where it is not.
        region: one of `REGIONS`.
        convention: "skip" keeps the NaN. "brats" takes "ET_dice_brats"; where that is absent a NaN stays a NaN, for it
            does not tell whether something was predicted.

    Raises:
        KeyError: the score has no Dice of the region.
        ValueError: the convention is neither.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be {SKIP!r} or {BRATS!r}, got {convention!r}")
    names = (f"{region}_dice_brats",) * (convention == BRATS) + (region, f"{region}_dice")
    name = next((name for name in names if name in score), None)
    if name is None:
        raise KeyError(f"score of subject {score.get('subject')} has neither {region!r} nor '{region}_dice'")
    return float(score[name])


def fold_means(scores: Scores, value_of: ValueOf = dice_of) -> DataFrame:
    """Means over the subjects of a fold, by (model, fold) with the columns ET, TC, WT and Average.

    A fold's average is the mean over its regions' means. NaN where no subject of the fold has a value. `value_of` gives
    the value of a score and a region, by default its Dice, empty regions skipped.
    """
    import pandas as pd

    rows = [
        {"model": str(score["model"]), "fold": score["fold"]} | {region: value_of(score, region) for region in REGIONS}
        for model in models_of(scores)
        for score in sorted((s for s in scores if str(s["model"]) == model), key=lambda score: str(score["fold"]))
    ]
    means = pd.DataFrame(rows).groupby(["model", "fold"], sort=False)[list(REGIONS)].mean()
    return means.assign(**{AVERAGE: means.mean(axis="columns")})


def summarise_scores(scores: Scores, value_of: ValueOf = dice_of) -> DataFrame:
    """Mean and sample standard deviation (N − 1) over folds (paper, Table 2).

    Returns:
        By model, columns (ET, "mean"), (ET, "std") to (Average, "std"); the deviation of one fold is NaN.
    """
    return fold_means(scores, value_of).groupby("model", sort=False).agg(["mean", "std"])


def is_known(scores: Scores, convention: str) -> bool:
    """Whether every score has the Dice that a convention asks for."""
    values = (dice_of(score, region, convention) for score in scores for region in REGIONS)
    return convention != BRATS or not any(map(math.isnan, values))


def selections(scores: Scores) -> dict[str, list[str]]:
    """Models by the rule that selected their epochs; a model whose rows name several stands under each."""
    found: dict[str, list[str]] = {}
    for score in scores:
        models = found.setdefault(str(score.get("selection") or PAPER), [])
        if str(score["model"]) not in models:
            models.append(str(score["model"]))
    return found


def selection_line(scores: Scores) -> str:
    """One sentence that says by which rule the epochs of which model were selected."""
    rules = selections(scores)
    known = (f"“{rule}” ({SELECTIONS.get(rule, 'unknown')})" for rule in rules)
    if len(rules) == 1:
        return f"Selection of epochs: {next(known)}."
    return (
        "Selection of epochs: "
        + "; ".join(f"{', '.join(models)} {rule}" for rule, models in zip(known, rules.values(), strict=True))
        + "."
    )


def table2(scores: Scores, convention: str, dataset: str = "") -> Table:
    """Table 2 under one convention for empty regions, best in bold; see `is_known`.

    Scores have "model", "fold", "subject", and the Dice of ET, TC and WT as `dice_of` reads it.
    """
    rows = [
        [*([dataset] if dataset else []), model, *cells]
        for model, cells in _summary_rows(scores, partial(dice_of, convention=convention), float, 4).items()
    ]
    heads = (*(["Dataset"] if dataset else []), "Model", *COLUMNS)
    return Table(heads, rows, f"{_what(scores)}. {CONVENTIONS[convention]}. {selection_line(scores)}")


def table2_text(scores: Scores, convention: str = SKIP, dataset: str = "") -> str:
    """Table 2 as Markdown, best in bold; scores as of `table2`. Without a name the dataset has no column."""
    if not is_known(scores, convention):
        return f"{NO_BRATS}\n"
    table = table2(scores, convention, dataset)
    rows = [[f"**{one.text}**" if isinstance(one, Cell) and one.bold else _text(one) for one in r] for r in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return f"{body}\n\n{table.caption}\n"


def table2_records(scores: Scores, dataset: str = "") -> list[dict[str, Any]]:
    """Table 2 under every convention that the scores allow for, as rows of a CSV file."""
    records = []
    for convention in (one for one in CONVENTIONS if is_known(scores, one)):
        summary = summarise_scores(scores, partial(dice_of, convention=convention))
        for model in models_of(scores):
            own = [score for score in scores if str(score["model"]) == model]
            names = {"convention": convention, "dataset": dataset, "model": model, "selection": _rule(own)}
            counts = {"subjects": len(own), "folds": len({str(score["fold"]) for score in own})}
            moments = {
                f"{column}_{'sd' if kind == 'std' else kind}": value
                for (column, kind), value in summary.loc[model].items()
            }
            records.append(names | counts | moments)
    return records


def other_scores_table(scores: Scores) -> Table:
    """All columns `<REGION>_<score>` that are not in Table 2, by score and model; no rows when there are none."""
    rows, absent = [], []
    for name in other_score_names(scores):
        value_of = partial(_value, name=name)
        if all(math.isnan(value_of(score, region)) for score in scores for region in REGIONS):
            absent.append(label(name))
            continue
        plain = name.endswith(("_mm", "_ml")) or "hd95" in name or name.startswith("lesions")
        for model, cells in _summary_rows(scores, value_of, _merit(name), 1 if plain else 3).items():
            own = [score for score in scores if str(score["model"]) == model]
            counts = [sum(not math.isnan(value_of(score, region)) for score in own) for region in REGIONS]
            counted = [Cell(f"{one.text} ({n})", one.bold) for one, n in zip(cells, counts, strict=False)]
            rows.append([label(name), model, *counted, cells[-1]])
    caption = f"{_what(scores)}. In brackets the number of subjects that have a value. {selection_line(scores)}"
    caption += f" Not measured: {', '.join(absent)}." if absent else ""
    return Table(("Score", "Model", *COLUMNS), rows, caption)


def other_score_names(scores: Scores) -> list[str]:
    """Names of the scores that are not in Table 2, in the order they are met; signed volumes also without sign."""
    pattern = re.compile(f"(?:{'|'.join(REGIONS)})_(.+)")
    found = dict.fromkeys(match[1] for score in scores for key in score if (match := pattern.fullmatch(key)))
    names = [name for name in found if name not in IN_TABLE_2]
    return [one for name in names for one in ((name, ABSOLUTE_ERROR) if name == SIGNED_ERROR else (name,))]


def label(name: str) -> str:
    """What a score is called in tables."""
    plain = name.removesuffix("_brats")
    return LABELS.get(plain, plain.replace("_", " ")) + (", BraTS convention" if plain != name else "")


def difference_rows(scores: Scores, num_resamples: int = 9999) -> list[dict[str, Any]]:
    """`metrics.paired_differences` of those of `COMPARISONS` that can be made, as rows of `DIFFERENCE_COLUMNS`.

    Args:
        scores: flat rows as of `metrics.score_subject`, with "model", "fold", "subject" and perhaps "selection".
        num_resamples: of the bootstrap.

    Returns:
        One row per comparison, convention for empty regions, and ET, TC, WT and Average (a subject's mean over its
        regions); `low` and `high` are the limits of the 95 % interval. They and `p` are NaN, and `method` None, where
        the scored subjects have had a say in the epochs of one of the two models, or of the backbones that one stands
        on (`metrics.may_infer`).
    """
    present, rows = set(models_of(scores)), []
    for pair in (pair for pair in COMPARISONS if present.issuperset(pair)):
        own = [score for score in scores if str(score["model"]) in pair]
        judged = [score for score in scores if str(score["model"]) in {*pair, *map(STANDS_ON.get, pair)}]
        confidence = 0.95 if may_infer(selections(judged)) else None
        for convention in (one for one in CONVENTIONS if is_known(scores, one)):
            name = "dice_brats" if convention == BRATS else "dice"
            found = paired_differences(own, *pair, name, confidence=confidence, num_resamples=num_resamples)
            names = {"model": pair[0], "baseline": pair[1], "convention": convention, "selection": _rule(judged)}
            for column in COLUMNS:
                one = found["mean" if column == AVERAGE else column]
                low, high = one["interval"]
                row = names | {"region": column, "low": low, "high": high}
                rows.append(row | {key: one[key] for key in ("pairs", "difference", "method", "p")})
    return rows


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The differences, conventions side by side; bold where an interval leaves zero out. No p column without a p."""
    conventions = list(dict.fromkeys(row["convention"] for row in rows))
    inferred = [row for row in rows if row["method"] is not None]
    lines: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        cells = [_difference_cell(row), _figure(row["p"], ".2g")] if inferred else [_difference_cell(row)]
        lines.setdefault((f"{row['model']} − {row['baseline']}", row["region"]), []).extend(cells)
    heads = [head for one in conventions for head in ((SHORT[one], "p") if inferred else (SHORT[one],))]
    what = "Mean of a subject's Dice less that of the baseline, and the number of subjects"
    touched = {f"{row['model']} − {row['baseline']}" for row in rows if not may_infer(row["selection"].split(" and "))}
    limits = INTERVALS if not touched else f"{INTERVALS} where the epochs were not chosen on these subjects"
    parts = [f"{what}, {limits}" if inferred else what, *([_means_only(touched, rows)] if touched else [])]
    rules = " and ".join(f"“{rule}”" for rule in dict.fromkeys(row["selection"] for row in rows))
    caption = f"{'. '.join(parts)}. Selection of epochs: {rules}."
    return Table(("Comparison", "Region", *heads), [[*key, *cells] for key, cells in lines.items()], caption)


def choices(tuning: Mapping[str, Any]) -> dict[str, Any]:
    """`{"tables", "reasons"}` from `tuning.json`, as `custom.tuning` writes it; empty where that is empty.

    What the file lacks is shown as a dash. No interval is shown where the subjects that refinement is
    judged on have had a say in the correctors' epochs (`metrics.may_infer` of the file's "selection").
    """
    regions = {region: tuning["regions"][region] for region in REGIONS if region in tuning.get("regions", {})}
    if not regions:
        return {}
    rule = str(tuning.get("selection") or PAPER)
    touched = not may_infer([rule])
    refined, tuned = [], []
    for region, one in regions.items():
        difference = _figure(one.get("difference"), "+.4f")
        low, high = one.get("interval") or (None, None)
        if not touched and _is_number(low) and _is_number(high):
            difference += f" [{low:+.4f}, {high:+.4f}]"
        dice = [_figure(one.get(f"dice_{name}"), ".4f") for name in ("coarse", "refined", "default", "tuned")]
        settings = [_figure(one.get(name), "g") for name in ("threshold", "min_volume_mm3")]
        refined.append([region, _yes(one.get("refine")), *dice[:2], difference])
        tuned.append([region, *settings, *dice[2:], _yes(one.get("adopted"))])
    count = f"{tuning['num_subjects']} subjects" if "num_subjects" in tuning else "Unknown number of subjects"
    convention = str(tuning.get("convention", "unknown"))
    parts = [
        "Refined only where out-of-fold Dice says that it helps: difference of refined and coarse masks of the same "
        f"subjects{'' if touched else ', with 95 % bootstrap interval'}",
        count,
        CONVENTIONS.get(convention, f"Convention for empty regions: {convention}"),
        *([MEANS_ONLY] if touched else []),
        f"Selection of epochs: “{rule}”.",
    ]
    other = "Threshold and smallest component; the tuned Dice is of every subject at settings chosen without its fold"
    reasons = (f"{region}: {one['reason']}" for region, one in regions.items() if one.get("reason"))
    if touched:  # files of older versions carry the interval in the sentence
        reasons = (re.sub(r" \(95 % interval[^()]*\)", "", reason) for reason in reasons)
    return {"tables": [Table(REFINED, refined, ". ".join(parts)), Table(TUNED, tuned, f"{other}. {parts[-1]}")],
            "reasons": list(reasons)}  # fmt: skip


def _summary_rows(
    scores: Scores, value_of: ValueOf, merit: Callable[[float], float], digits: int
) -> dict[str, list[Cell]]:
    """Cells "mean ± sd" of `COLUMNS` by model, those with the highest merit bold where there are several models."""
    summary = summarise_scores(scores, value_of)
    best = summary.xs("mean", axis="columns", level=1).map(merit).max()
    return {
        model: [
            Cell(
                _figure(row[column, "mean"], f".{digits}f")
                + (f" ± {row[column, 'std']:.{digits}f}" if _is_number(row[column, "std"]) else ""),
                bold=len(summary) > 1 and merit(row[column, "mean"]) == best[column],
            )
            for column in COLUMNS
        ]
        for model, row in summary.iterrows()
    }


def _value(score: Mapping[str, Any], region: str, name: str) -> float:
    plain = SIGNED_ERROR if name == ABSOLUTE_ERROR else name
    value = score.get(f"{region}_{plain}")
    value = math.nan if value is None else float(value)
    return value if plain == name else abs(value)


def _merit(name: str) -> Callable[[float], float]:
    """What makes the better of two means: higher, lower, or nothing (NaN) where nobody knows."""
    if name != SIGNED_ERROR and any(part in name for part in LOWER_IS_BETTER):
        return lambda mean: -mean
    if name != SIGNED_ERROR and any(part in name for part in HIGHER_IS_BETTER):
        return float
    return lambda mean: math.nan


def _what(scores: Scores) -> str:
    folds = len({str(score["fold"]) for score in scores})
    what = (
        f"Mean ± sample standard deviation across {folds} folds" if folds > 1 else "Mean over the subjects of one fold"
    )
    return f"{what}{', best in bold' if len(models_of(scores)) > 1 else ''}"


def _rule(scores: Scores) -> str:
    return " and ".join(selections(scores))


def _means_only(touched: set[str], rows: Sequence[Mapping[str, Any]]) -> str:
    pairs = list(dict.fromkeys(f"{row['model']} − {row['baseline']}" for row in rows))
    return MEANS_ONLY if len(touched) == len(pairs) else f"{', '.join(p for p in pairs if p in touched)}: {MEANS_ONLY}"


def _difference_cell(row: Mapping[str, Any]) -> Cell:
    if not _is_number(row["difference"]):
        return Cell("–")
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if _is_number(row["low"]) else ""
    return Cell(f"{row['difference']:+.3f}{interval} ({row['pairs']})", row["low"] > NOISE or row["high"] < -NOISE)


def _yes(value: Any) -> Cell:
    return Cell("–") if value is None else Cell("yes", bold=True) if value else Cell("no")


def _figure(value: Any, form: str) -> str:
    return f"{value:{form}}" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _text(cell: Any) -> str:
    return cell.text if isinstance(cell, Cell) else str(cell)
