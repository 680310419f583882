"""`kt unfreeze-and-finetune` end to end, killed and continued, and what it refuses."""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from conftest import CLASSES, RUN_FILES, Told, draw, encode, fill

import keras_transfer
from keras_transfer.advice.evidence import Trial
from keras_transfer.config import FinetuneConfig
from keras_transfer.data.tables import Table
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.comparison import LEVEL, Comparison
from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.evaluation.validation import CrossFit
from keras_transfer.features import activations as activations_module
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.parity import is_close, parity
from keras_transfer.runs.run import Run
from keras_transfer.training import tuned as tuned_module
from keras_transfer.training.labelled import LabelledFeatures, Weighting
from keras_transfer.training.losses import keras_loss
from keras_transfer.training.tail import TailData, fastest, train_tail
from keras_transfer.workflows import finetune as finetune_module
from keras_transfer.workflows import gate as gate_module

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
        **{"splits": {"test": 0.1}, "folds": 2, "report": False, **options},
    )
    return run.run_dir


@pytest.fixture(scope="module")
def guessing(workspace: Path, photos: Path) -> Path:
    """A run whose head knows nothing; tests work on copies."""
    return fit(photos, workspace, "guessing", head=UNTRAINED)


@pytest.fixture(scope="module")
def perfect(workspace: Path, photos: Path) -> Path:
    """A run that makes no mistake on its test images."""
    run_dir = fit(photos, workspace, "perfect")
    assert Run(run_dir).metrics["fit"]["test"]["accuracy"] == 1.0
    return run_dir


LEARNS_NOTHING = ("--lr", 1e-9, "--base-lr", 1e-9)
LEARNS_LITTLE = ("--lr", 1e-6, "--base-lr", 1e-6)


@pytest.fixture(scope="module")
def tuned(workspace: Path, guessing: Path) -> Path:
    """`guessing` after two epochs on its last stage; it has a phase more."""
    run_dir = workspace / "runs" / "tuned"
    shutil.copytree(guessing, run_dir)
    keras_transfer.unfreeze_and_finetune(
        run_dir,
        epochs=2,
        batch_size=8,
        learning_rate=3e-3,
        base_lr=1e-3,
        report=True,
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
    made = {"model.fit.keras", "predictions.fit.csv", "report.html"}
    assert names == RUN_FILES | made
    model, fit_model = tuned / "model.keras", tuned / "model.fit.keras"
    assert fit_model.read_bytes() == (guessing / "model.keras").read_bytes()
    assert model.read_bytes() != fit_model.read_bytes()
    for path in tuned.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644

    before, manifest = Run(guessing).manifest, Run(tuned).manifest
    ignored = {"phase", "finetune", "attempts", "coverage"}
    assert manifest.model_dump(exclude=ignored) == before.model_dump(exclude=ignored)
    assert manifest.phase == "finetune"
    report = manifest.finetune
    assert report.kept and report.metric == "accuracy"
    assert report.after > report.before
    assert 0 <= report.p_value <= LEVEL
    assert report.groups == pytest.approx({"stage_4": 1e-3, "head": 3e-3})
    assert report.split_point == "block5c_add"
    assert report.engine in ("openvino", "keras")
    assert report.precision == "f32"
    assert (report.epochs, report.best_epoch, report.averaged_epochs) == (2, 2, 1)
    assert report.deciding_images == 14  # of 54: a quarter
    assert report.attempts == manifest.attempts == 1
    assert report.images_needed > 50
    assert any("14 images decide" in note for note in report.notes)
    assert report.calibration.ece_before is not None
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
        for key in ("loss", "learning_rate", "seconds"):
            assert math.isfinite(float(row[key]))
        assert row["l2"] == row["val_loss"] == ""  # nobody sees how the judges fare
        assert "val_metric" not in row
    assert float(of_finetune[1]["learning_rate"]) == pytest.approx(0, abs=1e-9)
    report = Run(tuned).manifest.finetune
    metrics = Run(tuned).metrics
    assert list(metrics) == ["fit", "finetune"]
    assert metrics["fit"] == Run(guessing).metrics["fit"]
    assert list(metrics["finetune"]) == ["deciding", "test"]
    assert metrics["finetune"]["deciding"]["accuracy"] == report.after
    assert metrics["finetune"]["deciding"]["images"] == report.deciding_images
    found = metrics["finetune"]["deciding"]["log_loss"]
    assert found == report.calibration.log_loss_after

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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "rates"), [("perfect", ("--lr", 100)), ("guessing", LEARNS_LITTLE)]
)
def test_a_model_that_is_not_better_is_put_aside(kt, copy, request, start, rates):
    run_dir = copy(request.getfixturevalue(start))
    before = digests(run_dir)
    options = (*QUICK, "--epochs", 1, *rates)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert result.exit_code == 0, result.output
    for said in (result.stdout, result.stderr):
        assert "head-only model stays, for the new one is not clearly better" in said
    assert "p is the probability that chance alone" in result.stdout
    after = digests(run_dir)
    assert after["model.keras"] == before["model.keras"]
    assert after.keys() == before.keys() | {"model.finetune.keras"}
    run = Run(run_dir)
    assert run.manifest.phase == "fit"
    assert not run.manifest.finetune.kept
    assert "not clearly better" in run.manifest.finetune.reason
    paths = changed(run_dir / "model.keras", run_dir / "model.finetune.keras")
    assert "top_conv/kernel" in paths
    evaluated = json.loads(
        kt("evaluate", run_dir, "--json", "--phase", "finetune").stdout
    )
    assert evaluated["confusion"] == run.metrics["finetune"]["test"]["confusion"]
    of_fit = json.loads(kt("evaluate", run_dir, "--json").stdout)
    assert of_fit["confusion"] == run.metrics["fit"]["test"]["confusion"]


