"""The subjects one by one: worst first, every model beside the picture."""

from __future__ import annotations

import json

import pytest

from custom.report import write_crossval_report


@pytest.fixture
def run(tmp_path, three_models, pictures):
    """Three models on five subjects, with CoMNeT's QC pictures of all but b; it missed the core of c."""
    for score in three_models:
        name, key = score["subject"], score["model"].lower()
        missed = {"TC_volume_ml": 0.4, "TC_reference_ml": 4.0} if (name, key) == ("c", "comnet") else {}
        folder = tmp_path / "RUN" / key / "scores" / name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"scores": score | missed}))
        if key == "comnet" and name != "b":
            (folder / f"{name}_qc.png").write_bytes(pictures["a"].read_bytes())
    return tmp_path / "RUN"


@pytest.fixture
def shown(run, read_page):
    """The gallery of the run's page with so many pictures."""

    def show(num_pictures):
        html = write_crossval_report(run, num_pictures=num_pictures).read_text(encoding="utf-8")
        start = html.index("<h2>Worst cases first")
        (run / "gallery.html").write_text(html[start : html.index("</section>", start)], encoding="utf-8")
        return read_page(run / "gallery.html")

    return show


def test_worst_first_with_every_model(shown):
    page = shown(30)
    assert page.values("h3", "id") == [f"subject-{name}" for name in "cdbea"]
    assert page.values("a", "href") == [f"#subject-{name}" for name in "cdbea"]
    assert page.rows() == (1 + 5) + 5 * (1 + 3)
    assert page.texts.count("TC missed: 0.1 of 4.0 ml found") == 2, "in the table and beside the picture"
    assert page.texts.count("Nothing stands out in volumes and distances.") == 4


def test_a_region_rightly_left_empty_does_not_count(shown):
    texts = shown(1).texts
    own = texts[texts.index("The worst 1 of 5 subjects are shown one by one; scores.csv holds all.") :]
    assert own[own.index("CoMNeT") :][1:5] == ["–", "0.0520", "0.2520", "0.1520"], "c has no ET, rightly"
    assert "0.152" in texts


def test_pictures_and_the_lack_of_one(shown):
    page = shown(30)
    assert len(page.values("img", "src")) == 4 and all(
        one.startswith("data:image/jpeg") for one in page.values("img", "src")
    )
    assert sum(text.startswith("No picture: ") for text in page.texts) == 1


def test_only_the_worst_get_pictures(shown):
    page = shown(2)
    assert page.values("h3", "id") == ["subject-c", "subject-d"] == [one[1:] for one in page.values("a", "href")]
    assert {"a", "b", "e"} <= set(page.texts), "all are in the table"
