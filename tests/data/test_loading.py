"""DATA: what is found, how it is divided, and what is refused in one line."""

import csv
import io
import os
import socket
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import CLASSES, encode, without_root_powers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from keras_transfer.config import ListingConfig, SplitsConfig
from keras_transfer.data import reading
from keras_transfer.data.folders import find_images, image_files
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.reading import map_ahead
from keras_transfer.data.tables import Splits
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.runs.files import csv_text

NAMES = ("train", "test")


def write(folder: Path, *paths: str) -> Path:
    """Files whose content is their own path; a path that ends in / is a folder."""
    for path in paths:
        target = folder / path
        if path.endswith("/"):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path)
    return folder


def classes(root: Path, **counts: int) -> Path:
    return write(
        root, *(f"{name}/{i}.jpg" for name, n in counts.items() for i in range(n))
    )


def table(root: Path, text: str, name: str = "data.csv") -> str:
    root.mkdir(exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return str(root / name)


def split_of(splits: Splits) -> dict[str, str]:
    """Each image's split; fails if an image is in two."""
    found = [(source, name) for name, part in splits.items() for source in part.sources]
    assert len(found) == len(dict(found))
    return dict(found)


def sizes(splits: Splits) -> list[int]:
    """Number of images in train, val and test."""
    return [len(part) for _, part in splits.items()]


def label_of(splits: Splits) -> dict[str, str]:
    return {
        source: splits.class_names[target]
        for _, part in splits.items()
        for source, target in zip(part.sources, part.targets, strict=True)
    }


def refusal(error: type[Exception], data: object, **options: object) -> str:
    with pytest.raises(error) as caught:
        load(str(data), **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_class_folders_name_the_classes_of_all_their_images(photos):
    splits = load(str(photos))
    assert splits.class_names == CLASSES
    assert not splits.multi_label
    assert splits.warnings == ()
    labels = label_of(splits)
    assert len(labels) == 60
    assert all(source.startswith(f"{label}/") for source, label in labels.items())
    assert splits.train.targets.dtype == np.int64
    assert sizes(splits) == [51, 0, 9]


def test_read_yields_each_file_asked_for_once(photos):
    sources = load(str(photos)).train.sources[::-3]
    read = list(load(str(photos)).read(sources))
    assert sorted(read) == sorted((s, (photos / s).read_bytes()) for s in sources)


def test_a_class_is_everything_below_its_folder(tmp_path):
    write(tmp_path, "a/deep/er/1.PNG", "a/2.jpeg", "a/no-suffix", "b/3.webp", "b/4.GIF")
    labels = label_of(load(str(tmp_path)))
    assert labels == {
        "a/deep/er/1.PNG": "a",
        "a/2.jpeg": "a",
        "a/no-suffix": "a",
        "b/3.webp": "b",
        "b/4.GIF": "b",
    }


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "valid", "Testing"),
        ("training_set", "validation", "test_set"),
        ("TRAIN-SET", "dev", "testing-set"),
        ("train", "eval_set", "TEST"),
    ],
)
def test_split_folders_are_kept(tmp_path, train, val, test):
    for folder in (train, val, test):
        classes(tmp_path / folder, a=3, b=2)
    splits = load(str(tmp_path))
    kept = {train: "train", val: "train", test: "test"}
    found = split_of(splits)
    assert len(found) == 15
    assert all(kept[source.split("/")[0]] == split for source, split in found.items())
    assert all(source.split("/")[1] == y for source, y in label_of(splits).items())
    assert splits.warnings == (TRAINED_ON,)


TRAINED_ON = (
    "Validation images are trained on too: the L2 strength is chosen by "
    "cross-validation."
)
TESTED_ON = "Validation images are the test split: nothing is chosen with them."


@pytest.mark.parametrize("kind", ["folders", "csv"])
@pytest.mark.parametrize(
    ("folders", "test", "warnings"),
    [
        (["train", "test"], ["test"], ()),
        (["train", "val"], ["val"], (TESTED_ON,)),
        (["train", "val", "test"], ["test"], (TRAINED_ON,)),
        (["train", "dev", "Testing"], ["Testing"], (TRAINED_ON,)),
    ],
)
def test_what_the_data_hold_out_is_tested_on_and_all_else_is_trained_on(
    tmp_path, folders, test, warnings, kind
):
    for folder in folders:
        classes(tmp_path / folder, a=50, b=10)
    data = str(tmp_path)
    if kind == "csv":
        paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
        rows = [f"{path},{path.parts[1]},{path.parts[0]}" for path in paths]
        data = table(tmp_path, "\n".join(["path,label,split", *rows]))
    for seed in (0, 1):
        splits = load(data, SplitsConfig(test=0.4), seed)
        found = split_of(splits)
        assert len(found) == 60 * len(folders)
        assert all(
            split == ("test" if source.split("/")[0] in test else "train")
            for source, split in found.items()
        )
        assert splits.class_counts()["test"] == {"a": 50, "b": 10}
        assert splits.warnings == warnings


def test_train_alone_is_divided_as_if_it_were_not_named(tmp_path):
    paths = [f"{name}/{i}.jpg" for name in "ab" for i in range(40)]
    rows = [
        f"{path},{path[0]},{'train' if i % 3 else ''}," for i, path in enumerate(paths)
    ]
    named = load(table(tmp_path, "\n".join(["path,label,split,group", *rows])), seed=5)
    classes(tmp_path / "data", a=40, b=40)
    assert split_of(named) == split_of(
        load(
            table(tmp_path, "\n".join(["path,label", *(f"{x},{x[0]}" for x in paths)])),
            seed=5,
        )
    )
    assert sizes(named) == [68, 0, 12]
    assert named.warnings == ()


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "test-set")])
def test_what_lies_beside_split_folders_is_named_and_left_out(tmp_path, names):
    for folder in (*names, "docs"):
        classes(tmp_path / folder, a=20, b=20)
    classes(tmp_path / "__MACOSX", a=2)
    splits = load(str(tmp_path))
    assert splits.class_names == ("a", "b")
    assert len(splits.test) == 40
    assert len(split_of(splits)) == 80
    (warning,) = splits.warnings
    assert "docs" in warning and "left out" in warning and "MACOSX" not in warning