@pytest.mark.long
def test_force_keeps_a_model_that_is_worse(perfect, tune, kt, copy):
    run_dir = copy(perfect)
    aside = run_dir / "model.finetune.keras"
    aside.write_bytes(b"what an earlier fine-tuning left")
    run = tune(run_dir, "--from-scratch-head", "--lr", 1e-9, "--force", epochs=1)
    report = run.manifest.finetune
    assert run.manifest.phase == "finetune" and report.kept
    assert "by force" in report.reason
    assert report.after < report.before  # it guesses
    assert list(report.alphas) == ["1"] and report.alpha == 1  # and is not mixed
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES | {
        "model.fit.keras",
        "predictions.fit.csv",
    }
    assert digests(run_dir)["model.fit.keras"] == digests(perfect)["model.keras"]
    evaluated = json.loads(kt("evaluate", run_dir, "--json", "--phase", "fit").stdout)
    assert evaluated["confusion"] == run.metrics["fit"]["test"]["confusion"]
    old, new = weights(run_dir / "model.fit.keras"), weights(run.model_path)
    name = "probabilities/kernel"
    assert abs(new[name] - old[name]).max() > 0.01


def assert_only_attempts_changed(
    run_dir: Path, before: dict[str, str], attempts: int
) -> None:
    after = digests(run_dir)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert after.keys() == before.keys()
    manifest = Run(run_dir).manifest
    assert manifest.attempts == attempts > manifest.finetune.attempts


@pytest.mark.long
def test_of_two_fine_tunings_the_better_stays(tuned, guessing, tune, kt, copy):
    run_dir = copy(tuned)
    first = Run(run_dir).manifest.finetune
    before = digests(run_dir)
    options = (*QUICK, "--epochs", 1, *LEARNS_NOTHING)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert result.exit_code == 0, result.output
    assert "the earlier fine-tuned model stays" in result.stderr
    assert_only_attempts_changed(run_dir, before, 2)
    assert "as this is attempt 2" in result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "<- the run's model" in lines["finetune"]
    # A row: phase, images, accuracy (low to high), right of images, log loss, ECE.
    test_log_loss = re.compile(r" of \d+ +([\d.]+)")
    losses = {
        phase: float(test_log_loss.search(lines[phase])[1])
        for phase in lines
        if phase in ("fit", "finetune", "not")
    }
    assert losses["finetune"] < losses["not"] - 0.1
    assert "for 1 epoch," in result.stdout  # the earlier one took two

    forced = tune(run_dir, *LEARNS_NOTHING, "--force", epochs=1).manifest
    assert forced.phase == "finetune"
    # It started from the head-only model again, not from what was tuned before.
    assert forced.finetune.before > first.before
    assert forced.finetune.after == pytest.approx(first.before, abs=0.1)
    assert (forced.attempts, forced.finetune.attempts) == (3, 3)
    assert digests(run_dir)["model.fit.keras"] == digests(guessing)["model.keras"]
    history = rows(run_dir / "history.csv")
    assert [row["phase"] for row in history].count("finetune") == 1


@pytest.mark.long
def test_force_is_for_one_time_only(tuned, tune, copy):
    run_dir = copy(tuned)
    assert tune(run_dir, "--force", epochs=1).manifest.finetune.config.force
    before = digests(run_dir)
    tune(run_dir, *LEARNS_NOTHING, epochs=1)
    assert_only_attempts_changed(run_dir, before, 3)


