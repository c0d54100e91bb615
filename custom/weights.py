"""Weights on disk: found, described, checked and loaded, written whole or not at all, read without pickle."""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .cohort import REGIONS
from .files import UserError, whole_file

logger = logging.getLogger("comnet")

MODEL_KEY = "model"
PROVENANCE_KEY = "provenance"
NUM_FOLDS = 5
RELEASED: dict[str, str] = {
    "comnet_corrdiff": "9232be25069784ea0f96d7e8c8b977ce12462d5dd043a0271c4b5075e5ce98d4",
    "comnet_ensemble": "d598b7514500c73f3071c75368fed8cf0e2fd3d360495b4bbe3424fc67d815ea",
    "comnet_mednext": "33a1b9d59436bfb0d7be067201a19ec48aa978b04729d2598cea33c3dde649f7",
}
"""SHA-256 of each bundle's released ``models/model.pt``: a file that says it is a release must be one of them."""
DEFAULT_SETTINGS: dict[str, list[Any]] = {
    "thresholds": [0.5] * len(REGIONS),
    "min_volume_mm3": [50.0] * len(REGIONS),
    "refine_regions": [True] * len(REGIONS),
}
MONAI_NETWORKS = "monai.networks.nets"
TRUSTED = {"backbone": "custom.mednext.mednext_", "corrector": "custom.corrdiff.corrdiff_"}
"""How the names of networks begin that weights may name: those that the room exports, and MONAI's own backbones."""
OF_THE_PARTS = ("backbone", "corrector", "spacing", "patch_size", "mirror_axes")
"""What an ensemble and the backbones and correctors that it is gathered from must agree on."""
NUMBERS = ("spacing", "patch_size", "mirror_axes", "num_folds", "refine_each_fold", "num_samples")


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable or made for another network; the message names the file and what to do."""


def save_atomically(content: Any, path: str | Path) -> None:
    """Write ``content`` with ``torch.save``, whole or not at all.

    Raises:
        OSError: the folder cannot be written; no partial file is left.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # not the path: PyTorch would write the temporary name into the file


