"""Releases: each bundle as a zip that works by itself, and one `custom` a process."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .cohort import MODALITIES, REGIONS
from .files import UserError, file_sha256, whole_file, write_text
from .weights import NUMBERS, PROVENANCE_KEY, TRUSTED, Checkpoint, CheckpointError, check_settings, read_checkpoint

PACKAGE = Path(__file__).resolve().parent


class VersionError(ImportError, UserError):
    """Two different `custom` packages met in one process."""


def check_version(version: str, bundle_root: str | os.PathLike = ".") -> str:
    """Make sure that the imported `custom` is the one a bundle was written for.

    Python imports a package once: in a server that holds two bundles, the second would silently run on the first one's
    code. Every config calls this before it uses anything else of ours.

    Args:
        version: version of the bundle.
        bundle_root: the bundle's folder; where it carries its own `custom`, that copy must equal the imported package.

    Returns:
        The version.

    Raises:
        VersionError: the imported package is another one.
    """
    own = Path(bundle_root, PACKAGE.name)
    is_other = (own / "__init__.py").is_file() and own.resolve() != PACKAGE
    if version != __version__:
        difference = f"needs `custom` {version}, but {__version__}"
    elif is_other and package_digest(own) != package_digest(PACKAGE):
        difference = f"carries another build of `custom` {version} than the one that"
    else:
        return version
    raise VersionError(
        f"the bundle in {os.path.abspath(bundle_root)} {difference} was imported from {PACKAGE}: use bundles of one "
        "release, or run them in separate processes"
    )


def package_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Map the names of a package's sources and page templates, with forward slashes and in order, to the files."""
    found = (path for pattern in ("*.py", "templates/*.html") for path in package.rglob(pattern))
    return dict(sorted((path.relative_to(package).as_posix(), path) for path in found))