def test_both_models_are_compared_in_the_same_way(guessing, tune, copy, monkeypatch):
    tables, engines = [], set()
    from_files = tuned_module.predict_table

    def recorded(model, table, read, engine):
        tables.append(len(table))
        engines.add(engine)
        return from_files(model, table, read, engine)

    monkeypatch.setattr(tuned_module, "predict_table", recorded)
    monkeypatch.setattr(gate_module, "is_close", lambda parity: False)
    run = tune(copy(guessing), epochs=1)
    report = run.manifest.finetune
    assert any("figures are of the model on image files" in x for x in report.notes)
    assert tables == [14] * (1 + 4) + [6]  # before, four mixes, and test
    assert len(engines) == 1  # which TensorFlow traces once
    assert run.metrics["finetune"]["deciding"]["accuracy"] == report.after


def verdict(comparison: Comparison, several: bool = False) -> gate_module.Verdict:
    """What images say of which all is known; only the comparison matters."""
    targets = np.array([0, 1] * 6)
    shown = np.eye(2, dtype="f4")[targets]
    said = 0.2 + 0.6 * shown
    if several:
        targets = shown.astype("u1")
    images = Table(tuple(map(str, range(12))), targets, ("",) * 12)
    chosen = CrossFit(0.5, 1.2, said, 0.1 + 0.8 * shown)
    return gate_module.Verdict(comparison, chosen, images, np.arange(12) % 2, {})


def test_a_decision_speaks_the_language_of_its_metric():
    losses = Comparison("log_loss", 0.000123, 0.0000456, 0.05, 1, 50, 0.01, 9)
    decision = gate_module.decide("log_loss", verdict(losses), "fit", "fit", False)
    assert decision.kept and decision.images_needed is None
    assert (
        "log loss on 50 training images set aside to decide 0.0001" in decision.reason
    )
    told = Told()
    gate_module.note_few(losses, told)
    assert "points" not in told.notes[0] and "100 or more" in told.notes[0]

    figures = Comparison("macro_f1", 0.8125, 0.875, 0.12, 1, 50, 0.05, 2)
    decision = gate_module.decide("macro_f1", verdict(figures), "fit", "fit", False)
    assert not decision.kept and "differ for 2 images or groups" in decision.reason
    assert "macro F1 on 50 training images set aside to decide 0.812" in decision.reason
    gate_module.note_few(figures, told)
    assert "5 points" in told.notes[1]
    assert f"about {decision.images_needed:,} would" in told.notes[1]
    gate_module.note_few(replace(figures, images=100), told)
    assert len(told.notes) == 2


def test_a_trial_has_a_say_in_what_is_kept():
    def decided(gain: float, low: float, high: float) -> gate_module.Decision:
        trial = Trial("accuracy", 400, 10, 0.8, 0.8 + gain, low, high, seconds=1)
        found = Comparison("accuracy", 0.8, 0.8, 0.5, 1, 50, 0.04, 9, 50)
        of = verdict(found)
        return gate_module.decide("accuracy", of, "fit", "fit", False, trial)

    kept = decided(0.04, 0.02, 0.06)
    assert kept.kept and "together with +0.040 in a trial on 400" in kept.reason
    assert not decided(-0.01, -0.03, 0.01).kept
    # Judging images that say the contrary count by how much they can tell.
    worse = Comparison("accuracy", 0.8, 0.6, 0.9, 1, 50, 0.04, 9, 50)
    trial = Trial("accuracy", 400, 10, 0.8, 0.81, -0.03, 0.05, seconds=1)
    decide = partial(gate_module.decide, "accuracy", verdict(worse), "fit", "fit")
    assert not decide(False, trial).kept and decide(True, trial).kept


def test_calibration_is_that_of_the_tables():
    found = Comparison("accuracy", 0.5, 0.6, 0.05, 1, 12, 0.1, 9)
    for several in (False, True):
        of = verdict(found, several)
        decision = gate_module.decide("accuracy", of, "fit", "fit", False)
        pair = of.chosen.uncalibrated, of.chosen.probabilities
        before, after = (evaluate(of.images.targets, p, "ab") for p in pair)
        calibration = decision.calibration
        assert calibration.temperature == 1.2
        assert calibration.log_loss_before == pytest.approx(before.log_loss)
        assert calibration.log_loss_after == pytest.approx(after.log_loss)
        assert (calibration.ece_before, calibration.ece_after) == pytest.approx(
            (before.ece, after.ece)
        )
        assert (before.ece is None) == several


