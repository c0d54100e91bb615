"""A set of weights on disk: which files it is made of, and what it says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints import CheckpointError, read_checkpoint
from .cohort import REGIONS
from .files import file_sha256

NUM_FOLDS = 5
DEFAULT_SETTINGS: dict[str, list[Any]] = {
    "thresholds": [0.5] * len(REGIONS),
    "min_volume_mm3": [50.0] * len(REGIONS),
    "refine_regions": [True] * len(REGIONS),
}


TRUSTED = {"backbone": ("custom.mednext.", "monai.networks.nets."), "corrector": ("custom.corrdiff.",)}
"""Where the networks may come from that weights name: a config that holds such a name runs it."""


@dataclass(frozen=True)
class Weights:
    """What is known of a set of weights.

    Attributes:
        files: one checkpoint a fold, or one of the whole.
        sha256: digest over the digests of all files.
        facts: provenance that all files share, e.g. ``backbone``, ``spacing``, ``num_folds``; the last is the number of
            backbones within, where the files are CoMNeTs.
        trained_on: names of all subjects that any of the files was trained on.
        note: what the weights say of themselves, else the start of their digest.
    """

    files: tuple[Path, ...]
    sha256: str
    facts: dict[str, Any]
    trained_on: frozenset[str]
    note: str


def fold_checkpoint(weights_dir: str | Path, fold: int) -> Path:
    """Return where the training of one fold leaves its best checkpoint: ``<weights_dir>/fold<k>/model.pt``."""
    return Path(weights_dir) / f"fold{fold}" / "model.pt"


def weight_files(weights_dir: str | Path, num_folds: int = NUM_FOLDS) -> list[Path]:
    """Find the weights in a folder: ``model.pt`` of a whole ensemble, else one checkpoint a fold, else ``model.pt``.

    Raises:
        CheckpointError: neither is there, or a fold is missing; says which.
    """
    whole = Path(weights_dir) / "model.pt"
    folds = [fold_checkpoint(weights_dir, fold) for fold in range(num_folds)]
    missing = [path for path in folds if not path.is_file()]
    if whole.is_file() and (missing or _is_comnet(whole)):
        return [whole]
    if missing:
        raise CheckpointError(
            f"no weights in {weights_dir}: {len(missing)} of {num_folds} fold checkpoints are missing (first: "
            f"{missing[0]}) and there is no {whole.name}; train the folds, run `comnet demo`, or name another folder"
        )
    return folds


def describe_weights(weights: str | Path) -> Weights:
    """Read what a set of weights is.

    Args:
        weights: folder of an ensemble's weights, or one checkpoint.

    Raises:
        CheckpointError: no weights, unreadable ones, or folds that were made with different settings.
    """
    weights = Path(weights)
    files = [weights] if weights.is_file() else weight_files(weights, _expected_folds(weights))
    facts = [_facts(*read_checkpoint(path)) for path in files]
    for key in ("backbone", "spacing", "patch_size", "num_folds"):
        if any(fact.get(key) != facts[0].get(key) for fact in facts):
            raise CheckpointError(f"the folds in {weights} differ in {key}: they do not belong together")
    digest = hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()
    return Weights(
        files=tuple(files),
        sha256=digest,
        facts={key: value for key, value in facts[0].items() if all(fact.get(key) == value for fact in facts)},
        trained_on=frozenset(name for fact in facts for name in fact.get("trained_on", ())),
        note="; ".join(sorted({fact["notes"] for fact in facts if fact.get("notes")})) or f"weights {digest[:12]}",
    )


def untrusted_parts(facts: Mapping[str, Any]) -> list[str]:
    """Return which of the networks that a checkpoint names, "backbone" or "corrector", are none of ours or MONAI's."""
    return [part for part, ours in TRUSTED.items() if part in facts and not str(facts[part]).startswith(ours)]


def tuned_settings(weights_dir: str | Path) -> dict[str, list[Any]]:
    """Return what an ensemble's weights say of the settings they go with: see :mod:`custom.tuning`.

    Args:
        weights_dir: folder of an ensemble's weights, or one checkpoint.

    Returns:
        ``thresholds`` (probabilities), ``min_volume_mm3`` and ``refine_regions``, each a list for ET, TC and WT;
        ``DEFAULT_SETTINGS`` where there are no weights, or weights that were never tuned, such as fold checkpoints.

    Raises:
        CheckpointError: the weights of the whole cannot be read.
    """
    path = Path(weights_dir)
    whole = path / "model.pt" if path.is_dir() else path
    facts = read_checkpoint(whole)[1] if whole.is_file() else {}
    return {name: list(facts.get(name, default)) for name, default in DEFAULT_SETTINGS.items()}


def _is_comnet(checkpoint: Path) -> bool:
    """Whether it holds a CoMNeT, and not the copy of one fold's backbone that training publishes."""
    return any(name.startswith("backbones.") for name in read_checkpoint(checkpoint)[0])


def _facts(state: Mapping[str, torch.Tensor], provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance, with the number of backbones that a CoMNeT really has."""
    numbers = {name.split(".")[1] for name in state if name.startswith("backbones.")}
    return provenance | ({"num_folds": len(numbers)} if numbers else {})


def _expected_folds(weights_dir: Path) -> int:
    first = next(iter(sorted(weights_dir.glob("fold*/model.pt"))), None)
    return read_checkpoint(first)[1].get("num_folds", NUM_FOLDS) if first else NUM_FOLDS
