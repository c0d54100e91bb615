"""Mean and standard deviation of columns of scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation and count of every column of numbers.

    Args:
        rows: one mapping per subject, or per fold for the ± of the paper's Table 2. NaN and absent values are left
            out, and so are columns without a number, such as the subject's name.

    Returns:
        For each column `{"mean", "sd", "n"}`; `sd` divides by n - 1 and is NaN below two values, `mean` below one.
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, Real) and not isinstance(value, bool):
                columns.setdefault(name, []).append(float(value))
    return {name: _moments(values) for name, values in columns.items()}


def mean_of_defined(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    return _moments(values)["mean"]


def _moments(values: Iterable[float]) -> dict[str, float]:
    defined: Sequence[float] = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(defined) if defined else math.nan
    return {"mean": mean, "sd": statistics.stdev(defined) if len(defined) > 1 else math.nan, "n": len(defined)}