@pytest.mark.parametrize(
    "names", [("bus", "train"), ("test", "val"), ("dev", "a", "b"), ("train", "docs")]
)
def test_a_class_called_like_a_split_is_refused_and_has_a_way_out(tmp_path, names):
    classes(tmp_path, **dict.fromkeys(names, 10))
    message = refusal(KerasTransferError, tmp_path)
    assert "split" in message and "CSV" in message
    assert all(name in message for name in names)
    rows = [f"{name}/{i}.jpg,{name}" for name in names for i in range(10)]
    splits = load(table(tmp_path, "\n".join(["path,label", *rows])))
    assert splits.class_names == tuple(sorted(names))


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["{c}/train", "{c}/test"], ["test, train", "train/CLASS/"]),
        (["site1/{c}", "site2/{c}"], ["site1, site2", "cat, dog", "Name one"]),
        (["seg_x/seg_x/{c}", "seg_y/seg_y/{c}"], ["seg_x", "cat, dog", "Name one"]),
    ],
)
def test_class_folders_that_hold_the_same_folders_are_refused(tmp_path, folders, words):
    for folder in folders:
        for name in ("cat", "dog"):
            write(tmp_path / folder.format(c=name), "1.jpg", "2.jpg")
    message = refusal(KerasTransferError, tmp_path)
    assert all(word in message for word in words)


def test_class_folders_may_wrap_their_images_in_a_folder(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "images", *(f"{i}.jpg" for i in range(10)))
    splits = load(str(tmp_path))
    assert splits.class_names == ("cat", "dog")


def test_a_lone_folder_of_class_folders_is_refused_and_named(tmp_path):
    classes(tmp_path / "photos/images/all", cat=3, dog=3)
    classes(tmp_path / "photos/__MACOSX", cat=3)
    message = refusal(KerasTransferError, tmp_path / "photos")
    assert f"Name {tmp_path / 'photos/images/all'} instead" in message
    assert load(str(tmp_path / "photos/images/all")).class_names == ("cat", "dog")


@pytest.mark.parametrize("folder", ["", "train"])
def test_a_flat_folder_of_images_is_called_so(tmp_path, folder):
    write(tmp_path / folder, *(f"{i}.jpg" for i in range(5)))
    if folder:
        classes(tmp_path / "test", a=2, b=2)
    message = refusal(KerasTransferError, tmp_path)
    assert "5 images lie in no class folders" in message and "CSV" in message


def test_what_no_one_means_by_data_is_not_there(tmp_path):
    classes(tmp_path, a=40, b=40)
    for junk in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "a/@eaDir", ".Trash"):
        write(tmp_path / junk, "a/1.jpg", "2.jpg")
    write(tmp_path, "Thumbs.db", "a/Thumbs.db", "b/desktop.ini", "b/.DS_Store")
    splits = load(str(tmp_path))
    assert splits.class_names == ("a", "b")
    assert len(split_of(splits)) == 80
    assert splits.warnings == ()


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_class_in_one_split_only_is_named_at_once(tmp_path, where):
    for folder in ("train", "test"):
        classes(tmp_path / folder, a=20, b=20)
    classes(tmp_path / where, rare=20)
    warnings = " ".join(load(str(tmp_path)).warnings)
    other = {"train": "test", "test": "train"}[where]
    assert f"The {other} split has no image of 1 of 3 classes: 'rare'." in warnings


def test_hidden_files_and_folders_are_left_out(tmp_path):
    classes(tmp_path, a=10, b=10)
    write(tmp_path, ".git/1.jpg", "a/.hidden.jpg", "a/.thumbs/1.jpg", "a/._0.jpg")
    splits = load(str(tmp_path))
    assert set(label_of(splits)) == {f"{x}/{i}.jpg" for x in "ab" for i in range(10)}
    assert splits.warnings == ()


def test_what_is_no_image_by_its_name_is_left_out_with_one_warning(tmp_path):
    classes(tmp_path, a=10, b=10)
    write(tmp_path, "a/notes.txt", "a/Thumbs.db", "b/clip.mp4", "b/scan.tiff")
    splits = load(str(tmp_path))
    assert set(label_of(splits)) - {"b/scan.tiff"} == {
        f"{name}/{i}.jpg" for name in "ab" for i in range(10)
    }
    (warning,) = splits.warnings
    assert "and 1 more were left out: each is a file that" in warning
    assert "a/notes.txt" in warning


def test_an_empty_class_folder_is_a_warning_and_no_class(tmp_path):
    write(classes(tmp_path, a=10, b=10), "void/")
    splits = load(str(tmp_path))
    assert splits.class_names == ("a", "b")
    assert ["'void'" in line for line in splits.warnings] == [True]


def test_class_names_are_kept_to_the_letter(tmp_path):
    names = {"red fox", "Füchse", "狐", "a,b", 'c"d', "-e", "#f", "%s"}
    write(tmp_path, *(f"{name}/1.jpg" for name in names))
    splits = load(str(tmp_path))
    assert splits.class_names == tuple(sorted(names))
    rows = list(csv.DictReader(io.StringIO(splits.to_csv())))
    assert {(row["path"], row["label"]) for row in rows} == {
        (f"{name}/1.jpg", name) for name in names
    }


