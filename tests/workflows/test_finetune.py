"""`kt unfreeze-and-finetune` end to end, killed and continued, and what it refuses."""

import csv
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from conftest import CLASSES, RUN_FILES, Told, draw, encode, fill

import keras_transfer
from keras_transfer.config import FinetuneConfig
from keras_transfer.errors import KerasTransferError
from keras_transfer.features import activations as activations_module
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.parity import is_close, parity
from keras_transfer.runs.run import Run
from keras_transfer.training.head import LabelledFeatures
from keras_transfer.training.losses import keras_loss, mean_loss
from keras_transfer.training.tail import TailData, fastest, train_tail
from keras_transfer.workflows import finetune as finetune_module

UNTRAINED = {
    "kind": "mlp",
    "hidden": [16],
    "epochs": 1,
    "learning_rate": 1e-7,
    "l2": [1e-4],
}
"""A head that guesses, so that fine-tuning is certain to be better."""

QUICK = ("--unfreeze", "from:top_conv", "--lr", 0.01, "--batch-size", 8)
"""Trains the last convolution and the head, in a second or two."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def fit(data: Path, workspace: Path, name: str, **options: object) -> Path:
    run = keras_transfer.fit(
        str(data),
        image_size=64,
        name=name,
        runs_dir=workspace / "runs",
        cache_dir=workspace / "cache",
        **{"splits": {"val": 0.3}, "folds": 2, **options},
    )
    return run.run_dir


@pytest.fixture(scope="module")
def guessing(workspace: Path, photos: Path) -> Path:
    """A run whose head knows nothing; tests work on copies."""
    return fit(photos, workspace, "guessing", head=UNTRAINED)


@pytest.fixture(scope="module")
def perfect(workspace: Path, photos: Path) -> Path:
    """A run that makes no mistake on its validation images."""
    run_dir = fit(photos, workspace, "perfect")
    assert Run(run_dir).metrics["fit"]["val"]["accuracy"] == 1.0
    return run_dir


LEARNS_NOTHING = ("--lr", 1e-9, "--base-lr", 1e-9)
LEARNS_LITTLE = ("--lr", 1e-6, "--base-lr", 1e-6)


@pytest.fixture(scope="module")
def tuned(workspace: Path, guessing: Path) -> Path:
    """`guessing` after two epochs on its last stage; it has a phase more."""
    run_dir = workspace / "runs" / "tuned"
    shutil.copytree(guessing, run_dir)
    keras_transfer.unfreeze_and_finetune(
        run_dir, epochs=2, batch_size=8, learning_rate=3e-3, base_lr=1e-3
    )
    return run_dir


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copies a run here; tests of the same run do not see each other."""

    def copied(run_dir: Path, name: str = "run") -> Path:
        return Path(shutil.copytree(run_dir, tmp_path / name))

    return copied


@pytest.fixture
def tune(kt) -> Callable:
    """Runs `kt unfreeze-and-finetune RUN ...` on the last convolution; it must work."""

    def run(run_dir: Path, *options: object, epochs: int = 2) -> Run:
        arguments = (*QUICK, "--epochs", epochs, *options)
        result = kt("unfreeze-and-finetune", run_dir, *arguments)
        assert result.exit_code == 0, result.output
        assert not (run_dir / "checkpoint").exists()
        assert not list(run_dir.glob(".*"))
        return Run(run_dir)

    return run


def configure(run_dir: Path, **settings: object) -> None:
    """Changes what a run's config.yaml says."""
    config = run_dir / "config.yaml"
    old = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**old, **settings}))


def digests(folder: Path) -> dict[str, str]:
    """Every file in a folder, hidden ones too, and what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def weights(path: Path) -> dict[str, np.ndarray]:
    """Path of a variable -> its values, of a model file."""
    model = keras.saving.load_model(path, compile=False)
    return {variable.path: variable.numpy() for variable in model.weights}


def changed(before: Path, after: Path) -> set[str]:
    """Paths of the variables of which a bit differs between two model files."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {path for path in old if old[path].tobytes() != new[path].tobytes()}


