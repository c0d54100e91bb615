"""How the tests run bundles."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import monai.bundle
import pytest

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
GEOMETRY = {"shape": (32, 36, 32), "spacing": (5.0, 5.0, 5.0)}
TINY = {
    "backbone": "custom.mednext.mednext_tiny",
    "spacing": [5.0, 5.0, 5.0],
    "patch_size": [32, 32, 32],
    "max_epochs": 2,
    "warmup_epochs": 1,
    "learning_rate": 0.003,
    "num_workers": 0,
    "cache_rate": 1.0,
}


def run(bundle: str, *configs: str, run_id: str = "run", **overrides) -> None:
    """Run a bundle's configs in this process, as `python -m monai.bundle run` does."""
    root = BUNDLES / bundle
    files = [str(root / "configs" / name) for name in configs]
    monai.bundle.run(run_id=run_id, config_file=files, workflow_type=None, bundle_root=str(root), **overrides)


@contextmanager
def fails_with(kind: type[Exception], match: str) -> Iterator[None]:
    """Like `pytest.raises`, for the error that MONAI wraps in one of its own."""

    @contextmanager
    def unwrapped() -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise error.__cause__ or error from None

    with pytest.raises(kind, match=match), unwrapped():
        yield


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; yields the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def monai_bundle(bare: dict[str, str], *words: object, code: str = "", fails: bool = False) -> str:
    """Run `python -m monai.bundle` from `/`; `-S` leaves out the .pth files by which `custom` would be installed."""
    start = ["-c", code] if code else ["-m", "monai.bundle"]
    command = [sys.executable, "-S", *start, *map(str, words)]
    result = subprocess.run(command, cwd="/", env=bare, capture_output=True, text=True, timeout=600)
    assert (result.returncode != 0) == fails, (result.stdout + result.stderr)[-3000:]
    return result.stdout + result.stderr