@pytest.mark.parametrize(
    "names",
    [
        ("Cat", "cat"),
        (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
    ],
    ids=["case", "encoding"],
)
def test_class_names_that_look_alike_are_kept_apart(tmp_path, names):
    rows = [f"{name}{i}.jpg,{name}" for name in names for i in range(10)]
    splits = load(table(tmp_path, "\n".join(["path,label", *rows])))
    assert splits.class_names == tuple(sorted(names))
    (warning,) = splits.warnings
    assert all(repr(name) in warning for name in names)


@pytest.mark.parametrize(
    "name", ["a|b", "a\nb", "a\x1bb", "a\x7fb", "a\u2028b", "a\u2029b", "a\x85b"]
)
def test_a_class_name_that_cannot_be_written_is_refused(tmp_path, name):
    write(classes(tmp_path, a=2, b=2), f"{name}/1.jpg")
    assert repr(name) in refusal(KerasTransferError, tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    data = classes(tmp_path / "data", a=2, b=2)
    write(tmp_path, "far/x.jpg")
    (data / "a/self").symlink_to(data / "a")
    (data / "a/up").symlink_to(data)
    (data / "b/far").symlink_to(tmp_path / "far")
    (data / "b/far-again").symlink_to(tmp_path / "far")
    (data / "b/link.jpg").symlink_to(data / "a/0.jpg")
    expected = [f"{name}/{i}.jpg" for name in "ab" for i in range(2)]
    expected += ["b/far/x.jpg", "b/link.jpg"]
    assert sorted(label_of(load(str(data)))) == sorted(expected)
    (data / "b/link.jpg").unlink()
    (data / "b/far").unlink()
    found = [path.relative_to(data).as_posix() for path in find_images(data)]
    assert Counter(Path(path).name for path in found) == {
        "0.jpg": 2,
        "1.jpg": 2,
        "x.jpg": 1,
    }


def test_links_to_what_was_read_already_are_warned_of(tmp_path):
    data = classes(tmp_path / "data", a=20, b=20)
    (data / "a/up").symlink_to(data)
    (data / "a/self").symlink_to(data / "a")
    (warning,) = load(str(data)).warnings
    assert (
        "and 1 more were left out: each is a folder" in warning and "a/self" in warning
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_devices_and_sockets_are_unusable_and_never_opened(tmp_path):
    classes(tmp_path, a=3, b=3)
    os.mkfifo(tmp_path / "a/pipe.jpg")
    (tmp_path / "a/link.jpg").symlink_to(tmp_path / "a/pipe.jpg")
    (tmp_path / "b/endless.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("b/socket.jpg")
    splits = load(str(tmp_path))
    odd = {"a/pipe.jpg", "a/link.jpg", "b/endless.png", "b/socket.jpg"}
    read = dict(splits.read(sorted(label_of(splits))))
    unusable = {x: e.strerror for x, e in read.items() if isinstance(e, OSError)}
    assert unusable == dict.fromkeys(odd, "it is not a regular file")
    assert len(read) == 10


def test_a_path_that_cannot_be_is_one_unusable_row(tmp_path):
    data = table(tmp_path, "path,label\na\0.jpg,a\n/dev/zero,b\n.,b\n")
    splits = load(data, SplitsConfig(test=0))
    errors = [error.strerror for _, error in splits.read(splits.train.sources)]
    assert "NUL" in errors[0]
    assert errors[1:] == ["it is not a regular file"] * 2


def test_a_folder_that_cannot_be_read_is_one_warning(public_directory):
    classes(public_directory, a=20, b=20)
    locked = write(public_directory / "a/locked", "1.jpg")
    locked.chmod(0)
    with without_root_powers():
        splits = load(str(public_directory))
        images = list(find_images(public_directory))
    assert splits.warnings == ("a/locked was left out: a folder that cannot be read.",)
    assert len(images) == 41 and locked in images  # which whoever reads it finds out


def test_what_cannot_be_read_is_yielded_as_its_error(tmp_path):
    classes(tmp_path, a=3, b=3)
    (tmp_path / "a/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    splits = load(str(tmp_path))
    read = dict(splits.read(sorted(label_of(splits))))
    error = read.pop("a/dangling.jpg")
    assert isinstance(error, FileNotFoundError)
    assert read == {source: source.encode() for source in read}
    assert len(read) == 6


def test_a_file_name_that_is_not_utf8_can_be_fingerprinted_and_written(tmp_path):
    classes(tmp_path, a=3, b=3)
    (tmp_path / os.fsdecode(b"a/caf\xe9.jpg")).write_bytes(b"x")
    splits = load(str(tmp_path))
    splits.fingerprint(dict.fromkeys(label_of(splits), b""))
    assert b"caf\xe9" in splits.to_csv().encode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a/1.jpg", "a/2.jpg"], ["two classes", "'a'"]),
        (["a/", "b/"], ["no images"]),
        (["1.jpg", "2.jpg"], ["2 images lie in no class folders"]),
        (["train/", "val/a/1.jpg", "val/b/2.jpg"], ["train"]),
    ],
)
def test_folders_without_enough_to_learn_from_are_refused(tmp_path, paths, words):
    message = refusal(KerasTransferError, write(tmp_path, *paths))
    assert all(word in message for word in words)


@pytest.mark.parametrize("data", ["nowhere", "digit", "~/nowhere.csv"])
def test_data_that_do_not_exist_are_named(data):
    assert data in refusal(UsageError, data)


# CSV and TSV


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_names_path_label_split_and_group(
    tmp_path, delimiter, encoding, newline
):
    rows = [
        ("Path", "Label", "note", "SPLIT", "group"),
        ("x/1.jpg", "red fox", "n", "train", "p1"),
        ("x/2.jpg", "Füchse", "", "Validation", "p2"),
        ("x/3.jpg", "red fox", "", "test", ""),
        (" x/4.jpg ", " Füchse ", "", "TRAIN", "p1"),
    ]
    text = newline.join(delimiter.join(row) for row in rows) + newline * 2
    file = tmp_path / "data.txt"
    file.write_bytes(text.encode(encoding))
    write(tmp_path, *(f"x/{i}.jpg" for i in range(1, 5)))
    splits = load(str(file))
    assert splits.class_names == ("Füchse", "red fox")
    assert split_of(splits) == {
        "x/1.jpg": "train",
        "x/2.jpg": "train",
        "x/3.jpg": "test",
        "x/4.jpg": "train",
    }
    assert label_of(splits)["x/4.jpg"] == "Füchse"
    assert splits.train.groups == ("p1", "p2", "p1")
    assert splits.test.groups == ("",)
    assert dict(splits.read(["x/2.jpg"])) == {"x/2.jpg": b"x/2.jpg"}


def test_paths_may_be_quoted_or_absolute(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", "a.jpg") / "a.jpg"
    text = f'path,label\n"x, y.jpg",a\n{elsewhere},b\n'
    write(tmp_path / "data", "x, y.jpg")
    splits = load(table(tmp_path / "data", text))
    assert dict(splits.read(sorted(label_of(splits)))) == {
        "x, y.jpg": b"x, y.jpg",
        str(elsewhere): b"a.jpg",
    }


def test_several_labels_are_separated_by_a_bar(tmp_path):
    rows = ["1.jpg,sun|sea", "2.jpg,", "3.jpg,sea", "4.jpg, sea | sky |sea"]
    text = "\n".join(["path,label,split", *(f"{row},train" for row in rows)])
    splits = load(table(tmp_path, text))
    assert splits.multi_label
    assert splits.class_names == ("sea", "sky", "sun")
    assert splits.train.targets.dtype == np.uint8
    np.testing.assert_array_equal(
        splits.train.targets, [[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    )
    assert splits.class_counts()["train"] == {"sea": 3, "sky": 1, "sun": 1}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("path,label\na.jpg,x\nb.jpg,y\na.jpg,y\n", None, ["line 4", "a.jpg", "ine 2"]),
        ("path,label\na.jpg,x\n,y\n", None, ["line 3", "empty"]),
        ("path,label\na.jpg,x\nb.jpg,\n", None, ["line 3", "b.jpg", "no label"]),
        ("path,label\na.jpg,x\n\nb.jpg\n", None, ["line 4", "b.jpg", "no label"]),
        ("path,label,split\na.jpg,x,tset\n", None, ["line 2", "'tset'"]),
        ("path,label\n", None, ["no images"]),
        ("path,label\na.jpg,x\nb.jpg,x\n", None, ["two classes", "'x'"]),
        ("path,label\na.jpg,x\nb.jpg,y\x07\n", None, [r"'y\x07'"]),
        ("a.jpg,x\nb.jpg,y\n", UsageError, ["path,label", "'a.jpg,x'"]),
        ("path,label\na.jpg,x\nb, 1.jpg,y\n", UsageError, ["line 3", "3 cells"]),
        ("path,label\n\n\na, 1.jpg,x\n", UsageError, ["line 4", "double quotes"]),
        ("path,label,Label\na.jpg,x,y\n", UsageError, ["line 1", "'label'", "2 times"]),
        ("path:label\na.jpg:x\n", UsageError, ["path,label", "'path:label'"]),
        ("", UsageError, ["path,label"]),
    ],
)
def test_a_mistake_in_a_table_is_one_line_that_says_where(tmp_path, text, error, words):
    message = refusal(error or KerasTransferError, table(tmp_path, text))
    assert all(word in message for word in words)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(encode(np.zeros((9, 9, 3), np.uint8), "JPEG"))
    assert "photo.jpg" in refusal(UsageError, file)


# Splits


def shares_are_kept(counts: dict[str, dict[str, int]], test: float) -> None:
    for name in counts["train"]:
        total = sum(counts[split][name] for split in NAMES)
        assert abs(counts["test"][name] - test * total) <= 1, name
        assert counts["val"][name] == 0


@pytest.mark.parametrize("test", [None, 0.0, 0.1, 0.25, 0.5, 0.8])
def test_every_class_is_divided_in_the_share_asked_for(tmp_path, test):
    counts = {f"c{n}": n for n in (1, 2, 3, 4, 5, 9, 10, 11, 37)}
    classes(tmp_path, **counts)
    config = None if test is None else SplitsConfig(test=test)
    splits = load(str(tmp_path), config)
    assert len(split_of(splits)) == sum(counts.values())
    shares_are_kept(splits.class_counts(), 0.15 if test is None else test)
    assert test != 0 or len(splits.train) == sum(counts.values())


@pytest.mark.parametrize("test", [0.15, 0.5, 0.9])
def test_a_class_of_one_image_is_trained_on(tmp_path, test):
    classes(tmp_path, lonely=1, other=20)
    splits = load(str(tmp_path), SplitsConfig(test=test))
    assert splits.class_counts()["train"]["lonely"] == 1
    assert len(splits.test) == pytest.approx(21 * test, abs=1)


def test_many_small_classes_add_up_to_the_shares(tmp_path):
    splits = load(str(classes(tmp_path, **{f"c{i}": 5 for i in range(40)})))
    assert sizes(splits) == [170, 0, 30]


def test_the_seed_alone_decides_which_images_go_where(tmp_path):
    classes(tmp_path, a=40, b=40)
    first, again, other = (split_of(load(str(tmp_path), seed=s)) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert Counter(first.values()) == Counter(other.values())


def grouped_rows(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    rows = []
    for group in range(60):
        name = "abc"[rng.integers(3)]
        for i in range(rng.integers(1, 9)):
            label = name if rng.random() < 0.8 else "abc"[rng.integers(3)]
            rows.append((f"g{group}/{i}.jpg", label, f"g{group}"))
    rows += [(f"single/{i}.jpg", "abc"[i % 3], "") for i in range(30)]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("test", [0.1, 0.15, 0.25, 0.5])
def test_classes_too_small_to_be_divided_meet_the_share_together(tmp_path, size, test):
    splits = load(
        str(classes(tmp_path, **{f"c{i:03d}": size for i in range(200)})),
        SplitsConfig(test=test),
    )
    assert all(splits.class_counts()["train"].values())
    if size > 1:
        assert len(splits.test) == pytest.approx(200 * size * test, abs=1)
    else:
        assert len(splits.test) == 0
        assert "There is no test split" in splits.warnings[0]


def test_of_two_groups_one_is_tested_on(tmp_path):
    rows = [f"{i}.jpg,{'ab'[i % 2]},g{i // 20}" for i in range(40)]
    splits = load(table(tmp_path, "\n".join(["path,label,group", *rows])))
    assert sizes(splits) == [20, 0, 20]
    assert splits.warnings == ()


def test_groups_that_the_data_divide_are_counted_and_warned_of(tmp_path):
    rows = [f"{i}.jpg,{'ab'[i % 2]},train,p{i // 4}" for i in range(40)]
    rows += [f"v{i}.jpg,{'ab'[i % 2]},val,p{i + 8}" for i in range(5)]
    test = [f"t{i}.jpg,{'ab'[i % 2]},test,p{i + 3}" for i in range(12)]
    header = "path,label,split,group"
    splits = load(table(tmp_path, "\n".join([header, *rows, *test])))
    assert splits.warnings == (  # p3 to p9 are in train, p10 to p12 were in val
        TRAINED_ON,
        "10 of 12 test images are of a group that is in train too: their figures "
        "flatter.",
    )
    splits = load(table(tmp_path, "\n".join([header, *rows])))
    assert splits.warnings == (
        TESTED_ON,
        "2 of 5 test images are of a group that is in train too: their figures "
        "flatter.",
    )


def test_groups_that_a_kept_assignment_divides_are_warned_of(tmp_path):
    rows = [f"{i}.jpg,{'ab'[i % 2]},p{i // 2}" for i in range(40)]
    data = table(tmp_path, "\n".join(["path,label,group", *rows]))
    kept = [f"{i}.jpg,x,{'test' if i % 2 else 'train'}" for i in range(40)]
    file = table(tmp_path, "\n".join(["path,label,split", *kept]), "kept.csv")
    splits = load(data, SplitsConfig(file=Path(file)))
    assert any("20 of 20 test images are of a group" in x for x in splits.warnings)


@pytest.mark.parametrize("kind", ["csv", "no share"])
def test_whoever_has_no_test_split_is_warned(tmp_path, kind):
    if kind == "csv":
        rows = [f"{i}.jpg,{'ab'[i % 2]},{'train' if i < 9 else ''}" for i in range(40)]
        rows = ["path,label,split", *rows]
        splits = load(table(tmp_path, "\n".join(rows)), SplitsConfig(test=0))
    else:
        data = str(classes(tmp_path, a=20, b=20))
        splits = load(data, SplitsConfig(test=0))
    assert len(splits.test) == 0
    assert ["no test split" in line for line in splits.warnings] == [True]


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_never_torn_apart(tmp_path, seed):
    rows = grouped_rows(np.random.default_rng(seed))
    text = "\n".join(["path,label,group", *map(",".join, rows)])
    splits = load(table(tmp_path, text), SplitsConfig(test=0.2), seed)
    found = split_of(splits)
    assert len(found) == len(rows)
    used = defaultdict(set)
    for path, _, group in rows:
        used[group].add(found[path])
    assert used.pop("") == set(NAMES)
    assert all(len(names) == 1 for names in used.values())
    counts = Counter(found.values())
    assert counts["test"] / len(rows) == pytest.approx(0.2, abs=0.03)


def test_images_without_a_split_join_those_of_their_group(tmp_path):
    rows = [f"{i}.jpg,{'ab'[i % 2]},{'test' if i < 2 else ''},g" for i in range(10)]
    rows += [f"{i}.jpg,{'ab'[i % 2]},," for i in range(10, 60)]
    splits = load(table(tmp_path, "\n".join(["path,label,split,group", *rows])))
    assert splits.test.sources == tuple(f"{i}.jpg" for i in range(10))
    assert splits.train.sources == tuple(f"{i}.jpg" for i in range(10, 60))


@pytest.mark.parametrize("named", [4, 30, 60])
@pytest.mark.parametrize("name", ["test", "val"])
def test_a_named_test_split_is_kept_and_the_rest_trained_on(tmp_path, named, name):
    rows = [f"{i}.jpg,{'ab'[i % 2]},{name if i < named else ''}" for i in range(100)]
    splits = load(table(tmp_path, "\n".join(["path,label,split", *rows])))
    assert splits.test.sources == tuple(f"{i}.jpg" for i in range(named))
    assert splits.train.sources == tuple(f"{i}.jpg" for i in range(named, 100))


def test_multi_label_images_are_divided_by_their_rarest_class(tmp_path):
    rare = [f"r{i}.jpg,common|rare" for i in range(20)]
    rows = [*rare, *(f"c{i}.jpg,common" for i in range(80)), "n.jpg,"]
    splits = load(table(tmp_path, "\n".join(["path,label", *rows])))
    assert [splits.class_counts()[name]["rare"] for name in NAMES] == [17, 3]
    assert [splits.class_counts()[name]["common"] for name in NAMES] == [85, 15]
    assert len(split_of(splits)) == 101


def test_an_old_assignment_is_kept_and_only_new_images_are_assigned(tmp_path):
    data = classes(tmp_path / "data", a=30, b=30)
    old = load(str(data), SplitsConfig(test=0.3), seed=7)
    file = tmp_path / "splits.csv"
    file.write_text(old.to_csv())
    write(data, *(f"a/new{i}.jpg" for i in range(30)))
    (data / "b/0.jpg").unlink()
    splits = load(str(data), SplitsConfig(file=file), seed=1)
    expected, found = split_of(old), split_of(splits)
    del expected["b/0.jpg"]
    assert {path: found[path] for path in expected} == expected
    assert len(found) == len(expected) + 30
    counts = splits.class_counts()
    assert counts["test"]["a"] == 9  # its share of 15% already: nothing new
    assert counts["train"]["a"] == 51


@pytest.mark.parametrize("has_test", [True, False])
def test_old_validation_images_are_no_split_of_their_own(tmp_path, has_test):
    rows = [f"{i}.jpg,{'ab'[i % 2]},p{i // 4}" for i in range(80)]
    data = table(tmp_path, "\n".join(["path,label,group", *rows]))
    # Of each group, one image is new. Version 0.1.0 held p0 to p3 out for validation.
    old = {f"{i}.jpg": "val" if i < 16 else "train" for i in range(80) if i % 4}
    if has_test:
        old |= {path: "test" for path in old if 16 <= int(path[:-4]) < 32}
    lines = [f"{path},?,{split}" for path, split in old.items()]
    file = table(tmp_path, "\n".join(["path,label,split", *lines]), "old.csv")
    splits = load(data, SplitsConfig(file=Path(file)))
    first, warning = (16, TRAINED_ON) if has_test else (0, TESTED_ON)
    assert splits.test.sources == tuple(f"{i}.jpg" for i in range(first, first + 16))
    assert sizes(splits) == [64, 0, 16]
    assert splits.warnings == (warning,)


def test_an_old_assignment_of_other_data_is_refused(tmp_path):
    classes(tmp_path, a=3, b=3)
    file = Path(table(tmp_path, "path,label,split\nelse.jpg,a,train\n"))
    message = refusal(UsageError, tmp_path, config=SplitsConfig(file=file))
    assert "else.jpg" in message
    assert "a/0.jpg" in message


@pytest.mark.parametrize("multi_label", [False, True])
def test_splits_written_as_a_table_are_data_again(tmp_path, multi_label):
    rng = np.random.default_rng(0)
    rows = [(path, label, group) for path, label, group in grouped_rows(rng)]
    if multi_label:
        rows = [(path, f"{label}|x,é", group) for path, label, group in rows]
        rows.append(("none.jpg", "", ""))
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label", "group"), *rows])
    splits = load(table(tmp_path, text.getvalue()))
    again = load(table(tmp_path, splits.to_csv(), "splits.csv"), seed=99)
    assert again.class_names == splits.class_names
    assert again.multi_label == multi_label
    assert len(splits.test) > 0
    for (_, part), (_, other) in zip(splits.items(), again.items(), strict=True):
        assert part.sources == other.sources
        assert part.groups == other.groups
        np.testing.assert_array_equal(part.targets, other.targets)
    assert again.to_csv() == splits.to_csv()


# What file systems allow, except for what a path cannot hold and for a leading dot,
# which hides a file; a class name has no control characters and no bar.
_LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
_LABELS = st.text(
    st.characters(
        exclude_characters="/|", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn"]
    ),
    min_size=1,
    max_size=8,
)


def _is_ordinary(name: str) -> bool:
    return not name.startswith(".") and len(name.encode()) < 200


@st.composite
def _images(draw: st.DrawFn) -> list[tuple[str, str, str, str]]:
    """Rows of (path, label, split, group), two classes at least in train."""
    names = st.text(_LETTERS, min_size=1, max_size=12).filter(_is_ordinary)
    labels = draw(
        st.lists(
            _LABELS.filter(lambda x: x == x.strip()),
            min_size=2,
            max_size=4,
            unique=True,
        )
    )
    paths = draw(st.lists(names, min_size=4, max_size=30, unique=True))
    has_splits, has_groups = draw(st.booleans()), draw(st.booleans())
    groups = st.sampled_from(["", "p", " q ", "r\rs"] if has_groups else [""])
    splits = st.sampled_from(["train", "val", "Testing", ""] if has_splits else [""])
    return [
        (
            f"{index}/{path}",
            labels[index % len(labels)],
            "train" if has_splits and index < 2 else draw(splits),
            draw(groups),
        )
        for index, path in enumerate(paths)
    ]


def check_kept(
    splits: Splits,
    named: dict[str, str],
    groups: dict[str, str],
    others: tuple[str, ...] = ("train", "test"),
) -> None:
    """Compares splits with those named for some images.

    Images without a name are with their group: in one of the splits that its other
    images are named for, if any, else all in one of `others`.
    """
    val = "train" if "test" in named.values() else "test"
    found = split_of(splits)
    kept = {path: val if name == "val" else name for path, name in named.items()}
    assert {path: found[path] for path in kept} == kept
    fixed, free = defaultdict(set), defaultdict(set)
    for path, group in groups.items():
        if path in kept:
            fixed[group or path].add(kept[path])
        else:
            free[group or path].add(found[path])
    for group, used in free.items():
        assert len(used) == 1
        assert used <= (fixed[group] or {*others})
    assert len(splits.val) == 0
    said = [line for line in splits.warnings if line.startswith("Validation")]
    assert said == (
        []
        if "val" not in named.values()
        else [TRAINED_ON if val == "train" else TESTED_ON]
    )


@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=_images(), test=st.sampled_from([0.2, 0.6]), seed=st.integers(0, 3))
def test_any_table_is_divided_whole_and_its_splits_read_back(
    tmp_path, rows, test, seed
):
    data = tmp_path / "any.csv"
    text = csv_text(("path", "label", "split", "group"), rows)
    data.write_bytes(text.encode(errors="surrogateescape"))
    splits = load(str(data), SplitsConfig(test=test), seed)
    found, labels = split_of(splits), label_of(splits)
    expected = {Path(path.strip()).as_posix(): row for path, *row in rows}
    assert labels == {path: label for path, (label, _, _) in expected.items()}
    names = {"train": "train", "val": "val", "Testing": "test"}
    named = {path: names[split] for path, (_, split, _) in expected.items() if split}
    groups = {path: group.strip() for path, (_, _, group) in expected.items()}
    if {"val", "test"} & {*named.values()}:
        check_kept(splits, named, groups, others=("train",))
    else:
        check_kept(splits, {}, groups)
        if not any(groups.values()):
            shares_are_kept(splits.class_counts(), test)

    file = tmp_path / "splits.csv"
    file.write_bytes(splits.to_csv().encode(errors="surrogateescape"))
    again = load(str(data), SplitsConfig(file=file), seed=99)
    assert again.to_csv() == splits.to_csv()
    assert {row["path"] for _, row in read_table(file)} == set(found)


@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=_images(),
    names=st.lists(
        st.sampled_from(["train", "val", "test", ""]), min_size=30, max_size=30
    ),
    seed=st.integers(0, 3),
)
def test_any_old_splits_are_kept_and_new_images_join_their_group(
    tmp_path, rows, names, seed
):
    data, file = tmp_path / "any.csv", tmp_path / "old.csv"
    rows = [(path, label, group) for path, label, _, group in rows]
    text = csv_text(("path", "label", "group"), rows)
    data.write_bytes(text.encode(errors="surrogateescape"))
    groups = {Path(path.strip()).as_posix(): group.strip() for path, _, group in rows}
    named = dict(zip(groups, ["train", *names], strict=False))
    named = {path: name for path, name in named.items() if name}

    def divided(named: dict[str, str]) -> Splits:
        old = csv_text(
            ("path", "label", "split"), [(x, "?", y) for x, y in named.items()]
        )
        file.write_bytes(old.encode(errors="surrogateescape"))
        return load(str(data), SplitsConfig(test=0.2, file=file), seed)

    splits = divided(named)
    check_kept(splits, named, groups)
    found = split_of(splits)
    assert divided({path: found[path] for path in named}).to_csv() == splits.to_csv()


@settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(
        st.text(_LETTERS, min_size=1, max_size=8).filter(_is_ordinary),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    labels=st.lists(_LABELS.filter(_is_ordinary), min_size=2, max_size=3, unique=True),
)
def test_any_folder_reads_back_from_its_splits(tmp_path_factory, names, labels):
    folder = tmp_path_factory.mktemp("any")
    for label in labels:
        write(folder / label, *(f"{name}.jpg" for name in names))
    if not _is_plain(labels):
        return
    splits = load(str(folder))
    assert len(split_of(splits)) == len(names) * len(labels)
    assert splits.class_names == tuple(sorted(labels))
    file = tmp_path_factory.mktemp("splits") / "splits.csv"
    file.write_bytes(splits.to_csv().encode(errors="surrogateescape"))
    again = load(str(folder), SplitsConfig(file=file), seed=99)
    assert again.to_csv() == splits.to_csv()
    assert dict(again.read(again.train.sources)) == dict(
        splits.read(splits.train.sources)
    )


def _is_plain(labels: list[str]) -> bool:
    words = {label.strip().lower().replace("-", "_") for label in labels}
    junk = {"train", "training", "val", "valid", "validation", "dev", "eval", "test"}
    return not words & junk


def test_the_fingerprint_tells_bytes_labels_names_and_splits_apart(tmp_path):
    def fingerprint(text: str, content: bytes = b"") -> str:
        splits = load(table(tmp_path, "path,label,split\n" + text))
        digests = {s: sha256(s.encode()).digest() for s in label_of(splits)}
        return splits.fingerprint(digests | {"1.jpg": sha256(content).digest()})

    rows = "1.jpg,a,train\n2.jpg,b,train\n3.jpg,b,train\n4.jpg,b,test\n"
    same = fingerprint(rows)
    assert same == fingerprint(rows)
    others = {
        fingerprint(rows, b"other bytes"),
        fingerprint(rows.replace("1.jpg,a", "1.jpg,b").replace("2.jpg,b", "2.jpg,a")),
        fingerprint(rows.replace("2.jpg", "5.jpg")),
        fingerprint(rows.replace("3.jpg,b,train", "3.jpg,b,test")),
        fingerprint(rows.replace(",b,", ",c,")),
    }
    assert len(others | {same}) == 6
    assert fingerprint(rows.replace("3.jpg,b,train", "3.jpg,b,val")) == same


def test_keep_leaves_only_the_images_named(tmp_path):
    splits = load(str(classes(tmp_path, a=20, b=20)))
    wanted = [splits.train.sources[3], splits.test.sources[0], "unknown.jpg"]
    kept = splits.keep(wanted)
    assert split_of(kept) == {wanted[0]: "train", wanted[1]: "test"}
    assert label_of(kept) == {s: label_of(splits)[s] for s in wanted[:2]}
    assert kept.absent_classes() == [
        f"The {name} split has no image of 1 of 2 classes: {absent!r}."
        for name, absent in (
            (name, {"a": "b", "b": "a"}[label_of(kept)[source]])
            for source, name in zip(wanted, ("train", "test"), strict=False)
        )
    ]


def test_a_folder_is_not_walked_that_is_not_searched(tmp_path, monkeypatch):
    write(tmp_path, "1.jpg", "deep/2.jpg", "deep/er/3.jpg")
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: scanned.append(path) or scandir(path)
    )
    assert list(image_files(tmp_path, recursive=False)) == [str(tmp_path / "1.jpg")]
    assert scanned == [tmp_path]
    assert len(list(image_files([str(tmp_path)], recursive=True))) == 3


def test_one_path_is_as_good_as_a_list_of_one(tmp_path):
    assert list(image_files("photo.jpg", recursive=False)) == ["photo.jpg"]
    assert list(image_files(Path("photo.jpg"), recursive=False)) == ["photo.jpg"]


# All images as one table


def test_all_images_are_labelled_as_the_model_numbers_its_classes(tmp_path):
    data = str(classes(tmp_path, a=2, b=1))
    found, listing = load_all(data, ("x", "b", "a"), multi_label=False)
    assert dict(zip(found.sources, found.targets, strict=True)) == {
        "a/0.jpg": 2,
        "a/1.jpg": 2,
        "b/0.jpg": 1,
    }
    assert dict(listing.read(["b/0.jpg"])) == {"b/0.jpg": b"b/0.jpg"}
    found, _ = load_all(data, ("x", "b", "a"), multi_label=True)
    assert found.targets.tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]


def test_a_blank_label_of_a_multi_label_model_is_no_class(tmp_path):
    data = table(tmp_path, "path,label\n1.jpg,a\n2.jpg,\n")
    found, _ = load_all(data, ("a", "b"), multi_label=True)
    assert found.targets.tolist() == [[1, 0], [0, 0]]


def test_one_class_is_enough_to_evaluate(tmp_path):
    found, _ = load_all(str(classes(tmp_path, b=3)), ("a", "b"), multi_label=False)
    assert found.targets.tolist() == [1, 1, 1]


def test_a_label_that_the_model_lacks_is_named(tmp_path):
    classes(tmp_path, a=1, zebra=1)
    with pytest.raises(KerasTransferError, match="'zebra'.* a, b"):
        load_all(str(tmp_path), ("a", "b"), multi_label=False)


def test_several_labels_do_not_fit_a_model_of_one(tmp_path):
    data = table(tmp_path, "path,label\n1.jpg,a|b\n2.jpg,\n")
    with pytest.raises(KerasTransferError):
        load_all(data, ("a", "b"), multi_label=False)


# digits and tensorflow-datasets


def test_digits_are_the_images_of_scikit_learn():
    splits = load("digits")
    labels = label_of(splits)
    assert len(labels) == 1797
    assert splits.class_names == tuple("0123456789")
    shares_are_kept(splits.class_counts(), 0.15)
    bunch = load_digits()
    names = sorted(labels)
    assert [labels[name] for name in names] == list(map(str, bunch.target))
    read = dict(splits.read(names))
    for name, expected in zip(names[::50], bunch.images[::50], strict=True):
        with Image.open(io.BytesIO(read[name])) as image:
            assert image.format == "PNG"
            assert abs(np.asarray(image) - expected * (255 / 16)).max() <= 0.5


IMAGES = {
    form: [
        encode(np.full((6, 5, 3), (40 * i, 9, 255 - 40 * i), np.uint8), form)
        for i in range(6)
    ]
    for form in ("JPEG", "PNG")
}


def prepare(
    folder: Path,
    name: str,
    splits: dict[str, int],
    form: str = "PNG",
    features: tuple[str, ...] = ("image", "label"),
) -> dict[bytes, str]:
    """Writes a data set as tfds stores it, and forgets the builder's class.

    Returns:
        The bytes of each image, which end in its number, and its class.
    """
    images = {
        split: [
            (IMAGES[form][i % 6] + f"{split}{i}".encode(), ("no", "yes")[i % 3 == 0])
            for i in range(count)
        ]
        for split, count in splits.items()
    }
    kinds = {
        "image": tfds.features.Image(encoding_format=form.lower()),
        "mask": tfds.features.Image(encoding_format=form.lower()),
        "label": tfds.features.ClassLabel(names=["yes", "unused", "no"]),
    }

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({key: kinds[key] for key in features}),
        )

    def examples(split):
        for i, (image, label) in enumerate(images[split]):
            values = {"image": image, "mask": image, "label": label}
            yield i, {key: values[key] for key in features}

    with tfds.core.registered.skip_registration():
        builder = type(
            tfds.core.naming.snake_to_camelcase(name),
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "VERSION": tfds.core.Version("1.0.0"),
                "_info": info,
                "_split_generators": lambda self, _: {s: examples(s) for s in splits},
                "_generate_examples": None,
            },
        )
    builder(data_dir=folder).download_and_prepare()
    return {image: label for rows in images.values() for image, label in rows}


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("version", ["", ":1.0.0"])
def test_a_tfds_data_set_of_one_split_is_divided(tmp_path, form, version):
    stored = prepare(tmp_path, "kt_whole", {"train": 40}, form)
    splits = load(f"tfds:kt_whole{version}", options=ListingConfig(data_dir=tmp_path))
    assert splits.class_names == ("yes", "no")
    assert sizes(splits) == [34, 0, 6]
    labels = label_of(splits)
    read = list(splits.read(sorted(labels)))
    assert len(read) == len(stored) == 40
    assert {encoded: labels[source] for source, encoded in read} == stored
    some = splits.test.sources
    assert sorted(source for source, _ in splits.read(some)) == sorted(some)


