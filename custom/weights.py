"""Weights on disk: found, described, checked and loaded, written whole or not at all, read without pickle."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cohort import REGIONS
from .files import UserError, file_sha256, whole_file

MODEL_KEY = "model"
PROVENANCE_KEY = "provenance"


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable or made for another network; the message names the file and what to do."""


class Provenance:
    """What a set of weights is: where it came from and what it was trained on.

    Saved beside the weights under the key ``provenance``, so that a checkpoint tells by itself which backbone, spacing
    and subjects made it, and a subject that a fold trained on is never scored by that fold.

    Args:
        facts: plain values (text, numbers, lists of them), e.g. ``backbone``, ``spacing``, ``fold``, ``trained_on``.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def state_dict(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return dict(self.facts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the facts."""
        self.facts = dict(state)


def save_atomically(content: Any, path: str | Path) -> None:
    """Write ``content`` with ``torch.save`` to a temporary name in the same folder, then rename it to ``path``.

    Raises:
        OSError: the folder cannot be written; no partial file is left.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # not the path: PyTorch would write the temporary name into the file


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights and provenance; tensors and plain values only, never pickled code.

    Returns:
        The state dict of the network, and the provenance (empty when the file has none).

    Raises:
        CheckpointError: no such file, or not a checkpoint that can be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: train first, or name the folder that holds the weights")
    try:
        mapped = zipfile.is_zipfile(path)  # read where it is looked at; PyTorch's old format cannot be
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a readable checkpoint ({reason}): copy or train it again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = content.get(MODEL_KEY, content)
    if state is content:  # a released checkpoint is a plain state dict: see custom.release.plain_state_dict
        return dict(state), dict(getattr(content, "_metadata", {}).get(PROVENANCE_KEY, {}))
    return dict(state), dict(content.get(PROVENANCE_KEY, {}))


def load_network(network: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint strictly into ``network`` and return its provenance.

    Raises:
        CheckpointError: missing, unreadable, or of another size or architecture than ``network``.
    """
    return load_part(network, path, "")


def load_part(network: nn.Module, path: str | Path, prefix: str) -> dict[str, Any]:
    """Load strictly into ``network`` those weights of a checkpoint whose names start with ``prefix``.

    Returns:
        The provenance of the whole file.

    Raises:
        CheckpointError: missing, unreadable, or of another size or architecture than ``network``.
    """
    content, provenance = read_checkpoint(path)
    state = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    difference = _difference(network.state_dict(), state)
    if difference:
        made_by = f" (it was trained with {provenance['backbone']})" if "backbone" in provenance else ""
        raise CheckpointError(
            f"{path} does not fit {type(network).__name__}{made_by}: {difference}; "
            "use the backbone that the checkpoint was trained with"
        )
    network.load_state_dict(state)
    return provenance


class NetworkLoader:
    """Ignite handler that loads one checkpoint strictly when the engine starts.

    Args:
        network: network as configured.
        path: checkpoint, see :func:`load_network`.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.network = network
        self.path = path

    def attach(self, engine: Any) -> None:
        """Load at the start of ``engine``'s run."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, lambda _: self.load())

    def load(self) -> None:
        """Load now."""
        load_network(self.network, self.path)


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and expected[name].shape != found[name].shape]
    parts = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if reshaped:
        name = reshaped[0]
        sizes = f"{tuple(found[name].shape)} in the file, {tuple(expected[name].shape)} in the network"
        parts.append(f"{len(reshaped)} of another shape (first: {name}, {sizes})")
    return ", ".join(parts)


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
