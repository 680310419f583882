"""A cleaned table: what it leaves out, keeps together and marks, and reads back."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_transfer.config import ListingConfig
from keras_transfer.data.listing import list_data
from keras_transfer.data.tables import Listing, Table
from keras_transfer.errors import UsageError
from keras_transfer.findings.cleaned import cleaned_table, count_marked
from keras_transfer.findings.finding import Finding, Suspect
from keras_transfer.findings.images import AuditedImages
from keras_transfer.runs.files import SUSPECT, check_fix, write_atomic

ROOT = Path("/data")


def listing(labels, *, names=None, splits=None, groups=None, extra=None, weights=None):
    count = len(labels)
    return Listing(
        read=lambda sources: iter(()),
        root=ROOT,
        sources=list(names or [f"{i}.jpg" for i in range(count)]),
        labels=[tuple(x.split("|")) for x in labels],
        splits=list(splits or [""] * count),
        groups=list(groups or [""] * count),
        extra=extra,
        sample_weight=weights,
        multi_label=any("|" in x for x in labels),
    )


def images(listed, digests, unusable=()):
    rows = [i for i in range(len(listed.sources)) if i not in unusable]
    table = Table(
        tuple(listed.sources[i] for i in rows),
        np.zeros(len(rows), int),
        tuple(listed.groups[i] for i in rows),
    )
    return AuditedImages(
        *(table, np.array(["train"] * len(rows)), ("a",), False),
        *([digests[i].encode() for i in rows], np.zeros(len(rows)), None),
        *(listed.read, None, True),
    )


def cleaned(listed, digests, copies, findings=(), unusable=(), folder=ROOT):
    return cleaned_table(
        *(listed, images(listed, digests, unusable), np.array(copies), findings),
        folder,
    )


def read(found, file):
    """Reads a cleaned table as `kt fit` lists it."""
    write_atomic(file, found.text)
    return list_data(str(file), ListingConfig())


def column(read_back, name):
    return read_back.extra[name].to_pylist()


def test_equal_files_stay_once_unless_their_labels_differ(tmp_path):
    listed = listing(["cat", "cat", "dog", "cat"])
    found = cleaned(listed, ["x", "x", "x", "y"], [0, 0, 0, 1])
    back = read(found, tmp_path / "c.csv")
    assert back.sources == ["/data/0.jpg", "/data/2.jpg", "/data/3.jpg"] or (
        back.sources == ["0.jpg", "2.jpg", "3.jpg"]
    )
    assert (found.rows, found.dropped, found.groups) == (3, 1, 1)
    assert back.groups[0] == back.groups[1] != ""
    assert back.groups[2] == ""
    assert not any(back.splits)


def test_a_test_image_stays_and_its_copies_are_tested_on_too(tmp_path):
    listed = listing(["cat"] * 6, splits=["train", "test", "train", "val", "train", ""])
    # 0 equals 1; 2 and 3 are near duplicates of them; 5 of 4
    found = cleaned(listed, list("xxyzuv"), [0, 0, 0, 0, 1, 1])
    back = read(found, tmp_path / "c.csv")
    assert [Path(x).name for x in back.sources] == [
        *("1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")
    ]
    assert back.splits == ["test", "test", "test", "train", ""]
    assert (found.dropped, found.moved) == (1, 2)
    assert "1 copy left out, 2 moved to the test split" in str(found)


def test_without_a_test_split_the_validation_images_are_what_is_tested_on():
    listed = listing(["cat"] * 3, splits=["train", "val", "train"])
    found = cleaned(listed, list("xyz"), [0, 0, 1])
    assert [row.split(",")[2] for row in found.text.splitlines()[1:]] == [
        *("val", "val", "train")
    ]


def test_groups_of_the_data_and_of_copies_are_united(tmp_path):
    listed = listing(["cat"] * 7, groups=["p", "q", "", "q", "copies-1", "", ""])
    found = cleaned(listed, list("abcdefg"), [0, 0, 1, 2, 3, 4, 4])
    back = read(found, tmp_path / "c.csv")
    assert back.groups == ["p", "p", "", "p", "copies-1", "copies-2", "copies-2"]


def test_suspects_are_marked_and_unusable_files_left_out(tmp_path):
    listed = listing(["cat"] * 3)
    findings = [
        Finding(
            kind=kind,
            severity="low",
            message="",
            suspects=(Suspect(path="1.jpg"), Suspect(path="1.jpg", other="z")),
        )
        for kind in ("label errors", "blurry images")
    ]
    found = cleaned(listed, list("abc"), [0, 1], findings, unusable=[2])
    back = read(found, tmp_path / "c.csv")
    assert count_marked(tmp_path / "c.csv") == 1
    assert column(back, SUSPECT) == [None, "label errors; blurry images"]
    assert (found.rows, found.marked, found.unusable) == (2, 1, 1)
    assert "0 copies and 1 unusable left out" in str(found)


def test_further_columns_stay_further_ones(tmp_path):
    extra = pa.table(
        {
            "Filename": ["x", "y"],
            "table_filename": ["u", "v"],
            "suspect": ["old", None],
            "site": [1, None],
            "code": ["007", "008"],
        }
    )
    listed = listing(["cat|dog", "dog"], extra=extra, weights=[0.5, 2])
    back = read(cleaned(listed, list("ab"), [0, 1]), tmp_path / "c.csv")
    assert back.extra.column_names == [
        *("suspect", "table_Filename", "table_table_filename", "site", "code")
    ]
    assert column(back, "suspect") == [None, None]
    assert column(back, "site") == [1, None]
    assert column(back, "code") == ["007", "008"]
    assert back.sample_weight == [0.5, 2]
    assert back.labels == [("cat", "dog"), ("dog",)]


def test_paths_below_the_folder_are_relative_to_it():
    listed = listing(["cat"] * 2, names=["in/0.jpg", "/other/1.jpg"])
    for folder, first in (
        (ROOT, "in/0.jpg"),
        (ROOT / "in", "0.jpg"),
        (Path("/elsewhere"), "/data/in/0.jpg"),
    ):
        text = cleaned(listed, list("ab"), [0, 1], folder=folder).text
        paths = [line.split(",")[0] for line in text.splitlines()[1:]]
        assert paths == [first, "/other/1.jpg"]


_PARTS = st.sampled_from(
    ["<script>", ",", "\n", "\r", '"', "~", " ", ".", "\udce9", "http:", "é", "|"]
) | st.characters(exclude_characters="/\0", exclude_categories=("Cs",))
_NAMES = (
    st.lists(_PARTS, min_size=1, max_size=6)
    .map("".join)
    .filter(lambda name: name not in (".", ".."))
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(_NAMES, min_size=1, max_size=5, unique=True), data=st.data())
def test_hostile_names_are_read_back_exactly(tmp_path_factory, names, data):
    folder = data.draw(st.sampled_from([ROOT, Path("/elsewhere")]))
    listed = listing(["<b>,\"'"] * len(names), names=names)
    digests = [str(i) for i in range(len(names))]
    found = cleaned(listed, digests, range(len(names)), folder=folder)
    back = read(found, tmp_path_factory.mktemp("c") / "c.csv")
    expected = names if folder == ROOT else [f"/data/{name}" for name in names]
    assert back.sources == expected
    assert [*{*back.labels}] == [("<b>,\"'",)]


def test_a_table_never_replaces_the_data_or_an_image(tmp_path):
    data, image = tmp_path / "data.csv", tmp_path / "a.jpg"
    data.write_text("path,label\n")
    image.write_bytes(b"image")
    (tmp_path / "link.csv").symlink_to(data)
    (tmp_path / "folder.csv").mkdir()
    for file, words in (
        (data, "DATA itself"),
        (tmp_path / "link.csv", "DATA itself"),
        (image, ".csv"),
        (tmp_path / "no" / "c.csv", "folder"),
        (tmp_path / "folder.csv", "regular"),
    ):
        with pytest.raises(UsageError, match=words):
            check_fix(file, str(data), None)
    check_fix(tmp_path / "new.csv", str(data), None)


def test_a_table_replaces_only_an_earlier_cleaned_table(tmp_path):
    old = tmp_path / "old.csv"
    write_atomic(old, cleaned(listing(["cat"]), ["x"], [0]).text)
    check_fix(old, "photos", None)
    check_fix(old, "photos", tmp_path / "splits.csv")
    with pytest.raises(UsageError, match="would replace splits.file"):
        check_fix(old, "photos", old)
    for text in (b"", b"path,label,split,group\n", b"mine\n1\n", b"\xff\n"):
        old.write_bytes(text)
        with pytest.raises(UsageError, match="something else. Name another, or remove"):
            check_fix(old, "photos", None)
