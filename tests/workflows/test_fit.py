"""`kt fit` end to end on real files, then every later command on its run."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from conftest import CLASSES, RUN_FILES, Told, draw, encode, fill
from PIL import Image

import keras_transfer
from keras_transfer import terminal
from keras_transfer.config import load_config
from keras_transfer.data.loading import load as load_data
from keras_transfer.data.samples import sample_images
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation import crossvalidation
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.features.parity import PARITY_TOLERANCE
from keras_transfer.runs.run import Run
from keras_transfer.workflows.fit import FitResult, extract_and_fit
from keras_transfer.workflows.inputs import prepare

SMALL = ("--image-size", 64, "--no-report")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def run(workspace: Path, photos: Path) -> Run:
    """A run that tests only read."""
    return keras_transfer.fit(
        str(photos),
        image_size=64,
        name="shared",
        runs_dir=workspace / "runs",
        cache_dir=workspace / "cache",
    )


@pytest.fixture
def cached(run, workspace) -> tuple[object, ...]:
    """Options of `kt fit` by which nothing is computed of the photos again."""
    return (*SMALL, "--cache-dir", workspace / "cache")


def load(run_dir: Path) -> keras.Model:
    return keras.saving.load_model(run_dir / "model.keras", compile=False)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_run_directory_holds_exactly_what_is_documented(run, photos):
    names = {path.name for path in run.run_dir.iterdir()}
    assert names == RUN_FILES | {"report.html"}
    assert run.class_names == list(CLASSES)
    manifest = run.manifest
    assert manifest.data == str(photos)
    assert manifest.images_decoded == manifest.images_forwarded == 60
    assert manifest.class_counts["train"] == dict.fromkeys(CLASSES, 17)
    assert manifest.parity["top1_agreement"] == 1.0
    assert manifest.parity["max_probability_difference"] < 1e-3
    splits = rows(run.splits_path.read_text())
    assert len(splits) == 60
    assert {row["split"] for row in splits} == {"train", "test"}
    history = rows((run.run_dir / "history.csv").read_text())
    best = min(history, key=lambda row: float(row["val_loss"]))
    assert float(best["l2"]) == manifest.l2


def test_it_learns_and_its_figures_are_those_of_the_saved_model(run, kt, photos):
    test = run.metrics["fit"]["test"]
    assert test["accuracy"] >= 0.8
    evaluated = json.loads(kt("evaluate", run.run_dir, "--json").stdout)
    assert evaluated["confusion"] == test["confusion"]
    assert evaluated["log_loss"] == pytest.approx(test["log_loss"], abs=1e-3)
    everything = json.loads(kt("evaluate", run.run_dir, photos, "--json").stdout)
    assert everything["images"] == 60


def test_the_base_keeps_the_bits_of_its_pretrained_weights(run):
    from keras_transfer.models.bases import get_base
    from keras_transfer.models.classifier import build_base

    fresh = build_base(get_base("efficientnet_lite0"), "imagenet", 64, seed=1)
    trained = load(run.run_dir)
    assert len(fresh.weights) == len(trained.weights) - 2
    for before, after in zip(fresh.weights, trained.weights, strict=False):
        np.testing.assert_array_equal(before, after)
    assert [layer.name for layer in trained.layers if layer.trainable_variables] == [
        "head"
    ]


def test_predictions_stream_and_bad_files_are_rows(run, kt, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    good = photos / "circle" / "00.jpg"
    arguments = ["predict", run.run_dir, good, "broken.jpg", "missing.png"]
    result = kt(*arguments, "--top", 2)
    assert result.exit_code == 0
    first, broken, missing = rows(result.stdout)
    assert first["path"] == str(good)
    assert first["class_1"] in CLASSES
    assert float(first["score_1"]) >= float(first["score_2"])
    assert "damaged" in broken["error"] and not broken["class_1"]
    assert "No such file" in missing["error"]

    lines = kt(*arguments, "--format", "jsonl").stdout.splitlines()
    decoded = [json.loads(line) for line in lines]
    assert decoded[0]["predictions"][0]["class"] == first["class_1"]
    assert set(decoded[1]) == {"path", "error"}

    assert kt("predict", run.run_dir, "broken.jpg").exit_code == 1
    assert kt("predict", run.run_dir, photos).exit_code == 2  # only with --recursive
    found = rows(kt("predict", run.run_dir, photos, "--recursive").stdout)
    assert len(found) == 60


def test_a_second_fit_computes_nothing_again(run, photos, workspace):
    options = {
        "image_size": 64,
        "report": False,
        "runs_dir": workspace / "runs",
        "cache_dir": workspace / "cache",
    }
    again = keras_transfer.fit(str(photos), name="again", **options)
    assert again.manifest.images_decoded == again.manifest.images_forwarded == 0
    assert again.manifest.engine == "cache"
    for one, other in zip(
        load(run.run_dir).weights, load(again.run_dir).weights, strict=True
    ):
        np.testing.assert_array_equal(one, other)

    mlp = keras_transfer.fit(
        str(photos),
        name="mlp",
        head={"kind": "mlp", "hidden": [16], "l2": [1e-3], "epochs": 20},
        folds=2,
        **options,
    )
    assert mlp.manifest.images_forwarded == 0
    assert mlp.metrics["fit"]["test"]["accuracy"] >= 0.8
    assert load(mlp.run_dir).get_layer("head").get_layer("hidden_0").units == 16


def test_two_runs_from_nothing_have_the_same_bits(run, photos, tmp_path):
    other = keras_transfer.fit(
        str(photos), image_size=64, name="other", cache_dir=tmp_path / "elsewhere"
    )
    assert other.manifest.images_forwarded == 60
    for one, two in zip(
        load(run.run_dir).weights, load(other.run_dir).weights, strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_unreadable_images_are_left_out_and_listed(kt, photos, cached, tmp_path):
    folder = tmp_path / "some broken"
    shutil.copytree(photos, folder)
    whole = (folder / "circle" / "00.jpg").read_bytes()
    (folder / "circle" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "square" / "empty.png").write_bytes(b"")
    (folder / "square" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    result = kt("fit", folder, *cached, "--name", "broken")
    assert result.exit_code == 0, result.output
    run = keras_transfer.open_run("broken")
    skipped = {
        row["path"]: row["reason"]
        for row in rows((run.run_dir / "skipped.csv").read_text())
    }
    assert skipped.keys() == {"circle/cut.jpg", "square/empty.png", "square/gone.jpg"}
    assert "truncated" in skipped["circle/cut.jpg"]
    assert skipped["square/empty.png"] == "an empty file"
    assert "No such file" in skipped["square/gone.jpg"]
    assert run.manifest.skipped == 3
    assert len(rows(run.splits_path.read_text())) == 60

    result = kt("fit", folder, *cached, "--name", "strict", "--max-skipped", 0.01)
    assert result.exit_code == 1
    assert "3 of 63 images cannot be used" in result.stderr
    assert not Path("saved_models/strict").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(kt, photos, cached):
    arguments = ("fit", photos, *cached, "--name", "same")
    first = kt(*arguments)
    assert first.exit_code == 0, first.output
    manifest = Path("saved_models/same/manifest.json")
    before = manifest.read_bytes()
    second = kt(*arguments)
    assert second.exit_code == 2
    assert "--name" in second.stderr and "--overwrite" in second.stderr
    assert manifest.read_bytes() == before
    for name in ("1/saved_model.pb", "exported/keras/model.keras", "checkpoint/state"):
        path = manifest.parent / name
        path.parent.mkdir(parents=True)
        path.write_text("of the run before")
    failing = kt(*arguments, "--overwrite", "--max-skipped", 2)
    assert failing.exit_code == 2
    assert manifest.read_bytes() == before
    assert (manifest.parent / "checkpoint").exists()
    assert kt(*arguments, "--overwrite", "--seed", 1).exit_code == 0
    assert json.loads(manifest.read_text())["seed"] == 1
    assert [path.name for path in Path("saved_models").iterdir()] == ["same"]
    # Of which a server goes on serving the versions that it had.
    assert {path.name for path in manifest.parent.iterdir()} == RUN_FILES | {"1"}
    assert (manifest.parent / "1" / "saved_model.pb").read_text() == "of the run before"


def test_a_name_that_another_process_takes_meanwhile_stays_its(
    run, photos, workspace, tmp_path, capsys
):
    def take_name(step, done, total):
        Path("saved_models/mine").mkdir(parents=True, exist_ok=True)
        Path("saved_models/mine/manifest.json").write_text("its")

    options = {"data": str(photos), "image_size": 64, "name": "mine", "report": False}
    inputs = prepare(load_config(None, {**options, "cache_dir": workspace / "cache"}))
    result = extract_and_fit(inputs, Told(take_name))
    new = result.run
    assert Path("saved_models/mine/manifest.json").read_text() == "its"
    assert new.run_dir == Path("saved_models/mine-2")
    assert {path.name for path in new.run_dir.iterdir()} == RUN_FILES
    terminal.show_run(result)
    shown = capsys.readouterr().out
    assert "took or changed mine meanwhile" in shown
    assert "Run: saved_models/mine-2" in shown
    terminal.show_run(FitResult(run, {}, None))
    assert "meanwhile" not in capsys.readouterr().out


@pytest.mark.parametrize("exists", [False, True])
def test_on_a_full_disk_there_is_no_half_run(
    run, kt, photos, cached, small_disk, exists
):
    if exists:
        shutil.copytree(run.run_dir, small_disk / "mine")
    before = {path: path.read_bytes() for path in small_disk.glob("mine/*")}
    fill(small_disk, 1_000_000)  # a model has 13
    options = ("--name", "mine", "--overwrite")
    result = kt("fit", photos, *cached, "--runs-dir", small_disk, *options)
    assert result.exit_code == 1
    *notes, line = result.stderr.strip().splitlines()
    assert line.startswith("Error: The disk is full. Received: ")
    assert str(small_disk) in line
    assert all(note.startswith("- ") for note in notes)
    names = {"filler", "mine"} if exists else {"filler"}
    assert {path.name for path in small_disk.iterdir()} == names
    assert {path: path.read_bytes() for path in small_disk.glob("mine/*")} == before


@pytest.mark.long
def test_labels_may_be_several(kt, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for index in range(48):
        labels = [name for name in ("circle", "stripes") if rng.random() < 0.5]
        pixels = np.full((72, 72, 3), 40, np.uint8)
        for name in labels:
            pixels = np.maximum(pixels, draw(name, rng))
        (tmp_path / f"{index}.png").write_bytes(encode(pixels, "PNG"))
        lines.append(f"{index}.png,{'|'.join(labels)}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    result = kt("fit", "data.csv", *SMALL, "--export", "--class-weight", "balanced")
    assert result.exit_code == 0, result.output
    run = keras_transfer.open_run("data-efficientnet_lite0")
    assert run.manifest.multi_label
    figures = run.metrics["fit"]["test"]
    assert figures["mean_average_precision"] > 0.8
    assert figures["confusion"] is None
    output = load(run.run_dir).get_layer("head").get_layer("probabilities")
    assert output.activation.__name__ == "sigmoid"
    assert (run.run_dir / "1" / "saved_model.pb").is_file()
    evaluated = json.loads(kt("evaluate", run.run_dir, "--json").stdout)
    assert evaluated["log_loss"] == pytest.approx(figures["log_loss"], abs=1e-3)


@pytest.mark.long
def test_augmented_views_are_cached_and_trained_on(kt, photos):
    arguments = ["fit", photos, *SMALL, "--augment", 2, "--folds", 2, "--name"]
    assert kt(*arguments, "views").exit_code == 0
    run = keras_transfer.open_run("views")
    assert run.manifest.images_decoded == 60
    assert run.manifest.images_forwarded == 60 + 2 * 51
    assert kt(*arguments, "again").exit_code == 0
    again = keras_transfer.open_run("again")
    assert again.manifest.images_forwarded == 0
    assert kt(*arguments, "others", "--augment-policy", "randaugment").exit_code == 0
    others = keras_transfer.open_run("others")
    assert others.manifest.images_forwarded == 2 * 51
    np.testing.assert_array_equal(
        load(run.run_dir).get_layer("head").get_weights()[0],
        load(again.run_dir).get_layer("head").get_weights()[0],
    )


def test_kept_splits_stay_and_new_images_find_their_place(kt, photos, cached, tmp_path):
    folder = tmp_path / "growing"
    shutil.copytree(photos, folder)
    assert kt("fit", folder, *cached, "--name", "before").exit_code == 0
    rng = np.random.default_rng(9)
    for index in range(10):
        (folder / "circle" / f"new{index}.jpg").write_bytes(
            encode(draw("circle", rng), "JPEG")
        )
    splits = "saved_models/before/splits.csv"
    result = kt("fit", folder, *cached, "--name", "after", "--splits", splits)
    assert result.exit_code == 0, result.output
    before = {row["path"]: row["split"] for row in rows(Path(splits).read_text())}
    text = Path("saved_models/after/splits.csv").read_text()
    after = {row["path"]: row["split"] for row in rows(text)}
    assert len(after) == 70
    assert before.items() <= after.items()
    manifest = keras_transfer.open_run("after").manifest
    assert manifest.images_forwarded == 10


def test_groups_come_from_file_names(kt, photos, cached):
    """The names are 00.jpg to 19.jpg."""
    name = ("--name", "pairs", "--group-regex", r"^(\d\d)")
    assert kt("fit", photos, *cached, *name).exit_code == 0
    splits = rows(Path("saved_models/pairs/splits.csv").read_text())
    assert {row["group"] for row in splits} == {f"{i:02d}" for i in range(20)}
    split_of = {row["group"]: row["split"] for row in splits}
    assert all(row["split"] == split_of[row["group"]] for row in splits)
    # They apply to other images too, where they fit.
    told = kt("evaluate", "saved_models/pairs", photos).stderr
    assert "Groups by group_regex: 20, of 60 images." in told

    result = kt("fit", photos, *cached, "--name", "one", "--group-regex", r"\d(.jpg)")
    assert result.exit_code == 0
    assert "Nothing says how good the model is" in result.stderr


def test_a_disagreeing_precision_falls_back_and_says_so(kt, photos, monkeypatch):
    monkeypatch.setitem(PARITY_TOLERANCE, "bf16", 0.0)
    result = kt("fit", photos, *SMALL, "--precision", "bf16", "--name", "fallen")
    assert result.exit_code == 0, result.output
    manifest = keras_transfer.open_run("fallen").manifest
    assert manifest.precision == "f32"
    assert manifest.parity["top1_agreement"] == 1.0
    assert any("bf16 was given up" in note for note in manifest.notes)


def test_copies_across_splits_are_reported(kt, photos, tmp_path):
    folder = tmp_path / "copies"
    for split in ("train", "val", "test"):
        shutil.copytree(photos, folder / split)
    result = kt("fit", folder, *SMALL, "--name", "copies")
    assert result.exit_code == 0, result.output
    manifest = keras_transfer.open_run("copies").manifest
    assert manifest.images_forwarded == 60
    (copies,) = (note for note in manifest.notes if "the same bytes" in note)
    assert copies.startswith("60 test images have the same bytes as an image in")
    joined = "Validation images are trained on too"
    assert any(note.startswith(joined) for note in manifest.notes)
    assert manifest.class_counts["train"] == dict.fromkeys(CLASSES, 40)
    assert copies in result.stderr
    audit = json.loads((tmp_path / "saved_models/copies/audit.json").read_text())
    kinds = [finding["kind"] for finding in audit["findings"]]
    assert kinds[0] == "exact duplicates across splits"


def test_copies_with_different_labels_are_reported(kt, photos, cached, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(photos, folder)
    for index in range(3):
        shutil.copy(
            folder / f"circle/{index:02d}.jpg", folder / f"square/again{index}.jpg"
        )
    result = kt("fit", folder, *cached, "--name", "torn")
    assert result.exit_code == 0, result.output
    notes = keras_transfer.open_run("torn").manifest.notes
    (told,) = (note for note in notes if "an image with another label" in note)
    assert told in result.stderr and "square/again" in told


def test_of_few_test_images_out_of_fold_figures_come_first(
    kt, photos, cached, workspace
):
    noted: list[list[str]] = []
    told = Told(lambda *_: noted.append([*told.notes]))
    options = {"image_size": 64, "cache_dir": workspace / "cache"}
    made = keras_transfer.fit(photos, name="told", listeners=[told], **options)
    assert told.steps[0][0] == "features"
    assert any("9 test images say little" in text for text in noted[0])
    assert len(made.manifest.folds.values) == 5
    assert list(made.metrics["fit"]) == ["out_of_fold", "test"]
    result = kt("fit", photos, *cached, "--name", "shown")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("out of fold: accuracy ")
    (test,) = (line for line in lines if line.startswith("test: accuracy "))
    assert test.endswith(" of 9")
    document = json.loads(kt("fit", photos, *cached, "--name", "j", "--json").stdout)
    written = keras_transfer.open_run(document["run"])
    assert document["evaluations"] == written.metrics["fit"]
    assert document["folds"]["values"] == list(written.manifest.folds.values)
    assert document["timings"].keys() == written.manifest.timings.keys()
    assert document["notes"] == written.manifest.notes


def test_of_enough_test_images_the_test_comes_first(photos, run, workspace):
    options = {"image_size": 64, "cache_dir": workspace / "cache"}
    made = keras_transfer.fit(photos, name="many", splits={"test": 0.5}, **options)
    assert made.manifest.class_counts["test"] == dict.fromkeys(CLASSES, 10)
    assert list(made.metrics["fit"]) == ["test", "out_of_fold"]
    # Folds that agree by chance do not make the figure certain.
    low, high = made.metrics["fit"]["out_of_fold"]["intervals"]["accuracy"]
    assert low < 0.95 and (low, high) == (made.manifest.folds.low, high)


def test_every_image_has_its_prediction(run):
    said = rows((run.run_dir / "predictions.csv").read_text())
    splits = {r["path"]: r for r in rows(run.splits_path.read_text())}
    assert {row["path"] for row in said} == set(splits)
    for row in said:
        assert row["split"] == splits[row["path"]]["split"]
        assert row["label"] == splits[row["path"]]["label"]
        assert row["how"] == {"train": "out of fold", "test": "test"}[row["split"]]
        scores = {name: float(row[f"p_{name}"]) for name in CLASSES}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(scores, key=scores.get)
        assert row["sure"] == "" and row["far"] in ("true", "false")
    test = [row for row in said if row["how"] == "test"]
    right = sum(row["predicted"] == row["label"] for row in test)
    assert right == run.metrics["fit"]["test"]["correct"]


def test_a_part_of_the_images_may_be_held_out_instead_of_folds(
    photos, run, workspace, monkeypatch
):
    monkeypatch.setattr(crossvalidation, "MOST_CROSS_VALIDATED", 20)
    options = {"image_size": 64, "cache_dir": workspace / "cache"}
    made = keras_transfer.fit(photos, name="tenth", **options)
    assert made.manifest.folds is None
    found = made.metrics["fit"]["out_of_fold"]
    assert found["images"] in (5, 6)
    how = [row["how"] for row in rows((made.run_dir / "predictions.csv").read_text())]
    assert how.count("out of fold") == found["images"]
    assert how.count("fitted") == 51 - found["images"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": {"class_weight": {"cat": 2.0}}}, ["'cat'", "circle, square"]),
        ({"metric": "macro"}, ["metric", "macro_f1"]),
        ({"abstain_at_accuracy": 0.999}, ["2,995", "51"]),
        ({"folds": 60}, ["60 folds", "51"]),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused_at_once(
    photos, tmp_path, options, words
):
    with pytest.raises(UsageError) as raised:
        keras_transfer.fit(photos, cache_dir=tmp_path / "cache", **options)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words)
    assert not list(tmp_path.glob("cache/**/*.index"))


@pytest.mark.parametrize("metric", ["macro_f1", "log_loss", "auc"])
def test_the_metric_that_is_asked_for_decides(photos, run, workspace, metric):
    options = {"image_size": 64, "cache_dir": workspace / "cache", "metric": metric}
    made = keras_transfer.fit(photos, name="decided", overwrite=True, **options)
    found = made.metrics["fit"]["out_of_fold"]
    field = {"auc": "roc_auc"}.get(metric, metric)
    assert found["intervals"][field] == [
        made.manifest.folds.low,
        made.manifest.folds.high,
    ]
    assert made.manifest.folds.low <= found[field] <= made.manifest.folds.high


def test_thresholds_are_of_the_current_model_only(run, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(run.run_dir, tuned)
    shutil.copy(tuned / "model.keras", tuned / "model.fit.keras")
    manifest = json.loads((tuned / "manifest.json").read_text())
    sure = {"target": 0.9, "threshold": 0.5, "coverage": 1, "accuracy": 1}
    manifest["abstention"] = {**sure, "images": 50, "independent": 50}
    manifest["phase"] = "finetune"
    (tuned / "manifest.json").write_text(json.dumps(manifest))
    told = Told()
    found = keras_transfer.evaluate(tuned, phase="fit", listeners=[told])
    assert found.sure is None
    assert any("Thresholds are kept for the run's current" in x for x in told.notes)
    told = Told()
    assert keras_transfer.evaluate(tuned, listeners=[told]).sure is not None
    assert not told.notes


def test_a_run_without_test_images_names_what_else_there_is(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run.run_dir, bare)
    splits = (bare / "splits.csv").read_text().replace(",test,", ",train,")
    (bare / "splits.csv").write_text(splits)
    with pytest.raises(KerasTransferError, match=r"labeled images.* metrics\.json"):
        keras_transfer.evaluate(bare)


def test_old_runs_with_validation_images_are_read(run, kt, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run.run_dir, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    config["splits"] |= {"val": 0.1, "test": 0.1}
    for key in ("metric", "abstain_at_accuracy"):
        del config[key]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    splits = rows((old / "splits.csv").read_text())
    trained = [row for row in splits if row["split"] == "train"]
    for row in trained[::8]:
        row["split"] = "val"
    with (old / "splits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, splits[0])
        writer.writeheader()
        writer.writerows(splits)
    for name in ("far.npz", "predictions.csv"):
        (old / name).unlink()
    found = run_splits(keras_transfer.open_run(old))
    assert (len(found.train), len(found.val), len(found.test)) == (44, 7, 9)
    assert json.loads(kt("evaluate", old, "--json").stdout)["images"] == 9
    predicted = rows(kt("predict", old, run.config.data + "/circle").stdout)
    assert len(predicted) == 20 and "far" not in predicted[0]


def test_names_that_are_hard_to_write_survive_every_command(
    kt, photos, cached, tmp_path
):
    folder = tmp_path / "odd\udcff"  # not UTF-8
    names = {"circle": " circles", "square": "square ", "stripes": "stripes, red"}
    for name, odd in names.items():
        shutil.copytree(photos / name, folder / odd)
    for index, odd in enumerate(["a\rb.jpg", " c.jpg", "d\u2028e.jpg", 'f"g\n.jpg']):
        (folder / " circles" / f"{index:02d}.jpg").rename(folder / " circles" / odd)
    assert kt("fit", folder, *cached, "--name", "odd").exit_code == 0
    made = keras_transfer.open_run("odd")
    assert made.class_names == sorted(names.values())
    everything = json.loads(kt("evaluate", made.run_dir, folder, "--json").stdout)
    assert everything["images"] == 60
    assert everything["accuracy"] > 0.9
    splits = run_splits(made)
    assert sum(len(part) for _, part in splits.items()) == 60
    assert splits.class_counts() == made.manifest.class_counts


def test_labels_that_are_not_as_many_as_the_outputs_are_refused(kt, run, tmp_path):
    copy = tmp_path / "short"
    shutil.copytree(run.run_dir, copy)
    (copy / "labels.txt").write_text("circle\nsquare\n")
    result = kt("evaluate", copy)
    assert result.exit_code == 1
    assert "names 2 classes" in result.stderr and "3 outputs" in result.stderr


def test_one_path_is_predicted_as_such(run, photos):
    path = photos / "circle" / "00.jpg"
    for one in (path, str(path)):
        (prediction,) = keras_transfer.predict(run, one)
        assert prediction.source == str(path)


@pytest.mark.parametrize("form", ["file", "config"])
def test_options_of_a_section_leave_its_other_keys_alone(form, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: /nowhere\nhead:\n  l2: [0.5]\n  epochs: 7\n")
    config = file if form == "file" else load_config(file)
    merged = load_config(config, {"head": {"kind": "mlp"}, "head.epochs": 8})
    assert (merged.head.kind, merged.head.l2, merged.head.epochs) == ("mlp", (0.5,), 8)
    with pytest.raises(UsageError, match="does not exist"):  # and `fit` takes both
        keras_transfer.fit(Path("x"), config=config, head={"kind": "mlp"})


def test_runs_are_named_by_their_whole_folder_and_paths_are_absolute(photos):
    for version in ("v1", "v2"):
        shutil.copytree(photos, f"photos.{version}")
    inputs = [
        prepare(
            load_config(
                None,
                {
                    "data": f"photos.{version}",
                    "runs_dir": "runs",
                    "cache_dir": "cache",
                    "data_dir": "tfds",
                    "weights": "weights.h5",
                    "splits.file": "old/splits.csv",
                },
            )
        )
        for version in ("v1", "v2")
    ]
    names = [one.config.name for one in inputs]
    assert names == ["photos.v1-efficientnet_lite0", "photos.v2-efficientnet_lite0"]
    config = inputs[0].config
    paths = (config.data, config.runs_dir, config.cache_dir, config.data_dir)
    for path in (*paths, config.weights, config.splits.file):
        assert Path(path).is_absolute(), path


def test_decisions_are_made_on_training_images_only(photos, tmp_path):
    splits = load_data(str(photos))
    sample = sample_images(splits, 64, 200)
    assert [source for source, _, _ in sample] == list(splits.train.sources)


@pytest.mark.long
def test_a_killed_fit_keeps_its_features_and_leaves_no_run(photos, tmp_path):
    script = (
        "import keras_transfer.features.cache as f\n"
        "f.SHARD_SECONDS = 0.0\n"
        "from keras_transfer import fit\n"
        f"fit({str(photos)!r}, image_size=64, name='killed')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    index = tmp_path / "cache" / "keras_transfer" / "features"
    deadline = time.monotonic() + 120
    # One of features too: what is measured of images has a table of its own.
    while len({path.parent for path in index.glob("*/*.index")}) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    visible = [
        path.name
        for path in (tmp_path / "saved_models").glob("*")
        if not path.name.startswith(".")
    ]
    assert visible == []
    run = keras_transfer.fit(str(photos), image_size=64, name="killed")
    assert run.manifest.images_forwarded < 60


def test_16_bit_images_that_use_12_bits_are_noted(kt, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(40):
        name = ("dark", "light")[index % 2]
        pixels = rng.integers(
            0, 2**12 if name == "dark" else 2**16, (40, 40), np.uint16
        )
        path = tmp_path / "scans" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    note = "20 of 40 images are saved in 16 bits, of which at most 12 are used"
    for name, forwarded in (("first", 40), ("second", 0)):  # from the cache, too
        result = kt("fit", tmp_path / "scans", *SMALL, "--name", name)
        assert result.exit_code == 0, result.output
        assert note in result.stderr
        assert keras_transfer.open_run(name).manifest.images_decoded == forwarded


def test_the_precision_is_chosen_on_training_images_only(photos):
    splits = load_data(str(photos))
    reversed_reader = replace(
        splits, read=lambda names: reversed(list(splits.read(names)))
    )
    config = prepare(
        load_config(None, {"data": str(photos), "image_size": 64}), makes_run=False
    ).config
    seen = []
    frozen_features(
        frozen_base(config),
        reversed_reader,
        0,
        Storage("f32"),
        check=lambda _, sample: seen.append(sample),
    )
    training = sample_images(splits, 64, len(splits.train))
    known = {pixels.tobytes() for _, _, pixels in training}
    assert all(pixels.tobytes() in known for pixels in seen[0])
    assert len(seen[0]) == 8
