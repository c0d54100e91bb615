"""How the tests run bundles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
