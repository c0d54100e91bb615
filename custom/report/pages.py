"""HTML pages that stand alone: the templates beside this file, what they show, and pictures put into the page."""

from __future__ import annotations

import base64
import functools
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

PICTURE_QUALITY = 88


class Cell(NamedTuple):
    """A cell of a table that is more than text: bold, or a link to a subject's place on the page."""

    text: str
    bold: bool = False
    subject: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column heads its rows; cells are text, numbers as they are to be read, or `Cell`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str
    sortable: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture as a data URL, or why there is none."""

    alt: str
    caption: str = ""
    address: str = ""
    missing: str = ""


def write_page(path: str | os.PathLike[str], template: str, **content: Any) -> None:
    """Writes a page, whole or not at all; it holds its style, script and pictures and asks no network for anything.

    `template` is the name of a file in `templates`; what it shows is `content`, all of which is escaped there.

    Raises:
        ImportError: jinja2 is not installed.
        OSError: the file cannot be written.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    write_text(path, environment().get_template(template).render(**content, version=__version__, now=now) + "\n")


@functools.cache
def environment() -> Environment:
    """jinja2 with our templates; what a template is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["anchor"] = anchor
    found.tests["cell"] = lambda value: isinstance(value, Cell)
    return found


def anchor(name: str) -> str:
    """Identifier within the page for a subject's name."""
    return "subject-" + re.sub(r"\W", lambda match: f"_{ord(match[0]):x}", name)


def picture(source: str | os.PathLike[str] | Figure, alt: str, caption: str = "") -> Picture:
    """A picture to be put into a page: a file as JPEG, a figure as PNG; a file that cannot be read is said to be so."""
    content, kind = io.BytesIO(), "jpeg"
    try:
        if isinstance(source, (str, os.PathLike)):
            from PIL import Image

            with Image.open(Path(source)) as image:
                image.convert("RGB").save(content, format="JPEG", quality=PICTURE_QUALITY, optimize=True)
        else:
            kind = "png"
            source.savefig(content, format="png")
    except OSError as error:
        return Picture(alt, caption, missing=f"No picture: {error}")
    return Picture(alt, caption, address=f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}")


def weights_line(note: str) -> str:
    """What is known of the weights, as a sentence for the top of a page."""
    if not note:
        return "Weights: nothing is known about what they were trained on."
    return note[0].upper() + note[1:] if note.lower().startswith("weights") else f"Weights: {note}"
