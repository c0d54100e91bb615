"""Many subjects checked side by side, and what was found said aloud."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from monai.utils import optional_import

from .checks import check_subject
from .subject import Exclusion, Subject, SubjectError

T = TypeVar("T")
MOST_WORKERS = 8
MOST_LINES = 10

logger = logging.getLogger("comnet")


def check_subjects(
    subjects: Sequence[Subject], num_workers: int | None = None, progress: bool = False, **options: Any
) -> tuple[list[tuple[Subject, dict[str, Any]]], list[Exclusion]]:
    """Run `check_subject` over all subjects in threads (unpacking and hashing let go of the interpreter lock).

    Args:
        subjects: what to check.
        num_workers: threads; by default one per processor core, at most 8, as each holds an image in memory.
        progress: show a bar with the time left on a terminal.
        options: passed on to `check_subject`.

    Returns:
        Good subjects with their facts, and exclusions, both in the order of `subjects`.
    """

    def check(subject: Subject) -> dict[str, Any] | Exclusion:
        try:
            return check_subject(subject, **options)
        except SubjectError as error:
            return Exclusion.of(error)

    workers = num_workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        results = list(_with_bar(pool.map(check, subjects), len(subjects), progress))
    kept = [pair for pair in zip(subjects, results, strict=True) if isinstance(pair[1], dict)]
    return kept, [result for result in results if isinstance(result, Exclusion)]


def log_outcome(
    kept: Sequence[tuple[Subject, dict[str, Any]]], exclusions: Sequence[Exclusion], source: str, places: str = ""
) -> None:
    """Log how many subjects were kept, and as warnings what was excluded or is odd; `places` tells where to read on.

    Raises:
        ValueError: nothing was kept; quotes the first exclusions.
    """
    excluded = [str(exclusion) for exclusion in exclusions]
    if not kept:
        raise ValueError(f"no usable subject in {source}: all {len(excluded)} are excluded. {_first(excluded, places)}")
    if not excluded:
        logger.info("%s: %d subjects kept, none excluded", source, len(kept))
    else:
        logger.warning(
            "%s: %d subjects kept, %d excluded. %s", source, len(kept), len(excluded), _first(excluded, places)
        )
    odd = [f"{subject.name}: {warning}." for subject, facts in kept for warning in facts["warnings"]]
    if odd:
        logger.warning("%s: %d warnings about subjects that were kept. %s", source, len(odd), _first(odd, places))


def _first(lines: Sequence[str], places: str) -> str:
    more = f" … and {len(lines) - MOST_LINES} more{places}." if len(lines) > MOST_LINES else ""
    return " | ".join(lines[:MOST_LINES]) + more


def _with_bar(results: Iterable[T], total: int, progress: bool) -> Iterator[T]:
    if not progress:
        return iter(results)
    tqdm, installed = optional_import("tqdm", name="tqdm")
    if not installed:
        logger.info("tqdm is not installed: checking %d subjects without a progress bar", total)
        return iter(results)
    return iter(tqdm(results, total=total, desc="checking subjects", unit="subject", disable=None))
