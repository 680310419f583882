"""`kt audit`: planted problems are found, and a cleaned table is read back."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, Told, draw, encode
from PIL import Image

import keras_transfer
from keras_transfer.config import ListingConfig
from keras_transfer.data.listing import list_data
from keras_transfer.errors import KerasTransferError, UsageError

SIZE = 64


def photo(name: str, rng: np.random.Generator) -> np.ndarray:
    """The shape before a background of its own, or it would be a copy of another."""
    shape = draw(name, rng)
    blots = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    ground = np.asarray(blots.resize(shape.shape[:2], Image.Resampling.BICUBIC))
    return (0.35 * shape + 0.65 * ground).astype(np.uint8)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    cache = tmp_path_factory.mktemp("cache")
    return {"image_size": SIZE, "cache_dir": cache}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 25 photos a class with train/ and test/, and planted problems."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(1)
    for name in CLASSES:
        for index in range(25):
            split = "test" if index < 8 else "train"
            path = folder / split / name / f"{index:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photo(name, rng), "JPEG"))
    train, test = folder / "train", folder / "test"
    shutil.copy(test / "circle/00.jpg", train / "circle/copy.jpg")
    shutil.copy(train / "square/10.jpg", train / "square/again.jpg")
    shutil.copy(train / "square/11.jpg", train / "stripes/torn.jpg")
    black = np.full((72, 72, 3), 3, np.uint8)
    (train / "circle" / "black.jpg").write_bytes(encode(black, "JPEG"))
    Image.fromarray(photo("square", rng)).resize((16, 16)).save(train / "square/t.png")
    (train / "stripes" / "broken.jpg").write_bytes(b"no image")
    hostile = os.fsdecode(b"<script>, \xe9\n.jpg")
    (train / "circle" / hostile).write_bytes(encode(photo("stripes", rng), "JPEG"))
    return folder


@pytest.fixture(scope="module")
def found(planted, options):
    return keras_transfer.audit(planted, **options)


def suspects(found, kind):
    return [x.path for one in found.findings if one.kind == kind for x in one.suspects]


@pytest.mark.long
def test_planted_problems_are_found(found):
    assert found.images == 81
    assert found.class_counts == {"circle": 28, "square": 27, "stripes": 26}
    assert suspects(found, "nearly black images") == ["train/circle/black.jpg"]
    assert suspects(found, "tiny images") == ["train/square/t.png"]
    assert suspects(found, "unusable files") == ["train/stripes/broken.jpg"]
    assert found.at_least("high"), "a test image is among the training images"
    order = [one.severity for one in found.findings]
    assert order == sorted(order, key=("high", "medium", "low").index)


@pytest.mark.long
def test_a_label_that_no_model_believes_is_found(found):
    pytest.importorskip("cleanlab")
    hostile = os.fsdecode(b"train/circle/<script>, \xe9\n.jpg")
    (one,) = (x for x in found.findings if x.kind == "label errors")
    others = {x.path: x.other for x in one.suspects}
    assert others[hostile] == "stripes"


@pytest.mark.long
def test_a_cleaned_table_is_read_back(planted, options, tmp_path):
    told = Told()
    file = tmp_path / "cleaned.csv"
    keras_transfer.audit(planted, fix=file, listeners=[told], **options)
    before = list_data(str(planted), ListingConfig())
    after = list_data(str(file), ListingConfig())
    names = [Path(x).relative_to(planted).as_posix() for x in after.sources]
    dropped = {*before.sources} - {*names}
    assert {"train/circle/copy.jpg", "train/stripes/broken.jpg"} < dropped
    assert len(dropped & {"train/square/again.jpg", "train/square/10.jpg"}) == 1
    assert len(dropped) == 3
    assert names == [x for x in before.sources if x not in dropped]
    row = dict(zip(names, range(len(names)), strict=True))
    torn = row["train/square/11.jpg"], row["train/stripes/torn.jpg"]
    assert len({after.groups[i] for i in torn}) == 1 and after.groups[torn[0]]
    marks = after.extra["suspect"].to_pylist()
    assert "nearly black images" in marks[row["train/circle/black.jpg"]]
    assert {after.splits[i] for x, i in row.items() if x.startswith("test/")} == {
        "test"
    }
    assert (file, "table") in told.artifacts
    assert "2 copies and 1 unusable left out" in told.notes[-1]


@pytest.mark.long
def test_the_command_writes_a_table_and_exits_with_3_if_asked(
    kt, planted, options, found
):
    pytest.importorskip("keras_transfer.workflows.report")
    base = ["audit", planted, "--image-size", SIZE, "--cache-dir", options["cache_dir"]]
    kept = Path(f"audit-{planted.name}")
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    result = kt(*base, "--fail-on", "high")
    assert result.exit_code == 3, result.output
    assert sorted(x.name for x in kept.iterdir()) == [
        *("audit.csv", "mine.txt", "report.html")
    ]
    with (kept / "audit.csv").open(newline="", errors="surrogateescape") as file:
        rows = [*csv.DictReader(file)]
    assert [row["path"] for row in rows] == [
        x.path for one in found.findings for x in one.suspects
    ]
    assert [*rows[0]] == ["path", "finding", "severity", "score", "with"]
    assert "nearly black images" in result.stdout
    assert f"{kept}/report.html" in result.stdout

    result = kt(*base, "--json", "--output", "other")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["images"] == found.images
    assert len(document["findings"]) == len(found.findings)
    assert (Path("other") / "audit.csv").is_file()


def test_clean_photos_have_no_severe_finding(tmp_path, options):
    rng = np.random.default_rng(2)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for index in range(15):
            path = tmp_path / name / f"{index:02d}.jpg"
            path.write_bytes(encode(photo(name, rng), "JPEG"))
    found = keras_transfer.audit(tmp_path, **options)
    assert found.at_least("high") == []
    assert not suspects(found, "outliers")


def test_one_class_is_audited_as_far_as_it_goes(photos, options, tmp_path):
    shutil.copytree(photos / "circle", tmp_path / "one" / "circle")
    found = keras_transfer.audit(tmp_path / "one", **options)
    assert found.class_counts == {"circle": 20}
    assert "all images are of one class" in found.notes[0]
    assert found.notes[1:] == ("Outliers were not looked for: the images are too few.",)
    with pytest.raises(KerasTransferError, match="at least two classes"):
        keras_transfer.fit(tmp_path / "one", **options)


@pytest.mark.long
def test_a_few_images_of_several_labels_say_what_was_not_looked_for(options):
    images = np.random.default_rng(4).integers(0, 256, (8, 20, 20, 3), np.uint8)
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 2)
    found = keras_transfer.audit((images, labels), **options)
    *_, few, single = found.notes
    assert few == (
        "Blurry images, outliers and shortcuts were not looked for: the images are too "
        "few."
    )
    assert single.startswith("Classes that look alike, and sources on which a model")


@pytest.mark.long
def test_films_say_that_nothing_can_be_judged(options):
    rng = np.random.default_rng(3)
    films = np.repeat([photo("circle", rng), photo("square", rng)], 14, axis=0)
    frames = np.clip(films + rng.integers(-4, 5, films.shape), 0, 255)
    data = frames.astype(np.uint8), np.repeat(["cat", "dog"], 14)
    found = keras_transfer.audit(data, **options)
    kinds = {one.kind for one in found.findings}
    assert "classes of a single group" in kinds
    assert not kinds & {"label errors", "classes that look alike"}
    assert any("Label errors were not looked for" in note for note in found.notes)
    assert any("and shortcuts were not looked for" in note for note in found.notes)


def test_a_file_that_vanishes_meanwhile_does_no_harm(photos, options, tmp_path):
    shutil.copytree(photos / "circle", tmp_path / "one" / "circle")
    gone = min((tmp_path / "one" / "circle").iterdir())

    class Removes(Told):
        def progress(self, stage, done, total):
            gone.unlink(missing_ok=True)

    file, told = tmp_path / "c.csv", Removes()
    keras_transfer.audit(
        tmp_path / "one", fix=file, output=tmp_path, listeners=[told], **options
    )
    assert not gone.exists()
    assert len(list_data(str(file), ListingConfig()).sources) == 20
    assert [kind for _, kind in told.artifacts] == ["table", "audit", "audit"]
    (tmp_path / "audit.csv").unlink()
    with pytest.raises(UsageError, match="replaced by the findings"):
        keras_transfer.audit(
            tmp_path / "one", fix=tmp_path / "audit.csv", output=tmp_path, **options
        )


def test_images_that_are_no_files_have_no_cleaned_table(options):
    x = np.full((8, 20, 20, 3), 200, np.uint8)
    with pytest.raises(UsageError, match="images in files"):
        keras_transfer.audit((x, np.arange(8) % 2), fix="c.csv", **options)
    assert not Path("c.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fix", "DATA"], "DATA itself"),
        (["--fix", "c.txt"], "fix names a .csv file"),
        (["--output", "DATA"], "directory that can be written"),
        (["--fail-on", "worst"], "high"),
        (["--base", "resnet5"], "resnet5"),
    ],
)
def test_mistakes_in_usage_are_told_before_any_work(kt, tmp_path, arguments, words):
    data = tmp_path / "data.csv"
    data.write_text("path,label\na.jpg,cat\nb.jpg,dog\n")
    given = [str(data) if x == "DATA" else x for x in arguments]
    result = kt("audit", data, *given)
    assert result.exit_code == 2
    assert words in result.output
    assert [x.name for x in tmp_path.iterdir()] == ["data.csv"]


def test_a_run_is_no_data(kt, tmp_path):
    for name in ("manifest.json", "splits.csv"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    for command in ("audit", "fit"):
        result = kt(command, tmp_path / "run")
        assert result.exit_code == 2
        assert "which is a run. Name the data" in result.output


def test_data_of_which_nothing_can_be_used(options, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.jpg").write_bytes(b"no image")
    with pytest.raises(KerasTransferError, match="None of the 2 images can be used"):
        keras_transfer.audit(tmp_path / "data", **options)