@pytest.mark.parametrize("patience", [None, 2])
def test_a_further_fine_tuning_is_judged_by_the_same_images(
    tuned, tune, copy, patience
):
    """What the earlier model has learned from must not judge it."""
    run_dir = copy(tuned)
    photos = copy(Path(Run(run_dir).config.data), "photos")
    configure(run_dir, data=str(photos))
    judged, learned = (
        {row["path"] for row in rows(run_dir / "predictions.csv") if row["how"] == how}
        for how in ("out of fold", "fitted")
    )
    for source in (*sorted(judged)[:2], *sorted(learned)[:5]):
        (photos / source).unlink()
    options = ["--set", f"patience={patience}"] if patience else []
    report = tune(run_dir, *options, "--force", epochs=1).manifest.finetune
    again = rows(run_dir / "predictions.csv")
    judges = {row["path"] for row in again if row["how"] == "out of fold"}
    assert judges == {x for x in judged if (photos / x).exists()}
    assert report.deciding_images == len(judges) == 12
    assert report.before > 0.8  # of the earlier fine-tuned model, not of the guess
    assert not [note for note in report.notes if "learned from" in note]


@pytest.mark.parametrize("reason", ["of version 0.1.0", "forced", "no predictions"])
def test_where_no_judges_are_known_the_head_is_the_one_to_surpass(
    tuned, kt, copy, reason
):
    run_dir = copy(tuned)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    if reason == "no predictions":
        (run_dir / "predictions.csv").unlink()
    elif reason == "forced":
        manifest["finetune"] |= {"deciding_images": 0, "calibration": None}
    else:
        manifest["schema_version"] = 1
        for key in ("deciding_images", "calibration", "images_needed", "attempts"):
            del manifest["finetune"][key]
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    options = (*QUICK, "--epochs", 1, *LEARNS_NOTHING)
    result = kt("unfreeze-and-finetune", run_dir, *options)
    assert result.exit_code == 0, result.output
    assert "is compared with the head-only model, trained again" in result.stderr
    assert "the earlier fine-tuned model stays" in result.stderr
    assert "is not clearly better than the head-only one: accuracy" in result.stderr


def test_predictions_and_thresholds_become_those_of_the_new_model(
    guessing, tune, kt, copy
):
    run_dir = copy(guessing)
    configure(run_dir, abstain_at_accuracy=0.6)
    before = Run(run_dir).manifest
    assert before.abstention is None  # of a head that guesses
    run = tune(run_dir, epochs=4)
    manifest, report = run.manifest, run.manifest.finetune
    assert report.kept
    predicted = {row["path"]: row for row in rows(run_dir / "predictions.csv")}
    splits = {row["path"]: row["split"] for row in rows(run_dir / "splits.csv")}
    assert {path: row["split"] for path, row in predicted.items()} == splits
    count = {how: 0 for how in ("out of fold", "fitted", "test")}
    for row in predicted.values():
        count[row["how"]] += 1
        assert (row["how"] == "test") == (row["split"] == "test")
        assert row["far"] in ("true", "false")
    assert count == {"out of fold": 14, "fitted": 40, "test": 6}

    # The judges' figures are those of the thresholds and of the table of the phase.
    deciding = [row for row in predicted.values() if row["how"] == "out of fold"]
    right = np.mean([row["label"] == row["predicted"] for row in deciding])
    assert right == pytest.approx(report.after)
    assert manifest.abstention.images == manifest.coverage[-1].images == 14
    assert manifest.coverage[-1].accuracy == pytest.approx(report.after)
    assert manifest.coverage != before.coverage
    for row in predicted.values():
        most = max(float(row[f"p_{name}"]) for name in CLASSES)
        if abs(most - manifest.abstention.threshold) > 1e-5:
            assert (row["sure"] == "true") == (most > manifest.abstention.threshold)
    assert digests(run_dir)["far.npz"] != digests(guessing)["far.npz"]

    # And `kt predict` says the same of the test images, far or not.
    data = Path(run.config.data)
    tested = [path for path, row in predicted.items() if row["how"] == "test"]
    result = kt("predict", run_dir, *(data / path for path in tested))
    for said in csv.DictReader(io.StringIO(result.stdout)):
        row = predicted[str(Path(said["path"]).relative_to(data))]
        assert said["class_1"] == row["predicted"]
        assert (said["sure"], said["far"]) == (row["sure"], row["far"])


@pytest.mark.long
def test_figures_without_test_images_are_labelled_as_what_they_are(
    photos, tmp_path, kt
):
    run_dir = fit(photos, tmp_path, "run", splits={"test": 0.0}, head=UNTRAINED)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK, "--epochs", 2)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    report, metrics = Run(run_dir).manifest.finetune, Run(run_dir).metrics
    for phase, split in (("fit", "out_of_fold"), ("finetune", "deciding")):
        figures = metrics[phase][split]
        (line,) = [x for x in lines if x.startswith(f"{phase} ")]
        assert line.startswith(f"{phase} {split.replace('_', ' ')} ")
        assert f"{figures['accuracy']:.3f} (" in line
        assert f"{figures['log_loss']:.3g} {figures['ece']:.3f}" in line
    found = report.calibration
    assert f", ECE {found.ece_before:.3f} -> {found.ece_after:.3f}" in result.stdout


