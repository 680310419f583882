"""What a run remembers of its images, and what is told when they are others."""

import csv
import os
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, Told
from PIL import Image

import keras_transfer
from keras_transfer.config import load_config
from keras_transfer.data.loading import load
from keras_transfer.errors import KerasTransferError, UnusableImagesError
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.extraction import Extraction
from keras_transfer.features.image_table import known_images
from keras_transfer.features.usable import usable_splits
from keras_transfer.runs.files import csv_text

BAD = os.fsdecode(b"bad\xff.jpg")
SMALL = {
    "report": False,
    "image_size": 32,
    "weights": "none",
    "max_skipped": 0.2,
    "folds": 2,
    "head": {"l2": 0.1},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, photos) -> Path:
    """A folder of images, whose times are long ago, and a run of it."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(photos, folder / "images")
    (folder / "images" / "circle" / BAD).write_bytes(b"not an image")
    keras_transfer.fit(
        folder / "images",
        name="run",
        runs_dir=folder / "runs",
        cache_dir=folder / "cache",
        **SMALL,
    )
    return folder


@pytest.fixture
def copied(workspace, tmp_path) -> Path:
    """The same, for tests that change something, where the run expects it."""
    kept = tmp_path / "kept"
    shutil.copytree(workspace, kept)
    yield workspace
    shutil.rmtree(workspace)
    kept.rename(workspace)


def test_the_image_table_has_a_row_for_each_image(workspace):
    run = keras_transfer.open_run(workspace / "runs" / "run")
    table = pq.read_table(run.images_path)
    assert table.num_rows == 61
    rows = {row["source"]: row for row in table.to_pylist()}
    with run.splits_path.open(newline="") as file:
        listed = {row["path"]: row for row in csv.DictReader(file)}
    assert rows.keys() - listed.keys() == {r"circle/bad\xff.jpg"}
    for source, row in listed.items():
        path = workspace / "images" / source
        assert row["split"] == rows[source]["split"]
        assert row["label"] == rows[source]["label"]
        assert rows[source]["sha256"] == sha256(path.read_bytes()).digest()
        assert rows[source]["bytes"] == path.stat().st_size
        with Image.open(path) as image:
            size = image.size
        assert (rows[source]["width"], rows[source]["height"]) == size
        assert rows[source]["file_type"] == "JPEG"
        assert rows[source]["jpeg_quality"] == 75
        assert rows[source]["reason"] is None
    bad = rows[r"circle/bad\xff.jpg"]
    assert bad["reason"] == "not an image"
    assert bad["sha256"] is bad["brightness"] is bad["file_type"] is None


def count_reads(monkeypatch, fit) -> int:
    """How many images are read while a run is made anew."""
    read, paths = Path.read_bytes, []

    def counting(path):
        paths.append(path)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", counting)
        fit()
    return len({path for path in paths if path.suffix == ".jpg"})


@pytest.mark.long
def test_a_second_fit_reads_no_image_that_it_knows(copied, monkeypatch):
    for path in (copied / "images").rglob("*.jpg"):
        os.utime(path, ns=(10**18, 10**18))

    def fit(**options):
        keras_transfer.fit(
            copied / "images",
            name="run",
            runs_dir=copied / "runs",
            cache_dir=copied / "cache",
            overwrite=True,
            **SMALL,
            **options,
        )

    def aged(path, **options):
        found = real(path, **options)
        fields = {name: getattr(found, name) for name in dir(found) if "st_" in name}
        fields["st_ctime_ns"] -= 10**11  # which nobody can set
        return type("Found", (), fields)()

    # As if the images had been there for a while: else they are read, to be safe.
    real = os.stat
    monkeypatch.setattr("keras_transfer.features.file_index.os.stat", aged)
    fit()
    few = count_reads(monkeypatch, fit)
    assert few <= 53  # unusable, or of the training images that parity is measured on
    table = keras_transfer.open_run(copied / "runs" / "run").images_path
    before = pq.read_table(table)
    assert count_reads(monkeypatch, lambda: fit(reread=True)) == 61
    assert not keras_transfer.open_run(copied / "runs" / "run").config.reread
    assert pq.read_table(table).equals(before)


def test_images_that_changed_since_the_run_was_made_are_told_of(copied):
    run = keras_transfer.open_run(copied / "runs" / "run")
    told = Told()
    test = pq.read_table(run.images_path, filters=[("split", "=", "test")])
    test = test.filter(test["reason"].is_null())
    changed = test["source"].to_pylist()[0]
    other = next((copied / "images" / "stripes").iterdir())
    (copied / "images" / changed).write_bytes(other.read_bytes())
    run.evaluate(listeners=[told])
    (note,) = told.notes
    assert note.startswith(f"1 of {len(test)} images have changed")
    assert changed in note


def test_images_that_were_trained_on_are_told_of(workspace, tmp_path):
    run = keras_transfer.open_run(workspace / "runs" / "run")
    rows = [row for row in pq.read_table(run.images_path).to_pylist() if row["sha256"]]
    for row in rows:
        target = tmp_path / row["label"] / f"{row['split']}-{Path(row['source']).name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(workspace / "images" / row["source"], target)
    told = Told()
    run.evaluate(tmp_path, listeners=[told])
    (note,) = told.notes
    trained = sum(row["split"] == "train" for row in rows)
    assert note.startswith(f"{trained} of {len(rows)} images are byte for byte")
    assert "/train-" in note


def test_a_damaged_table_is_named_and_a_missing_one_is_not(tmp_path):
    path, told = tmp_path / "images.parquet", Told()
    assert known_images(path, told) == {}
    assert told.notes == []
    path.write_bytes(b"damaged")
    assert known_images(path, told) == {}
    (note,) = told.notes
    assert note.startswith(f"{path} is damaged")


@pytest.mark.long
def test_paths_need_not_be_utf8(photos, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    options = {"runs_dir": folder / "runs", "cache_dir": folder / "cache", **SMALL}
    run = keras_transfer.fit(photos, **options)
    told = Told()
    run.evaluate(listeners=[told])
    assert told.notes == []
    index = FeatureCache(folder / "cache").file_index(photos, ["circle/00.jpg"])
    index.remember({"circle/00.jpg": bytes(32)})
    assert len(known_images(run.images_path, told)) == 60


def test_too_many_unusable_images_are_counted_by_reason_and_listed(photos, tmp_path):
    config = load_config(None, {"data": str(photos)})
    sources = [
        source for _, table in load(str(photos)).items() for source in table.sources
    ]
    reasons = [f"damaged or truncated, {index + 1:,} bytes" for index in range(20)]
    reasons += ["not an image"] * 4 + ["an empty file"] * 3 + ["a TIFF"] + ["an AVIF"]
    skipped = dict(zip(sources, reasons, strict=False))
    usable = dict.fromkeys(sources[len(skipped) :], b"")
    found = Extraction(digests=usable, skipped=skipped)
    with pytest.raises(UnusableImagesError) as caught:
        usable_splits(config, load(str(photos)), found)
    assert str(caught.value) == (
        "29 of 60 images cannot be used, more than 10%: damaged or truncated (20); not "
        "an image (4); an empty file (3); other reasons (2). The first is "
        f"{sources[0]}. Mend them, or train with a larger max_skipped."
    )
    assert caught.value.skipped == skipped


def test_a_fit_lists_unusable_images_until_it_succeeds(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    bad = data / "circle" / "00.jpg"
    bad.write_bytes(b"")
    path = Path("saved_models/data.skipped.csv")
    options = {"name": "data", **SMALL, "max_skipped": 0.0}
    with pytest.raises(KerasTransferError) as caught:
        keras_transfer.fit(data, **options)
    assert str(caught.value).endswith(f"All are listed in {path}.")
    assert path.read_text() == "path,reason\ncircle/00.jpg,an empty file\n"
    shutil.copy(data / "circle" / "01.jpg", bad)
    keras_transfer.fit(data, **options)
    assert not path.exists()


def test_weights_change_what_is_learned_and_no_figure(photos, tmp_path):
    rows = [
        (str(photos / name / f"{i:02d}.jpg"), name, "test" if i > 14 else "train")
        for name in CLASSES
        for i in range(20)
    ]
    weight = {"circle": 9, "square": 1, "stripes": 0.5}
    columns = {
        "path": [path for path, *_ in rows],
        "label": [label for _, label, _ in rows],
        "split": [split for *_, split in rows],
        "sample_weight": [weight[label] for _, label, _ in rows],
        "Width": pa.array(range(60), pa.int16()),
        "table_Width": [[i] for i in range(60)],
        "site": pa.array(["a", None] * 30).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), "data.parquet")
    (tmp_path / "small.csv").write_text(
        csv_text(("path", "label", "split"), rows), encoding="utf-8"
    )
    runs = [
        keras_transfer.fit(data, name=name, runs_dir="runs", cache_dir="cache", **SMALL)
        for name, data in (("weighted", "data.parquet"), ("plain", "small.csv"))
    ]
    run, plain = runs

    with run.splits_path.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert all(float(row["sample_weight"]) == weight[row["label"]] for row in listed)
    images = pq.read_table(run.images_path)
    position = {path: i for i, path in enumerate(columns["path"])}
    for row in images.to_pylist():
        i = position[row["source"]]
        assert row["sample_weight"] == weight[row["label"]]
        assert row["table_table_Width"] == i
        assert row["table_Width"] == [i]
        assert row["site"] == ("a" if i % 2 == 0 else None)
        assert row["width"] > 60
    assert images.schema.field("table_table_Width").type == pa.int16()
    assert not {"sample_weight", "site"} & {*pq.read_schema(plain.images_path).names}
    known = known_images(run.images_path, Told())
    assert known == known_images(plain.images_path, Told())
    again = run_splits(run)
    assert set(again.test.sample_weight.tolist()) == {9.0, 1.0, 0.5}

    said = [probabilities(one) for one in runs]
    assert np.abs(said[0] - said[1]).max() > 0.01
    for one, found in zip(runs, said, strict=True):
        right = np.repeat(np.arange(3), 5)
        figures = one.metrics["fit"]["test"]
        losses = -np.log(found[np.arange(15), right])
        assert figures["log_loss"] == pytest.approx(losses.mean(), rel=1e-4)
        assert figures["accuracy"] == (found.argmax(1) == right).mean()


def probabilities(run) -> np.ndarray:
    """What a run said of its test images, as `[N, C]`."""
    with run.predictions_path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
