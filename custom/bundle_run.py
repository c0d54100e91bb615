"""How this package runs a bundle: as ``python -m monai.bundle run`` does, with the command in sight."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import platform
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fire.parser import DefaultParseValue

from .files import FileError, UserError, write_text

if TYPE_CHECKING:
    from .weights import Weights

FAULT_LOG = "comnet-error.log"
NOT_LOCATED = "Cannot locate class or function path"
"""What MONAI says where a config, or who overrules it, names something that is not there."""


NOT_NEEDED = (
    *("matplotlib", "pandas", "tensorboard", "tensorboardX", "torch.utils.tensorboard", "mlflow"),
    *("skimage", "scipy.signal", "pydicom"),
)
"""What MONAI imports, where it is installed, to offer plots, profiles, logs, and readers and filters of images."""


def import_monai_lean() -> None:
    """Import MONAI without what a segmentation never asks of it: two thirds of the time beyond PyTorch's.

    For processes that train nothing. The libraries themselves can be imported as ever afterwards; only what MONAI
    builds on them is not there. The garbage collector is kept from what is imported, now and when the process ends:
    it would look through it many times, and none of it is garbage.
    """
    if "monai" in sys.modules:
        return
    absent: dict[str, Any] = {}
    gc.disable()
    try:
        import torch  # noqa: F401

        absent |= {name: None for name in NOT_NEEDED if name not in sys.modules}  # `None`: not installed
        sharded = "torch.distributed.optim"  # Ignite takes a class from there, and SymPy with it, to know optimisers
        if sharded not in sys.modules:
            absent[sharded] = SimpleNamespace(ZeroRedundancyOptimizer=type("ZeroRedundancyOptimizer", (), {}))
        sys.modules.update(absent)
        import monai.bundle  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]
        gc.freeze()
        gc.enable()


def reuse_memory() -> None:
    """Have glibc keep large blocks that are freed for the next image, rather than hand them back to the system.

    The system clears each page of memory that it hands out: a third of the processor time of a segmentation. Where
    the C library is another one, nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        never_by_mmap, trim_above_256_mb = (-4, 0), (-1, 2**28)  # M_MMAP_MAX, M_TRIM_THRESHOLD in malloc.h
        for option in (never_by_mmap, trim_above_256_mb):
            ctypes.CDLL(None).mallopt(*option)


def bundle_root(name: str) -> Path:
    """Return the folder of a bundle: inside the installed package, else beside it in the repository."""
    package = Path(__file__).resolve().parent
    for bundles in (package / "bundles", package.parent / "bundles"):
        if (bundles / name / "configs").is_dir():
            return bundles / name
    raise FileError(f"bundle {name} is not installed: run from the repository or install the package again")


def config_files(name: str, configs: Iterable[str | Path]) -> list[Path]:
    """Return the paths of configs: a `Path` stays, a name is that of a file in the bundle's ``configs``."""
    folder = bundle_root(name) / "configs"
    return [config if isinstance(config, Path) else folder / config for config in configs]


def run_bundle(name: str, *configs: str | Path, run_id: str = "run", **overrides: Any) -> None:
    """Print and run ``python -m monai.bundle run`` for a bundle.

    Args:
        name: bundle, e.g. ``"comnet_ensemble"``.
        configs: files as in `config_files`; each is laid over those before it.
        run_id: what to run.
        overrides: config values by name; a `Path`, also in a list or dict, stays text whatever it looks like.

    Raises:
        UserError: an override that no config knows, which MONAI would take in silence.
    """
    import monai.bundle

    for chatty in ("monai.bundle.scripts", "monai.bundle.workflows"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="parsing config_file", category=UserWarning)  # our own configs

    files = [str(file) for file in config_files(name, configs)]
    refuse_unknown(overrides, files)
    print(bundle_command(name, *configs, run_id=run_id, **overrides), file=sys.stderr, flush=True)
    values = {key: config_value(value) for key, value in overrides.items()}
    root = config_value(bundle_root(name))
    monai.bundle.run(run_id=run_id, config_file=files, workflow_type=None, **({"bundle_root": root} | values))


