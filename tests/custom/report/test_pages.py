"""Pages: what is escaped, what is asked for and absent, and what is imported when."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jinja2 import UndefinedError

from custom.report.pages import Cell, Table, anchor, environment, write_page


def test_cells_are_escaped_whatever_they_are(render) -> None:
    evil = "<b onclick='x'>&"
    html = render(Table((evil, "Model"), [[Cell(evil, subject=evil), Cell(evil, bold=True)], [1, evil]], evil))
    assert "<b" not in html and html.count("&lt;b onclick=&#39;x&#39;&gt;&amp;") == 5
    assert f'<a href="#{anchor(evil)}">' in html and "<strong>&lt;b" in html


def test_nothing_is_shown_of_a_table_without_rows(render) -> None:
    assert render(Table(("a", "b"), [], "caption")) == ""


def test_what_a_template_is_not_given_is_an_error_and_no_page(tmp_path) -> None:
    with pytest.raises(UndefinedError, match="'notes' is undefined"):
        write_page(tmp_path / "page.html", "segment.html", title="a")
    assert not list(tmp_path.iterdir())


def test_every_template_is_complete() -> None:
    names = environment().list_templates()
    assert names == ["base.html", "elements.html", "scores.html", "segment.html"]
    assert all(environment().get_template(name) for name in names)


@pytest.mark.slow
def test_a_segmentation_without_pictures_needs_none_of_what_draws_them() -> None:
    absent = ("jinja2", "pandas", "matplotlib", "PIL")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import custom.batch, custom.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