def package_digest(package: Path) -> str:
    """Return one SHA-256 over the names and contents of a package's source files."""
    digest = hashlib.sha256()
    for name, path in package_files(package).items():
        digest.update(f"{name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()


logger = logging.getLogger("comnet")

BUNDLES = ("comnet_mednext", "comnet_corrdiff", "comnet_ensemble")
WEIGHTS = {
    "comnet_mednext": "mednext/fold0/model.pt",
    "comnet_corrdiff": "comnet/fold0/model.pt",
    "comnet_ensemble": "ensemble/model.pt",
}
LARGE_FILE = 25 * 2**20
EARLIEST = (1980, 1, 1, 0, 0, 0)
NO_WEIGHTS = "No weights are distributed in this bundle: train them, or put a model.pt here.\n"


class PackingError(UserError):
    """A bundle cannot be released as it is; the message names the file and what to do."""


def pack(
    output_dir: str = "dist", weights: str | None = None, repo: str = "", bundles_dir: str | None = None
) -> list[str]:
    """Make the release: a zip for each bundle, `models/model_info.json` and `SHA256SUMS`.

    A zip holds the bundle's configs, docs and licence, its own copy of `custom`, and `models/model.pt` where `weights`
    has one. What the weights say of themselves (networks, spacing, folds) is written into the configs, so that
    every zip works as it is. Same input, same bytes: entries are sorted, uncompressed, and carry no time.

    Args:
        output_dir: folder for the release.
        weights: output folder of `comnet crossval`; by default the released weights, where they are there.
        repo: "owner/repository/tag" of the GitHub release, which the addresses in `model_info.json` point to.
        bundles_dir: folder of the bundles; by default that of the repository.

    Returns:
        Names of the files written.

    Raises:
        PackingError: not run from the repository, versions that disagree, or weights that no config fits.
        CheckpointError: a checkpoint cannot be read.
        OSError: the folder cannot be written.
    """
    source = Path(bundles_dir) if bundles_dir else PACKAGE.parent / "bundles"
    output, base = Path(output_dir), _base_url(repo)
    bundles = [source / name for name in BUNDLES if (source / name / "configs").is_dir()]
    if not bundles:
        raise PackingError(f"no bundles in {source}: run `comnet pack` from a clone of the repository")
    if weights is not None and not Path(weights).is_dir():
        raise CheckpointError(f"no folder {weights}: give the output folder of `comnet crossval`, or no weights")
    for bundle in bundles:
        _configs(bundle)
    written = [file for bundle in bundles for file in _pack_bundle(bundle, output, weights, base)]
    info = _model_info(source.parent / "models" / "model_info.json", output, written, base)
    write_text(output / "models" / "model_info.json", json.dumps(info, indent=4, sort_keys=True) + "\n")
    written.append("models/model_info.json")
    sums = "".join(f"{file_sha256(output / name)}  {name}\n" for name in sorted(written))
    write_text(output / "SHA256SUMS", sums)
    return [*written, "SHA256SUMS"]


def bundle_files(bundle: Path, checkpoint: Path | None = None, base_url: str = "") -> dict[str, bytes]:
    """Collect what a bundle's zip holds: names within the bundle, and contents.

    `checkpoint` is shipped as `models/model.pt`; if it is large, it is fetched from `base_url`, the release's address.

    Raises:
        PackingError: see `pack`.
    """
    state, facts = read_checkpoint(checkpoint) if checkpoint else ({}, {})
    check_settings(facts, str(checkpoint))
    files = {f"{PACKAGE.name}/{name}": path.read_bytes() for name, path in package_files().items()}
    files |= {f"docs/{path.name}": path.read_bytes() for path in bundle.glob("docs/*") if path.is_file()}
    files |= {f"configs/{path.name}": path.read_bytes() for path in bundle.glob("configs/*.conf")}
    files |= {f"configs/{name}": _with_settings(config, facts) for name, config in _configs(bundle).items()}
    files["LICENSE"] = (bundle / "LICENSE").read_bytes()
    if checkpoint is None:
        return files | {"models/README.md": NO_WEIGHTS.encode()}
    released = facts.get("release")  # whose digest stands in the code
    files["models/model.pt"] = checkpoint.read_bytes() if released else _as_bytes(plain_state_dict(state, facts))
    if len(files["models/model.pt"]) > LARGE_FILE:
        files["large_files.yml"] = _large_files(bundle.name, files["models/model.pt"], base_url)
    return files


def release_weights(source: str | Path, target: str | Path, half: bool = True, **facts: Any) -> str:
    """Write weights as they are released, with provenance that says so.

    Args:
        source: a checkpoint.
        target: file to write, such as `bundles/comnet_ensemble/models/model.pt`.
        half: in half precision; values that it cannot hold, such as the sums of a codebook, stay as they are.
        facts: what its provenance says besides or instead, such as `notes`, which stands on every report, and
            `missing_modalities`, the mean held-out Dice of ET, TC and WT without modalities, which stands on every
            result of a subject that lacks them:
            `{"nothing": [0.60, 0.82, 0.87], "t1n": [...], "t1n+t2w": [...], ...}`, keys in the order of `MODALITIES`.

    Returns:
        The SHA-256 to enter into `custom.weights.RELEASED`: until then the file is refused.

    Raises:
        UserError: `missing_modalities` is no such table.
    """
    _check_missing(facts.get("missing_modalities", {}))
    state, found = read_checkpoint(source)
    halves = {name: value.half() if half and value.is_floating_point() else value for name, value in state.items()}
    smaller = {name: value if value.isfinite().all() else state[name] for name, value in halves.items()}
    with whole_file(target) as temporary:
        temporary.write_bytes(_as_bytes(plain_state_dict(smaller, found | {"release": __version__} | facts)))
    return file_sha256(target)


def _check_missing(table: Mapping[str, Any]) -> None:
    subsets = {"+".join(keys) for count in range(1, len(MODALITIES)) for keys in combinations(MODALITIES, count)}
    for key, row in table.items():
        three = len(row) == len(REGIONS) and all(0 <= dice <= 1 for dice in row)
        if key not in {"nothing", *subsets} or not three:
            raise UserError(
                f"missing_modalities has {key!r}: {row!r}: give keys such as 'nothing', 't1n' or 't1n+t2w', and three "
                f"Dice each, of {', '.join(REGIONS)}"
            )


def plain_state_dict(state: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> OrderedDict[str, torch.Tensor]:
    """Make of weights and provenance what every tool of MONAI loads: a state dict with nothing around it.

    The provenance goes into `_metadata`, which PyTorch saves with every state dict and ignores where it knows no such
    module; `custom.weights.read_checkpoint` finds it there.
    """
    plain = OrderedDict(state)
    plain._metadata = OrderedDict({PROVENANCE_KEY: dict(facts)})  # type: ignore[attr-defined]
    return plain


def _base_url(repo: str) -> str:
    parts = repo.split("/")
    if not repo:
        return ""
    if len(parts) != 3 or not all(parts):
        raise PackingError(f"repo is {repo!r}: give owner/repository/tag, as for `monai.bundle download`")
    return f"https://github.com/{parts[0]}/{parts[1]}/releases/download/{parts[2]}/"


def _pack_bundle(bundle: Path, output: Path, weights: str | None, base_url: str) -> list[str]:
    checkpoint = _checkpoint(bundle, weights)
    files = bundle_files(bundle, checkpoint, base_url)
    name = f"{bundle.name}_v{__version__}"
    with (
        whole_file(output / f"{name}.zip") as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for inner in sorted(files):
            entry = zipfile.ZipInfo(f"{bundle.name}/{inner}", EARLIEST)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[inner])
    if "large_files.yml" not in files:
        return [f"{name}.zip"]
    with whole_file(output / f"{name}_model.pt") as temporary:
        temporary.write_bytes(files["models/model.pt"])
    return [f"{name}.zip", f"{name}_model.pt"]


def _checkpoint(bundle: Path, weights: str | None) -> Path | None:
    path = Path(weights) / WEIGHTS[bundle.name] if weights is not None else bundle / "models" / "model.pt"
    if path.is_file() and (weights is not None or Checkpoint.at(path).facts.get("release")):
        return path
    logger.warning("%s is released without weights: there is no %s", bundle.name, path)
    return None


def _configs(bundle: Path) -> dict[str, dict[str, Any]]:
    """Read a bundle's configs; metadata, changelog and every config's guard must name the package's own version."""
    configs = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in bundle.glob("configs/*.json")}
    complete = {name: one for name, one in configs.items() if isinstance(one.get("path_setup"), dict)}
    guards = {name: one["path_setup"]["version"] for name, one in complete.items()}
    metadata = configs.get("metadata.json", {})
    for name, version in {"metadata.json": metadata.get("version"), **guards}.items():
        if version != __version__:
            file = bundle / "configs" / name
            raise PackingError(f"{file} says version {version}, `custom` is {__version__}: make them agree")
    if __version__ not in metadata.get("changelog", {}):
        raise PackingError(f"{bundle / 'configs' / 'metadata.json'} has no changelog for {__version__}: write one")
    return configs


def _with_settings(config: dict[str, Any], facts: Mapping[str, Any]) -> bytes:
    """Write into a complete config what the weights were made with; overlays and metadata stay as they are."""
    if "path_setup" in config:
        config |= {key: facts[key] for key in (*TRUSTED, *NUMBERS) if key in facts and key in config}
    return config_text(config).encode()


def config_text(config: Any, width: int = 120) -> str:
    """Write a config as this repository's are written: JSON, one line for whatever fits into one."""
    return _json_lines(config, "", width - 1) + "\n"


def _json_lines(node: Any, before: str, width: int) -> str:
    """Lay out a node; ``before`` is what stands on its first line already, where that is not the first of all."""
    line = json.dumps(node, ensure_ascii=False)
    if not isinstance(node, (dict, list)) or (before and len(before) + len(line) <= width):
        return line
    outer = " " * (len(before) - len(before.lstrip()))
    inner = outer + "    "
    opening, closing = ("{", "}") if isinstance(node, dict) else ("[", "]")
    keys = [json.dumps(key, ensure_ascii=False) + ": " for key in node] if isinstance(node, dict) else [""] * len(node)
    values = node.values() if isinstance(node, dict) else node
    parts = [inner + key + _json_lines(value, inner + key, width) for key, value in zip(keys, values, strict=True)]
    return f"{opening}\n" + ",\n".join(parts) + f"\n{outer}{closing}"


def _as_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()  # not a path: PyTorch would write the name of the file into it
    torch.save(content, buffer)
    return buffer.getvalue()


def _large_files(bundle: str, content: bytes, base_url: str) -> bytes:
    entry = {
        "path": "models/model.pt",
        "url": f"{base_url}{bundle}_v{__version__}_model.pt",
        "hash_val": hashlib.sha256(content).hexdigest(),
        "hash_type": "sha256",
    }
    lines = [f"{'- ' if key == 'path' else '  '}{key}: {json.dumps(value)}" for key, value in entry.items()]
    return "\n".join(["large_files:", *lines, ""]).encode()


def _model_info(earlier: Path, output: Path, written: list[str], base_url: str) -> dict[str, dict[str, str]]:
    """Describe the zips, and those of earlier releases, as the GitHub source of `monai.bundle.download` reads them."""
    info = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    zips = [name for name in written if name.endswith(".zip")]
    facts = {name: {"checksum": file_sha256(output / name), "source": base_url + name} for name in zips}
    return info | {name.removesuffix(".zip"): fact for name, fact in facts.items()}