@pytest.mark.parametrize(
    ("given", "train", "test"),
    [
        ({"train": 20, "validation": 6, "test": 9}, ["train", "validation"], "test"),
        ({"train": 20, "validation": 6}, ["train"], "validation"),
        ({"train": 30, "test": 9}, ["train"], "test"),
    ],
    ids=["all", "no_test", "no_val"],
)
def test_the_splits_of_a_tfds_data_set_are_kept(tmp_path, request, given, train, test):
    name = f"kt_split_{request.node.callspec.id}"
    stored = prepare(tmp_path, name, given)
    splits = load(f"tfds:{name}", options=ListingConfig(data_dir=tmp_path))
    for part, names in ((splits.train, train), (splits.test, [test])):
        read = {encoded for _, encoded in splits.read(part.sources)}
        assert len(read) == len(part) == sum(given[x] for x in names)
        wanted = {f"{x}{i}".encode() for x in names for i in range(given[x])}
        assert read == {x for x in stored if x.endswith(tuple(wanted))}
    assert len(splits.val) == 0


def test_a_tfds_data_set_is_all_one_table(tmp_path):
    stored = prepare(tmp_path, "kt_all", {"train": 5, "test": 4})
    found, listing = load_all(
        "tfds:kt_all", ("no", "yes"), False, ListingConfig(data_dir=tmp_path)
    )
    encoded = dict(listing.read(found.sources))
    assert {
        encoded[source]: ("no", "yes")[target]
        for source, target in zip(found.sources, found.targets, strict=True)
    } == stored