def assert_one_line(result, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    errors = [x for x in result.stderr.splitlines() if not x.startswith("- ")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: ")
    for word in words:
        assert word in errors[0]


# What a run holds afterwards


def test_a_fine_tuned_run_holds_exactly_what_is_documented(tuned, guessing):
    names = {path.name for path in tuned.iterdir()}
    assert names == RUN_FILES | {"model.fit.keras"}
    model, fit_model = tuned / "model.keras", tuned / "model.fit.keras"
    assert fit_model.read_bytes() == (guessing / "model.keras").read_bytes()
    assert model.read_bytes() != fit_model.read_bytes()
    for path in tuned.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644

    before, manifest = Run(guessing).manifest, Run(tuned).manifest
    ignored = {"phase", "finetune"}
    assert manifest.model_dump(exclude=ignored) == before.model_dump(exclude=ignored)
    assert manifest.phase == "finetune"
    report = manifest.finetune
    assert report.kept and report.metric == "accuracy"
    assert report.after > report.before
    assert 0 <= report.p_value <= 0.25
    assert report.groups == pytest.approx({"stage_4": 1e-3, "head": 3e-3})
    assert report.split_point == "block5c_add"
    assert report.engine in ("openvino", "keras")
    assert report.precision == "f32"
    assert report.epochs == 2 and report.best_epoch in (1, 2)
    assert report.parity["top1_agreement"] == 1.0
    assert report.parity["max_probability_difference"] <= 0.01
    assert report.activation_bytes in (4 * 4 * 112 * 2, 4 * 4 * 112 * 4)
    trained = [path for path in changed(fit_model, model)]
    sizes = {path: value.size for path, value in weights(model).items()}
    assert report.trained_parameters >= sum(sizes[path] for path in trained)
    assert report.timings["total"] >= report.timings["training"] > 0
    assert any("716,928 weights up to block5c_add" in note for note in report.notes)


def test_history_metrics_and_config_have_both_phases(tuned, guessing):
    history = rows(tuned / "history.csv")
    of_fit = [row for row in history if row["phase"] == "fit"]
    of_finetune = [row for row in history if row["phase"] == "finetune"]
    for old, new in zip(rows(guessing / "history.csv"), of_fit, strict=True):
        assert old.items() <= new.items()
    assert history == of_fit + of_finetune
    assert [row["epoch"] for row in of_finetune] == ["1", "2"]
    for row in of_finetune:
        for key in ("loss", "val_loss", "val_metric", "learning_rate", "seconds"):
            assert math.isfinite(float(row[key]))
        assert row["l2"] == ""
    assert float(of_finetune[1]["learning_rate"]) == pytest.approx(0, abs=1e-9)
    report = Run(tuned).manifest.finetune
    best = max(of_finetune, key=lambda row: float(row["val_metric"]))
    assert best["val_metric"] == of_finetune[report.best_epoch - 1]["val_metric"]

    metrics = Run(tuned).metrics
    assert list(metrics) == ["fit", "finetune"]
    assert metrics["fit"] == Run(guessing).metrics["fit"]
    assert list(metrics["finetune"]) == ["val", "test"]
    # Guesses are near-ties, of which cached activations may change one or two in 18.
    assert metrics["fit"]["val"]["accuracy"] == pytest.approx(report.before, abs=0.12)
    assert metrics["finetune"]["val"]["accuracy"] == report.after

    # The options are of this phase only: the next one starts from the defaults again.
    assert (tuned / "config.yaml").read_text() == (guessing / "config.yaml").read_text()
    given = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "base_lr": 1e-3}
    assert report.config == FinetuneConfig(**given)


@pytest.mark.parametrize("phase", ["fit", "finetune"])
def test_each_phase_can_be_evaluated_from_its_files(tuned, kt, phase):
    result = kt("evaluate", tuned, "--phase", phase, "--json")
    figures = json.loads(result.stdout)
    written = Run(tuned).metrics[phase]["test"]
    assert figures["confusion"] == written["confusion"]
    assert figures["log_loss"] == pytest.approx(written["log_loss"], abs=1e-3)
    if phase == "finetune":
        assert kt("evaluate", tuned, "--json").stdout == result.stdout


def test_prediction_and_export_use_the_new_model(tuned, photos, kt, copy):
    run_dir = copy(tuned)
    result = kt("predict", run_dir, photos, "--recursive", "--top", 3)
    said = list(csv.DictReader(io.StringIO(result.stdout)))
    right = [row["class_1"] == Path(row["path"]).parent.name for row in said]
    assert len(right) == 60 and np.mean(right) > 0.8
    result = kt("export", run_dir)
    assert result.exit_code == 0, result.output
    import tensorflow as tf

    serve = tf.saved_model.load(str(run_dir / "1")).signatures["serving_default"]
    served = serve(
        image_bytes=tf.constant([Path(r["path"]).read_bytes() for r in said])
    )
    best = served["probabilities"].numpy().max(axis=1)
    expected = [float(row["score_1"]) for row in said]
    np.testing.assert_allclose(best, expected, atol=1e-4)


def test_the_model_loads_where_this_package_is_not_imported(tuned, tmp_path):
    script = (
        "import sys, keras, numpy\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "assert not any(name.startswith('keras_transfer') for name in sys.modules)\n"
        "pixels = numpy.load('pixels.npy')\n"
        "numpy.save('out.npy', model.predict(pixels, verbose=0))\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype("f4")
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-c", script, str(tuned / "model.keras")]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = keras.saving.load_model(tuned / "model.keras")
    expected = model(pixels, training=False)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


# What is trained, and what is not


def test_frozen_weights_and_batch_normalization_keep_their_bits(tuned):
    paths = changed(tuned / "model.fit.keras", tuned / "model.keras")
    everything = set(weights(tuned / "model.keras"))
    kernels = {path for path in everything if path.endswith("kernel")}
    unfrozen = {
        path
        for path in everything
        if path.startswith(("block6", "block7", "top_", "hidden_0", "probabilities"))
    }
    assert paths & kernels == unfrozen & kernels
    assert not [path for path in paths if "bn/" in path or path not in unfrozen]
    assert {"hidden_0/bias", "probabilities/bias"} <= paths


def test_batch_normalization_is_trained_only_above_the_split(guessing, tune, copy):
    run_dir = copy(guessing)
    run = tune(run_dir, "--unfreeze", "from:block7a_project_conv", "--train-bn")
    assert run.manifest.phase == "finetune"
    paths = changed(run_dir / "model.fit.keras", run_dir / "model.keras")
    of_bn = {path for path in paths if "bn/" in path}
    assert of_bn == {
        f"{layer}/{name}"
        for layer in ("block7a_project_bn", "top_bn")
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }


def test_stages_are_unfrozen_from_the_top(guessing, tune, copy):
    run_dir = copy(guessing)
    run = tune(run_dir, "--unfreeze", "stages:2", "--force", epochs=1)
    groups = run.manifest.finetune.groups
    assert list(groups) == ["stage_3", "stage_4", "head"]
    assert groups == pytest.approx({"stage_3": 9e-4, "stage_4": 3e-3, "head": 0.01})
    paths = changed(run_dir / "model.fit.keras", run_dir / "model.keras")
    layers = {path.split("/")[0] for path in paths}
    assert {"block6a_expand_conv", "top_conv", "hidden_0", "probabilities"} <= layers
    assert {x for x in layers if x.startswith(("block4", "block5"))}
    assert not {x for x in layers if x.startswith(("block1", "block2", "stem"))}


def test_everything_can_be_unfrozen(guessing, tune, copy):
    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    run = tune(run_dir, "--unfreeze", "all", "--force", epochs=1)
    assert pixel_tables(Path("fresh")) == {("image#1", 60)}
    report = run.manifest.finetune
    assert report.split_point == "image"
    assert report.activation_bytes == 64 * 64 * 3
    assert list(report.groups)[0] == "stem"
    paths = changed(run_dir / "model.fit.keras", run_dir / "model.keras")
    assert "stem_conv/kernel" in paths
    assert report.parity["top1_agreement"] == 1.0


# Never worse


@pytest.mark.parametrize(
    ("start", "rates"), [("perfect", ("--lr", 100)), ("guessing", LEARNS_LITTLE)]
)
def test_a_model_that_is_not_better_is_put_aside(kt, copy, request, start, rates):
    run_dir = copy(request.getfixturevalue(start))
    before = digests(run_dir)
    options = (*QUICK, "--epochs", 1, *rates)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert result.exit_code == 0, result.output
    assert "the head-only model stays, for the new one is not better" in result.stderr
    after = digests(run_dir)
    assert after["model.keras"] == before["model.keras"]
    assert after.keys() == before.keys() | {"model.finetune.keras"}
    run = Run(run_dir)
    assert run.manifest.phase == "fit"
    assert not run.manifest.finetune.kept
    assert "not better" in run.manifest.finetune.reason
    paths = changed(run_dir / "model.keras", run_dir / "model.finetune.keras")
    assert "top_conv/kernel" in paths
    evaluated = json.loads(
        kt("evaluate", run_dir, "--json", "--phase", "finetune").stdout
    )
    assert evaluated["confusion"] == run.metrics["finetune"]["test"]["confusion"]
    of_fit = json.loads(kt("evaluate", run_dir, "--json").stdout)
    assert of_fit["confusion"] == run.metrics["fit"]["test"]["confusion"]


def test_force_keeps_a_model_that_is_worse(perfect, tune, kt, copy):
    run_dir = copy(perfect)
    aside = run_dir / "model.finetune.keras"
    aside.write_bytes(b"what an earlier fine-tuning left")
    run = tune(run_dir, "--from-scratch-head", "--lr", 1e-9, "--force", epochs=1)
    report = run.manifest.finetune
    assert run.manifest.phase == "finetune" and report.kept
    assert "by force" in report.reason
    assert report.after < report.before == 1.0  # it guesses
    assert list(report.alphas) == ["1"] and report.alpha == 1  # and is not mixed
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES | {"model.fit.keras"}
    assert digests(run_dir)["model.fit.keras"] == digests(perfect)["model.keras"]
    evaluated = json.loads(kt("evaluate", run_dir, "--json", "--phase", "fit").stdout)
    assert evaluated["confusion"] == run.metrics["fit"]["test"]["confusion"]
    old, new = weights(run_dir / "model.fit.keras"), weights(run.model_path)
    name = "probabilities/kernel"
    assert abs(new[name] - old[name]).max() > 0.01


def test_of_two_fine_tunings_the_better_stays(tuned, guessing, tune, kt, copy):
    run_dir = copy(tuned)
    first = Run(run_dir).manifest.finetune
    before = digests(run_dir)
    options = (*QUICK, "--epochs", 1, *LEARNS_NOTHING)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert result.exit_code == 0, result.output
    assert "the earlier fine-tuned model stays" in result.stderr
    assert digests(run_dir) == before
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "<- the run's model" in lines["finetune"]
    columns = {phase: line.split() for phase, line in lines.items()}
    log_loss, unchanged = float(columns["not"][3]), float(columns["fit"][2])
    assert log_loss == pytest.approx(unchanged, abs=0.01)  # it learnt nothing
    assert float(columns["finetune"][2]) < log_loss - 0.1
    assert "for 1 epochs" in result.stdout  # the earlier one took two

    forced = tune(run_dir, *LEARNS_NOTHING, "--force", epochs=1).manifest
    assert forced.phase == "finetune"
    # It started from the head-only model again, not from what was tuned before.
    assert forced.finetune.before == first.after
    assert forced.finetune.after == pytest.approx(first.before, abs=0.1)
    assert digests(run_dir)["model.fit.keras"] == digests(guessing)["model.keras"]
    history = rows(run_dir / "history.csv")
    assert [row["phase"] for row in history].count("finetune") == 1


def test_force_is_for_one_time_only(tuned, tune, copy):
    run_dir = copy(tuned)
    assert tune(run_dir, "--force", epochs=1).manifest.finetune.config.force
    before = digests(run_dir)
    tune(run_dir, *LEARNS_NOTHING, epochs=1)
    assert digests(run_dir) == before


def test_both_models_are_compared_in_the_same_way(guessing, tune, copy, monkeypatch):
    tables = []
    from_files = finetune_module.predict_table

    def recorded(model, table, read):
        tables.append(len(table))
        return from_files(model, table, read)

    monkeypatch.setattr(finetune_module, "predict_table", recorded)
    monkeypatch.setattr(finetune_module, "is_close", lambda parity: False)
    run = tune(copy(guessing), epochs=1)
    report = run.manifest.finetune
    assert any("figures are of the model on image files" in x for x in report.notes)
    assert sorted(tables) == [6, 18, 18]
    assert run.metrics["finetune"]["val"]["accuracy"] == report.after


# The mix of weights


def test_weights_are_mixed_in_the_share_that_is_best(guessing, tune, copy, monkeypatch):
    monkeypatch.setattr(finetune_module, "ALPHAS", (1.0,))
    whole = tune(copy(guessing, "whole"))
    monkeypatch.setattr(finetune_module, "ALPHAS", (0.5, 1e-4))
    half = tune(copy(guessing, "half"))
    report = half.manifest.finetune
    assert report.alphas.keys() == {"0.5", "0.0001"}
    assert report.alpha == 0.5
    assert report.alphas["0.5"] == report.after > report.alphas["0.0001"]
    old = weights(half.run_dir / "model.fit.keras")
    new, mixed = weights(whole.model_path), weights(half.model_path)
    moved = {}
    for path in old:
        expected = (old[path].astype("f8") + new[path]) / 2
        np.testing.assert_allclose(mixed[path], expected, atol=1e-6, rtol=1e-6)
        moved[path] = abs(new[path] - old[path]).max()
    assert moved["top_conv/kernel"] > 1e-3
    assert half.manifest.finetune.split_point == "block7a_project_bn"
    assert {path.split("/")[0] for path, by in moved.items() if by} == {
        "top_conv",
        "hidden_0",
        "probabilities",
    }


def test_of_the_usual_shares_the_best_is_taken(tuned):
    report = Run(tuned).manifest.finetune
    assert list(report.alphas) == ["0.25", "0.5", "0.75", "1"]
    assert report.alphas[f"{report.alpha:g}"] == max(report.alphas.values())
    assert report.after == max(report.alphas.values())


# What is computed, and how often


def test_activations_are_computed_once(guessing, tune, copy):
    cached = copy(guessing, "first")
    configure(cached, cache_dir="fresh")
    again = Path(shutil.copytree(cached, "second"))
    first = tune(cached, epochs=1).manifest.finetune
    assert first.engine in ("openvino", "keras")
    decided = [x for x in first.notes if x.startswith(("engine ", "precision "))]
    assert len({*decided}) == len(decided) > 0
    before = digests(Path("fresh"))
    second = tune(again, epochs=1)
    assert second.manifest.finetune.engine == "cache"
    assert digests(Path("fresh")) == before
    assert not changed(cached / "model.keras", again / "model.keras")


def test_of_a_way_that_is_given_up_only_a_sample_is_kept(
    guessing, tune, copy, monkeypatch
):
    answers = iter((False, True))
    monkeypatch.setattr(activations_module, "is_close", lambda parity: next(answers))
    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    report = tune(run_dir, "--precision", "f32", epochs=1).manifest.finetune
    (given_up,) = [note for note in report.notes if "were given up" in note]
    assert "float16" in given_up
    assert report.activation_bytes == 2 * 2 * 320 * 4
    kept = {(table["dtype"], table["images"]) for table in feature_tables("fresh")}
    assert kept == {("float16", 36), ("float32", 60)}  # of training images


def test_activations_that_never_agree_are_an_error(guessing, kt, copy, monkeypatch):
    monkeypatch.setattr(activations_module, "is_close", lambda parity: False)
    run_dir = copy(guessing)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK, "--precision", "f32")
    assert_one_line(result, 1, "does not agree", "report this")


def test_only_a_clear_change_of_class_is_a_disagreement():
    expected = np.array([[0.501, 0.499], [0.9, 0.1]])
    near_tie = parity(expected, np.array([[0.499, 0.501], [0.9, 0.1]]), 0.01)
    assert near_tie["top1_agreement"] == 1.0 and is_close(near_tie)
    other = parity(expected, np.array([[0.501, 0.499], [0.1, 0.9]]), 0.01)
    assert other["top1_agreement"] == 0.5 and not is_close(other)
    several = np.array([[0.99999, 0.99998]])  # classes that an image shows both
    assert is_close(parity(several, several[:, ::-1], 1e-3))


def test_free_space_is_needed_for_what_is_not_cached_yet(
    guessing, kt, tune, copy, monkeypatch
):
    row_bytes = 2 * 2 * 320 * 2

    def leave(rows: int) -> None:
        free = activations_module.FREE_BYTES + rows * row_bytes
        monkeypatch.setattr(FeatureCache, "free_bytes", lambda cache: free)

    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    leave(24)  # 60 without the sample
    tune(run_dir, epochs=1)
    leave(35)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK, "--augment", 1)
    assert_one_line(result, 1, "36 activations", "GB left", "--disk-budget")