def bundle_command(name: str, *configs: str | Path, run_id: str = "run", **overrides: Any) -> str:
    """Return the shell command that does the same as `run_bundle`, from the working folder."""
    files = [os.path.relpath(file) for file in config_files(name, configs)]
    words = ["python", "-m", "monai.bundle", "run", *([] if run_id == "run" else [run_id])]
    words += ["--config_file", files[0] if len(files) == 1 else str(files)]
    for key, value in ({"bundle_root": bundle_root(name)} | overrides).items():
        words += [f"--{key}", str(config_value(Path(os.path.relpath(value)) if isinstance(value, Path) else value))]
    return " ".join(map(_quoted, words))


def ensemble_settings(weights: Weights, device: str | None = None) -> dict[str, Any]:
    """Return the values of comnet_ensemble's inference.json that follow from weights and device.

    Raises:
        CheckpointError: there are no weights, they cannot be read, or they name a network that is none of CoMNeT's.
        UserError: there is no such device.
    """
    settings = weights.settings
    if "corrector" not in settings:  # MONAI drops an override of None
        settings |= {"corrector": "$None", "network_def#corrector": "$None", "batch#model": "MedNeXt ensemble"}
    if device:
        import torch

        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise UserError(f"no device {device!r}: give cpu, cuda or cuda:1") from error
        if kind not in ("cpu", "cuda"):
            raise UserError(f"no device {device!r}: give cpu, cuda or cuda:1")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
        settings["device"] = f"$torch.device('{device}')"
    return settings


def config_value(value: Any) -> Any:
    """Return what a config takes a value for, with every `Path` as text that neither MONAI nor Fire reads otherwise.

    MONAI's configs give a meaning to ``#``, ``@``, ``%`` and ``$`` in a text. Fire, which reads MONAI's command line
    too, takes ``2023_01`` for a number and ``a,b`` for a tuple. Such a text becomes an expression that yields it.
    """
    if isinstance(value, Mapping):
        return {key: config_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [config_value(one) for one in value]
    if not isinstance(value, Path):
        return value
    text = str(value)
    if not set(text) & set("#@%$") and DefaultParseValue(text) == text:
        return text
    return "$" + "".join(f"\\x{ord(sign):02x}" if sign in "#@%$" else sign for sign in repr(text))


def _quoted(word: str) -> str:
    """Quote for a shell, with double quotes round lists of file names, so that people can read them."""
    quoted = shlex.quote(word)
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else quoted


def known_error(error: BaseException) -> UserError | None:
    """Find what is meant for users in an error or what caused it; ``None`` if it is a fault of ours."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, UserError):
        if isinstance(found, ModuleNotFoundError) and str(found).startswith(NOT_LOCATED):
            name = str(found).removeprefix(NOT_LOCATED).strip(" :.")
            return UserError(f"there is no {name}: give its whole name, in the option or config that has this one")
        found = found.__cause__
    return found


def known_reason(error: BaseException) -> str | None:
    """Return the message of `known_error`."""
    return None if (known := known_error(error)) is None else str(known)


@contextmanager
def plainly() -> Iterator[None]:
    """Raise an error that is meant for users as it is, not as MONAI wraps it."""
    try:
        yield
    except Exception as error:
        if (known := known_error(error)) is None or known is error:
            raise
        raise known from None


def log_fault(error: BaseException, folder: str | Path) -> str:
    """Keep the traceback of a fault of ours in ``<folder>/comnet-error.log``; return what to tell the user."""
    story = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for place in (Path(folder), Path.cwd()):
        try:
            write_text(place / FAULT_LOG, story)
        except OSError:
            continue
        return f"{what}\ncomnet: this is no mistake of yours; its traceback is in {place / FAULT_LOG}"
    return f"{what}\n{story}"


def refuse_unknown(overrides: Mapping[str, Any], files: Sequence[str]) -> None:
    """Refuse values that no config knows, which MONAI would take in silence."""
    known = {key.split("#")[0] for file in files for key in json.loads(Path(file).read_text(encoding="utf-8"))}
    unknown = [key for key in overrides if key.split("#")[0] not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, n=3)
        advice = f"did you mean --{' or --'.join(close)}?" if close else f"options are the names in {files[0]}"
        raise UserError(f"unknown option --{unknown[0]}: {advice}")
