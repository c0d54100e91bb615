"""Reports: the picture shows the tumour where it is, pages stand alone, tables hold what they were given."""

from __future__ import annotations

import csv
import math
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from custom.cohort import Exclusion
from custom.metrics import score_subject
from custom.report import (
    REGION_COLOURS,
    dice_bars,
    dice_of,
    fold_strip,
    qc_figure,
    region_volumes,
    summarise_scores,
    tumour_slices,
    write_qc_picture,
    write_scores_report,
    write_segment_report,
    write_volumes_csv,
)

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


def _contours(axes):
    """Outline paths by colour and line style: {(hex, is_dashed): points [n, 2]}."""
    found = {}
    for one in axes.collections:
        paths = [path.vertices for path in one.get_paths() if len(path.vertices)]
        dashed = one.get_linestyle()[0][1] is not None
        found[to_hex(one.get_edgecolor()[0]).upper(), dashed] = np.concatenate(paths)
    return found


def _texts(figure):
    return [text.get_text() for text in (*figure.texts, *figure.legends[0].get_texts())]


class TestQcFigure:
    def test_panels_and_their_letters(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        letters = ["".join(text.get_text() for text in axes.texts) for axes in figure.axes]
        assert letters == ["RLAP", "RLSI", "APSI"] * 2
        assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["T1c", "T2-FLAIR"]
        np.testing.assert_array_equal(figure.get_size_inches() * figure.dpi, (1200, 850))

    def test_right_is_on_the_left_and_front_is_up(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        figure.draw_without_rendering()
        for axes in figure.axes[:2]:
            points = axes.transData.transform(_contours(axes)[REGION_COLOURS["WT"], False])
            middle = axes.get_window_extent()
            assert points[:, 0].max() < (middle.x0 + middle.x1) / 2, "a tumour on the right is drawn on the left"
            assert points[:, 1].min() > (middle.y0 + middle.y1) / 2, "a tumour in front or on top is drawn on top"
        sagittal = figure.axes[2]
        points = sagittal.transData.transform(_contours(sagittal)[REGION_COLOURS["WT"], False])
        assert points[:, 0].max() < np.mean(sagittal.get_window_extent().intervalx), "the front is on the left"

    def test_slices_are_those_with_most_tumour(self, brain):
        images, label_map = brain
        assert tumour_slices(label_map > 0, fallback=images[0] > 0)[2] == 13
        figure = qc_figure(images, label_map, SPACING, "name")
        assert figure.axes[0].get_title() == "axial, slice 14 of 20"

    def test_image_is_the_slice_of_its_modality(self, brain):
        images, label_map = brain
        figure = qc_figure(images, label_map, SPACING, "name")
        for row, modality in ((0, 1), (3, 3)):
            drawn = figure.axes[row].images[0].get_array()
            values = np.unique(np.asarray(drawn)[np.asarray(drawn) > 0])
            np.testing.assert_array_equal(values, np.unique(images[modality, ..., 13][images[modality, ..., 13] > 0]))

    def test_outlines_surround_their_masks(self, brain):
        images, label_map = brain
        axes = qc_figure(images, label_map, SPACING, "name").axes[0]
        contours = _contours(axes)
        assert set(contours) == {(colour, False) for colour in REGION_COLOURS.values()}
        for region, (width, height) in {"ET": (3, 3), "TC": (5, 6), "WT": (10, 12)}.items():
            np.testing.assert_allclose(np.ptp(contours[REGION_COLOURS[region], False], axis=0), (width, height))

    def test_only_the_chosen_regions(self, brain):
        figure = qc_figure(*brain, SPACING, "name", regions=("WT",))
        assert set(_contours(figure.axes[0])) == {(REGION_COLOURS["WT"], False)}
        assert not any("ET" in text for text in _texts(figure))

    def test_reference_is_dashed_with_its_volume(self, brain):
        images, label_map = brain
        reference = np.roll(label_map, -3, axis=0)
        reference[reference == 3] = 1
        figure = qc_figure(images, label_map, SPACING, "name", reference=reference)
        contours = _contours(figure.axes[0])
        shift = contours[REGION_COLOURS["WT"], False].min(0) - contours[REGION_COLOURS["WT"], True].min(0)
        np.testing.assert_allclose(shift, (3, 0))
        assert (REGION_COLOURS["ET"], True) not in contours
        assert any("ET 0.0 ml (reference 0.0 ml)" in text for text in _texts(figure))

    def test_reference_leads_where_nothing_was_predicted(self, brain):
        images, label_map = brain
        figure = qc_figure(images, np.zeros_like(label_map), SPACING, "name", reference=label_map)
        assert figure.axes[0].get_title() == "axial, slice 14 of 20"

    def test_empty_mask(self, brain):
        images, label_map = brain
        figure = qc_figure(images, np.zeros_like(label_map), SPACING, "name")
        assert figure.axes[0].get_title() == "axial, slice 11 of 20"
        assert not any(axes.collections for axes in figure.axes)
        assert "No tumour in the mask" in _texts(figure)

    def test_no_brain_at_all(self):
        figure = qc_figure(np.zeros((4, 8, 8, 8)), np.zeros((8, 8, 8), np.uint8), (1, 1, 1), "name")
        figure.draw_without_rendering()
        assert len(figure.axes) == 6

    def test_tumour_outside_the_brain_is_not_cropped_away(self, brain):
        images, label_map = brain
        label_map[0:3, 0:3, :] = 2
        label_map[:, :, :11] = label_map[:, :, 16:] = 0
        axes = qc_figure(images, label_map, SPACING, "name").axes[0]
        assert np.ptp(_contours(axes)[REGION_COLOURS["WT"], False][:, 0]) == 34

    def test_anisotropic_voxels_keep_their_proportions(self, brain):
        figure = qc_figure(*brain, SPACING, "name")
        aspects = [axes.get_aspect() for axes in figure.axes[:3]]
        np.testing.assert_allclose(aspects, (1.5 / 1, 3 / 1, 3 / 1.5))

    def test_notes_are_written_as_they_are(self, brain):
        figure = qc_figure(*brain, SPACING, "a_$b$", "two", weights_note="trained on $n$ phantoms")
        figure.draw_without_rendering()
        assert {"a_$b$", "two"} <= set(_texts(figure))
        assert "trained on $n$ phantoms · research use, not a medical device" in _texts(figure)

    def test_another_palette(self, brain):
        images, label_map = brain
        label_map[label_map == 3] = 4
        figure = qc_figure(images, label_map, SPACING, "name", palette="brats2021")
        assert (REGION_COLOURS["ET"], False) in _contours(figure.axes[0])

    def test_shapes_that_differ_are_refused(self, brain):
        images, label_map = brain
        with pytest.raises(ValueError, match="name: .*one 3-D grid"):
            qc_figure(images, label_map[1:], SPACING, "name")


class TestQcPicture:
    def test_stored_orientation_does_not_matter(self, tmp_path, files, brain):
        images, label_map = brain
        write_qc_picture(tmp_path / "file.png", *files, title="name")
        qc_figure(images, label_map, SPACING, "name").savefig(tmp_path / "array.png", facecolor="#0b0d10")
        from_file, from_array = (_pixels(tmp_path / f"{name}.png") for name in ("file", "array"))
        assert from_file.shape == (850, 1200, 3)
        np.testing.assert_array_equal(from_file, from_array)

    def test_four_channel_file_gives_the_same_picture(self, tmp_path, files):
        images, label = files
        nib.concat_images([nib.load(path) for path in images]).to_filename(tmp_path / "four.nii.gz")
        write_qc_picture(tmp_path / "one.png", [tmp_path / "four.nii.gz"], label)
        write_qc_picture(tmp_path / "four.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "one.png"), _pixels(tmp_path / "four.png"))

    def test_reference_palette_is_translated(self, tmp_path, files, brain):
        images, label = files
        prediction = nib.load(label)
        truth = np.where(np.asarray(prediction.dataobj) == 3, 4, prediction.dataobj).astype(np.uint8)
        nib.Nifti1Image(truth, prediction.affine).to_filename(tmp_path / "truth.nii.gz")
        write_qc_picture(tmp_path / "a.png", images, label, reference_path=tmp_path / "truth.nii.gz")
        write_qc_picture(tmp_path / "b.png", images, label, reference_path=label, reference_palette="brats2023")
        np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))

    def test_image_on_another_grid_is_resampled(self, tmp_path, files):
        images, label = files
        shifted = nib.load(images[1]).slicer[2:]
        shifted.to_filename(tmp_path / "shifted.nii.gz")
        write_qc_picture(tmp_path / "a.png", [images[0], tmp_path / "shifted.nii.gz", *images[2:]], label)
        write_qc_picture(tmp_path / "b.png", images, label)
        np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))

    def test_missing_modality_is_refused(self, tmp_path, files):
        with pytest.raises(ValueError, match="expected 4 modalities"):
            write_qc_picture(tmp_path / "a.png", files[0][:3], files[1])

    def test_nothing_left_after_a_failure(self, tmp_path, files, monkeypatch):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", _fail_half_way)
        (tmp_path / "out").mkdir()
        with pytest.raises(OSError, match="disk full"):
            write_qc_picture(tmp_path / "out" / "a.png", *files)
        assert not list((tmp_path / "out").iterdir())

    def test_real_subject(self, tmp_path, real_data):
        case = real_data / "brats2021" / "BraTS2021_00006"
        images = [case / f"{case.name}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
        write_qc_picture(tmp_path / "a.png", images, case / f"{case.name}_seg.nii.gz", palette="brats2021")
        pixels = _pixels(tmp_path / "a.png").astype(int)
        blue = np.argwhere(np.abs(pixels - (0x56, 0xB4, 0xE9)).sum(-1) < 30)
        axial = blue[(blue[:, 1] < 330) & (blue[:, 0] < 400)]
        assert axial.size and axial[:, 1].mean() > 190, "a left frontal tumour is on the right of the axial panel"
        assert axial[:, 0].mean() < 250, "and at its top"


def _pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def _fail_half_way(figure, path, **options):
    path.write_bytes(b"half")
    raise OSError("disk full")


class TestVolumes:
    def test_volumes_in_ml(self, brain):
        volumes = region_volumes(brain[1], 4.5)
        expected = {"ET": 9, "TC": 5 * 6 * 3, "WT": 8 * 10 * 5 + 10 * 12 - 8 * 10}
        assert volumes == pytest.approx({name: voxels * 4.5 / 1000 for name, voxels in expected.items()})
        assert list(volumes) == ["ET", "TC", "WT"]

    def test_palette_decides_what_enhances(self):
        label_map = np.array([1, 2, 3, 4], np.uint8)
        assert region_volumes(label_map, 1000, "brats2021") == {"ET": 1, "TC": 2, "WT": 3}
        assert region_volumes(label_map * np.array([1, 1, 1, 0]), 1000) == {"ET": 1, "TC": 2, "WT": 3}

    def test_csv_round_trip(self, tmp_path, rows):
        write_volumes_csv(tmp_path / "new" / "volumes.csv", rows)
        with open(tmp_path / "new" / "volumes.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert list(read[0]) == ["subject", "et_ml", "tc_ml", "wt_ml", "status", "seconds", "warnings", "weights"]
        assert [row["et_ml"] for row in read] == ["1.235", "0.000", ""]
        assert read[1]["warnings"] == "no ET; thin slices" and read[2]["subject"] == "c<script>"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["volumes.csv"]

    def test_failure_keeps_the_old_table(self, tmp_path, rows):
        path = tmp_path / "volumes.csv"
        write_volumes_csv(path, rows[:1])
        before = path.read_bytes()
        with pytest.raises(TypeError):
            write_volumes_csv(path, [*rows, {"subject": "d", "warnings": object()}])
        assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["volumes.csv"]


class TestSegmentReport:
    def test_page_stands_alone(self, tmp_path, rows, pictures):
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures, settings={"weights_note": "phantoms"})
        page = Page(tmp_path / "report.html")
        assert not page.open and page.values("html", "lang") == ["en"]
        assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("img", "src"))
        assert "://" not in page.source and "link" not in page.tags
        assert not page.values("script", "src")
        assert all(page.values("img", "alt")) and len(page.values("img", "alt")) == 1
        assert {path.name for path in tmp_path.glob("*.html")} == {"report.html"}
        assert not list(tmp_path.glob(".*"))

    def test_what_it_says(self, tmp_path, rows, pictures):
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures, settings={"weights_note": "phantoms"})
        texts = Page(tmp_path / "report.html").texts
        assert "Weights: phantoms" in texts and any("Not a medical device" in text for text in texts)
        assert texts[texts.index("segmented") - 1] == "2"
        assert texts[texts.index("failed or left out") - 1] == "1"
        assert {"1.23", "20.00", "30.50", "no ET; thin slices", "thin slices"} <= set(texts)
        assert texts.index("Not segmented") < texts.index("Volumes") < texts.index("Subjects")
        assert "No picture was drawn." in texts, "of b"

    def test_everything_is_escaped(self, tmp_path, rows):
        evil = '<img src=x onerror="alert(1)">'
        rows[0] |= {"subject": evil, "warnings": [evil]}
        write_segment_report(tmp_path / "r.html", rows, [], settings={evil: evil, "weights_note": evil}, title=evil)
        page = Page(tmp_path / "r.html")
        assert "img" not in page.tags and page.tags.count("script") == 1
        assert "c<script>" in page.texts and evil in page.texts

    def test_links_lead_to_subjects(self, tmp_path, rows):
        rows[0]["subject"] = "sub 1/ä"
        write_segment_report(tmp_path / "report.html", rows)
        page = Page(tmp_path / "report.html")
        targets = [link.removeprefix("#") for link in page.values("a", "href")]
        assert targets == page.values("h3", "id") and len(set(targets)) == 2
        assert not any(" " in target for target in targets)

    def test_failures_come_with_reason_and_remedy_and_once(self, tmp_path, rows):
        exclusions = [
            Exclusion("c<script>", "t2.nii.gz", "the file is truncated", "Copy it again"),
            {"subject": "d", "file": "", "reason": "no T1c", "remedy": "Add it"},
        ]
        write_segment_report(tmp_path / "report.html", rows, exclusions)
        texts = Page(tmp_path / "report.html").texts
        assert texts.count("c<script>") == 1 and texts.count("d") == 1
        assert {"the file is truncated", "Copy it again", "no T1c", "Add it", "t2.nii.gz"} <= set(texts)
        assert "truncated & unreadable" not in texts

    def test_failure_known_from_its_row_only(self, tmp_path, rows):
        write_segment_report(tmp_path / "report.html", rows)
        assert "truncated & unreadable" in Page(tmp_path / "report.html").texts

    def test_unreadable_picture_is_said(self, tmp_path, rows):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        pictures = {"a": tmp_path / "broken.png", "b": tmp_path / "absent.png"}
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures)
        page = Page(tmp_path / "report.html")
        assert sum(text.startswith("No picture: ") for text in page.texts) == 2 and "img" not in page.tags

    def test_nothing_at_all(self, tmp_path):
        write_segment_report(tmp_path / "report.html", [])
        page = Page(tmp_path / "report.html")
        assert "Not segmented" not in page.texts and page.rows() == 0