def test_augmented_views_are_cached_and_trained_on(guessing, tune, copy):
    run_dir = copy(guessing)
    report = tune(run_dir, "--augment", 2).manifest.finetune
    assert report.engine in ("openvino", "keras", "cache")
    count = 60 + 2 * 36
    assert any(note.startswith(f"{count} rows of") for note in report.notes)
    again = copy(guessing, "again")
    assert tune(again, "--augment", 2).manifest.finetune.engine == "cache"
    assert not changed(run_dir / "model.keras", again / "model.keras")


def pixel_tables(cache_dir: Path) -> set[tuple[str, int]]:
    """What tables of pixels are known by, and how many images they hold."""
    tables = feature_tables(cache_dir)
    return {(x["split_point"], x["images"]) for x in tables if x["dtype"] == "uint8"}


def feature_tables(cache_dir: str | Path) -> list[dict]:
    """All tables but that of the images' quality, which has no split point."""
    return [x for x in FeatureCache(Path(cache_dir)).list() if x["split_point"]]


def test_online_augmentation_makes_new_views_every_epoch(
    guessing, tune, copy, monkeypatch
):
    seen = []

    def recorded(recipe, data, checkpoint, listener):
        def transformed(pixels, picked, number):
            assert pixels.dtype == np.uint8 and pixels.shape[1:] == (64, 64, 3)
            out = data.transform(pixels, picked, number)
            seen.extend(
                (number, int(i), row.tobytes())
                for i, row in zip(picked, out, strict=True)
            )
            return out

        return train_tail(
            recipe, replace(data, transform=transformed), checkpoint, listener
        )

    monkeypatch.setattr(finetune_module, "train_tail", recorded)
    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    report = tune(run_dir, "--augment", "online", epochs=3).manifest.finetune
    assert pixel_tables(Path("fresh")) == {("image#1", 36)}
    assert report.epochs == 3
    assert report.split_point == "block7a_project_bn"
    assert any("augment online" in note for note in report.notes)
    for epoch in range(3):
        assert {i for number, i, _ in seen if number == epoch} == set(range(36))
    views = {row for number, i, row in seen if i == 0}
    assert len(views) == 3
    assert report.parity["top1_agreement"] == 1.0


