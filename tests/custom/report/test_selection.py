"""No interval and no p value on figures that a choice has touched: simulations of a corrector of pure noise."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import wilcoxon

from custom.report import write_crossval_report, write_scores_report
from custom.report.tables import difference_rows, difference_table, selection_line, table2, table2_text

FOLDS, SUBJECTS, VALIDATIONS = 5, 10, 40
SUBJECT_SD, CORRELATION = 0.02, 0.9
SIMULATIONS = 100


def simulate(rng: np.random.Generator, rule: str) -> np.ndarray:
    """What a corrector of pure noise adds to each subject's Dice, at the epoch that a rule selects in every fold.

    "paper" takes the epoch with the best mean on the scored fold, "last" takes the last. Each epoch is correlated with
    the one before. There is no epoch in which the corrector is a no-op: with one among them it is no better.
    """
    gains = []
    for _ in range(FOLDS):
        epochs = rng.normal(0, SUBJECT_SD, (VALIDATIONS, SUBJECTS))
        for before, epoch in pairwise(epochs):
            epoch *= (1 - CORRELATION**2) ** 0.5
            epoch += CORRELATION * before
        gains.append(epochs[epochs.mean(axis=1).argmax() if rule == "paper" else -1])
    return np.concatenate(gains)


def records(gains: np.ndarray, make_score, rule: str | None) -> list[dict]:
    """Rows of MedNeXt and CoMNeT, whose Dice are the backbone's plus the gain."""
    rows = []
    for model, added in (("MedNeXt", np.zeros_like(gains)), ("CoMNeT", gains)):
        for subject, gain in enumerate(added):
            row = make_score(model, subject // SUBJECTS, f"s{subject:02}", [0.7 + gain] * 3)
            rows.append(row | ({} if rule is None else {"selection": rule}))
    return rows


def test_the_choice_alone_makes_noise_significant() -> None:
    rng = np.random.default_rng(0)
    gains = [simulate(rng, "paper") for _ in range(SIMULATIONS)]
    assert np.mean([wilcoxon(gain).pvalue < 0.05 for gain in gains]) > 0.85


@pytest.mark.parametrize("rule", [None, "paper", "anything else"])
def test_the_report_gives_no_p_and_no_interval_after_that_choice(make_score, render, rule) -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        rows = difference_rows(records(simulate(rng, "paper"), make_score, rule))
        assert all(row["pairs"] == FOLDS * SUBJECTS and math.isfinite(row["difference"]) for row in rows)
        assert all(math.isnan(row[name]) for row in rows for name in ("low", "high", "p"))
        table = difference_table(rows)
        html = render(table)
        assert "p" not in table.columns and "[" not in html and "<strong>" not in html
        assert "Means only: the epochs were chosen on the subjects that are scored here" in table.caption


def test_without_the_choice_it_gives_both_and_errs_as_often_as_it_says(make_score, render) -> None:
    rng = np.random.default_rng(2)
    false = intervals = 0
    for _ in range(SIMULATIONS):
        rows = difference_rows(records(simulate(rng, "last"), make_score, "last"), num_resamples=99)
        row = next(row for row in rows if row["region"] == "WT" and row["convention"] == "skip")
        false += row["p"] < 0.05
        intervals += not row["low"] <= 0 <= row["high"]
    assert 1 <= false <= 10, "5 of 100 are to be expected"
    assert intervals <= 12
    table = difference_table(rows)
    assert "p" in table.columns and "[" in render(table) and "Means only" not in table.caption


def test_only_comparisons_without_a_choice_keep_their_intervals(three_models) -> None:
    rules = {"SegResNet": "last", "MedNeXt": "inner", "CoMNeT": "paper"}
    rows = difference_rows([row | {"selection": rules[row["model"]]} for row in three_models])
    known = {(row["model"], row["baseline"]) for row in rows if not math.isnan(row["low"])}
    assert known == {("MedNeXt", "SegResNet")}
    caption = difference_table(rows).caption
    assert "CoMNeT − MedNeXt, CoMNeT − SegResNet: Means only" in caption and "95 % bootstrap interval" in caption


def test_a_corrector_stands_on_its_backbones(three_models) -> None:
    rules = {"SegResNet": "last", "MedNeXt": "paper", "CoMNeT": "last"}
    rows = difference_rows([row | {"selection": rules[row["model"]]} for row in three_models])
    assert all(math.isnan(row["low"]) and math.isnan(row["p"]) for row in rows)
    without = [row | {"selection": "last"} for row in three_models if row["model"] != "MedNeXt"]
    assert not any(math.isnan(row["low"]) for row in difference_rows(without))


def test_every_table_says_the_rule(three_models) -> None:
    assert "“paper”" in table2(three_models, "skip").caption and "“paper”" in table2_text(three_models)
    last = [row | {"selection": "last"} for row in three_models]
    assert "“last” (the last epoch, without a choice)" in table2_text(last) and "paper" not in table2_text(last)
    mixed = [*last[:5], *three_models[5:]]
    assert selection_line(mixed).startswith("Selection of epochs: SegResNet “last”")
    assert "MedNeXt, CoMNeT “paper”" in selection_line(mixed)


@pytest.mark.parametrize("rule", [None, "last"])
def test_pages(tmp_path, make_score, read_page, rule) -> None:
    rows = records(simulate(np.random.default_rng(3), rule or "paper"), make_score, None)
    for row in rows:
        folder = tmp_path / "RUN" / row["model"].lower() / "scores" / row["subject"]
        folder.mkdir(parents=True)
        record = {"scores": row} | ({} if rule is None else {"selection": rule})
        (folder / "record.json").write_text(json.dumps(record))
    texts = read_page(write_crossval_report(tmp_path / "RUN", num_pictures=0)).texts
    csv = (tmp_path / "RUN" / "report" / "differences.csv").read_text()
    assert any("Means only" in text for text in texts) == (rule is None)
    assert any("95 % bootstrap interval" in text for text in texts) == (rule is not None)
    assert any(f"“{rule or 'paper'}”" in text for text in texts)
    assert (",nan,nan,," in csv) == (rule is None) and f",{rule or 'paper'}," in csv
    write_scores_report(tmp_path / "s.html", rows)
    assert any("“paper”" in text for text in read_page(tmp_path / "s.html").texts)
