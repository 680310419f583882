"""The report page as text: what is escaped, what is on it, and how large it is."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made_pages import HOSTILE, made_page, predictions

from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.findings.finding import Audit, Finding, Suspect
from keras_transfer.markup import printable
from keras_transfer.reporting.album import Album, relative_names
from keras_transfer.reporting.contents import (
    confusion_of,
    figures_of,
    mistakes_and_doubts,
)
from keras_transfer.reporting.of_run.page import findings_of
from keras_transfer.reporting.page import Page, render
from keras_transfer.reporting.summary import WithoutPaths, stands_out

SECTIONS = {
    *("headline", "confusion", "classes", "curves", "galleries", "feature_map"),
    *("learning", "finetuning", "findings", "provenance"),
}


class Parsed(HTMLParser):
    """A page taken apart as a browser does."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data):
        is_script = self._open and self._open[-1] == "script"
        (self.scripts if is_script else self.text).append(data)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def sections(self) -> set[str]:
        return {str(x["id"]) for tag, x in self.tags if tag == "section"}


@pytest.fixture(scope="module")
def page() -> Page:
    return made_page()


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return render(page)


def test_nothing_in_a_name_becomes_markup(page, html):
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    for tag, attributes in parsed.tags:
        assert not {x for x in attributes if x.startswith("on")}, (tag, attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    data, script = parsed.scripts
    assert "<" not in data and ">" not in data and "</" not in script
    said = json.loads(data)
    assert [row[0] for row in said["images"]] == [
        printable(image.name) for image in page.images
    ]
    shown = " ".join(parsed.text)
    for name in HOSTILE:
        assert printable(name) in shown
    assert "49" not in shown.partition("7 * 7")[1]
    assert "\u202e" not in html and "\\u202e" in html
    html.encode()  # no surrogates


def test_the_policy_of_the_page_allows_its_own_script_only(html):
    (policy,) = (
        str(x["content"])
        for tag, x in Parsed(html).tags
        if tag == "meta" and x.get("http-equiv")
    )
    assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy
    assert re.search(r"script-src 'sha256-[\w+/=]{44}';", policy)
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in html and "@import" not in html


def test_pictures_have_no_metadata_and_stand_in_the_page_once(page, html):
    assert sum(image.thumbnail is not None for image in page.images) == 60
    webp = [image.thumbnail.webp for image in page.images if image.thumbnail]
    assert all(b"SECRET" not in x and b"EXIF" not in x for x in webp)
    standing = {card.image for one in page.galleries for card in one.cards}
    rows = json.loads(Parsed(html).scripts[0])["images"]
    for index, row in enumerate(rows):
        if index in standing:
            assert row[5] == ""


def test_sections_without_content_are_left_out(page, html):
    assert Parsed(html).sections() == SECTIONS
    bare = render(Page("Audit", "data", ("3 images",), ("Nothing was found.",)))
    assert Parsed(bare).sections() == set() and "<dialog" not in bare
    without = render(replace(page, finetuning=None, findings=None, heat=None))
    assert Parsed(without).sections() == SECTIONS - {"finetuning", "findings"}


def test_multi_label_data_have_classes_with_thresholds_instead_of_a_matrix():
    page = made_page(("cat", "dog", "<b>owl</b>"), multi_label=True, pictures=9)
    parsed = Parsed(render(page))
    assert parsed.sections() == SECTIONS - {"confusion"}
    assert "threshold" in " ".join(parsed.text)
    assert [row.bar.value for row in page.classes] == sorted(
        row.bar.value for row in page.classes
    )


def test_of_many_classes_the_most_confused_come_first():
    names = tuple(f"species {i:03d} of a family" for i in range(200))
    page = made_page(names, count=900, pictures=200)
    html = render(page)
    assert len(html) < 2_000_000
    matrix = page.confusion
    assert matrix is not None and matrix.classes == 200
    assert 2 <= len(matrix.class_names) <= 20 and len(matrix.others) == len(
        matrix.class_names
    )
    wrong = [pair.count for pair in matrix.pairs]
    assert wrong == sorted(wrong, reverse=True)
    assert {pair.true for pair in matrix.pairs[:3]} <= {*matrix.class_names}
    kept = predictions(names, 900)
    missed = (kept.is_predicted.argmax(1) != kept.targets).sum()
    said = sum(
        int(x) for _, text in matrix.rest for x in re.findall(r"\((\d+)\)", text)
    )
    assert said == missed


def test_a_cell_opens_the_images_in_it():
    names = ("cat", "dog", "owl")
    kept, album = predictions(names), Album()
    matrix = confusion_of(kept, names, album)
    said = kept.is_predicted.argmax(1)
    for i in range(3):
        for j in range(3):
            rows = np.flatnonzero((kept.targets == i) & (said == j))
            cell = matrix.rows[i][j]
            assert cell.count == len(rows)
            if cell.count:
                one = album.sets[cell.key]
                sources = {album.sources[x] for x in one.images}
                assert one.total == len(rows)
                assert sources == {*kept.sources[rows].tolist()}


def test_figures_stand_beside_those_of_knowing_nothing():
    targets = np.repeat([0, 1], [60, 40])
    p = np.tile(np.array([[0.6, 0.4]], np.float32), (100, 1))
    always = evaluate(targets, p, ("cat", "dog"))  # that classifier itself
    figures = figures_of(always, "test", np.array([0.6, 0.4])).figures
    assert {figure.label for figure in figures} >= {"Accuracy", "Log loss (nats)"}
    for figure in figures:
        if figure.label != "Calibration error":
            assert figure.baseline == pytest.approx(figure.value, abs=1e-6), figure


def test_mistakes_come_by_confidence_and_doubts_by_closeness():
    kept = predictions(("a", "b", "c", "d"))
    mistakes, doubts = mistakes_and_doubts(kept, None, 5, 5)
    sure = kept.probabilities.max(1)
    assert not kept.is_right[mistakes].any()
    assert sure[mistakes].tolist() == sorted(sure[~kept.is_right])[::-1][:5]
    assert sure[doubts].tolist() == sorted(sure)[:5]


def test_absolute_paths_become_relative():
    named = relative_names(["/a/b/c/1.jpg", "/a/b/d/2.jpg", "e/3.jpg"])
    assert named == {"/a/b/c/1.jpg": "c/1.jpg", "/a/b/d/2.jpg": "d/2.jpg"}
    plain = WithoutPaths(["/home/me/my photos"])
    said = plain(
        "In /home/me/my photos/cat/1.jpg, /home/me/x.csv: line 3, /etc/a/b and a/b "
        "of https://x.org/y; 1/2"
    )
    assert said == "In cat/1.jpg, x.csv: line 3, b and a/b of https://x.org/y; 1/2"


def test_without_pictures_galleries_are_lists():
    page = made_page(("a", "b", "c", "d"), pictures=0)
    assert 'class="gallery without"' in render(page)
    assert ">no picture<" not in render(page).split("<script")[0]


def test_contents_of_an_audit_are_its_findings(page):
    alone = Page("Audit", "data", (), (), findings=page.findings, sets=page.sets)
    parsed = Parsed(render(replace(alone, images=page.images)))
    links = [x["href"] for tag, x in parsed.tags if tag == "a"][1:]
    findings = ["#finding-0", "#finding-1"]
    assert links == 3 * findings  # narrow and wide contents, and by severity
    known = {x.get("id") for _, x in parsed.tags}
    assert {link[1:] for link in findings} <= known
    assert "#headline" in render(page)
    figures = Page("Report", "data", (), (), headline=page.headline)
    assert "<nav" not in render(figures)


def test_long_names_lose_their_middle_and_keep_it_in_their_title(page):
    name = "a" * 50 + "b" * 50 + "/0042.jpg"
    image = replace(page.images[page.galleries[0].cards[0].image], name=name)
    card = replace(page.galleries[0].cards[0], image=0)
    gallery = replace(page.galleries[0], cards=(card,))
    html = render(Page("Report", "x", (), (), images=(image,), galleries=(gallery,)))
    assert f'title="{name}"' in html and f">{name}<" not in html
    assert "b/0042.jpg</span>" in html


def test_notes_stay_with_their_images():
    album = Album()
    album.put("key", "title", ["a", "b"], ["of a", "of b"])
    assert album.sets["key"].notes == ("of a", "of b")


def test_what_stands_out_needs_no_predictions_of_single_images():
    names = ("ants", "bees", "never shown")
    targets = np.repeat([0, 1], [6, 4])
    p = np.eye(3, dtype=np.float32)[targets]
    right = evaluate(targets, p, names)
    assert stands_out(right, None) == "No image was wrong."
    p[0] = 0, 1, 0
    says = "The most frequent mistake is to take ants for bees (1 image)."
    assert stands_out(evaluate(targets, p, names), None) == says
    several = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], np.uint8)
    said = np.array([[0.9, 0.3, 0.1], [0.8, 0.2, 0.1], [0.7, 0.1, 0.1]], np.float32)
    found = evaluate(several, said, names)
    assert stands_out(found, None).startswith("The hardest class is bees (average")
    unknown = {
        name: one.model_copy(update={"average_precision": None})
        for name, one in found.classes.items()
    }
    assert stands_out(found.model_copy(update={"classes": unknown}), None) == ""


def test_notes_of_suspects_are_words_without_scores():
    suspects = (
        Suspect(path="a.jpg", score=0.9, other="b.jpg"),
        Suspect(path="b.jpg", score=0.8, other="a.jpg"),
        Suspect(path="c.jpg", score=0.7, other="damaged"),
    )
    found = Finding(kind="copies", severity="low", message="Two.", suspects=suspects)
    audit, album = Audit.of("data", {"cat": 3}, 3, [found], []), Album()
    findings_of(audit, album, WithoutPaths([]), "audit.csv")
    (shown,) = album.sets.values()
    assert shown.notes == ("", "", "damaged")
