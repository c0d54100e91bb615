"""The report on one segmentation run: what failed and why, volumes, and a picture of every subject."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from ..cohort import REGIONS
from .page import (
    RESEARCH_USE,
    Html,
    anchor,
    banner,
    bullets,
    cards,
    picture,
    section,
    table,
    text,
    weights_line,
    write_page,
)
from .panels import REGION_NAMES

DONE = "done"
REGION_KEY = "ET: enhancing tumour. TC: ET with necrosis and non-enhancing core. WT: TC with oedema."


def write_segment_report(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    exclusions: Sequence[Any] = (),
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "CoMNeT: segmentation report",
) -> None:
    """Writes one self-contained HTML page about a segmentation run.

    Args:
        path: HTML file to write, whole or not at all.
        rows: one dict per subject as for `write_volumes_csv`; `status` is "done" for a subject that was segmented.
        exclusions: subjects that were left out or failed: `Exclusion`s, or dicts with subject, file, reason and remedy.
        pictures: path of the QC picture by subject; pictures are embedded as JPEG.
        settings: shown as a table; "weights_note" goes to the top of the page.
        title: title of the page.
    """
    settings, pictures = dict(settings or {}), pictures or {}
    done = [row for row in rows if row.get("status") == DONE]
    failures = _failures(rows, exclusions)
    note = str(settings.get("weights_note") or next((row["weights"] for row in done if row.get("weights")), ""))
    write_page(
        path,
        title,
        banner(RESEARCH_USE, weights_line(note)),
        cards(
            {
                "segmented": len(done),
                "failed or left out": len(failures),
                "with warnings": sum(bool(_warnings(row)) for row in done),
            }
        ),
        section("Not segmented", _failure_table(failures)),
        section("Volumes", _volume_table(done), REGION_KEY if done else ""),
        section("Subjects", *(_subject(row, pictures.get(str(row["subject"]))) for row in done)),
        section("Settings", table(("setting", "value"), list(settings.items()), "What the result depends on")),
    )


def _failures(rows: Sequence[Mapping[str, Any]], exclusions: Sequence[Any]) -> list[Mapping[str, Any]]:
    failures = [asdict(one) if is_dataclass(one) else one for one in exclusions]
    named = {str(one["subject"]) for one in failures}
    unnamed = [row for row in rows if row.get("status") != DONE and str(row["subject"]) not in named]
    return failures + [{"subject": row["subject"], "reason": "; ".join(_warnings(row))} for row in unnamed]


def _failure_table(failures: Sequence[Mapping[str, Any]]) -> Html:
    rows = [[one["subject"], one.get("reason", ""), one.get("remedy", ""), one.get("file", "")] for one in failures]
    return table(("subject", "reason", "what to do", "file"), rows, "Subjects with no result")


def _volume_table(done: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for row in done:
        name = str(row["subject"])
        link = Html(f'<a href="#{anchor(name)}">{text(name)}</a>')
        rows.append([link, *_volumes(row), _number(row.get("seconds"), 1), "; ".join(_warnings(row))])
    columns = ("subject", *(f"{region} [ml]" for region in REGIONS), "time [s]", "warnings")
    return table(columns, rows, "Click a heading to sort", sortable=True)


def _subject(row: Mapping[str, Any], path: str | os.PathLike[str] | None) -> Html:
    name = str(row["subject"])
    volumes = ", ".join(f"{region} {value} ml" for region, value in zip(REGIONS, _volumes(row), strict=True))
    regions = ", ".join(REGION_NAMES[region] for region in REGIONS)
    alt = f"{name}: T1c and T2-FLAIR in three planes with outlines of {regions}. Volumes: {volumes}."
    shown = picture(path, alt) if path is not None else Html('<p class="missing">No picture was drawn.</p>')
    heading = f'<h3 id="{anchor(name)}">{text(name)}</h3>'
    return Html(f"<article>{heading}<p>{text(volumes)}</p>{bullets(_warnings(row), 'warnings')}{shown}</article>")


def _volumes(row: Mapping[str, Any]) -> list[str]:
    return [_number(row.get(f"{region.lower()}_ml"), 2) for region in REGIONS]


def _warnings(row: Mapping[str, Any]) -> list[str]:
    warnings = row.get("warnings") or []
    return [one for one in ([warnings] if isinstance(warnings, str) else map(str, warnings)) if one]


def _number(value: Any, decimals: int) -> str:
    return "–" if value is None else f"{float(value):.{decimals}f}"