def test_of_each_image_one_view_is_read():
    class Counted:
        def __init__(self, view: int):
            self.values = np.arange(20)[:, None] + 100 * view
            self.shape, self.dtype = self.values.shape, self.values.dtype

        def __getitem__(self, index):
            read.extend(index)
            return self.values[index]

    views = [Counted(view) for view in range(4)]
    images = LabelledFeatures(views, np.arange(20), 20, np.ones((2, 20), "f4"))
    data = TailData(images, images, [])
    seen = set()
    for epoch in range(3):
        read: list[int] = []
        batches = list(data.batches(8, 0, epoch))
        assert sorted(read) == list(range(20))
        labels = np.concatenate([labels for _, labels in batches])[:, :20].argmax(1)
        values = np.concatenate([values for values, _ in batches])[:, 0]
        np.testing.assert_array_equal(values % 100, labels)
        seen |= set(values // 100)
    assert seen == {0, 1, 2, 3}


# Precision


class Timed:
    """In the place of a learner."""

    def __init__(self, precision: str, seconds_a_step: float, loss: float):
        self.precision, self.seconds_a_step = precision, seconds_a_step
        self.loss = loss

    def measure(self, batch, steps: int) -> float:
        return self.loss


@pytest.mark.parametrize(
    ("steps", "seconds", "loss", "chosen"),
    [
        (100, 0.5, 1.01, "bf16"),
        (100, 0.99, 1.0, "f32"),
        (100, 2.0, 1.0, "f32"),
        (100, 0.5, 1.2, "f32"),
        (100, 0.5, math.nan, "f32"),
        (5, 0.5, 1.0, "f32"),  # all of it takes a moment
    ],
)
def test_less_precise_arithmetic_must_be_faster_and_begin_the_same(
    steps, seconds, loss, chosen
):
    learners = {"f32": Timed("f32", 1.0, 1.0), "bf16": Timed("bf16", seconds, loss)}
    told = Told()
    found = fastest(
        learners.__getitem__,
        ["f32", "bf16"],
        (np.zeros(0), np.zeros(0)),
        steps,
        told,
    )
    assert found.precision == chosen
    assert len(told.notes) == (steps > 5)


def test_training_in_bf16(guessing, tune, copy):
    run_dir = copy(guessing)
    run = tune(run_dir, "--precision", "bf16")
    assert run.manifest.finetune.precision == "bf16"
    assert run.manifest.finetune.kept
    paths = changed(run_dir / "model.fit.keras", run_dir / "model.keras")
    assert {path.split("/")[0] for path in paths} == {
        "top_conv",
        "hidden_0",
        "probabilities",
    }


def test_dropout_is_drawn_from_the_seed_of_the_run(guessing, kt, copy, monkeypatch):
    def stop(*arguments: object) -> None:
        raise KerasTransferError(f"The last argument is {arguments[-1]}.")

    monkeypatch.setattr(finetune_module, "training_copy", stop)
    run_dir = copy(guessing)
    configure(run_dir, seed=1234)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert_one_line(result, 1, "The last argument is 1234.")


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_losses_of_training_and_of_validation_are_one_figure(multi_label):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (20, 3)) if multi_label else rng.integers(0, 3, 20)
    weights = rng.uniform(1, 2, (2, 3)).astype("f4")
    data = LabelledFeatures([np.zeros((20, 1))], targets, 3, weights)
    logits = rng.normal(size=(20, 3)).astype("f4")
    labels = np.concatenate(data.labels(slice(None)), axis=1)
    losses = keras_loss(multi_label, from_logits=True)(labels, logits)
    activation = keras.ops.sigmoid if multi_label else keras.ops.softmax
    probabilities = np.asarray(activation(logits))
    of_probabilities = mean_loss(
        probabilities, *data.labels(slice(None)), data.multi_label
    )
    assert of_probabilities == pytest.approx(float(np.mean(losses)), rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("augment", "budget"),
    [(0, 1e-6), ("online", 0.00045)],  # enough for pixels, not for held-out images too
)
def test_activations_beyond_the_disk_budget_are_refused(
    guessing, kt, copy, augment, budget
):
    run_dir = copy(guessing)
    before = digests(run_dir)
    options = (*QUICK, "--disk-budget", budget, "--augment", augment)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    fixes = ("--disk-budget", "--augment online", "Unfreeze fewer")
    received = f"Received: --disk-budget {budget:g}, --augment {augment}, "
    assert_one_line(result, 1, "60 activations", received, *fixes)
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


