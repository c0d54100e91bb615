"""The files of ``--config``: what is laid over every config of a cross-validation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..bundle_run import bundle_root, config_files
from ..files import FileError, UserError, write_text

RUNS = (
    ("comnet_mednext", "train.json"),
    ("comnet_mednext", "inference.json", "evaluate.json"),
    ("comnet_corrdiff", "train.json"),
    ("comnet_corrdiff", "inference.json", "evaluate.json"),
    ("comnet_ensemble", "train.json"),
)
OWN_KEYS = {
    **dict.fromkeys(("dataset_dir", "datalist_file", "output_dir", "fold", "checkpoint", "bundle_root"), ""),
    **dict.fromkeys(("models_dir", "ckpt_dir", "backbones_dir", "correctors_dir", "coarse_dir"), ""),
    "num_folds": " (they are those of the datalist)",
    "seed": " (use --seed)",
}


class Overlays:
    """Configs to lay over those of the bundles.

    A bare file name that bundles have among their own configs (``small.json``) is taken from each bundle that has it;
    any other name is a file of the user, which is laid over every config, because training and scoring must agree.
    Where a file sets something inside a component that a config lacks (``train#...`` over ``inference.json``), MONAI
    would stop: a copy without those entries is laid over that config instead.

    Args:
        names: file names or paths; later ones win.
        run_dir: folder of the cross-validation; the copies go to its ``configs``.

    Raises:
        FileNotFoundError: neither a config of the bundles nor a file.
        ValueError: a file is no JSON object, sets what no config knows, or what the cross-validation sets itself.
    """

    def __init__(self, names: Iterable[str], run_dir: str | Path) -> None:
        self.names = list(names)
        self.run_dir = Path(run_dir)
        self.own = {name for name in self.names if _is_own(name)}
        for name in self.names:
            if name not in self.own:
                _check(name, _read(Path(name)))

    def over(self, bundle: str, *configs: str) -> tuple[str | Path, ...]:
        """Return ``configs`` of a bundle with everything that is to be laid over them."""
        base = _merged(config_files(bundle, configs))
        return (*configs, *(file for name in self.names if (file := self._laid(name, bundle, configs[0], base))))

    def values(self, bundle: str, *configs: str) -> dict[str, Any]:
        """Return the named values of ``configs`` as they are with everything laid over them."""
        return _merged(config_files(bundle, self.over(bundle, *configs)))

    def _laid(self, name: str, bundle: str, config: str, base: Mapping[str, Any]) -> str | Path | None:
        path = bundle_root(bundle) / "configs" / name if name in self.own else Path(name)
        if name in self.own and not path.is_file():
            return None
        content = _read(path)
        fitting = {key: value for key, value in content.items() if _fits(key, base)}
        if len(fitting) < len(content):
            return self._copy(fitting, f"{bundle}-{Path(config).stem}-{1 + self.names.index(name)}-{path.name}")
        return name if name in self.own else path

    def _copy(self, content: Mapping[str, Any], name: str) -> Path:
        target = self.run_dir / "configs" / name
        write_text(target, json.dumps(content, indent=4) + "\n")
        return target


def _is_own(name: str) -> bool:
    bundles = {bundle for bundle, *_ in RUNS}
    own = Path(name).name == name and any((bundle_root(bundle) / "configs" / name).is_file() for bundle in bundles)
    if not own and not Path(name).is_file():
        raise FileError(f"config {name}: no such file, nor has any bundle a config of that name")
    return own


def _check(name: str, content: Mapping[str, Any]) -> None:
    bases = [_merged(config_files(bundle, configs)) for bundle, *configs in RUNS]
    for key in content:
        root = key_parts(key)[0]
        if root in OWN_KEYS:
            raise UserError(f"{name}: `comnet crossval` sets {root} itself{OWN_KEYS[root]}: take it out")
        if not any(root in base and _fits(key, base) for base in bases):
            close = get_close_matches(key, {known for base in bases for known in base}, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "see the names at the top of train.json"
            raise UserError(f"{name}: no config knows {key!r}: {advice}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names with values")
    return content


def _merged(files: Iterable[Path]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for file in files:
        content |= {key: value for key, value in _read(file).items() if len(key_parts(key)) == 1}
    return content


def key_parts(key: str) -> list[str]:
    """Split a config key into the names it goes through: MONAI writes ``train#dataset#data`` or ``train::dataset``."""
    return key.lstrip("+").replace("::", "#").split("#")


def _fits(key: str, base: Any) -> bool:
    """Whether MONAI can set ``key``: all that it is inside of must be there; a name at the top can always be set."""
    for part in key_parts(key)[:-1]:
        if isinstance(base, list):
            base = dict(enumerate(base)).get(int(part)) if part.isdigit() else None
        else:
            base = base.get(part) if isinstance(base, dict) else None
    return isinstance(base, (dict, list))