@pytest.mark.parametrize("features", [("image", "mask", "label"), ("image",)])
def test_a_tfds_data_set_needs_one_image_and_one_label(tmp_path, features):
    prepare(tmp_path, "kt_odd", {"train": 3}, features=features)
    message = refusal(
        UsageError, "tfds:kt_odd", options=ListingConfig(data_dir=tmp_path)
    )
    assert all(feature in message for feature in ["kt_odd", *features])


@pytest.mark.parametrize("name", ["no_such_data_set", "no_such:9.9.9", "", "a b"])
def test_an_unknown_tfds_name_is_one_line(tmp_path, name):
    assert repr(name) in refusal(
        UsageError, f"tfds:{name}", options=ListingConfig(data_dir=tmp_path)
    )


def test_a_tfds_data_set_that_cannot_be_prepared_is_explained(tmp_path):
    class KtRemote(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Log in and accept the terms."

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": tfds.features.Image()}),
            )

        def _split_generators(self, dl_manager):
            return {"train": dl_manager.manual_dir}

        def _generate_examples(self): ...

    message = refusal(
        KerasTransferError, "tfds:kt_remote", options=ListingConfig(data_dir=tmp_path)
    )
    assert "'kt_remote'" in message
    assert str(tmp_path) in message
    assert "as data_dir" in message


