"""One self-contained HTML page: shell, style, and the few elements that the reports are built of.

Functions that return HTML escape every text they are given.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESEARCH_USE = "Research use only. Not a medical device: not for diagnosis, treatment or any other clinical decision."
PICTURE_QUALITY = 88


class Html(str):
    """Text that is HTML already and is not escaped again."""


def text(value: Any) -> Html:
    """Escapes anything but `Html`."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def name_of(name: str) -> Html:
    """A short name that is not broken over two lines."""
    return Html(f'<span class="name">{text(name)}</span>')


def join(parts: Iterable[str]) -> Html:
    """HTML pieces one after the other; plain text among them is escaped."""
    return Html("\n".join(text(part) for part in parts))


def section(heading: str, *parts: str) -> Html:
    """A section with its heading, or nothing when it has no content."""
    return Html(f"<section>\n<h2>{text(heading)}</h2>\n{join(parts)}\n</section>") if any(parts) else Html("")


def banner(*lines: str) -> Html:
    """A highlighted box that must not be overlooked."""
    return Html(f'<div class="banner" role="note">{"".join(f"<p>{text(line)}</p>" for line in lines if line)}</div>')


def weights_line(note: str) -> str:
    """What is known of the weights, as a sentence for the banner."""
    if not note:
        return "Weights: nothing is known about what they were trained on."
    return note[0].upper() + note[1:] if note.lower().startswith("weights") else f"Weights: {note}"


def cards(facts: Mapping[str, Any]) -> Html:
    """Large numbers with their names."""
    items = (f"<div><dd>{text(value)}</dd><dt>{text(name)}</dt></div>" for name, value in facts.items())
    return Html(f'<dl class="cards">{"".join(items)}</dl>')


def bullets(lines: Iterable[str], css_class: str = "") -> Html:
    """A list, or nothing when there are no lines."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines if line)
    return Html(f'<ul class="{escape(css_class)}">{items}</ul>') if items else Html("")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, sortable: bool = False) -> Html:
    """A table whose first column heads its rows; numbers come as formatted text. Nothing when there are no rows."""
    if not rows:
        return Html("")
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "\n".join(
        f'<tr><th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    css_class = ' class="sortable"' if sortable else ""
    return Html(
        f'<div class="scroll"><table{css_class}>\n<caption>{text(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(source: str | os.PathLike[str] | Figure, alt: str, caption: str = "") -> Html:
    """A picture inside the page; a file that cannot be read leaves a sentence that says so."""
    try:
        address = _as_jpeg(source) if isinstance(source, (str, os.PathLike)) else _as_png(source)
    except OSError as error:
        return Html(f'<p class="missing">{text(f"No picture: {error}")}</p>')
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img src="{address}" alt="{text(alt)}">{below}</figure>')


def anchor(name: str) -> str:
    """Identifier within the page for a subject's name."""
    return "subject-" + re.sub(r"\W", lambda match: f"_{ord(match[0]):x}", name)


def write_page(path: str | os.PathLike[str], title: str, *parts: str) -> None:
    """Writes a page, whole or not at all; it holds its style, script and pictures and asks no network for anything."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    page = TEMPLATE.substitute(
        title=text(title), body=join(parts), style=STYLE, script=SCRIPT, footer=text(f"CoMNeT {__version__}, {now}")
    )
    write_text(path, page)


def _as_jpeg(path: str | os.PathLike[str]) -> str:
    from PIL import Image

    content = io.BytesIO()
    with Image.open(Path(path)) as image:
        image.convert("RGB").save(content, format="JPEG", quality=PICTURE_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _as_png(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


TEMPLATE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
<footer>$footer</footer>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { --ink: #1d232a; --faint: #5b6570; --line: #dfe3e8; --accent: #0b5c94; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, Roboto, Arial, sans-serif; }
main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
h1 { font-size: 1.8rem; margin: 1.5rem 0 .75rem; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .3rem; }
p { margin: .4rem 0; }
a { color: var(--accent); }
.banner { border: 1px solid #e0a100; border-left-width: 6px; border-radius: 4px; padding: .5rem 1rem; }
.banner { background: #fff6dc; }
.banner p:first-child { font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.cards div { flex: 1 1 8rem; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; }
.cards dd { margin: 0; font-size: 1.7rem; font-weight: 600; }
.cards dt { color: var(--faint); }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .35rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { overflow-wrap: break-word; }
.name { white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; }
th[scope="row"] { font-weight: 600; }
.sortable thead button { all: unset; cursor: pointer; }
.sortable thead button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort="ascending"] button::after { content: " \\25B2"; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
.warnings { margin: .4rem 0; padding-left: 1.2rem; color: #8a4b00; }
.missing { color: #a3262a; }
figure { margin: .5rem 0; break-inside: avoid; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { color: var(--faint); font-size: .92rem; }
details summary { cursor: pointer; }
article { break-inside: avoid; }
footer { color: var(--faint); font-size: .85rem; margin: 2.5rem auto 1.5rem; }
@media print { body { font-size: 11pt; } h2, h3 { break-after: avoid; } .banner { print-color-adjust: exact; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table')) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].textContent.trim();
  const isNumber = s => s !== '' && !Number.isNaN(parseFloat(s)) && /^[-+.\\d]/.test(s);
  heads.forEach((head, i) => {
    const texts = rows.map(row => value(row, i)).filter(s => s !== '' && s !== '\\u2013');
    const numeric = i > 0 && texts.length > 0 && texts.every(isNumber);
    if (numeric) [head, ...rows.map(row => row.cells[i])].forEach(cell => cell.classList.add('number'));
    if (!table.classList.contains('sortable')) return;
    const button = document.createElement('button');
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = s => Number.isNaN(parseFloat(s)) ? -Infinity : parseFloat(s);
      const order = (a, b) => numeric ? key(value(a, i)) - key(value(b, i)) : value(a, i).localeCompare(value(b, i));
      rows.sort((a, b) => (up ? 1 : -1) * order(a, b)).forEach(row => table.tBodies[0].append(row));
    });
  });
}
"""