# The mix of weights


def without_temperature(run: Run) -> dict[str, np.ndarray]:
    """The weights of a run's model, before the temperature was folded in."""
    values = weights(run.model_path)
    for name in ("probabilities/kernel", "probabilities/bias"):
        values[name] = values[name] * run.manifest.finetune.calibration.temperature
    return values


@pytest.mark.long
def test_weights_are_mixed_in_the_share_that_is_best(guessing, tune, copy, monkeypatch):
    monkeypatch.setattr(tuned_module, "ALPHAS", (1.0,))
    whole = tune(copy(guessing, "whole"))
    monkeypatch.setattr(tuned_module, "ALPHAS", (0.5, 1e-4))
    half = tune(copy(guessing, "half"))
    report = half.manifest.finetune
    assert report.alphas.keys() == {"0.5", "0.0001"}
    assert report.alpha == 0.5
    assert report.alphas["0.5"] == report.after > report.alphas["0.0001"]
    # The model before has another head than the run: it was trained on fewer images.
    monkeypatch.setattr(tuned_module, "ALPHAS", (0.0,))
    none = tune(copy(guessing, "none"), "--force")
    old = without_temperature(none)
    new, mixed = without_temperature(whole), without_temperature(half)
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


def test_the_share_is_the_mean_of_what_both_halves_choose(tuned):
    report = Run(tuned).manifest.finetune
    assert list(report.alphas) == ["0.25", "0.5", "0.75", "1"]
    assert report.alpha * 8 == round(report.alpha * 8)
    assert 0.25 <= report.alpha <= 1
    assert 0.3 < report.calibration.temperature < 3


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


@pytest.mark.long
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
    assert kept == {("float16", 40), ("float32", 60)}  # of training images


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


@pytest.mark.long
def test_free_space_is_needed_for_what_is_not_cached_yet(
    guessing, kt, tune, copy, monkeypatch
):
    row_bytes = 2 * 2 * 320 * 2

    def leave(rows: int) -> None:
        free = activations_module.FREE_BYTES + rows * row_bytes
        monkeypatch.setattr(FeatureCache, "free_bytes", lambda cache: free)

    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    leave(20)  # 60 without the sample
    tune(run_dir, epochs=1)
    leave(39)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK, "--augment", 1)
    assert_one_line(result, 1, "40 activations", "GB left", "--disk-budget")


@pytest.mark.long
def test_augmented_views_are_cached_and_trained_on(guessing, tune, copy):
    run_dir = copy(guessing)
    report = tune(run_dir, "--augment", 2).manifest.finetune
    assert report.engine in ("openvino", "keras", "cache")
    count = 60 + 2 * 40
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


@pytest.mark.long
def test_online_augmentation_makes_new_views_every_epoch(
    guessing, tune, copy, monkeypatch
):
    seen = []

    def recorded(recipe, data, checkpoint, listener):
        def transformed(pixels, picked, number, change):
            assert pixels.dtype == np.uint8 and pixels.shape[1:] == (64, 64, 3)
            out = data.transform(pixels, picked, number, change)
            seen.extend(
                (number, int(i), row.tobytes())
                for i, row in zip(picked, out, strict=True)
            )
            return out

        return train_tail(
            recipe, replace(data, transform=transformed), checkpoint, listener
        )

    monkeypatch.setattr(finetune_module, "train_tail", recorded)
    monkeypatch.setattr(finetune_module, "PARITY_IMAGES", 8)  # not all images
    run_dir = copy(guessing)
    configure(run_dir, cache_dir="fresh")
    report = tune(run_dir, "--augment", "online", epochs=3).manifest.finetune
    assert pixel_tables(Path("fresh")) == {("image#1", 40)}
    assert report.epochs == 3
    assert report.split_point == "block7a_project_bn"
    assert any("augment online" in note for note in report.notes)
    for epoch in range(3):
        assert {i for number, i, _ in seen if number == epoch} == set(range(40))
    views = {row for number, i, row in seen if i == 0}
    assert len(views) == 3
    assert report.parity["top1_agreement"] == 1.0


