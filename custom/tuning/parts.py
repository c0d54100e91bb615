"""The parts of an ensemble, brought together only where they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import CheckpointError, read_checkpoint
from ..comnet import CoMNeT, gather
from ..files import file_sha256
from ..weights import fold_checkpoint

SETTINGS = ("backbone", "corrector", "spacing", "patch_size")


def gather_parts(
    network: CoMNeT,
    facts: Mapping[str, Any],
    backbones_dir: str | Path,
    correctors_dir: str | Path | None = None,
    corrector_fold: int = 0,
) -> dict[str, Any]:
    """Load the backbone of every fold and the corrector of one.

    Args:
        network: the ensemble to fill.
        facts: what its provenance says already; parts that say otherwise of ``SETTINGS`` are refused.
        backbones_dir: folder with ``fold<k>/model.pt`` of ``comnet_mednext``.
        correctors_dir: folder with ``fold<k>/model.pt`` of ``comnet_corrdiff``; ``None`` loads no corrector.
        corrector_fold: whose corrector it is.

    Returns:
        ``facts`` with ``num_folds``, ``trained_on`` (subjects that any part has seen), the parts' own ``notes`` where
        there are none, ``corrector_fold``, and the SHA-256 of each part as ``backbones_sha256``, ``corrector_sha256``.

    Raises:
        CheckpointError: a part is missing, unreadable, or was trained with other settings or another backbone.
    """
    backbones = [fold_checkpoint(backbones_dir, fold) for fold in range(len(network.backbones))]
    corrector = None if correctors_dir is None else fold_checkpoint(correctors_dir, corrector_fold)
    parts = gather(network, backbones, corrector)
    for path, part in zip([*backbones, corrector], parts, strict=False):
        _check_settings(path, part, facts)
    return {
        **facts,
        "num_folds": len(backbones),
        "trained_on": sorted({str(name) for part in parts for name in part.get("trained_on", ())}),
        "notes": facts.get("notes") or "; ".join(sorted({part["notes"] for part in parts if part.get("notes")})),
        "backbones_sha256": [file_sha256(path) for path in backbones],
        "corrector_sha256": None if corrector is None else file_sha256(corrector),
        "corrector_fold": None if corrector is None else corrector_fold,
    }


def check_own_backbone(correctors_dir: str | Path, backbones_dir: str | Path, fold: int) -> None:
    """Make sure that a fold's corrector was trained on the coarse logits of a backbone that is still the same.

    Raises:
        CheckpointError: it was not, or one of the two is missing.
    """
    corrector, backbone = fold_checkpoint(correctors_dir, fold), fold_checkpoint(backbones_dir, fold)
    within, expected = read_checkpoint(corrector)[0], read_checkpoint(backbone)[0]
    found = {
        name.removeprefix("backbones.0."): value for name, value in within.items() if name.startswith("backbones.")
    }
    if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
        raise CheckpointError(
            f"{corrector} was trained with another backbone than {backbone}: train the corrector again, or name the "
            "folder of its own backbones"
        )


def _check_settings(path: Path, part: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for name in SETTINGS:
        if name in part and name in facts and part[name] != facts[name]:
            raise CheckpointError(f"{path} was trained with {name} {part[name]}, not {facts[name]}: set {name} to that")