# Threads


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_mapping_ahead_keeps_the_order_and_its_distance(ahead):
    taken = 0

    def items():
        nonlocal taken
        while taken < 40:
            taken += 1
            yield taken

    def slow(item: int) -> int:
        time.sleep(0.004 * (item % 3))
        return -item

    furthest = 0
    for count, result in enumerate(map_ahead(slow, items(), 3, ahead), 1):
        assert result == -count
        furthest = max(furthest, taken - count)
    assert count == 40
    assert furthest == ahead


def test_a_result_does_not_wait_until_enough_was_taken_ahead():
    taken, done = 0, threading.Semaphore(0)

    def items():
        nonlocal taken
        for taken in range(1, 101):  # noqa: B020
            yield taken
            done.acquire(timeout=10)  # slower than the function

    def function(item: int) -> int:
        done.release()
        return item

    furthest = 0
    for count, result in enumerate(map_ahead(function, items(), 2, ahead=20), 1):
        assert result == count
        assert taken <= 3 * count + 3
        furthest = max(furthest, taken - count)
    assert count == 100
    assert furthest == 20  # which a slow consumer leaves time for


@pytest.mark.parametrize("sizes", [[30] * 40, [500, 1, 1, 500, 500] * 3])
def test_mapping_ahead_is_bounded_by_bytes(monkeypatch, sizes):
    monkeypatch.setattr(reading, "MOST_BYTES_AHEAD", 100)
    waiting = furthest = 0

    def items():
        nonlocal waiting, furthest
        for size in sizes:
            waiting += size
            furthest = max(furthest, waiting)
            yield size

    def slow(size: int) -> int:
        time.sleep(0.002)
        return size

    results = []
    for size in map_ahead(slow, items(), 2, ahead=20, weigh=lambda size: size):
        results.append(size)
        waiting -= size
    assert results == sizes
    assert furthest <= 100 + 2 * max(sizes)  # the next one, and the last one taken