@pytest.mark.long
def test_weights_of_images_count_in_training(workspace, photos, tmp_path, monkeypatch):
    weight = dict(zip(CLASSES, (8.0, 1.0, 0.5), strict=True))
    lines = [
        f"{photos / name / f'{i:02d}.jpg'},{name},{weight[name]}"
        for name in CLASSES
        for i in range(20)
    ]
    table = tmp_path / "weighted.csv"
    table.write_text("\n".join(["path,label,sample_weight", *lines]))
    run_dir = fit(table, workspace, "weighted", head=UNTRAINED)
    tails = []

    def recorded(recipe, data, checkpoint, listener):
        for part in (data.train, data.stopping):
            expected = np.array([weight[CLASSES[i]] for i in part.targets])
            np.testing.assert_allclose(
                part.sample_weight, expected / expected.mean(), rtol=1e-6
            )
        (tmp_path / "other").mkdir()
        plain = replace(data, train=replace(data.train, sample_weight=None))
        tails.append(train_tail(recipe, plain, tmp_path / "other", listener))
        tails.append(train_tail(recipe, data, checkpoint, listener))
        return tails[-1]

    monkeypatch.setattr(finetune_module, "train_tail", recorded)
    run = keras_transfer.unfreeze_and_finetune(
        run_dir, unfreeze="from:top_conv", epochs=2, batch_size=8, patience=3
    )
    plain, weighted = tails
    assert any(
        (one != other).any()
        for one, other in zip(plain.weights, weighted.weights, strict=True)
    )
    with run.splits_path.open(newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["sample_weight"]) == weight[row["label"]]


def test_images_to_stop_by_may_all_have_weight_0(
    workspace, photos, tmp_path, monkeypatch
):
    lines = [
        f"{photos / name / f'{i:02d}.jpg'},{name},{int(i < 3)}"
        for name in CLASSES
        for i in range(20)
    ]
    table = tmp_path / "few.csv"
    table.write_text("\n".join(["path,label,sample_weight", *lines]))
    run_dir = fit(table, workspace, "few", head=UNTRAINED)
    seen = []

    def recorded(recipe, data, checkpoint, listener):
        seen.append(data)
        return train_tail(recipe, data, checkpoint, listener)

    monkeypatch.setattr(finetune_module, "train_tail", recorded)
    keras_transfer.unfreeze_and_finetune(
        run_dir, unfreeze="from:top_conv", epochs=1, batch_size=8, patience=3
    )
    (data,) = seen
    assert data.train.sample_weight.max() > 1
    assert len(data.stopping) and data.stopping.sample_weight is None


def test_of_each_image_one_view_is_read():
    class Counted:
        def __init__(self, view: int):
            self.values = np.arange(20)[:, None] + 100 * view
            self.shape, self.dtype = self.values.shape, self.values.dtype

        def __getitem__(self, index):
            read.extend(index)
            return self.values[index]

    views = [Counted(view) for view in range(4)]
    images = LabelledFeatures(views, np.arange(20), Weighting.equal(20))
    data = TailData(images)
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
    absent, present, offset = rng.uniform(1, 2, (3, 3)).astype("f4")
    weighting = Weighting(absent, present, offset * (not multi_label))
    data = LabelledFeatures([np.zeros((20, 1))], targets, weighting)
    logits = rng.normal(size=(20, 3)).astype("f4")
    labels = np.concatenate(data.labels(slice(None)), axis=1)
    losses = keras_loss(multi_label, weighting.logit_offset)(labels, logits)
    activation = keras.ops.sigmoid if multi_label else keras.ops.softmax
    of_probabilities = data.losses_of(np.asarray(activation(logits))).mean()
    assert of_probabilities == pytest.approx(float(np.mean(losses)), rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("augment", "budget"),
    [(0, 1e-6), ("online", 0.0005)],  # enough for pixels, not for held-out images too
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
        (["--mix", "mixup"], ["--mix mixup and --augment 0", "--augment online"]),
        (["--label-smoothing", "1"], ["label_smoothing", "below 1"]),
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
        [str(guessing), "--resume"],
    ]
    command = [sys.executable, "-c", script, json.dumps(mistakes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_run_is_named(kt):
    result = kt("unfreeze-and-finetune", "nowhere")
    assert_one_line(result, 2, "nowhere", "kt fit")


@pytest.mark.long
@pytest.mark.parametrize(("augment", "evaluated"), [(0, ["test"]), ("online", [])])
def test_where_no_images_can_be_set_aside_force_is_needed(
    photos, tmp_path, kt, tune, augment, evaluated
):
    lines = ["path,label,split,group"]
    for name in ("circle", "stripes"):
        for index in range(10):
            split = "test" if evaluated and index < 2 else "train"
            lines.append(f"{photos}/{name}/{index:02d}.jpg,{name},{split},{split}")
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines))
    whole = {"test": 0.0}
    run_dir = fit(data, tmp_path, "one-group", splits=whole, head=UNTRAINED, folds=None)
    before = digests(run_dir)
    result = kt("unfreeze-and-finetune", run_dir, *QUICK)
    assert_one_line(result, 2, "at least three groups", "--force")
    assert digests(run_dir) == before
    run = tune(run_dir, "--force", "--augment", augment)
    report = run.manifest.finetune
    assert (report.before, report.after, report.p_value) == (None, None, None)
    assert (report.alpha, report.alphas, report.best_epoch) == (1.0, {}, 2)
    assert (report.deciding_images, report.calibration) == (0, None)
    assert run.manifest.attempts == 0
    assert list(run.metrics["finetune"]) == evaluated