class Checkpoint:
    """One file of weights: tensors and plain values only, never pickled code.

    The file is read once; its tensors are let go when they have been loaded.

    Attributes:
        path: the file.
        sha256: digest of its content.
        facts: its provenance, empty when it has none.
        num_backbones: of a CoMNeT; 0 where it is a backbone alone.

    Raises:
        CheckpointError: no such file, a damaged one, or no checkpoint that can be read safely.
    """

    _alive: ClassVar[WeakValueDictionary[tuple[str, int, int, int], Checkpoint]] = WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.state: dict[str, torch.Tensor] | None
        self.state, self.facts = self._parse(content)
        self.num_backbones = len({name.split(".")[1] for name in self.state if name.startswith("backbones.")})
        if self.facts.get("release") and self.sha256 not in RELEASED.values():
            raise CheckpointError(
                f"{path} is damaged or of another release (its SHA-256 is {self.sha256}): get it anew"
            )

    @classmethod
    def at(cls, path: str | Path) -> Checkpoint:
        """Read a file, or return what was read of it while that is still in use."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}: train first, or name the folder that holds the weights")
        stat = path.stat()
        key = (os.path.realpath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        found = cls._alive.get(key)
        if found is None:
            found = cls._alive[key] = cls(path)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, read anew if they have been let go."""
        return self._parse(self.path.read_bytes())[0] if self.state is None else self.state

    def load(self, network: nn.Module, prefix: str = "") -> None:
        """Load strictly into ``network`` those weights whose names start with ``prefix``; half precision as float32.

        Raises:
            CheckpointError: of another size or architecture than ``network``, which stays as it was.
        """
        content = self.tensors()
        state = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        if difference := _difference(network.state_dict(), state):
            made_by = f" (it was trained with {self.facts['backbone']})" if "backbone" in self.facts else ""
            raise CheckpointError(
                f"{self.path} does not fit {type(network).__name__}{made_by}: {difference}; "
                "use the backbone that the checkpoint was trained with"
            )
        network.load_state_dict(state)
        self.state = None

    def _parse(self, content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        try:
            file = io.BytesIO(content)
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # PyTorch's old format is none
                raise ValueError("damaged: its checksums do not agree")
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            told = f"{self.path} is not a readable checkpoint ({reason}): copy or train it again"
            if content.startswith(b"version https://git-lfs"):
                told = f"{self.path} stands for a file that Git LFS has not fetched: run `git lfs pull`"
            raise CheckpointError(told) from error
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{self.path} holds a {type(found).__name__}, not a state dict")
        if MODEL_KEY in found:
            return dict(found[MODEL_KEY]), dict(found.get(PROVENANCE_KEY, {}))
        return dict(found), dict(getattr(found, "_metadata", {}).get(PROVENANCE_KEY, {}))  # custom.release makes such


class Weights:
    """A set of weights: found, described, checked and loaded; nothing is read before it is asked for.

    Args:
        path: one checkpoint; or a folder with ``model.pt`` of a whole CoMNeT, else ``fold<k>/model.pt`` of each fold's
            backbone, else ``model.pt`` of one backbone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, weights: Weights | str | Path) -> Weights:
        """Return weights as they are, or those at a path."""
        return weights if isinstance(weights, Weights) else cls(weights)

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The whole, or one checkpoint a fold.

        Raises:
            CheckpointError: there are none, a fold is missing, one cannot be read, or they do not belong together.
        """
        whole = self.path / "model.pt" if self.path.is_dir() else self.path
        places = [path for path in self.path.glob("fold*/model.pt") if path.parent.name[4:].isdecimal()]
        folds = {int(path.parent.name[4:]): path for path in places}
        if not folds and not whole.is_file():
            raise CheckpointError(
                f"no weights at {self.path}: there is neither model.pt nor "
                "fold<k>/model.pt: name yours by --weights, weights_dir or checkpoint"
            )
        if whole.is_file() and (not folds or Checkpoint.at(whole).num_backbones):
            return (Checkpoint.at(whole),)
        found = tuple(Checkpoint.at(folds[fold]) for fold in sorted(folds))
        expected = range(found[0].facts.get("num_folds", NUM_FOLDS))
        if missing := [str(fold) for fold in expected if fold not in folds]:
            copy = ", and model.pt there is one fold's" if whole.is_file() else ""
            raise CheckpointError(
                f"{len(missing)} of {len(expected)} fold checkpoints are missing in {self.path} (fold "
                f"{', '.join(missing)}{copy}): train them, or name one checkpoint"
            )
        for key in ("backbone", "spacing", "patch_size", "num_folds"):
            if any(one.facts.get(key) != found[0].facts.get(key) for one in found):
                raise CheckpointError(f"the folds in {self.path} differ in {key}: they do not belong together")
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """One checkpoint a fold, or one of the whole."""
        return tuple(one.path for one in self.checkpoints)

    @cached_property
    def sha256(self) -> str:
        """Digest over the digests of all files."""
        return hashlib.sha256("".join(one.sha256 for one in self.checkpoints).encode()).hexdigest()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Provenance that all files share, e.g. ``backbone``; ``num_folds`` is the number of backbones within."""
        first, *others = (one.facts for one in self.checkpoints)
        shared = {key: value for key, value in first.items() if all(fact.get(key) == value for fact in others)}
        return shared | {"num_folds": self.checkpoints[0].num_backbones or len(self.checkpoints)}

    @property
    def trained_on(self) -> frozenset[str]:
        """Names of all subjects that any of the files was trained on."""
        return frozenset(name for one in self.checkpoints for name in one.facts.get("trained_on", ()))

    @property
    def note(self) -> str:
        """What the weights say of themselves, else the start of their digest."""
        notes = {one.facts["notes"] for one in self.checkpoints if one.facts.get("notes")}
        return "; ".join(sorted(notes)) or f"weights {self.sha256[:12]}"

    @cached_property
    def tuned(self) -> dict[str, list[Any]]:
        """Settings that the weights go with: ``thresholds`` (probabilities), ``min_volume_mm3``, ``refine_regions``.

        Each is a list for ET, TC and WT; ``DEFAULT_SETTINGS`` where the weights were never tuned, as single folds are,
        and where there are no weights yet.
        """
        return {name: list(self._facts_if_any.get(name, default)) for name, default in DEFAULT_SETTINGS.items()}

    @cached_property
    def missing_dice(self) -> dict[str, list[float]] | None:
        """Mean held-out Dice of ET, TC and WT without modalities: ``{"nothing": [...], "t1n+t2w": [...], ...}``.

        From the provenance (``missing_modalities``, see `custom.release.release_weights`). Empty where modalities were
        dropped in training and nothing was measured; None where neither is known.
        """
        table = self._facts_if_any.get("missing_modalities")
        if table is None:
            return {} if self._facts_if_any.get("drop_modalities_prob") else None
        return {str(key): [float(dice) for dice in row] for key, row in table.items()}

    @property
    def _facts_if_any(self) -> dict[str, Any]:
        there = self.path.is_file() or any(self.path.glob("model.pt")) or any(self.path.glob("fold*/model.pt"))
        return self.facts if there else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Values of a config that the weights were made with: networks, spacing, patch size, folds.

        Raises:
            CheckpointError: they name something that is no network of CoMNeT or MONAI, or numbers that are none.
        """
        check_settings(self.facts, self.path)
        return {name: self.facts[name] for name in (*TRUSTED, *NUMBERS) if self.facts.get(name) is not None}

    def refuse_other_spacing(self, spacing: Sequence[float], backbone: str | None = None) -> None:
        """Make sure that images have the voxel size, in mm, which the weights were trained on.

        A backbone that is another one as well is told when they are loaded.

        Raises:
            CheckpointError: the weights name another one.
        """
        own = self.facts.get("spacing") or spacing
        if tuple(own) != tuple(spacing) and backbone in (None, self.facts.get("backbone")):
            raise CheckpointError(
                f"the weights in {self.path} were trained at a spacing of {list(own)} mm, not {list(spacing)}: give "
                f'--spacing "{list(own)}"'
            )

    def load(self, network: nn.Module) -> None:
        """Load strictly into a network: a whole CoMNeT, or one backbone; or folds' backbones into a CoMNeT's.

        Five fold checkpoints hold no corrector: an untrained one leaves the ensemble's probabilities as they are.

        Raises:
            CheckpointError: a file is missing, unreadable or made for another network.
        """
        backbones = getattr(network, "backbones", None)
        if backbones is None or self.checkpoints[0].num_backbones:
            parts = [network]
        else:
            parts = list(backbones)
            logger.info("%s holds backbones only: nothing refines their probabilities", self.path)
        if len(parts) != len(self.checkpoints):
            raise CheckpointError(f"{self.path} holds {len(self.checkpoints)} backbones, the network has {len(parts)}")
        for part, checkpoint in zip(parts, self.checkpoints, strict=True):
            checkpoint.load(part)


class WeightsLoader:
    """Ignite handler that loads weights strictly when the engine starts.

    Args:
        network: network as configured.
        weights: see :class:`Weights`; or their path.
    """

    def __init__(self, network: nn.Module, weights: Weights | str) -> None:
        self.network = network.module if isinstance(network, DistributedDataParallel) else network
        self.weights = Weights.of(weights)

    def attach(self, engine: Any) -> None:
        """Load at the start of ``engine``'s run."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, lambda _: self.weights.load(self.network))


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state dict of the network and the provenance of one file: see :class:`Checkpoint`."""
    checkpoint = Checkpoint.at(path)
    return checkpoint.tensors(), checkpoint.facts


def fold_checkpoint(weights_dir: str | Path, fold: int) -> Path:
    """Return where the training of one fold leaves its best checkpoint: ``<weights_dir>/fold<k>/model.pt``."""
    return Path(weights_dir) / f"fold{fold}" / "model.pt"


def check_settings(facts: Mapping[str, Any], path: str | Path) -> None:
    """Refuse what would run as code once it stands in a config; ``facts`` are the provenance of weights at ``path``.

    Raises:
        CheckpointError: a network that is none of CoMNeT's or MONAI's, or numbers that are none.
    """
    for part in TRUSTED:
        if facts.get(part) is not None and not _is_trusted(part, facts[part]):
            raise CheckpointError(f"{path} names the {part} {facts[part]!r}, which is none of CoMNeT's: not used")
    for name in NUMBERS:
        if facts.get(name) is not None and not _is_numeric(facts[name]):
            raise CheckpointError(f"{path} has the {name} {facts[name]!r}, which is no number: not used")


def _is_trusted(part: str, name: Any) -> bool:
    module, _, attribute = str(name).rpartition(".")
    room, _, prefix = TRUSTED[part].rpartition(".")
    if module == room:
        return attribute.startswith(prefix) and attribute in importlib.import_module(room).__all__
    if part != "backbone" or module != MONAI_NETWORKS:
        return False
    network = getattr(importlib.import_module(MONAI_NETWORKS), attribute, None)
    return isinstance(network, type) and issubclass(network, nn.Module)


def _is_numeric(value: Any) -> bool:
    return all(_is_numeric(one) for one in value) if isinstance(value, list) else isinstance(value, (int, float))


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and expected[name].shape != found[name].shape]
    kinds = {"missing": missing, "unknown": unknown}
    parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds.items() if names]
    if reshaped:
        name = reshaped[0]
        sizes = f"{tuple(found[name].shape)} in the file, {tuple(expected[name].shape)} in the network"
        parts.append(f"{len(reshaped)} of another shape (first: {name}, {sizes})")
    return ", ".join(parts)
