"""Paired differences against enumeration, normal theory and plain resampling, and on every degenerate input."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from custom.metrics import paired_differences

NAN = math.nan


def rows(model: str, values: dict[str, float], score: str = "dice") -> list[dict]:
    columns = [f"{region}_{score}" for region in ("ET", "TC", "WT", "mean")]
    return [
        {"model": model, "fold": number % 5, "subject": name, **dict.fromkeys(columns, value)}
        for number, (name, value) in enumerate(values.items())
    ]


def compare(differences: list[float], **kwargs) -> dict:
    """Comparison of two models whose scores differ by so much, region ET."""
    names = [f"s{number:03}" for number in range(len(differences))]
    ours = rows("new", dict(zip(names, differences, strict=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return paired_differences(ours + rows("old", dict.fromkeys(names, 0.0)), "new", "old", **kwargs)["ET"]


def every_sign(differences: list[float]) -> float:
    """Share of all assignments of signs whose rank sum is as far from its mean as the one seen."""
    ranks = stats.rankdata(np.abs(differences))
    sums = [
        sum(rank for rank, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product(*[(0, 1)] * len(ranks))
    ]
    middle = ranks.sum() / 2
    seen = abs(ranks[np.array(differences) > 0].sum() - middle)
    return float(np.mean([abs(value - middle) >= seen - 1e-9 for value in sums]))


def test_pairs_are_made_by_subject_and_the_rest_is_counted() -> None:
    ours = rows("new", {"a": 0.9, "b": 0.7, "c": 0.8, "d": NAN, "only ours": 0.1})
    theirs = rows("old", {"d": 0.5, "c": 0.5, "b": 0.6, "a": 0.7, "theirs": 0.2, "theirs too": 0.3})
    result = paired_differences([*theirs, *rows("third", {"a": 0.0}), *ours], "new", "old")
    assert list(result) == ["ET", "TC", "WT", "mean"]
    assert result["WT"]["difference"] == pytest.approx((0.2 + 0.1 + 0.3) / 3)
    assert [result["WT"][name] for name in ("pairs", "unpaired", "undefined")] == [3, 3, 1]


def test_each_region_has_its_own_column() -> None:
    ours, theirs = ({"ET_nsd": 0.5, "TC_nsd": 0.6, "WT_nsd": 0.7, "mean_nsd": 0.6}, {"ET_nsd": NAN, "TC_nsd": 0.5})
    theirs |= {"WT_nsd": 0.5, "mean_nsd": 0.5}
    scores = [{"model": model, "subject": "a", **row} for model, row in (("new", ours), ("old", theirs))]
    result = paired_differences(scores, "new", "old", score="nsd")
    assert [result[name]["pairs"] for name in result] == [0, 1, 1, 1]
    assert [result[name]["difference"] for name in ("TC", "WT", "mean")] == pytest.approx([0.1, 0.2, 0.1])


def test_swapping_the_models_turns_the_signs() -> None:
    scores = rows("new", {"a": 0.9, "b": 0.7, "c": 0.85}) + rows("old", {"a": 0.7, "b": 0.6, "c": 0.9})
    one, other = (paired_differences(scores, *names)["TC"] for names in (("new", "old"), ("old", "new")))
    assert one["difference"] == -other["difference"]
    assert one["p"] == other["p"]


@pytest.mark.parametrize("seed", range(3))
def test_p_is_that_of_counting_every_assignment_of_signs(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.3, 1, 9).tolist()
    assert compare(differences)["p"] == pytest.approx(every_sign(differences))


def test_pairs_without_a_difference_do_not_weigh_in_the_test() -> None:
    differences = [0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert compare([*differences, 0.0, 0.0])["p"] == pytest.approx(compare(differences)["p"], abs=0.03)


def test_interval_of_many_normal_differences_is_that_of_normal_theory() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.05, 400)
    result = compare(differences.tolist())
    half = 1.96 * differences.std(ddof=1) / 20
    assert result["method"] == "BCa"
    assert result["interval"] == pytest.approx([differences.mean() - half, differences.mean() + half], abs=0.1 * half)


def test_interval_of_skewed_differences_reaches_further_than_the_percentiles() -> None:
    differences = np.random.default_rng(1).exponential(1, 30)
    resampled = np.random.default_rng(2).choice(differences, (9999, 30)).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    limits = compare(differences.tolist())["interval"]
    assert low < limits[0] < differences.mean() < high < limits[1]
    assert limits == pytest.approx([low, high], abs=0.3)


def test_wider_with_more_confidence() -> None:
    differences = [0.1, -0.2, 0.3, 0.15, 0.05, 0.2]
    narrow, wide = (compare(differences, confidence=level)["interval"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_same_numbers_whatever_the_order_and_others_with_another_seed() -> None:
    names = [f"s{number}" for number in range(11)]
    values = np.random.default_rng(3).random((2, 11))
    scores = rows("new", dict(zip(names, values[0], strict=True))) + rows(
        "old", dict(zip(names, values[1], strict=True))
    )
    result = paired_differences(scores, "new", "old")
    assert paired_differences(scores[::-1], "new", "old") == result
    assert paired_differences(scores, "new", "old", seed=1)["ET"]["interval"] != result["ET"]["interval"]


@pytest.mark.parametrize("differences", [[], [0.2]])
def test_fewer_than_two_pairs_have_no_interval(differences: list[float]) -> None:
    result = compare([*differences, NAN])
    assert (result["pairs"], result["undefined"], result["method"]) == (len(differences), 1, None)
    assert result["difference"] == pytest.approx(differences[0] if differences else NAN, nan_ok=True)
    assert all(math.isnan(value) for value in (*result["interval"], result["p"]))


def test_equal_differences_are_their_own_interval() -> None:
    result = compare([0.3 - 0.2, 0.5 - 0.4, 0.1, 0.7 - 0.6])
    assert result["interval"] == pytest.approx([0.1, 0.1])
    assert result["method"] == "constant"
    assert result["p"] == pytest.approx(2 / 2**4)
    nothing = compare([0.0, 0.0, 0.0])
    assert (nothing["interval"], nothing["difference"], nothing["p"]) == ([0, 0], 0, 1)


@pytest.mark.parametrize("differences", [[0.1, 0.3], [0.0, 0.0, 0.5], [0.0] * 10 + [1e-6]])
def test_few_or_lopsided_differences_have_a_finite_interval(differences: list[float]) -> None:
    result = compare(differences)
    low, high = result["interval"]
    assert min(differences) <= low <= result["difference"] <= high <= max(differences)
    assert result["method"] in ("BCa", "percentile")


def test_percentiles_serve_where_bca_is_not_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bca(data, statistic, *, method, **kwargs):
        limits = (NAN, NAN) if method == "BCa" else (0.1, 0.2)
        return type("Result", (), {"confidence_interval": limits})

    monkeypatch.setattr(stats, "bootstrap", without_bca)
    result = compare([0.1, 0.15, 0.2])
    assert (result["interval"], result["method"]) == ([0.1, 0.2], "percentile")


def test_result_can_be_written_as_json() -> None:
    result = compare([0.1, -0.2, 0.3])
    assert json.loads(json.dumps(result)) == result


def test_numbers_read_from_a_table_are_numbers() -> None:
    ours = [row | {"ET_dice": value} for row, value in zip(rows("new", {"a": 0, "b": 0}), ("0.5", ""), strict=True)]
    result = paired_differences(ours + rows("old", {"a": 0.25, "b": 0.1}), "new", "old")["ET"]
    assert (result["pairs"], result["undefined"], result["difference"]) == (1, 1, 0.25)


@pytest.mark.parametrize(
    ("model", "score", "extra", "message"),
    [
        ("newer", "dice", [], "no scores of model newer"),
        ("new", "jaccard", [], "model new have no column ET_jaccard"),
        ("new", "dice", rows("old", {"a": 0.4}), "model old scores subject a twice, in folds 0 and 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(model: str, score: str, extra: list[dict], message: str) -> None:
    scores = rows("new", {"a": 0.5}) + rows("old", {"a": 0.4})
    with pytest.raises(ValueError, match=message):
        paired_differences(scores + extra, model, "old", score=score)
