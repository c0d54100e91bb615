"""Fixtures shared by the tests of reports: a brain on disk, scores, and a reader of pages."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

from custom.report import write_qc_picture
from custom.report.pages import environment

SPACING = (1.0, 1.5, 3.0)
SHAPE = (40, 50, 20)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find in a page; stops at tags that are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if data.strip() and self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data.strip())

    def values(self, tag, name):
        return [attributes[name] for one, attributes in self.attributes if one == tag and name in attributes]

    def rows(self):
        return self.source.count("<tr>")


@pytest.fixture
def read_page():
    """Turns the path of a page into a `Page`."""
    return Page


@pytest.fixture(scope="session")
def render():
    """HTML of a table by the macro that all pages use, without the space between elements."""

    def html(table):
        source = '{% from "elements.html" import table %}{{ table(one) }}'
        return "".join(line.strip() for line in environment().from_string(source).render(one=table).splitlines())

    return html


@pytest.fixture
def brain():
    """Images [4, X, Y, Z] and a label map with the tumour on the right, in front and on top (RAS axes)."""
    images = np.zeros((4, *SHAPE), np.float32)
    images[:, 4:36, 5:45, 3:17] = np.random.default_rng(0).uniform(50, 100, (4, 32, 40, 14))
    label_map = np.zeros(SHAPE, np.uint8)
    label_map[26:34, 30:40, 11:16] = 2
    label_map[24:34, 28:40, 13] = 2
    label_map[28:33, 32:38, 12:15] = 1
    label_map[29:32, 33:36, 13] = 3
    return images, label_map


@pytest.fixture
def files(tmp_path, brain):
    """Paths of four images and a label map, stored as LPS."""
    images, label_map = brain
    affine = np.diag([*SPACING, 1.0])
    to_lps = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", "LPS")))
    paths = []
    for name, voxels in [*((f"image{i}", image) for i, image in enumerate(images)), ("label", label_map)]:
        path = tmp_path / f"{name}.nii.gz"
        nib.Nifti1Image(voxels, affine).as_reoriented(to_lps).to_filename(path)
        paths.append(path)
    return paths[:4], paths[4]


@pytest.fixture
def pictures(tmp_path, files):
    path = tmp_path / "a_qc.png"
    write_qc_picture(path, *files, title="a")
    return {"a": path}


@pytest.fixture
def rows():
    return [
        {"subject": "a", "et_ml": 1.23456, "tc_ml": 20, "wt_ml": 30.5, "status": "done", "seconds": 12, "warnings": ""},
        {"subject": "b", "et_ml": 0.0, "tc_ml": 0.0, "wt_ml": 7.0, "status": "done", "seconds": 3.5,
         "warnings": ["no ET", "thin slices"], "weights": "trained on phantoms only"},
        {"subject": "c<script>", "status": "failed", "seconds": 0.1, "warnings": "truncated & unreadable"},
    ]  # fmt: skip


@pytest.fixture
def scores():
    """Two folds of two subjects, of which the second has no ET."""
    values = {
        ("plain", 0): [(0.6, 0.7, 0.8), (math.nan, 0.5, 0.9)],
        ("plain", 1): [(0.8, 0.5, 0.9), (math.nan, 0.5, 0.9)],
        ("refined", 0): [(0.9, 0.7, 0.8), (math.nan, 0.6, 0.9)],
        ("refined", 1): [(0.7, 0.8, 0.9), (math.nan, 0.7, 0.9)],
    }
    return [
        {"model": model, "fold": fold, "subject": f"s{fold}{i}", "ET": et, "TC": tc, "WT": wt}
        for (model, fold), subjects in values.items()
        for i, (et, tc, wt) in enumerate(subjects)
    ]


@pytest.fixture(scope="session")
def make_score():
    """Writes one flat row of scores; a region's Dice of None is a region rightly left empty."""
    return _score


def _score(model, fold, subject, dice, **more):
    row = {"model": model, "fold": fold, "subject": subject}
    for region, value in zip(("ET", "TC", "WT"), dice, strict=True):
        row |= {f"{region}_dice": math.nan if value is None else value}
        row |= {f"{region}_dice_brats": 1.0 if value is None else value}
    for name in ("dice", "dice_brats"):
        values = [row[f"{region}_{name}"] for region in ("ET", "TC", "WT")]
        defined = [value for value in values if not math.isnan(value)]
        row[f"mean_{name}"] = sum(defined) / len(defined) if defined else math.nan
    return row | more


@pytest.fixture(scope="session")
def three_models(make_score):
    """SegResNet, MedNeXt and CoMNeT on five subjects of five folds; c has no ET and is the worst."""
    dice = {
        "a": (0.8, 0.7, 0.9),
        "b": (0.6, 0.6, 0.8),
        "c": (None, 0.1, 0.2),
        "d": (0.5, 0.7, 0.7),
        "e": (0.4, 0.8, 0.9),
    }
    gains = {"SegResNet": (0, 0, 0), "MedNeXt": (0.02, -0.03, 0.05), "CoMNeT": (0.06, -0.05, 0.05)}
    return [
        make_score(
            model, fold, name, [None if d is None else d + g + 0.001 * fold for d, g in zip(values, gain, strict=True)]
        )
        for model, gain in gains.items()
        for fold, (name, values) in enumerate(dice.items())
    ]
