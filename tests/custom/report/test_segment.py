"""The segmentation report: stands alone, escapes everything, and says what failed."""

from __future__ import annotations

from custom.cohort import Exclusion
from custom.report import write_segment_report


class TestSegmentReport:
    def test_page_stands_alone(self, read_page, tmp_path, rows, pictures):
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures, settings={"weights_note": "phantoms"})
        page = read_page(tmp_path / "report.html")
        assert not page.open and page.values("html", "lang") == ["en"]
        assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("img", "src"))
        assert "://" not in page.source and "link" not in page.tags
        assert not page.values("script", "src")
        assert all(page.values("img", "alt")) and len(page.values("img", "alt")) == 1
        assert {path.name for path in tmp_path.glob("*.html")} == {"report.html"}
        assert not list(tmp_path.glob(".*"))

    def test_what_it_says(self, read_page, tmp_path, rows, pictures):
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures, settings={"weights_note": "phantoms"})
        texts = read_page(tmp_path / "report.html").texts
        assert "Weights: phantoms" in texts and any("Not a medical device" in text for text in texts)
        assert texts[texts.index("segmented") - 1] == "2"
        assert texts[texts.index("failed or left out") - 1] == "1"
        assert {"1.23", "20.00", "30.50", "no ET; thin slices", "thin slices"} <= set(texts)
        assert texts.index("Not segmented") < texts.index("Volumes") < texts.index("Subjects")
        assert "No picture was drawn." in texts, "of b"

    def test_everything_is_escaped(self, read_page, tmp_path, rows):
        evil = '<img src=x onerror="alert(1)">'
        rows[0] |= {"subject": evil, "warnings": [evil]}
        write_segment_report(tmp_path / "r.html", rows, [], settings={evil: evil, "weights_note": evil}, title=evil)
        page = read_page(tmp_path / "r.html")
        assert "img" not in page.tags and page.tags.count("script") == 1
        assert "c<script>" in page.texts and evil in page.texts

    def test_links_lead_to_subjects(self, read_page, tmp_path, rows):
        rows[0]["subject"] = "sub 1/ä"
        write_segment_report(tmp_path / "report.html", rows)
        page = read_page(tmp_path / "report.html")
        targets = [link.removeprefix("#") for link in page.values("a", "href")]
        assert targets == page.values("h3", "id") and len(set(targets)) == 2
        assert not any(" " in target for target in targets)

    def test_failures_come_with_reason_and_remedy_and_once(self, read_page, tmp_path, rows):
        exclusions = [
            Exclusion("c<script>", "t2.nii.gz", "the file is truncated", "Copy it again"),
            {"subject": "d", "file": "", "reason": "no T1c", "remedy": "Add it"},
        ]
        write_segment_report(tmp_path / "report.html", rows, exclusions)
        texts = read_page(tmp_path / "report.html").texts
        assert texts.count("c<script>") == 1 and texts.count("d") == 1
        assert {"the file is truncated", "Copy it again", "no T1c", "Add it", "t2.nii.gz"} <= set(texts)
        assert "truncated & unreadable" not in texts

    def test_failure_known_from_its_row_only(self, read_page, tmp_path, rows):
        write_segment_report(tmp_path / "report.html", rows)
        assert "truncated & unreadable" in read_page(tmp_path / "report.html").texts

    def test_unreadable_picture_is_said(self, read_page, tmp_path, rows):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        pictures = {"a": tmp_path / "broken.png", "b": tmp_path / "absent.png"}
        write_segment_report(tmp_path / "report.html", rows, pictures=pictures)
        page = read_page(tmp_path / "report.html")
        assert sum(text.startswith("No picture: ") for text in page.texts) == 2 and "img" not in page.tags

    def test_what_this_run_has_not_made_stands_apart(self, read_page, tmp_path, rows):
        old = {"subject": "old", "et_ml": 9.0, "tc_ml": 9.0, "wt_ml": 9.0, "status": "earlier run", "weights": "others"}
        write_segment_report(tmp_path / "report.html", [*rows, old])
        page = read_page(tmp_path / "report.html")
        assert page.texts[page.texts.index("segmented") - 1] == "2", "the earlier one does not count"
        apart = page.texts[page.texts.index("Of earlier runs") :]
        assert page.texts.count("old") == 1 and {"old", "9.00", "others"} <= set(apart)
        assert page.texts.index("Subjects") < page.texts.index("Of earlier runs")
        assert page.values("h3", "id") == ["subject-a", "subject-b"]

    def test_a_region_that_was_erased_is_said_in_table_and_page(self, read_page, tmp_path, rows):
        warning = "ET had only components smaller than min_volume_mm3 and is empty"
        rows[0] |= {"warnings": [warning]}
        write_segment_report(tmp_path / "report.html", rows)
        texts = read_page(tmp_path / "report.html").texts
        assert texts.count(warning) == 2 and texts[texts.index("with warnings") - 1] == "2"

    def test_nothing_at_all(self, read_page, tmp_path):
        write_segment_report(tmp_path / "report.html", [])
        page = read_page(tmp_path / "report.html")
        assert "Not segmented" not in page.texts and page.rows() == 0
