"""One process, one `custom`: a bundle refuses to run on the package of another release or another build."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from . import __version__
from .files import file_sha256

PACKAGE = Path(__file__).resolve().parent


class VersionError(ImportError):
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
    if version != __version__:
        difference = f"needs `custom` {version}, but {__version__}"
    elif _is_other_package(own) and package_digest(own) != package_digest(PACKAGE):
        difference = f"carries another build of `custom` {version} than the one that"
    else:
        return version
    raise VersionError(
        f"the bundle in {os.path.abspath(bundle_root)} {difference} was imported from {PACKAGE}: use bundles of one "
        "release, or run them in separate processes"
    )


def package_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Map the names of a package's source files, with forward slashes and in order, to the files themselves."""
    return dict(sorted((path.relative_to(package).as_posix(), path) for path in package.rglob("*.py")))


def package_digest(package: Path) -> str:
    """Return one SHA-256 over the names and contents of a package's source files."""
    digest = hashlib.sha256()
    for name, path in package_files(package).items():
        digest.update(f"{name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()


def _is_other_package(own: Path) -> bool:
    return (own / "__init__.py").is_file() and own.resolve() != PACKAGE
