"""What the jobs of a cross-validation depend on: subjects, configs laid over the bundles', and the code that runs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..bundle_run import bundle_root, config_files, run_bundle
from ..files import FileError, UserError, file_sha256, write_text

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
PACKAGE = Path(__file__).resolve().parents[1]
INDIFFERENT = ("path_setup", "num_workers", "cache_rate")
"""Names in configs that no result depends on: the check of the version, worker processes, what is kept in memory."""


@dataclass(frozen=True)
class Subjects:
    """Who is cross-validated.

    Attributes:
        datalist_file: the copy in the run's folder.
        dataset_dir: folder of the dataset.
        num_folds: how many folds they were dealt into.
        folds: fold of each subject, by name.
        digest: SHA-256 over subjects, folds, and sizes of their files; where the files lie does not matter.
    """

    datalist_file: Path
    dataset_dir: Path
    num_folds: int
    folds: dict[str, int]
    digest: str


def prepare_subjects(
    source: str | Path,
    run_dir: str | Path,
    dataset_dir: str | Path | None = None,
    num_folds: int | None = None,
    seed: int = 0,
) -> Subjects:
    """Copy the datalist to ``<run_dir>/datalist.json`` and make sure that it can be cross-validated.

    Args:
        source: datalist as `comnet validate` writes it (it may be the copy itself), or a dataset folder, which is
            checked the first time.
        run_dir: folder of the cross-validation.
        dataset_dir: where the dataset is, by default what the datalist remembers.
        num_folds: how many folds a datalist must have, or a dataset folder is dealt into (by default 5).
        seed: seed of these folds.

    Raises:
        ValueError: the datalist is none, has other folds, or is another than the one that the folder was made for.
        OSError: a file is absent or cannot be written.
    """
    from ..cohort import load_datalist
    from ..cohort.datalist import copy_datalist, dataset_of

    source, copy = Path(source), Path(run_dir) / "datalist.json"
    if source.is_dir():
        if not copy.exists():
            data = {"dataset_dir": source, "datalist_file": copy, "num_folds": num_folds or 5, "seed": seed}
            run_bundle("comnet_mednext", "train.json", run_id="check_data", **data)
        elif dataset_of(copy) != source.resolve():
            raise UserError(f"{run_dir} was made for the dataset {dataset_of(copy)}: name another --output_dir")
        source = copy
    if not source.is_file():
        raise FileError(f"{source} does not exist: give a datalist as `comnet validate` writes it, or a dataset folder")
    if copy.is_file() and _items(copy) != _items(source):
        raise UserError(
            f"{copy.parent} was made for other subjects or folds than those of {source}: name another --output_dir"
        )
    dataset = copy_datalist(source, copy, dataset_dir)
    datalist = load_datalist(copy, dataset)
    folds = {item["subject"]: item["fold"] for item in datalist["training"]}
    count = datalist.get("num_folds") or 1 + max(folds.values())
    if num_folds not in (None, count):
        raise UserError(f"{source} has {count} folds, not {num_folds}: make another one with `comnet validate`")
    empty = sorted(set(range(count)) - set(folds.values()))
    if empty or count < 2:
        problem = f"fold {empty[0]} of {count} holds no subject" if empty else "one fold leaves nothing to train on"
        raise UserError(f"{source}: {problem}: make another one with `comnet validate --num_folds`")
    rows = [
        [item["subject"], item["fold"], item["palette"]]
        + [[os.path.relpath(file, dataset), os.path.getsize(file)] for file in (*item["image"], item["label"])]
        for item in datalist["training"]
    ]
    return Subjects(copy, dataset, count, folds, _digest(rows))


class Overlays:
    """Configs to lay over those of the bundles.

    A bare file name that bundles have among their own configs (``small.json``) is taken from each bundle that has it;
    any other name is a file of the user, which is laid over every config, because training and scoring must agree. Of
    all of them, one file a config is made, with what that config knows: MONAI would stop at ``train#...`` laid over
    ``inference.json``. Its name holds its digest, so that jobs that run already keep theirs.

    Args:
        names: file names or paths; later ones win.
        run_dir: folder of the cross-validation; what is laid over a config goes to its ``configs``.

    Raises:
        FileNotFoundError: neither a config of the bundles nor a file.
        ValueError: a file is no JSON object, sets what no config knows, or what the cross-validation sets itself.
    """

    def __init__(self, names: Iterable[str], run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        bundles = dict.fromkeys(bundle for bundle, *_ in RUNS)
        self._laid: dict[str, dict[str, Any]] = {bundle: {} for bundle in bundles}
        for name in names:
            own = {bundle: bundle_root(bundle) / "configs" / name for bundle in bundles if Path(name).name == name}
            own = {bundle: file for bundle, file in own.items() if file.is_file()}
            if not own and not Path(name).is_file():
                raise FileError(f"config {name}: no such file, nor has any bundle a config of that name")
            if not own:
                _check(name, _read(Path(name)), self._laid)
            for bundle, file in (own or dict.fromkeys(bundles, Path(name))).items():
                for key, value in _read(file).items():
                    self._laid[bundle].pop(key, None)  # MONAI goes through them in order: what comes later is last
                    self._laid[bundle][key] = value

    def over(self, bundle: str, *configs: str) -> tuple[str | Path, ...]:
        """Return ``configs`` of a bundle with what is to be laid over them, and the names that this refers to."""
        base, laid = _merged(config_files(bundle, configs)), self._laid[bundle]
        kept, more = set[str](), {key for key in laid if _fits(key, base)}
        while more:
            kept |= more
            more = set(re.findall(r"@(\w+)", json.dumps([laid[key] for key in more]))) & laid.keys() - kept
        content = {key: value for key, value in laid.items() if key in kept}
        if not content:
            return configs
        file = self.run_dir / "configs" / f"{bundle}-{Path(configs[0]).stem}-{_digest(content)[:8]}.json"
        if not file.exists():
            write_text(file, json.dumps(content, indent=4) + "\n")
        return (*configs, file)

    def values(self, bundle: str, *configs: str) -> dict[str, Any]:
        """Return the named values of ``configs`` as they are with everything laid over them."""
        return _merged(config_files(bundle, self.over(bundle, *configs)))


def config_contents(bundle: str, configs: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return what configs hold, without what no result depends on."""
    contents = [_read(file) for file in config_files(bundle, configs)]
    kept = [{key: one[key] for key in one if _parts(key)[-1] not in INDIFFERENT} for one in contents]
    return [one for one in kept if one]