@pytest.mark.parametrize("options", [(), ("--epochs", 1, "--batch-size", 100)])
def test_a_loss_that_is_not_finite_leaves_the_run_as_it_was(
    guessing, kt, copy, options
):
    run_dir = copy(guessing)
    before = digests(run_dir)
    arguments = (*QUICK, "--epochs", 3, "--lr", 1e38, "--force", *options)
    result = kt("unfreeze-and-finetune", run_dir, *arguments)
    assert_one_line(result, 1, "--lr")
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--unfreeze", "half"], ["unfreeze", "half"]),
        (["--unfreeze", "stages:0"], ["stages:0"]),
        (["--unfreeze", "stages:99"], ["stages:99", "at most"]),
        (["--unfreeze", "from:nowhere"], ["nowhere"]),
        (["--set", "wait_decay=1"], ["'finetune.weight_decay'"]),
        (["--set", "nonsense"], ["key=value"]),
        (["--lr", "0"], ["learning_rate"]),
        (["--lr", "nan"], ["learning_rate"]),
        (["--lr", "inf"], ["learning_rate"]),
        (["--base-lr", "-1"], ["base_lr"]),
        (["--layer-decay", "2"], ["layer_decay"]),
        (["--epochs", "0"], ["epochs"]),
        (["--batch-size", "0"], ["batch_size"]),
        (["--augment", "-1"], ["augment", "-1"]),
        (["--augment", "offline"], ["augment", "offline"]),
        (["--disk-budget", "0"], ["disk_budget"]),
        (["--resume"], ["nothing to go on with", "--resume"]),
    ],
)
def test_a_mistake_in_usage_is_one_line_and_changes_nothing(
    guessing, kt, copy, options, words
):
    run_dir = copy(guessing)
    before = digests(run_dir)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert_one_line(result, 2, *words)
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


