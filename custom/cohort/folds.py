"""Cross-validation folds that come out the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


def assign_folds(items: Iterable[Mapping[str, Any]], num_folds: int = 5, seed: int = 0) -> dict[str, int]:
    """Deal subjects into folds, stratified by label source and by whether there is enhancing tumour.

    Patients are shuffled within their stratum by a hash of seed and name, so neither the order of `items` nor the
    machine nor the version of any library matters. Each goes to the fold that has fewest of the stratum, then fewest
    in all. Where each patient has one scan, folds differ by at most one subject in every stratum and over all; scans
    of one patient ("patient", by default the subject itself) stay together whatever the balance, as a patient on both
    sides of a split would leak.

    Args:
        items: each with "subject", "label_source", "has_et" and perhaps "patient".
        num_folds: at least 1. More folds than patients leave folds empty.
        seed: another seed deals another hand.

    Returns:
        Fold (0 to `num_folds` - 1) of each subject.

    Raises:
        ValueError: `num_folds` below 1.
    """
    if num_folds < 1:
        raise ValueError(f"num_folds is {num_folds}: give at least 1.")
    total = [0] * num_folds
    folds: dict[str, int] = {}
    for _, patients in sorted(_strata(items, seed).items()):
        own = [0] * num_folds
        for subjects in patients:
            fold = min(range(num_folds), key=lambda k: (own[k], total[k], k))
            own[fold] += len(subjects)
            total[fold] += len(subjects)
            folds |= dict.fromkeys(subjects, fold)
    return dict(sorted(folds.items()))


def _strata(items: Iterable[Mapping[str, Any]], seed: int) -> dict[tuple[str, bool], list[list[str]]]:
    """Patients of each stratum, as lists of subjects, those with most scans first."""
    patients: dict[str, list[Mapping[str, Any]]] = {}
    for item in sorted(items, key=lambda item: item["subject"]):
        patients.setdefault(item.get("patient", item["subject"]), []).append(item)
    strata: dict[tuple[str, bool], list[list[str]]] = {}
    for patient in sorted(patients, key=lambda name: (-len(patients[name]), _shuffle_key(name, seed))):
        first = patients[patient][0]
        stratum = strata.setdefault((str(first["label_source"]), bool(first["has_et"])), [])
        stratum.append([item["subject"] for item in patients[patient]])
    return strata


def _shuffle_key(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
