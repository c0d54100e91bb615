"""Checkpoints: written whole or not at all, read without pickle, refused in one sentence when they do not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import whole_file

MODEL_KEY = "model"
PROVENANCE_KEY = "provenance"


class CheckpointError(ValueError):
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
    if state is content:  # a released checkpoint is a plain state dict: see custom.packing.plain_state_dict
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
