"""Files that are written whole or not at all, and the errors that are meant for users."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """What a user can mend; the message says what is wrong, where, and what to do.

    All errors meant for users derive from it: only these are told in one line, anything else keeps its traceback.
    """


class FileError(OSError, UserError):
    """A file or folder that is absent, or cannot be read or written."""

    def __str__(self) -> str:
        """The message, without the number that `OSError` puts before it."""
        return str(self.args[-1])


def option_values(option: str, value: Any, expected: str, fits: Callable[[Any], bool], counts: Sequence[int]) -> tuple:
    """Return the values of an option, of which a single one needs no brackets.

    Args:
        option: its name, for the message.
        value: what was given.
        expected: what to give, for the message.
        fits: whether one value is as it should be.
        counts: how many values there may be.

    Raises:
        UserError: there are more or fewer values, or one does not fit.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and PyTorch's
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(found) not in counts or not all(map(fits, found)):
        raise UserError(f"{option} is {value!r}: give {expected}")
    return found


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether a value is a number, `True` and `False` being none, from `least` to `most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


PARTIAL = ".partial-"


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it.

    Raises:
        FileError: it cannot be made; the message names it and says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> FileError:
    told = f"cannot write to {folder} ({error.strerror}): choose another folder or mend its permissions"
    return FileError(error.errno, told)


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or a user's share of it, that is full."""


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it takes that name only when the block ends without an error.

    The temporary name keeps the extension (``.nii.gz``, ``.png``), by which writers choose a format, and starts with a
    dot. Whatever stops the block, no file named ``path`` is ever half written.

    Raises:
        FileError: the folder cannot be made or written, or the disk is full; the message says which, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(errno.EISDIR, f"{path} is a folder: choose another name for the file, or move the folder away")
    temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}-{path.name}")
    make_folder(path.parent)
    try:
        temporary.touch()
    except OSError as error:
        raise _cannot_write(path.parent, error) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FileError(
            error.errno, f"no space is left in {path.parent}: make room, then run the same again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


BATCH_MARK = "weights.txt"
"""In a folder of results; it says what weights made them."""


def is_batch(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is marked as one of results of this package."""
    try:
        return "\nsha256 " in Path(folder, BATCH_MARK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


_LOCKS: dict[str, int] = {}


def lock_folder(folder: str | Path) -> None:
    """Keep other processes from working in ``folder`` until this one ends, however it ends.

    The lock hangs on the folder itself: no file of it can be left behind. Where the system has no such locks (Windows,
    some network drives) nothing is kept out.

    Raises:
        FileError: another process is working there.
    """
    try:
        import fcntl
    except ImportError:
        return
    place = os.path.realpath(folder)
    if place in _LOCKS:
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise FileError(error.errno, f"another process is working in {folder}: wait for it") from error
    except OSError:
        os.close(handle)
        return
    _LOCKS[place] = handle


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all; of names that are no UTF-8 the strange bytes stand as escapes."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_table(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header and one line a row, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
