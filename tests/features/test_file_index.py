"""Files that did not change are not read again, and those that may have are."""

import os
from hashlib import sha256

import pyarrow.parquet as pq
import pytest

from keras_transfer.features.file_index import FileIndex

LONG_AGO = 10**18


def write(path, content, time_ns=LONG_AGO):
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))


@pytest.fixture
def old_times(monkeypatch):
    """Lets files look old, whose ctime nobody can set."""
    real = os.stat

    class Old:
        def __init__(self, found):
            self._found = found

        def __getattr__(self, name):
            value = getattr(self._found, name)
            return value - 10**11 if name == "st_ctime_ns" else value

    monkeypatch.setattr(os, "stat", lambda path, **kw: Old(real(path, **kw)))


def digests_of(root, names):
    return {name: sha256((root / name).read_bytes()).digest() for name in names}


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for name in ("a.jpg", "b.jpg", os.fsdecode(b"\xff.jpg")):
        write(root / name, name.encode(errors="surrogateescape"))
    return root


def test_files_that_did_not_change_are_known(tmp_path, images, old_times):
    names = sorted(path.name for path in images.iterdir())
    index = FileIndex(tmp_path / "index", images, names)
    assert index.known() == {}
    index.remember(digests_of(images, names))
    again = FileIndex(tmp_path / "index", images, names[::-1] + ["missing.jpg"])
    assert again.known() == digests_of(images, names)
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    assert FileIndex(tmp_path / "index", elsewhere, names).known() == {}


@pytest.mark.parametrize("change", ["bytes", "size", "time", "inode"])
def test_a_file_that_may_have_changed_is_not_known(change, tmp_path, images, old_times):
    names = ["a.jpg", "b.jpg"]
    index = FileIndex(tmp_path / "index", images, names)
    index.remember(digests_of(images, names))
    path = images / "a.jpg"
    if change == "bytes":  # the same size and mtime: ctime tells
        write(path, b"A.jpg")
    elif change == "size":
        write(path, b"longer than before")
    elif change == "time":
        os.utime(path, ns=(LONG_AGO, LONG_AGO + 1))
    else:
        write(images / "new", path.read_bytes())
        (images / "new").replace(path)
    found = FileIndex(tmp_path / "index", images, names)
    assert found.known() == digests_of(images, ["b.jpg"])


def test_files_that_are_younger_than_a_clocks_tick_are_not_kept(tmp_path, images):
    # Their ctime is now: they may change again without another time.
    index = FileIndex(tmp_path / "index", images, ["a.jpg"])
    index.remember(digests_of(images, ["a.jpg"]))
    assert FileIndex(tmp_path / "index", images, ["a.jpg"]).known() == {}


def test_what_another_reading_found_stays(tmp_path, images, old_times):
    for name in ("a.jpg", "b.jpg"):
        index = FileIndex(tmp_path / "index", images, [name])
        index.remember(digests_of(images, [name]))
    both = FileIndex(tmp_path / "index", images, ["a.jpg", "b.jpg"])
    assert both.known() == digests_of(images, ["a.jpg", "b.jpg"])


def test_files_that_are_gone_are_forgotten(tmp_path, images, old_times):
    index = FileIndex(tmp_path / "index", images, ["a.jpg", "b.jpg"])
    index.remember(digests_of(images, ["a.jpg", "b.jpg"]))
    (images / "a.jpg").rename(tmp_path / "kept")
    other = FileIndex(tmp_path / "index", images, ["b.jpg"])
    other.remember({"b.jpg": bytes(32)})
    (tmp_path / "kept").rename(images / "a.jpg")
    both = FileIndex(tmp_path / "index", images, ["a.jpg", "b.jpg"])
    assert both.known() == {"b.jpg": bytes(32)}


@pytest.mark.parametrize("year", [1900, 2300])
def test_any_time_of_a_file_is_taken(tmp_path, images, year):
    seconds = (year - 1970) * 31_556_952
    os.utime(images / "a.jpg", (seconds, seconds))
    index = FileIndex(tmp_path / "index", images, ["a.jpg"])
    index.remember(digests_of(images, ["a.jpg"]))
    assert index.known() == {}


def test_an_index_of_another_version_is_an_empty_one(tmp_path, images, old_times):
    index = FileIndex(tmp_path / "index", images, ["a.jpg"])
    index.remember(digests_of(images, ["a.jpg"]))
    (path,) = (tmp_path / "index").iterdir()
    table = pq.read_table(path)
    pq.write_table(table.append_column("other", table["size"]), path)
    again = FileIndex(tmp_path / "index", images, ["a.jpg"])
    assert again.known() == {}
    again.remember(digests_of(images, ["a.jpg"]))
    assert again.known() == digests_of(images, ["a.jpg"])


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1"])
def test_a_damaged_index_is_an_empty_one(content, tmp_path, images, old_times):
    index = FileIndex(tmp_path / "index", images, ["a.jpg"])
    index.remember(digests_of(images, ["a.jpg"]))
    (path,) = (tmp_path / "index").iterdir()
    path.write_bytes(content)
    assert index.known() == {}
    index.remember(digests_of(images, ["a.jpg"]))
    assert index.known() == digests_of(images, ["a.jpg"])


def test_an_index_that_cannot_be_written_is_done_without(tmp_path, images, old_times):
    (tmp_path / "index").write_text("a file in its place")
    index = FileIndex(tmp_path / "index", images, ["a.jpg"])
    index.remember(digests_of(images, ["a.jpg"]))
    assert index.known() == {}
