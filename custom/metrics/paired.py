"""Whether one model beats another on the same subjects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..cohort import REGIONS

Row = Mapping[str, Any]
PAPER = "paper"
UNTOUCHED = ("inner", "last")
"""Rules of selecting epochs that have not seen the scored subjects; "paper" takes the best epoch on these."""
RULES = (PAPER, *UNTOUCHED)


def may_infer(rules: Iterable[str | None]) -> bool:
    """Whether an interval or a p value means anything on scores of weights that were selected by these rules.

    A choice among epochs on the scored subjects takes the luck of that choice for a gain: with a corrector of pure
    noise the signed-rank test then finds p < 0.05 in nine runs of ten. No rule known (None) counts as "paper".
    """
    return all(rule in UNTOUCHED for rule in rules)


def paired_differences(
    scores: Iterable[Row],
    model: str,
    baseline: str,
    score: str = "dice",
    seed: int = 0,
    confidence: float | None = 0.95,
    num_resamples: int = 9999,
) -> dict[str, dict[str, Any]]:
    """Compare two models subject by subject.

    Args:
        scores: flat rows with `model`, `subject` and the columns of `score_subject`; each subject once a model.
        model: name of the one model.
        baseline: name of the other, whose score is subtracted.
        score: column without its region: `dice`, `dice_brats`, `hd95` and so on.
        seed: of the resampling; the same rows in any order give the same numbers.
        confidence: of the interval; None gives neither interval nor p, for scores that a choice on the same subjects
            has touched.
        num_resamples: bootstrap samples of subjects.

    Returns:
        For `ET`, `TC`, `WT` and `mean`, a dict that can be written as JSON:
        `pairs`: subjects with a score from both models;
        `unpaired`: subjects that only one of the two has; `undefined`: those that both have, but without a score (NaN)
        from one of them at least;
        `difference`: mean of model less baseline, NaN without a pair;
        `interval`: `[low, high]` for that mean by `method`: the bootstrap `"BCa"`, or `"percentile"` where BCa is not
        defined; `"constant"` where all pairs differ by the same amount; `None` below two pairs, with NaN limits;
        `p`: of the two-sided Wilcoxon signed-rank test, pairs without a difference discarded; 1 where no pair differs,
        NaN below two pairs.

    Raises:
        ValueError: a model has no row, has a subject twice, or no column of that score.
    """
    rows = list(scores)
    ours, theirs = _subjects(rows, model), _subjects(rows, baseline)
    both = sorted(ours.keys() & theirs.keys())
    unpaired = len(ours.keys() ^ theirs.keys())
    comparison: dict[str, dict[str, Any]] = {}
    for region in (*REGIONS, "mean"):
        column = f"{region}_{score}"
        differences = _column(ours, both, column, model) - _column(theirs, both, column, baseline)
        defined = differences[~np.isnan(differences)]
        counts = {"pairs": len(defined), "unpaired": unpaired, "undefined": len(both) - len(defined)}
        mean = float(defined.mean()) if len(defined) else math.nan
        test: dict[str, Any] = {"difference": mean, "interval": [math.nan, math.nan], "method": None, "p": math.nan}
        if confidence is not None:
            interval, method = _interval(defined, seed, confidence, num_resamples)
            test |= {"interval": interval, "method": method, "p": _wilcoxon(defined)}
        comparison[region] = counts | test
    return comparison


def _subjects(rows: Iterable[Row], model: str) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows:
        if row["model"] != model:
            continue
        name = str(row["subject"])
        if name in found:
            folds = f"{found[name].get('fold')} and {row.get('fold')}"
            raise ValueError(f"model {model} scores subject {name} twice, in folds {folds}: give the scores of one run")
        found[name] = row
    if not found:
        raise ValueError(f"no scores of model {model}: the rows must have that name under 'model'")
    return found


def _column(rows: Mapping[str, Row], subjects: Iterable[str], column: str, model: str) -> np.ndarray:
    if not any(column in row for row in rows.values()):
        raise ValueError(f"the scores of model {model} have no column {column}: check the name of the score")
    values = (rows[subject].get(column) for subject in subjects)
    return np.array([math.nan if value in (None, "") else float(value) for value in values], dtype=float)


def _interval(
    differences: np.ndarray, seed: int, confidence: float, num_resamples: int
) -> tuple[list[float], str | None]:
    from scipy.stats import bootstrap

    if len(differences) < 2:
        return [math.nan, math.nan], None
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):
        return [float(differences.mean())] * 2, "constant"
    options = {"confidence_level": confidence, "n_resamples": num_resamples, "batch": 1000}
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rng = np.random.default_rng(seed)
            found = bootstrap((differences,), np.mean, **options, method=method, random_state=rng)
        limits = [float(limit) for limit in found.confidence_interval]
        if np.isfinite(limits).all():
            break
    return limits, method


def _wilcoxon(differences: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    if len(differences) < 2:
        return math.nan
    if not differences.any():
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(wilcoxon(differences).pvalue)