# How training ends


def test_without_patience_the_last_epochs_are_averaged(guessing, copy, monkeypatch):
    """Against the weights after each epoch, which its checkpoint has."""
    states: list[list[np.ndarray]] = []
    averages: list[np.ndarray] = []

    def recorded(recipe, data, checkpoint, listener):
        class Recorder(Told):
            def epoch(self, *_: object) -> None:
                with np.load(checkpoint / "state.npz") as file:
                    states.append([file[f"state_{i}"] for i in range(10)])

        trained = train_tail(recipe, data, checkpoint, Recorder())
        averages.extend(trained.weights)
        return trained

    monkeypatch.setattr(finetune_module, "train_tail", recorded)
    options = {"unfreeze": "from:top_conv", "learning_rate": 0.01, "batch_size": 8}
    run = keras_transfer.unfreeze_and_finetune(copy(guessing), epochs=7, **options)
    report = run.manifest.finetune
    assert (report.averaged_epochs, report.best_epoch, report.epochs) == (2, 7, 7)
    kernel = max(averages, key=np.size)
    *_, one, other = (
        next(value for value in state if value.shape == kernel.shape)
        for state in states
    )
    np.testing.assert_allclose(kernel, (one.astype("f8") + other) / 2, atol=1e-6)
    assert abs(one - other).max() > 1e-5


def test_with_patience_further_images_choose_the_epoch(guessing, tune, copy):
    options = ("--set", "patience=2", "--lr", 0.5)
    run = tune(copy(guessing), *options, "--force", epochs=12)
    report = run.manifest.finetune
    assert report.averaged_epochs == 1 and report.epochs < 12
    assert report.epochs == report.best_epoch + 2
    history = [r for r in rows(run.run_dir / "history.csv") if r["phase"] == "finetune"]
    losses = [float(row["val_loss"]) for row in history]
    assert losses.index(min(losses)) + 1 == report.best_epoch
    assert report.deciding_images == 14  # not those


@pytest.mark.long
def test_the_default_patience_of_old_runs_was_not_asked_for(guessing, tune, copy):
    """Version 0.1.0 wrote it out into every config.yaml."""
    manifest = json.loads((guessing / "manifest.json").read_text())
    patience = {}
    for version, old, given in [(1, 4, None), (1, 4, 4), (1, 7, None), (2, 4, None)]:
        run_dir = copy(guessing, f"{version}-{old}-{given}")
        text = json.dumps({**manifest, "schema_version": version})
        (run_dir / "manifest.json").write_text(text)
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        configure(run_dir, finetune={**config["finetune"], "patience": old})
        options = ["--set", f"patience={given}"] if given else []
        report = tune(run_dir, "--force", *options, epochs=1).manifest.finetune
        patience[version, old, given] = report.config.patience
    assert list(patience.values()) == [None, 4, 7, 4]


@pytest.mark.long
def test_a_head_of_more_folds_than_images_that_are_left(photos, tmp_path, tune):
    lines = ["path,label"]
    lines += [f"{photos}/{x}/{i:02d}.jpg,{x}" for x in CLASSES[:2] for i in range(6)]
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines))
    whole = {"test": 0.0}
    run_dir = fit(data, tmp_path, "folds", splits=whole, head=UNTRAINED, folds=12)
    report = tune(run_dir, "--force", epochs=1).manifest.finetune
    assert report.deciding_images == 3


