"""Images that are sorted into folders: nothing is overwritten, nothing escapes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_transfer.data import sorting
from keras_transfer.data.sorting import SortedFolders, folder_names
from keras_transfer.data.tables import Prediction
from keras_transfer.errors import KerasTransferError

ROW = np.array([0.9, 0.1], np.float32)
HOSTILE = (
    "../x",
    "a/b",
    "..",
    ".",
    "",
    "_unsure",
    "_none",
    "a_b",
    "A/B",
    "c:d",
    "x\0y",
)


def of(path: object, *classes: str, sure: bool | None = None) -> Prediction:
    return Prediction(str(path), ROW, classes=classes, sure=sure)


def image(path: str, content: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)
    return Path(path)


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def test_images_go_to_the_folders_of_their_classes():
    folders = SortedFolders(Path("out"), ("cat", "dog"))
    one, two, three = (image(f"new/{name}.jpg", name) for name in "abc")
    assert folders.put(of(one, "cat")) == [Path("out/cat/a.jpg")]
    folders.put(of(two, "dog", sure=True))
    folders.put(of(three, "dog", sure=False))
    assert folders.put(Prediction("new/broken.jpg", None, "damaged")) == []
    expected = {"cat/a.jpg": "a", "dog/b.jpg": "b", "_unsure/c.jpg": "c"}
    assert contents(Path("out")) == expected
    assert folders.counts == {"cat": 1, "dog": 1, "_unsure": 1}
    assert one.read_text() == "a"


def test_images_of_several_classes_or_none():
    folders = SortedFolders(Path("out"), ("cat", "dog"))
    folders.put(of(image("a.jpg", "a"), "dog", "cat"))
    folders.put(of(image("b.jpg", "b")))
    assert contents(Path("out")) == dict.fromkeys(("cat/a.jpg", "dog/a.jpg"), "a") | {
        "_none/b.jpg": "b"
    }


def test_existing_files_stay_as_they_are():
    folders = SortedFolders(Path("out"), ("cat",))
    image("out/cat/a.jpg", "mine")
    os.symlink("nowhere", "out/cat/a-2.jpg")
    for folder in ("one", "two"):
        folders.put(of(image(f"{folder}/a.jpg", folder), "cat"))
    found = contents(Path("out/cat"))
    assert found == {"a.jpg": "mine", "a-3.jpg": "one", "a-4.jpg": "two"}
    assert not Path("nowhere").exists()


def test_an_image_that_is_there_already_is_not_put_there_again():
    source = image("new/a.jpg", "a")
    for _ in range(2):
        SortedFolders(Path("out"), ("cat",)).put(of(source, "cat"))
    assert contents(Path("out")) == {"cat/a.jpg": "a"}


@pytest.mark.parametrize("can_link", [True, False])
def test_images_are_linked_or_else_copied(monkeypatch, can_link):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if not can_link:
        monkeypatch.setattr(sorting.os, "link", refuse)
    source = image("new/a.jpg", "a")
    os.utime(source, (1, 1))
    link = Path("link.jpg")
    link.symlink_to(source.resolve())
    folders = SortedFolders(Path("out"), ("cat",))
    (placed,), (through,) = folders.put(of(source, "cat")), folders.put(of(link, "cat"))
    assert placed.samefile(source) == through.samefile(source) == can_link
    assert not through.is_symlink()
    assert placed.read_text() == through.read_text() == "a"
    assert placed.stat().st_mtime == 1
    image("other/a.jpg", "b")
    folders.put(of("other/a.jpg", "cat"))
    assert contents(Path("out/cat")) == {"a.jpg": "a", "link.jpg": "a", "a-2.jpg": "b"}


def test_a_copy_that_fails_leaves_nothing(monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sorting.os, "link", fail)
    monkeypatch.setattr(shutil, "copyfileobj", fail)
    folders = SortedFolders(Path("out"), ("cat",))
    with pytest.raises(KerasTransferError, match="a.jpg .No space left"):
        folders.put(of(image("a.jpg", "a"), "cat"))
    assert contents(Path("out")) == {}


def test_no_class_name_leads_out_of_the_directory(tmp_path):
    folders = SortedFolders(tmp_path / "out", HOSTILE)
    for index, name in enumerate(HOSTILE):
        folders.put(of(image(f"new/{index}.jpg", str(index)), name))
    folders.put(of(image("new/unsure.jpg", "unsure"), "a/b", sure=False))
    found = contents(tmp_path / "out")
    assert len(found) == len(HOSTILE) + 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}
    assert os.listdir(tmp_path / "out/_unsure") == ["unsure.jpg"]
    assert all(name.count("/") == 1 for name in found)


@given(st.lists(st.text(max_size=300), unique=True, max_size=20))
def test_folder_names_are_different_single_components(names):
    folders = folder_names(names)
    assert [*folders] == names
    lower = {folder.lower() for folder in folders.values()}
    assert len(lower | {"_unsure", "_none"}) == len(names) + 2
    for folder in folders.values():
        assert Path("x", folder).parent == Path("x") and folder not in ("", ".", "..")
        assert len(folder.encode()) < 255 and not set(folder) & set('/\\\0:*?"<>|')
        assert folder.strip(". ") == folder


def test_ordinary_names_stay():
    names = ["cat", "Katze ä", "日本", "v1.0", "a b"]
    assert folder_names(names) == {name: name for name in names}
    assert folder_names(["a/b", "a_b", "A:B"]) == {
        "a/b": "a_b",
        "a_b": "a_b-2",
        "A:B": "A_B-3",
    }