class TestScores:
    def test_mean_and_deviation_across_folds(self, scores):
        summary = summarise_scores(scores)
        assert summary["plain"]["ET"] == pytest.approx((0.7, np.std([0.6, 0.8], ddof=1)))
        assert summary["plain"]["WT"] == pytest.approx((0.875, np.std([0.85, 0.9], ddof=1)))
        averages = [np.mean([0.6, 0.6, 0.85]), np.mean([0.8, 0.5, 0.9])]
        assert summary["plain"]["Average"] == pytest.approx((np.mean(averages), np.std(averages, ddof=1)))

    def test_conventions_for_empty_regions(self, scores):
        assert math.isnan(dice_of(scores[1], "ET"))
        assert math.isnan(dice_of(scores[1], "ET", "brats")), "nobody said what was predicted"
        assert dice_of(scores[1] | {"ET_dice_brats": 0.0}, "ET", "brats") == 0, "a false positive"
        known = [score | ({"ET_dice_brats": 1.0} if math.isnan(score["ET"]) else {}) for score in scores]
        assert summarise_scores(known, "brats")["plain"]["ET"][0] == pytest.approx((0.6 + 1 + 0.8 + 1) / 4)
        assert summarise_scores(known)["plain"]["ET"][0] == pytest.approx(0.7)
        with pytest.raises(ValueError, match="convention"):
            dice_of(scores[0], "ET", "other")
        with pytest.raises(KeyError, match="s00.*ET_dice"):
            dice_of({"subject": "s00", "TC": 0.5}, "ET")

    def test_one_fold_and_no_value(self):
        score = {"model": "m", "fold": 0, "subject": "s", "ET": math.nan, "TC": 0.5, "WT": 0.7}
        summary = summarise_scores([score])["m"]
        assert math.isnan(summary["ET"][0]) and math.isnan(summary["TC"][1])
        assert summary["Average"][0] == pytest.approx(0.6)

    def test_bars_show_the_means(self, scores):
        axes = dice_bars(scores).axes[0]
        heights = sorted(round(bar.get_height(), 6) for bar in axes.patches)
        summary = summarise_scores(scores)
        assert heights == sorted(round(mean, 6) for row in summary.values() for mean, _ in row.values())
        assert [label.get_text() for label in axes.get_xticklabels()] == ["ET", "TC", "WT", "Average"]

    def test_strip_shows_every_fold(self, scores):
        figure = fold_strip(scores)
        drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"])
        expected = [[0.6, 0.6, 0.85], [0.8, 0.5, 0.9], [0.9, 0.65, 0.85], [0.7, 0.75, 0.9]]
        np.testing.assert_allclose(drawn, np.mean(expected, axis=1))

    def test_page(self, tmp_path, scores, pictures):
        write_scores_report(tmp_path / "s.html", scores, pictures, dataset="UTSW <b>", weights_note="weights of fold 0")
        page = Page(tmp_path / "s.html")
        assert not page.open and "://" not in page.source and "b" not in page.tags
        assert len(page.values("img", "alt")) == 3 and all(page.values("img", "alt"))
        assert "0.7000 ± 0.1414" in page.texts and "Weights of fold 0" in page.texts
        assert page.source.count("<strong>0.8000 ± 0.1414</strong>") == 1, "the better ET is bold"
        assert page.rows() == 1 + 2 + 1 + len(scores), "a table of two models, and one of all subjects"
        assert any(text.startswith("No table under the BraTS convention") for text in page.texts)
        assert "–" in page.texts

    def test_rows_of_metrics_give_both_tables(self, tmp_path):
        masks = np.zeros((2, 3, 8, 8, 8), bool)
        masks[0, :, 2:5, 2:5, 2:5] = masks[1, 1:, 2:5, 2:5, 2:6] = True
        row = {"model": "m", "fold": 0, "subject": "false positive ET"} | score_subject(*masks)
        write_scores_report(tmp_path / "s.html", [row])
        page = Page(tmp_path / "s.html")
        assert page.rows() == 2 * (1 + 1) + 1 + 1
        assert "0.0000" in page.texts and "0.8571" in page.texts and "–" in page.texts

    def test_single_fold_page_has_no_deviation(self, tmp_path, scores):
        write_scores_report(tmp_path / "s.html", [score for score in scores if score["fold"] == 0])
        texts = Page(tmp_path / "s.html").texts
        assert any("Mean over the subjects of one fold" in text for text in texts)
        assert not any("± 0" in text for text in texts)

    def test_no_scores_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="no scores"):
            write_scores_report(tmp_path / "s.html", [])
        assert not list(tmp_path.iterdir())