def code_digest(text: str) -> str:
    """Return a SHA-256 over the modules of this package that ``text`` names, and all that these import.

    Comments, docstrings and layout do not count, nor the package's ``__init__.py``, which holds the version.
    """
    todo = [file for name in re.findall(r"\bcustom\.([\w.]+)", text) for file in _files(name.split("."))]
    found: dict[str, str] = {}
    while todo:
        file = todo.pop()
        name = file.relative_to(PACKAGE).as_posix()
        if name not in found:
            found[name], imported = _module(file, file.stat().st_mtime_ns)
            todo += imported
    return _digest(found)


def with_files(digest: str, run_dir: Path, files: Iterable[Path]) -> str:
    """Return ``digest`` together with the contents of files in ``run_dir``; of folders and absent files, the place."""
    contents = {os.path.relpath(file, run_dir): file_sha256(file) if file.is_file() else None for file in files}
    return _digest([digest, contents])


def _items(datalist_file: Path) -> Any:
    try:
        return json.loads(datalist_file.read_text(encoding="utf-8"))["training"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{datalist_file} is no datalist: write it with `comnet validate`") from error


def _check(name: str, content: Mapping[str, Any], laid: Mapping[str, Mapping[str, Any]]) -> None:
    bases = [{**_merged(config_files(bundle, configs)), **laid[bundle]} for bundle, *configs in RUNS]
    for key in content:
        root = _parts(key)[0]
        if root in OWN_KEYS:
            raise UserError(f"{name}: `comnet crossval` sets {root} itself{OWN_KEYS[root]}: take it out")
        if not any(_fits(key, base) for base in bases):
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
    return {key: value for file in files for key, value in _read(file).items() if len(_parts(key)) == 1}


def _parts(key: str) -> list[str]:
    """Split a config key into the names it goes through: MONAI writes ``train#dataset#data`` or ``train::dataset``."""
    return key.lstrip("+").replace("::", "#").split("#")


def _fits(key: str, base: Any) -> bool:
    """Whether a config has what ``key`` sets: the name itself, or all that the key goes through to set something."""
    first, *others = _parts(key)
    if first not in base:
        return False
    for part in (first, *others[:-1]) if others else ():
        if isinstance(base, list):
            base = base[int(part)] if part.isdigit() and int(part) < len(base) else None
        else:
            base = base.get(part) if isinstance(base, dict) else None
    return isinstance(base, (dict, list))


def _files(parts: Sequence[str]) -> list[Path]:
    """Files of the package that an import of a dotted name runs, but for its ``__init__.py``."""
    files, folder = [], PACKAGE
    for part in parts:
        if (folder / part / "__init__.py").is_file():
            folder = folder / part
            files.append(folder / "__init__.py")
        else:
            return [*files, *(file for file in [folder / f"{part}.py"] if file.is_file())]
    return files


@cache
def _module(file: Path, modified: int) -> tuple[str, list[Path]]:
    """Digest of a module's code, and the files of the package that it imports."""
    tree = ast.parse(file.read_bytes())
    room = file.relative_to(PACKAGE).parent.parts
    imported: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = [*room[: len(room) + 1 - node.level], *(node.module or "").split(".")]
            for name in node.names:
                imported += _files([part for part in (*above, name.name) if part])
    return _digest(_shape(tree)), imported


def _shape(node: Any) -> Any:
    """A syntax tree as nested lists, the same for every version of Python."""
    if isinstance(node, list):
        return [_shape(one) for one in node if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, _shape(value)] for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *fields]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