def test_mistakes_are_found_before_tensorflow_starts(guessing):
    script = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from keras_transfer.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(main, ['unfreeze-and-finetune', *arguments])\n"
        "    assert done.exit_code == 2, (arguments, done.output)\n"
        "    assert 'tensorflow' not in sys.modules, arguments\n"
    )
    mistakes = [
        ["nowhere"],
        [str(guessing), "--unfreeze", "half"],
        [str(guessing), "--set", "wait_decay=1"],
        [str(guessing), "--precision", "f8"],
        [str(guessing), "--epochs", "many"],
    ]
    command = [sys.executable, "-c", script, json.dumps(mistakes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_run_is_named(kt):
    result = kt("unfreeze-and-finetune", "nowhere")
    assert_one_line(result, 2, "nowhere", "kt fit")


@pytest.mark.parametrize(
    ("test", "augment", "evaluated"), [(0.1, 0, ["test"]), (0.0, "online", [])]
)
def test_without_validation_images_force_is_needed(
    photos, workspace, kt, tune, test, augment, evaluated
):
    held_out, name = {"val": 0.0, "test": test}, f"no-val-{augment}"
    run_dir = fit(photos, workspace, name, splits=held_out, head=UNTRAINED)
    before = digests(run_dir)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert_one_line(result, 2, "--force", "validation")
    assert digests(run_dir) == before
    run = tune(run_dir, "--force", "--augment", augment)
    report = run.manifest.finetune
    assert (report.before, report.after, report.p_value) == (None, None, None)
    assert (report.alpha, report.alphas, report.best_epoch) == (1.0, {}, 2)
    assert list(run.metrics["finetune"]) == evaluated


# Killed, and continued


def start(run_dir: Path, *options: object) -> subprocess.Popen:
    arguments = [str(x) for x in (*QUICK, "--epochs", 6, *options)]
    command = [sys.executable, "-m", "keras_transfer.cli", "unfreeze-and-finetune"]
    return subprocess.Popen(
        [*command, str(run_dir), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def killed(run_dir: Path, ready: Callable[[], bool], *options: object) -> int:
    """Starts a fine-tuning of six epochs and kills its process group."""
    process = start(run_dir, *options)
    wait_until(process, ready)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode


def changes(path: Path, count: int) -> Callable[[], bool]:
    """Whether a file was replaced so often, from when this is first asked."""
    seen: list[int] = []

    def ready() -> bool:
        inode = path.stat().st_mtime_ns if path.exists() else 0
        if not seen or seen[-1] != inode:
            seen.append(inode)
        return len(seen) > count

    return ready


def history_without_seconds(run_dir: Path) -> list[dict[str, str]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in rows(run_dir / "history.csv")
    ]


def assert_same_result(one: Path, other: Path) -> None:
    assert not changed(one / "model.keras", other / "model.keras")
    assert history_without_seconds(one) == history_without_seconds(other)
    assert Run(one).metrics == Run(other).metrics
    a, b = Run(one).manifest.finetune, Run(other).manifest.finetune
    assert (a.alpha, a.best_epoch, a.p_value) == (b.alpha, b.best_epoch, b.p_value)
    assert (a.epochs, a.kept) == (b.epochs, b.kept)
    assert {path.name for path in one.iterdir()} == {
        path.name for path in other.iterdir()
    }


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path, guessing: Path) -> Path:
    """What six epochs make of `guessing`, with an mlp's dropout and a second view."""
    run_dir = workspace / "runs" / "uninterrupted"
    shutil.copytree(guessing, run_dir)
    keras_transfer.unfreeze_and_finetune(
        run_dir,
        unfreeze="from:top_conv",
        learning_rate=0.01,
        batch_size=8,
        epochs=6,
        augment=1,
        patience=6,
    )
    return run_dir


DROPOUT = ("--augment", 1, "--set", "patience=6")


@pytest.fixture(scope="module")
def unfinished(workspace: Path, guessing: Path) -> Path:
    """A run whose fine-tuning was killed when it had finished an epoch."""
    run_dir = workspace / "runs" / "unfinished"
    shutil.copytree(guessing, run_dir)
    state = run_dir / "checkpoint" / "state.npz"
    assert killed(run_dir, state.exists, *DROPOUT) == -signal.SIGKILL
    return run_dir


def test_fine_tuning_gives_the_same_bits_every_time(
    guessing, uninterrupted, tune, copy
):
    again = copy(guessing)
    tune(again, *DROPOUT, epochs=6)
    assert_same_result(again, uninterrupted)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    guessing, uninterrupted, tune, copy
):
    run_dir = copy(guessing)
    configure(run_dir, cache_dir="elsewhere")
    Path("elsewhere/features").mkdir(parents=True)
    checkpoint = run_dir / "checkpoint"
    state = checkpoint / "state.npz"
    started = (checkpoint / "config.yaml").exists
    assert killed(run_dir, started, *DROPOUT) == -signal.SIGKILL
    assert not state.exists()
    twice = changes(state, 2)
    assert killed(run_dir, twice, *DROPOUT, "--resume") == -signal.SIGKILL
    before = digests(run_dir)
    assert {name for name in before if "/" not in name} == RUN_FILES
    assert before["model.keras"] == digests(guessing)["model.keras"]
    with np.load(state) as file:
        epochs = len(json.loads(str(file["text"]))["history"])
    assert 2 <= epochs < 6
    tune(run_dir, *DROPOUT, "--resume", epochs=6)
    assert_same_result(run_dir, uninterrupted)


def test_resuming_needs_no_options(unfinished, uninterrupted, kt, copy):
    run_dir = copy(unfinished)
    result = kt("unfreeze-and-finetune", run_dir, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_result(run_dir, uninterrupted)


def test_an_unfinished_fine_tuning_is_not_lost_by_accident(unfinished, kt, tune, copy):
    run_dir = copy(unfinished)
    before = digests(run_dir)
    plain = kt("unfreeze-and-finetune", run_dir)
    assert_one_line(plain, 2, "--resume", "--no-resume")
    other = kt("unfreeze-and-finetune", run_dir, "--resume", "--lr", 0.5)
    assert_one_line(other, 2, "--lr 0.5 instead of 0.01", "--no-resume")
    assert digests(run_dir) == before
    images = run_dir / "checkpoint" / "images.txt"
    images.write_text("0" * 64)  # as if an image had other bytes then
    changed_images = kt("unfreeze-and-finetune", run_dir, "--resume")
    assert_one_line(changed_images, 2, "images changed", "--no-resume")
    assert digests(run_dir).keys() == before.keys()
    assert kt("evaluate", run_dir).exit_code == 0
    run = tune(run_dir, "--no-resume", epochs=1)
    assert run.manifest.finetune.epochs == 1


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_checkpoint_is_one_line(unfinished, kt, copy, damage):
    run_dir = copy(unfinished)
    state = run_dir / "checkpoint" / "state.npz"
    data = state.read_bytes()
    state.write_bytes(data[:-1000] if damage == "cut" else b"")
    result = kt("unfreeze-and-finetune", run_dir, "--resume")
    assert result.exit_code in (1, 2)
    assert_one_line(result, result.exit_code, "--no-resume")


def test_a_training_that_diverged_is_not_gone_on_with(unfinished, guessing, kt, copy):
    run_dir = copy(unfinished)
    state = run_dir / "checkpoint" / "state.npz"
    with np.load(state) as file:
        arrays = dict(file)
    arrays["state_0"] = np.full_like(arrays["state_0"], np.nan)
    np.savez(state, **arrays)
    result = kt("unfreeze-and-finetune", run_dir, "--resume")
    assert_one_line(result, 1, "Training diverged", "--lr")
    assert digests(run_dir) == digests(guessing)
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


def test_an_error_after_the_last_epoch_loses_none(
    guessing, uninterrupted, kt, tune, copy, monkeypatch
):
    run_dir = copy(guessing)
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            raise KerasTransferError("The disk is full.")

        patched.setattr(finetune_module, "updating", fail)
        options = (*QUICK, *DROPOUT, "--epochs", 6)
        result = kt("unfreeze-and-finetune", run_dir, *options)
    assert_one_line(result, 1, "The disk is full.")
    tune(run_dir, *DROPOUT, "--resume", epochs=6)
    assert_same_result(run_dir, uninterrupted)


@pytest.mark.parametrize("left", [0, 1_000_000])
def test_on_a_full_disk_a_run_stays_as_it_was(guessing, kt, small_disk, left):
    run_dir = Path(shutil.copytree(guessing, small_disk / "run"))
    before = digests(run_dir)
    fill(small_disk, left)  # not even for its config, or not for a checkpoint
    result = kt("unfreeze-and-finetune", run_dir, *QUICK, "--epochs", 2)
    assert_one_line(result, 1, "The disk is full. Received: ", str(small_disk))
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == {*before}


def test_where_the_disk_is_full_after_an_epoch_it_is_gone_on_with(
    unfinished, kt, small_disk
):
    run_dir = Path(shutil.copytree(unfinished, small_disk / "run"))
    before = digests(run_dir)
    fill(small_disk, 1_000_000)
    result = kt("unfreeze-and-finetune", run_dir, "--resume")
    assert_one_line(result, 1, "The disk is full. Received: ", str(small_disk))
    assert digests(run_dir) == before
    assert not [path for path in run_dir.rglob(".*")]
    (small_disk / "filler").unlink()
    assert kt("unfreeze-and-finetune", run_dir, "--resume").exit_code == 0


def test_what_will_be_needed_is_read_before_training(guessing, kt, copy, monkeypatch):
    run_dir = copy(guessing)
    monkeypatch.delattr(finetune_module, "train_tail")
    (run_dir / "metrics.json").write_text("{")
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert_one_line(result, 1, "metrics.json is damaged")
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


def test_an_interrupt_is_one_line_and_can_be_resumed(guessing, uninterrupted, kt, copy):
    run_dir = copy(guessing)
    before = digests(run_dir)
    process = start(run_dir, *DROPOUT)
    wait_until(process, (run_dir / "checkpoint" / "state.npz").exists)
    second = kt("unfreeze-and-finetune", run_dir, *QUICK, "--no-resume")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert_one_line(second, 1, "Another process", str(run_dir))
    assert process.returncode == 130
    errors = [x for x in stderr.splitlines() if x and not x.startswith("- ")]
    assert len(errors) == 1 and errors[0].startswith("Interrupted.")
    assert "--resume" in errors[0]
    after = digests(run_dir)
    assert before.items() <= after.items()
    assert (run_dir / "checkpoint" / "state.npz").exists()
    told = Told()
    keras_transfer.unfreeze_and_finetune(run_dir, resume=True, listeners=[told])
    batches = [done for step, done, of in told.steps if (step, of) == ("training", 30)]
    assert batches == list(range(batches[0], 31)) and batches[0] > 5
    assert_same_result(run_dir, uninterrupted)


# Data of every kind


def test_labels_may_be_several(kt, tune, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for index in range(60):
        labels = [name for name in CLASSES if rng.random() < 0.5]
        pixels = np.full((72, 72, 3), 40, np.uint8)
        for name in labels:
            pixels = np.maximum(pixels, draw(name, rng))
        (tmp_path / f"{index}.png").write_bytes(encode(pixels, "PNG"))
        lines.append(f"{index}.png,{'|'.join(labels)}")
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines))
    head = {**UNTRAINED, "class_weight": "balanced"}
    run_dir = fit(data, tmp_path, "several", head=head)
    run = tune(run_dir, epochs=4)
    report = run.manifest.finetune
    assert report.metric == "mean_average_precision"
    assert report.kept and report.after > report.before
    figures = run.metrics["finetune"]
    assert figures["val"]["mean_average_precision"] == report.after
    evaluated = json.loads(kt("evaluate", run_dir, "--json").stdout)
    assert evaluated["log_loss"] == pytest.approx(figures["test"]["log_loss"], abs=1e-3)


def test_two_classes_out_of_balance(photos, workspace, tmp_path, tune, kt):
    folder = tmp_path / "two"
    for name, count in (("circle", 20), ("stripes", 8)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            file = f"{index:02d}.jpg"
            shutil.copy(photos / name / file, folder / name / file)
    head = {**UNTRAINED, "class_weight": "balanced"}
    balanced = fit(folder, workspace, "balanced", head=head)
    plain = Path(shutil.copytree(balanced, tmp_path / "plain"))
    config = plain / "config.yaml"
    text = config.read_text()
    assert "class_weight: balanced" in text
    config.write_text(text.replace("class_weight: balanced", "class_weight: none"))
    losses, val_losses = [], []
    for run_dir in (balanced, plain):
        tune(run_dir, *LEARNS_NOTHING, "--force")
        history = rows(run_dir / "history.csv")
        first, _ = [row for row in history if row["phase"] == "finetune"]
        losses.append(float(first["loss"]))
        val_losses.append(float(first["val_loss"]))
    assert losses[0] > 1e-3
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    unweighted = pytest.approx(Run(plain).metrics["fit"]["val"]["log_loss"], rel=5e-3)
    assert val_losses[1] == unweighted and val_losses[0] != unweighted


@pytest.fixture
def vanishing(photos: Path, guessing: Path, copy) -> tuple[Path, Path]:
    """A run, and its folder of images, which may be changed."""
    folder, run_dir = copy(photos, "vanishing"), copy(guessing)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace(str(photos), str(folder)))
    return run_dir, folder


def sources(run_dir: Path, split: str) -> list[str]:
    return [r["path"] for r in rows(run_dir / "splits.csv") if r["split"] == split]


def test_images_that_vanished_or_are_new_are_left_out(vanishing, tune):
    run_dir, folder = vanishing
    shutil.copy(folder / "stripes/00.jpg", folder / "circle/new.jpg")
    for split in ("train", "val", "test"):
        (folder / sources(run_dir, split)[0]).unlink()
    (folder / sources(run_dir, "train")[1]).write_bytes(b"no longer an image")
    (folder / sources(run_dir, "val")[1]).write_bytes(b"")
    run = tune(run_dir)
    assert run.manifest.finetune.kept
    left_out = [x for x in run.manifest.finetune.notes if "are left out" in x]
    assert len(left_out) == 1 and left_out[0].startswith("2 images cannot be used")
    assert run.metrics["finetune"]["val"]["images"] == 18 - 2
    assert run.metrics["finetune"]["test"]["images"] == 6 - 1


@pytest.mark.parametrize("change", ["a class more", "a class less"])
def test_other_classes_than_those_of_the_run_do_not_shift_labels(vanishing, kt, change):
    run_dir, folder = vanishing
    if change == "a class more":
        (folder / "apples").mkdir()
        shutil.copy(folder / "circle/00.jpg", folder / "apples/00.jpg")
    else:
        shutil.rmtree(folder / "circle")
    arguments = (*QUICK, "--epochs", 3, "--force")
    result = kt("unfreeze-and-finetune", run_dir, *arguments)
    assert result.exit_code == 0, result.output
    said = kt("predict", run_dir, folder / "square", folder / "stripes").stdout
    answers = list(csv.DictReader(io.StringIO(said)))
    right = [row["class_1"] == Path(row["path"]).parent.name for row in answers]
    assert np.mean(right) > 0.8


def test_a_split_may_vanish_as_a_whole(vanishing, tune):
    run_dir, folder = vanishing
    for source in sources(run_dir, "test"):
        (folder / source).unlink()
    run = tune(run_dir)
    assert list(run.metrics["finetune"]) == ["val"]


@pytest.mark.parametrize(
    ("split", "max_skipped", "exit_code", "words"),
    [
        ("val", 0.1, 1, ["18 of 60 images cannot be used", "max_skipped"]),
        ("val", 0.5, 2, ["Without validation images", "--force"]),
        ("train", 1.0, 1, ["0 usable training images"]),
    ],
)
def test_a_split_of_which_nothing_can_be_read_is_one_line(
    vanishing, kt, split, max_skipped, exit_code, words
):
    run_dir, folder = vanishing
    configure(run_dir, max_skipped=max_skipped)
    before = digests(run_dir)
    for source in sources(run_dir, split):
        (folder / source).write_bytes(b"no longer an image")
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert_one_line(result, exit_code, *words)
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


@pytest.mark.parametrize("split", ["train", "everything"])
def test_data_that_are_gone_are_one_line(vanishing, kt, split):
    run_dir, folder = vanishing
    before = digests(run_dir)
    if split == "train":
        for source in sources(run_dir, "train"):
            (folder / source).unlink()
    else:
        shutil.rmtree(folder)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert result.exit_code in (1, 2)
    assert_one_line(result, result.exit_code)
    assert "fault of kt" not in result.stderr
    assert digests(run_dir) == before
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES


# From Python


def test_it_can_be_called_from_python(guessing, copy):
    opened = keras_transfer.open_run(copy(guessing))
    told = Told()
    options = {"unfreeze": "from:top_conv", "learning_rate": 0.01, "batch_size": 8}
    run = keras_transfer.unfreeze_and_finetune(
        opened,
        epochs=1,
        listeners=[told],
        **options,
    )
    assert run is opened
    report = run.manifest.finetune
    assert report.epochs == 1
    assert told.notes[:-1] == report.notes and told.notes[-1] == report.reason
    assert ("training", 5, 5) in told.steps
    assert [x for x in told.steps if x[0] == "features"][-1][1:] == (60, 60)
    (told_epoch,) = told.epochs
    history = rows(run.run_dir / "history.csv")
    assert told_epoch[:2] == ("finetune", 1)
    assert f"{told_epoch[2]['val_loss']}" == history[-1]["val_loss"]
    assert told.artifacts == [(run.run_dir, "run")]
    with pytest.raises(keras_transfer.errors.UsageError, match="epochs"):
        keras_transfer.unfreeze_and_finetune(run, epoch=1)