def test_large_files_are_not_all_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES_AHEAD", 40_000)
    names = [f"{i:02d}.jpg" for i in range(30)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([i]) * 10_000)
    names.insert(3, "missing.jpg")
    read_bytes, read = Path.read_bytes, []

    def counting(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counting)
    furthest = 0
    for count, (name, content) in enumerate(reading.read_files(names, tmp_path), 1):
        assert name == names[count - 1]
        if name != "missing.jpg":
            assert content == bytes([int(name[:2])]) * 10_000
        time.sleep(0.002)
        furthest = max(furthest, len(read) - count)
    assert count == 31 and len(read) == 30  # what is missing is not opened
    assert 3 <= furthest <= 5


def test_mapping_ahead_runs_in_threads_at_once():
    barrier = threading.Barrier(3, timeout=10)
    assert len(set(map_ahead(lambda _: barrier.wait(), range(3), 3))) == 3


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_exception_comes_after_the_results_before_it(where):
    def divide(item: int) -> float:
        return 6 / (3 - item)

    def items():
        yield from range(10) if where == "function" else range(3)
        raise KeyError

    results = map_ahead(divide, items(), 2, ahead=2)
    if where == "function":
        assert [next(results) for _ in range(3)] == [2, 3, 6]
    else:
        assert next(results) == 2
    with pytest.raises(ZeroDivisionError if where == "function" else KeyError):
        list(results)


def test_giving_up_early_does_no_more_work():
    begun = []

    def slow(item: int) -> None:
        begun.append(item)
        time.sleep(0.05)

    results = map_ahead(slow, range(1000), 2, ahead=20)
    next(results)
    before = threading.active_count()
    results.close()
    assert len(begun) <= 8  # not the 21 that were waiting
    assert threading.active_count() == before - 2
