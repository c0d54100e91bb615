"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it takes that name only when the block ends without an error.

    The temporary name keeps the extension (``.nii.gz``, ``.png``), by which writers choose a format, and starts with a
    dot. Whatever stops the block, no file named ``path`` is ever half written.

    Raises:
        OSError: the folder cannot be made or written; the message names it and says what to do.
    """
    path = Path(path)
    temporary = path.with_name(f".partial-{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        advice = f"cannot write to {path.parent} ({error.strerror}): choose another folder or mend its permissions"
        raise OSError(error.errno, advice) from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