@pytest.mark.long
@pytest.mark.parametrize("unreadable", [False, True])
def test_force_helps_where_none_can_be_set_aside_for_patience(
    photos, tmp_path, tune, kt, unreadable, monkeypatch
):
    lines = ["path,label"]
    count = 10 if unreadable else 6
    lines += [f"{i}{x}.jpg,{x}" for x in CLASSES[:2] for i in range(count)]
    for x in CLASSES[:2]:
        for i in range(count):
            shutil.copy(photos / x / f"{i:02d}.jpg", tmp_path / f"{i}{x}.jpg")
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines))
    run_dir = fit(
        data, tmp_path, "few", splits={"test": 0.0}, head=UNTRAINED, max_skipped=1.0
    )
    if unreadable:  # all that judge, but not those that stop
        run = Run(run_dir)
        config = run.config.model_copy(
            update={"finetune": FinetuneConfig(patience=2, force=True)}
        )
        parts = gate_module.divide(run, config, run_splits(run), Told())
        assert len(parts.judging) == 5 and len(parts.stopping) == 4
        for source in parts.judging.sources:
            (tmp_path / source).write_bytes(b"no longer an image")
    plain = kt("unfreeze-and-finetune", run_dir, *QUICK, "--set", "patience=2")
    assert_one_line(plain, 2, "Received", "--force")
    trained = []
    train_on_features = finetune_module.train_on_features

    def recorded(config, splits, features, listener):
        trained.append(len(splits.train))
        return train_on_features(config, splits, features, listener)

    monkeypatch.setattr(finetune_module, "train_on_features", recorded)
    run = tune(run_dir, "--force", "--set", "patience=2")
    assert run.manifest.finetune.deciding_images == (0 if unreadable else 3)
    assert trained == [11 if unreadable else 9]  # without what stops or judges


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
        {key: value for key, value in row.items() if "second" not in key}
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
    )
    return run_dir


DROPOUT = ("--augment", 1)


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


@pytest.mark.long
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


class Interrupting(Told):
    """Ends a fine-tuning after its second epoch."""

    def epoch(self, phase: str, number: int, figures) -> None:
        if (phase, number) == ("finetune", 2):
            raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_with_mixtures_too_an_interrupted_run_ends_as_if_it_had_not_been(
    guessing, copy, mixing
):
    options = {
        "unfreeze": "from:top_conv",
        "learning_rate": 0.01,
        "batch_size": 8,
        "epochs": 4,
        "augment": "online",
        "augment_policy": "randaugment",
        "mix": mixing,
        "label_smoothing": 0.1,
    }
    whole, run_dir = copy(guessing, "whole"), copy(guessing)
    keras_transfer.unfreeze_and_finetune(whole, **options)
    assert Run(whole).manifest.finetune.config.mix == mixing
    with pytest.raises(KeyboardInterrupt):
        keras_transfer.unfreeze_and_finetune(
            run_dir, listeners=[Interrupting()], **options
        )
    assert not changed(run_dir / "model.keras", guessing / "model.keras")
    keras_transfer.unfreeze_and_finetune(run_dir, resume=True)
    assert_same_result(run_dir, whole)


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
    found = figures["deciding"]["mean_average_precision"]
    assert found == pytest.approx(report.after)
    evaluated = json.loads(kt("evaluate", run_dir, "--json").stdout)
    assert evaluated["log_loss"] == pytest.approx(figures["test"]["log_loss"], abs=1e-3)


@pytest.mark.long
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
        tune(run_dir, *LEARNS_NOTHING, "--force", "--set", "patience=5")
        history = rows(run_dir / "history.csv")
        first, _ = [row for row in history if row["phase"] == "finetune"]
        losses.append(float(first["loss"]))
        val_losses.append(float(first["val_loss"]))
    assert losses[0] > 1e-3
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert val_losses[0] != pytest.approx(val_losses[1], rel=5e-3)


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
    for split in ("train", "test"):
        (folder / sources(run_dir, split)[0]).unlink()
    (folder / sources(run_dir, "train")[1]).write_bytes(b"no longer an image")
    (folder / sources(run_dir, "train")[2]).write_bytes(b"")
    run = tune(run_dir)
    assert run.manifest.finetune.kept
    left_out = [x for x in run.manifest.finetune.notes if "are left out" in x]
    assert len(left_out) == 1 and left_out[0].startswith("2 images cannot be used")
    deciding = run.metrics["finetune"]["deciding"]["images"]
    assert deciding == run.manifest.finetune.deciding_images in (11, 12, 13)
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
    assert list(run.metrics["finetune"]) == ["deciding"]


@pytest.mark.parametrize(
    ("split", "max_skipped", "exit_code", "words"),
    [
        ("train", 0.1, 1, ["54 of 60 images cannot be used", "max_skipped"]),
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
    assert f"{told_epoch[2]['loss']}" == history[-1]["loss"]
    assert told_epoch[2].keys() == {
        *("epoch", "loss", "accuracy", "learning_rate"),
        *("seconds", "images_per_second"),
    }
    assert told.artifacts == [(run.run_dir, "run")]
    with pytest.raises(keras_transfer.errors.UsageError, match="epochs"):
        keras_transfer.unfreeze_and_finetune(run, epoch=1)
