"""Which method, which base: probes, scores, rules, and folds."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from conftest import CLASSES, Told
from PIL import Image

import keras_transfer
from keras_transfer.advice import probe as probe_module
from keras_transfer.advice.costs import TuningCosts
from keras_transfer.advice.evidence import Evidence, Trial
from keras_transfer.advice.logme import logme
from keras_transfer.advice.probe import Probed, learning_curve
from keras_transfer.advice.ranking import rank_by_accuracy
from keras_transfer.advice.rules import expected_gain, recommend, separation
from keras_transfer.advice.trial import plan_trial
from keras_transfer.config import load_config
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.intervals import trials_of, wilson
from keras_transfer.features.cache import FeatureCache
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.head import train_head
from keras_transfer.workflows.advise import command_line
from keras_transfer.workflows.inputs import prepare

# LogME


def reference_logme(features: np.ndarray, targets: np.ndarray, classes: int) -> float:
    """The published definition: y ~ N(0, F F^T / alpha + I / beta), maximized."""
    found = []
    for index in range(classes):
        label = (targets == index).astype(float)

        def negative(logs, label=label):
            alpha, beta = np.exp(logs)
            covariance = features @ features.T / alpha + np.eye(len(label)) / beta
            return -scipy.stats.multivariate_normal.logpdf(
                label, np.zeros(len(label)), covariance
            )

        grid = [(a, b) for a in range(-4, 9, 2) for b in range(-4, 9, 2)]
        best = scipy.optimize.minimize(
            negative,
            min(grid, key=negative),
            method="Nelder-Mead",
            bounds=[(-15, 15)] * 2,
            options={"fatol": 1e-10},
        )
        found.append(-best.fun / len(label))
    return float(np.mean(found))


@pytest.mark.parametrize(("count", "dimension"), [(30, 4), (12, 20), (25, 25)])
def test_logme_is_what_its_definition_gives(count, dimension):
    rng = np.random.default_rng(count)
    targets = np.arange(count) % 3
    features = rng.normal(size=(count, dimension))
    features[:, :3] += 2 * np.eye(3)[targets]
    expected = reference_logme(features, targets, 3)
    assert logme(features, targets, 3) == pytest.approx(expected, abs=1e-4)


def test_logme_is_higher_where_classes_lie_apart():
    rng = np.random.default_rng(0)
    targets = np.arange(200) % 2
    noise = rng.normal(size=(200, 16))
    apart = noise + 3 * targets[:, None]
    assert logme(apart, targets, 2) > logme(noise, targets, 2) + 0.1
    several = np.eye(2, dtype=np.uint8)[targets]
    assert logme(apart, several, 2) == pytest.approx(logme(apart, targets, 2))


def test_logme_leaves_out_what_nothing_shows():
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    features = rng.normal(size=(60, 8)) + targets[:, None]
    expected = logme(features, targets, 2)
    assert logme(features, targets, 4) == pytest.approx(expected)
    labels = np.column_stack([targets, 1 - targets, np.ones(60), np.zeros(60)])
    assert logme(features, labels.astype(np.uint8), 4) == pytest.approx(expected)
    assert np.isnan(logme(features, labels[:, 2:].astype(np.uint8), 2))


# Folds and intervals


def table(targets, groups=None) -> Table:
    names = tuple(f"{index}.jpg" for index in range(len(targets)))
    return Table(names, np.asarray(targets), tuple(groups or [""] * len(targets)))


def test_folds_hold_each_class_alike_and_divide_no_group():
    targets = np.array([0] * 40 + [1] * 20)
    numbers = fold_numbers(table(targets), 2, 5, seed=3)
    for fold in range(5):
        assert np.bincount(targets[numbers == fold]).tolist() == [8, 4]
    groups = [f"patient {index // 3}" for index in range(60)]
    numbers = fold_numbers(table(targets, groups), 2, 5, seed=3)
    for patient in set(groups):
        rows = [i for i, group in enumerate(groups) if group == patient]
        assert len(set(numbers[rows])) == 1
    assert (fold_numbers(table(targets), 2, 5, 4) != numbers).any()


def test_folds_of_several_labels_and_of_rare_classes():
    targets = np.zeros((30, 3), np.uint8)
    targets[:10, 0] = targets[5:25, 1] = 1
    numbers = fold_numbers(table(targets), 3, 5, seed=0)
    assert np.bincount(numbers, minlength=5).min() >= 4
    numbers = fold_numbers(table([0] * 20 + [1] * 2), 2, 5, seed=0)
    assert set(numbers) == set(range(5))
    targets = np.arange(40) % 10  # four images a class
    numbers = fold_numbers(table(targets), 10, 5, seed=0)
    assert np.bincount(numbers).tolist() == [8] * 5
    assert all(len(set(numbers[targets == index])) == 4 for index in range(10))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_probes_learn_by_the_weights_of_images(share, monkeypatch):
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 2
    rows = rng.normal(size=(120, 4)).astype(np.float32) + targets[:, None]
    rows = rows.astype(np.float32)
    weights = np.where(np.arange(120) % 3, 1 + 4 * targets, 0).astype(np.float32)
    trained = []

    def recorded(config, data, *others):
        trained.append((data.sample_weight, train_head(config, data, *others)))
        return trained[-1][1]

    monkeypatch.setattr(probe_module, "train_head", recorded)
    config = load_config(None, {"data": "digits"})
    splits = Splits(
        *[table(targets)] * 3, ("a", "b"), False, lambda sources: iter(()), ()
    )
    accuracy = []
    for given in (weights, 7 * weights, None):
        images = replace(table(targets), sample_weight=given)
        probed = Probed(images, rows, np.arange(120) // 2 % 5)
        curve, _ = learning_curve(config, splits, probed, (share,))
        accuracy.append(curve[share].values)
    (one, head), (other, _), (equal, _) = trained
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.count_nonzero(one) == round(80 * share)
    assert np.count_nonzero(equal) == round(120 * share)
    some = one > 0
    np.testing.assert_allclose(
        one[some], weights[some] / weights.mean(dtype=np.float64), rtol=1e-6
    )
    assert {*equal} == {0.0, 1.0} if share < 1 else {*equal} == {1.0}
    # Figures count images alike: those of weight 0 too.
    said = head.out_of_fold.probabilities[head.out_of_fold.chosen].argmax(1)
    right = [(said == targets)[probed.folds == fold].mean() for fold in range(5)]
    shifts = np.subtract(accuracy[0], right)
    np.testing.assert_allclose(shifts, shifts[0], atol=1e-6)
    assert accuracy[0] != accuracy[2]


def test_probes_of_images_without_weight_are_refused():
    images = replace(table([0, 1] * 9), sample_weight=np.zeros(18, np.float32))
    probed = Probed(images, np.zeros((18, 2), np.float32), np.arange(18) % 5)
    config = load_config(None, {"data": "digits"})
    splits = Splits(*[images] * 3, ("a", "b"), False, lambda sources: iter(()), ())
    with pytest.raises(KerasTransferError, match="18 images, all with a sample_weight"):
        learning_curve(config, splits, probed)


def test_fewer_images_or_groups_than_folds_is_an_error():
    with pytest.raises(UsageError, match="Received: 3 and 5 folds"):
        fold_numbers(table([0, 1, 0]), 2, 5, 0)
    with pytest.raises(UsageError, match="fewer groups .* Received: 2 and 5 folds"):
        fold_numbers(table([0, 1] * 10, ["a", "b"] * 10), 2, 5, 0)
    with pytest.raises(UsageError, match="Every class .* Received: at most 4 and 5"):
        fold_numbers(table([0, 1, 2] * 4, list("abcdefghijkl")), 3, 5, 0)


def test_an_estimate_is_its_formula():
    values = [0.85, 0.95, 0.9, 1.0, 0.8]
    found = estimate(values, 0.2)
    variance = np.var(values, ddof=1) * (1 / 5 + 0.25)
    trials = 0.9 * 0.1 / variance * (1.959964 / 2.776445) ** 2
    assert found.mean == pytest.approx(0.9)
    assert (found.low, found.high) == pytest.approx(tuple(wilson(0.9, trials)))
    gain = estimate([-0.1, 0.0], 0.2, (-1.0, 1.0))
    half = 12.706205 * np.sqrt(0.005 * (1 / 2 + 0.25))
    assert gain.mean == pytest.approx(-0.05)
    assert (gain.low, gain.high) == pytest.approx((-0.05 - half, -0.05 + half))


def test_the_number_of_images_steadies_an_estimate():
    of_images = tuple(wilson(0.9, 150).tolist())
    assert trials_of(of_images) == pytest.approx(150)
    assert trials_of(tuple(wilson(1.0, 40).tolist())) == pytest.approx(40)
    same, apart = [0.9] * 5, [0.8, 1.0, 0.8, 1.0, 0.9]
    steady, shaky = (estimate(x, 0.2, of_images=of_images) for x in (same, apart))
    loose = estimate(apart, 0.2)
    assert estimate(same, 0.2).low == 0.9  # as if nothing was uncertain
    # In units of 0.9 * 0.1: 4 of 12 parts are measured, 8 are those of 30 images each.
    for found, variance in ((steady, 0.0), (shaky, 0.01)):
        mixed = (4 * variance / 0.09 + 8 / 30) / 12 * (1 / 5 + 0.25)
        t = scipy.stats.t.ppf(0.975, 12)
        ends = wilson(0.9, (1.959964 / t) ** 2 / mixed)
        assert (found.low, found.high) == pytest.approx(tuple(ends))
    assert steady.low > shaky.low > loose.low
    perfect = estimate([1.0] * 5, 0.2, of_images=tuple(wilson(1.0, 150).tolist()))
    assert 0.93 < perfect.low < wilson(1.0, 150)[0] and perfect.high == 1
    # One measurement has the variance of its images, a fifth of all.
    single = estimate([0.9], 0.2, of_images=of_images)
    t = scipy.stats.t.ppf(0.975, 8)
    ends = wilson(0.9, (1.959964 / t) ** 2 * 30 / (1 + 0.25))
    assert (single.low, single.high) == pytest.approx(tuple(ends))
    # What a correction put out of bounds is put back.
    beyond = estimate([1.02, 1.0, 1.02], 0.2, of_images=of_images)
    assert beyond.mean == beyond.high == 1 and beyond.low > 0.8
    losses = estimate([0.3, 0.5], 0.5, (0.0, np.inf), (0.3, 0.6))
    usual = 2 * (0.3 / 2 / 1.959964) ** 2
    variance = (1 * 0.02 + 8 * usual) / 9 * (1 / 2 + 1)
    half = scipy.stats.t.ppf(0.975, 9) * np.sqrt(variance)
    assert (losses.low, losses.high) == pytest.approx((max(0.4 - half, 0), 0.4 + half))


# Rules


def certain(value: float) -> Estimate:
    return Estimate(
        mean=value, low=value - 0.02, high=value + 0.02, values=(value,) * 5
    )


ORDINARY = Evidence(
    images=1600,
    class_counts={"a": 700, "b": 900},
    metric="accuracy",
    accuracy=certain(0.8),
    curve={0.25: certain(0.7), 0.5: certain(0.79), 1.0: certain(0.8)},
    gain=Estimate(mean=0.005, low=-0.01, high=0.02, values=()),
    majority=0.56,
    neighbours=0.95,
    logme=0.1,
    images_per_second=300,
    minutes={"extract": 1, "more-data": 1, "finetune-top": 5, "finetune-all": 50},
    gigabytes={"extract": 0, "more-data": 0, "finetune-top": 0.1, "finetune-all": 1},
    disk=10,
    not_tried="a trial takes about 20 min",
)
MANY = {f"class {number}": 80 for number in range(20)}
COMMON = {"accuracy": certain(0.985), "majority": 0.98, "neighbours": 0.998}
RISES = Estimate(mean=0.05, low=0.02, high=0.08, values=())
UNLIKE = {"neighbours": 0.6}
PARTLY = {"neighbours": 0.85}


def tried(gain: float, images: int = 1600) -> dict[str, Trial]:
    """A trial in which fine-tuning gained this much."""
    interval = {"low": gain - 0.03, "high": gain + 0.03}
    return {
        "trial": Trial("accuracy", images, 5, 0.7, 0.7 + gain, **interval, seconds=9)
    }


@pytest.mark.parametrize(
    ("changes", "budget", "method", "why"),
    [
        ({}, None, "finetune-top", "500 images"),
        ({}, 2, "extract", "more time or disk"),
        ({"accuracy": certain(0.995)}, None, "extract", "little is left"),
        ({"images": 200}, None, "extract", "classes of few images"),
        ({"images": 200, "gain": RISES}, None, "extract", "classes of few images"),
        ({"images": 200} | UNLIKE, None, "finetune-top", "well apart"),
        ({"images": 200} | UNLIKE, 2, "extract", "more time or disk"),
        (
            {"class_counts": {"a": 900, "b": 4}},
            None,
            "finetune-top",
            "500 images",
        ),
        (
            {"class_counts": MANY | {"a": 4}},
            None,
            "finetune-top",
            "500 images",
        ),
        (COMMON, None, "finetune-top", "500 images"),
        ({"images": 29_000}, None, "finetune-all", "500 images"),
        ({"images": 29_000}, 10, "finetune-top", "500 images"),
        ({"images": 29_000, "disk": 0.5}, None, "finetune-top", "500 images"),
        ({"disk": 0.01}, None, "extract", "more time or disk"),
        (PARTLY, None, "finetune-top", "well apart"),
        (UNLIKE, None, "finetune-all", "well apart"),
        (UNLIKE, 10, "finetune-top", "well apart"),
        (
            tried(0.04),
            None,
            "finetune-top",
            "by +0.036: +0.040 in the trial",
        ),
        (tried(0.04) | UNLIKE, None, "finetune-all", "+0.040"),
        (
            tried(0.04, 200) | {"images": 200},
            None,
            "finetune-top",
            "+0.040",
        ),
        (tried(-0.04), None, "extract", "in the trial"),
        (tried(-0.04) | UNLIKE, None, "extract", "in the trial"),
        # What few of the images do not show, more of them may.
        (tried(-0.04, 300), None, "finetune-top", "500 images"),
        (
            tried(0.0, 200) | {"images": 200, "gain": RISES},
            None,
            "more-data",
            "more images",
        ),
        (tried(0.04, 200) | {"images": 200, "gain": RISES}, None, "finetune-top", ""),
        (tried(0.0) | {"gain": RISES}, None, "extract", "in the trial"),
    ],
)
def test_the_method_follows_from_the_numbers(changes, budget, method, why):
    found, reason, advice = recommend(replace(ORDINARY, **changes), budget)
    assert found == method and why in reason
    assert [one.rule for one in advice] == [
        "data size",
        "rare classes",
        "balance",
        "learning curve",
        "headroom",
        "task similarity",
        "compute",
        "trial",
    ]
    assert all(one.message for one in advice)


def test_a_trial_and_what_is_usual_are_weighed_by_their_variances():
    usual = 0.02, 0.03
    assert expected_gain(None, usual, 100) == 0.02
    certain_trial = replace(tried(0.05)["trial"], low=0.0499, high=0.0501)
    assert expected_gain(certain_trial, usual, 1600) == pytest.approx(0.05, abs=1e-5)
    # The trial's error is the usual deviation: both count half.
    alike = replace(certain_trial, low=0.05 - 1.96 * 0.03, high=0.05 + 1.96 * 0.03)
    assert expected_gain(alike, usual, 1600) == pytest.approx(0.035)
    worse = replace(alike, before=0.75, after=0.7)
    assert expected_gain(worse, usual, 1600) == pytest.approx(-0.015)
    assert expected_gain(worse, usual, 10_000) == 0.02  # few of them were tried


def messages(**changes) -> str:
    return " | ".join(a.message for a in recommend(replace(ORDINARY, **changes))[2])


def test_rules_say_what_they_found():
    ordinary = messages()
    assert "in balance" in ordinary and "similar to the base's own" in ordinary
    assert "every class has at least 10" in ordinary
    assert "1,600 training images" in ordinary  # however many labels they have
    assert "not tried: a trial takes about 20 min" in ordinary
    assert "(0.700 with 25%, 0.790 with 50%, 0.800 with 100%;" in ordinary
    assert "finetune-top 5 min and 0.10 GB" in ordinary
    assert "out of balance" in messages(class_counts={"a": 1000, "b": 100})
    assert "unlike the base's own" in messages(**UNLIKE)
    assert "keep the classes apart in part" in messages(**PARTLY)
    assert "more time or disk than there is" in messages(disk=0.5)
    assert "more would help" in messages(gain=RISES)
    shown = messages(**tried(0.04))
    assert "from 0.700 to 0.740 (+0.040, 95% interval +0.010 to +0.070)" in shown
    assert "on 1,600 training images" in shown
    assert "which chance may explain" in messages(**tried(0.01))
    assert separation(0.75, 0.5) == 0.5


def test_rare_classes_are_named_and_decide_nothing():
    counts = {f"class {n}": 90 for n in range(8)} | {"rare": 9, "rarest": 4}
    method, _, advice = recommend(
        replace(ORDINARY, class_counts=counts, **tried(0.077))
    )
    assert method == "finetune-top"
    (said,) = [one.message for one in advice if one.rule == "rare classes"]
    assert "of 'rarest' (4), 'rare' (9):" in said
    # Of 4 images, all found, Wilson's interval of the recall starts at 0.51.
    assert "of 4 images, all found, the recall may still be 0.51" in said
    assert wilson(1.0, 4)[0] == pytest.approx(0.51, abs=0.005)
    many = {f"class {n}": n for n in range(1, 9)}
    assert "'class 3' (3), 5 more:" in messages(class_counts=many)


COSTS = TuningCosts(forward=0.01, learning=0.01, setup=5, row_bytes=1)


def test_a_trial_is_as_long_as_time_allows():
    # 3 folds of 5 s, in which heads take 1 s; 300 images are learned from twice.
    plan, fits = plan_trial(300, 10, COSTS, 1, 300)
    assert (plan.images, plan.epochs, fits) == (300, 10, True)
    assert plan.seconds == pytest.approx(1 + 3 * 6 + 3 + 10 * 2 * 3)
    plan, fits = plan_trial(300, 10, COSTS, 1, 60)
    assert (plan.images, plan.epochs, fits) == (300, 6, True)
    plan, fits = plan_trial(300, 10, COSTS, 1, 40)
    assert (plan.images, plan.epochs, fits) == (300, 5, False)
    plan, fits = plan_trial(30_000, 10, COSTS, 1, 300)
    assert 1_000 <= plan.images < 3_000 and plan.epochs == 5 and fits
    assert plan.seconds == pytest.approx(300, abs=0.2)
    plan, fits = plan_trial(30_000, 10, COSTS, 1, 100)
    assert (plan.images, plan.epochs, fits) == (1_000, 5, False)
    plan, _ = plan_trial(300, 2, COSTS, 1, 300)
    assert plan.epochs == 2


def test_a_budget_that_allows_nothing_is_an_error():
    with pytest.raises(
        UsageError, match="Received: 30.0 s, .* about 60.0 s. Allow a larger"
    ):
        recommend(ORDINARY, 0.5)


# The commands


@pytest.mark.long
def test_advice_ends_in_a_command_that_uses_what_it_computed(kt, photos):
    result = kt("advise", photos, "--image-size", 64, "--budget", "1m")
    assert result.exit_code == 0, result.output
    *_, shares, recommended, command = result.stdout.strip().splitlines()
    assert shares.split() == ["25%", "50%", "100%"]  # below the learning curve
    assert recommended.startswith("Recommended: feature extraction. Why: ")
    program, *arguments = command.split()
    assert program == "kt" and "&&" not in arguments
    fitted = kt(*arguments)
    assert fitted.exit_code == 0, fitted.output
    (run_dir,) = Path("saved_models").iterdir()
    assert keras_transfer.open_run(run_dir).manifest.images_forwarded == 0


def test_the_command_is_whole(photos):
    options = {"base": "MobileNetV2", "head.dropout": 0.5, "overwrite": True}
    config = load_config(None, {**options, "data": str(photos)})
    inputs = prepare(config, makes_run=False)
    command = command_line(inputs, "finetune-all", options, balanced=True)
    fit, tune = (shlex.split(part)[2:] for part in command.split(" && "))
    assert fit == [
        *(str(photos), "--base", "MobileNetV2", "--set", "head.dropout=0.5"),
        *("--set", "overwrite=true", "--class-weight", "balanced"),
    ]
    run_dir = f"saved_models/{photos.name}-MobileNetV2"
    assert tune == [run_dir, "--unfreeze", "all"]


def test_the_command_leaves_a_run_that_exists(photos):
    inputs = prepare(load_config(None, {"data": str(photos)}), makes_run=False)
    inputs.run.run_dir.mkdir(parents=True)
    for name in (f"{inputs.run.run_dir.name}-2", f"{inputs.run.run_dir.name}-3"):
        command = command_line(inputs, "finetune-top", {}, balanced=False)
        fit, tune = (shlex.split(part)[2:] for part in command.split(" && "))
        assert fit == [str(photos), "--name", name]
        assert tune == [f"saved_models/{name}"]
        inputs.run.run_dir.with_name(name).mkdir()


# A base that is quick to measure, and a cache of its features
QUICK = {"base": "alexnet", "weights": "none", "image_size": 64}
QUICKLY = ("--base", "alexnet", "--weights", "none", "--image-size", 64)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_advice_as_json(kt, tmp_path, shared_cache):
    folder, rng = tmp_path / "photos\udcff", np.random.default_rng(0)  # not UTF-8
    for channel, name in enumerate(CLASSES):  # easily told apart by color
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 99, (64, 64, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    result = kt("advise", folder, *QUICKLY, "--cache-dir", shared_cache, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    evidence = found["evidence"]
    assert evidence["class_counts"] == dict.fromkeys(CLASSES, 17)
    assert 0.98 < evidence["accuracy"]["mean"] <= 1
    assert set(evidence["curve"]) == {"0.25", "0.5", "1.0"}
    assert [one["rule"] for one in found["advice"]][0] == "data size"
    assert evidence["trial"] is None
    assert found["reason"] == evidence["not_tried"] == "little is left to win"
    assert 0 < evidence["minutes"]["extract"] < evidence["minutes"]["finetune-all"]
    assert evidence["gigabytes"]["finetune-top"] > 0
    assert found["command"].startswith("kt fit ")


@pytest.mark.long
def test_fine_tuning_finds_what_the_trial_computed(photos, tmp_path):
    options = QUICK | {"cache_dir": tmp_path / "cache"}
    told = Told()
    evidence = keras_transfer.advise(photos, **options, listeners=[told]).evidence
    trial = evidence.trial
    assert trial is not None and trial.images == 51 and 5 <= trial.epochs <= 10
    assert trial.low <= trial.gain <= trial.high
    assert trial.before == pytest.approx(evidence.accuracy.mean, abs=0.2)
    steps = [step for step in told.steps if step[0] == "trial"]
    assert [done for _, done, _ in steps] == list(range(1, steps[-1][2] + 1))
    # Nothing was computed of test images above the split point.
    rows = FeatureCache(tmp_path / "cache").list()
    images = {row["split_point"].partition("#")[0]: row["images"] for row in rows}
    assert images == {"": 60, "3 pooled outputs": 60, "pool2_packed": 51}
    told = Told()
    run = keras_transfer.fit(photos, **options)
    run.unfreeze_and_finetune(epochs=1, listeners=[told])
    assert any("60 rows of" in x and "up to 51 are there" in x for x in told.notes)


@pytest.mark.long
def test_copies_of_an_image_are_not_learned_from(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for index in range(64):
        path = tmp_path / f"{index}.png"
        if index % 2:  # the same image again
            shutil.copy(tmp_path / f"{index - 1}.png", path)
        else:
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        split = "train" if index < 60 else "test"
        rows.append(f"{path},{'ab'[index // 2 % 2]},{split}")
    (tmp_path / "data.csv").write_text("\n".join(["path,label,split", *rows]))
    found = keras_transfer.advise(
        tmp_path / "data.csv", **QUICK, cache_dir=tmp_path / "cache"
    )
    # Images are noise whatever their class, so that only copies could tell it.
    trial = found.evidence.trial
    assert trial is not None and trial.images == 60
    assert max(trial.before, trial.after, found.evidence.accuracy.mean) < 0.75


@pytest.mark.parametrize("command", ["advise", "rank"])
def test_what_cannot_be_measured_is_one_line(kt, photos, tmp_path, command):
    one_class = tmp_path / "one"
    shutil.copytree(photos / "circle", one_class / "circle")
    few = tmp_path / "few"
    for name in CLASSES:
        (few / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(few / name / "1.png")
    bases = ("--base",) if command == "advise" else ("--bases",)
    for arguments, code, words in [
        ((one_class,), 1, "at least two classes"),
        ((few,), 2, "fewer training images than folds"),
        ((photos, *bases, "ResNet51"), 2, "Did you mean 'ResNet50'?"),
        (
            (photos, *bases, "alexnet", "--image-size", 64),
            1,
            "alexnet-owt-7be5be79.pth",
        ),
        ((tmp_path / "nowhere",), 2, "nowhere"),
    ]:
        result = kt(command, *arguments)
        assert result.exit_code == code, result.output
        said = ("- ", "Downloading data from ")
        lines = [x for x in result.stderr.splitlines() if not x.startswith(said)]
        assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("budget", ["30", "x", "-1m", "30 minutes"])
def test_a_budget_is_a_duration(kt, photos, budget):
    result = kt("advise", photos, "--budget", budget)
    assert result.exit_code == 2
    assert "30m, 2h or 90s" in result.stderr


def test_an_impossible_budget_is_one_line(kt, photos, shared_cache):
    options = (*QUICKLY, "--cache-dir", shared_cache, "--budget", "0.001s")
    result = kt("advise", photos, *options)
    assert result.exit_code == 2
    assert "The budget is too small" in result.stderr


@pytest.mark.long
def test_bases_are_ranked_and_drawn(kt, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "none"))
    result = kt("rank", photos, "--image-size", 64, "--chart", "chart.png")
    assert result.exit_code == 0, result.output
    assert "efficientnet_lite0" in result.stdout
    assert "Left out: dinov2_small, dinov2_base, vit_base_patch16, alexnet," in (
        result.stdout
    )
    assert "weights are not on this machine" in result.stdout
    with Image.open("chart.png") as image:
        assert image.format == "PNG" and image.size[0] >= 800
    options = ("--image-size", 64, "--chart", "chart.png", "--json")
    document = json.loads(kt("rank", photos, *options).stdout)
    ranked = {one["base"]: one for one in document["ranked"]}
    installed = [f"efficientnet_lite{number}" for number in range(3)]
    assert sorted(ranked) == installed
    assert any(one["is_best"] for one in ranked.values())
    listed = {
        row["base"]: row for row in json.loads(kt("bases", "--json").stdout)["bases"]
    }
    for name, one in ranked.items():
        (measured,) = listed[name]["throughput"]
        assert measured["images_per_second"] == one["images_per_second"]
        assert measured["image_size"] == 64
    one = ranked["efficientnet_lite0"]
    assert one["accuracy"]["low"] <= one["accuracy"]["mean"] <= one["accuracy"]["high"]
    assert document["left_out"]["alexnet"] == "weights are not on this machine"
    assert document["chart"] == "chart.png"


@pytest.mark.long
def test_named_bases_are_measured_side_by_side(photos):
    names = ["alexnet", "efficientnet_lite0"]
    told = Told()
    result = keras_transfer.rank(
        str(photos),
        [*names, "alexnet_fc7"],
        image_size=64,
        weights="none",
        listeners=[told],
    )
    ranked, left_out = result.ranked, result.left_out
    assert sorted(one.base for one in ranked) == names
    assert list(left_out) == ["alexnet_fc7"] and "64" in left_out["alexnet_fc7"]
    assert [step for step in told.steps if step[1] == 60] == [
        (name, 60, 60) for name in names
    ]
    means = [one.accuracy.mean for one in ranked]
    assert means == sorted(means, reverse=True)
    for one in ranked:
        assert one.images_per_second > 0 and one.megabytes == pytest.approx(
            4e-6 * one.parameters
        )


def test_the_pareto_front_is_what_nothing_beats():
    points = {"a": (0.9, 10), "b": (0.8, 20), "c": (0.7, 15), "d": (0.9, 5)}
    found = [
        {
            "base": name,
            "accuracy": certain(accuracy),
            "logme": 0.0,
            "images_per_second": speed,
            "parameters": 1,
            "megabytes": 1.0,
        }
        for name, (accuracy, speed) in points.items()
    ]
    result = rank_by_accuracy(found, {"e": "no weights"})
    assert [one.base for one in result.ranked] == ["a", "d", "b", "c"]
    assert {one.base for one in result.ranked if one.is_best} == {"a", "b"}
    assert result.left_out == {"e": "no weights"}


def test_images_of_several_classes_are_advised_on(photos, shared_cache):
    rows = [
        (path, f"{path.parent.name}|shape" if index % 2 else path.parent.name)
        for index, path in enumerate(sorted(photos.glob("*/*.jpg")))
    ]
    text = "path,label\n" + "".join(f"{path},{label}\n" for path, label in rows)
    Path("data.csv").write_text(text)
    options = QUICK | {"cache_dir": shared_cache}
    full = {"finetune": {"disk_budget_gb": 1e-9}}
    found = keras_transfer.advise("data.csv", **options, **full)
    assert found.evidence.trial is None and "disk" in found.evidence.not_tried
    assert found.evidence.neighbours is None
    assert found.evidence.majority == pytest.approx(0.375, abs=0.03)
    assert found.evidence.majority < found.evidence.accuracy.mean <= 1
    assert found.command == (
        f"kt fit {Path('data.csv').resolve()} --base alexnet --weights none "
        f"--image-size 64 --cache-dir {shared_cache} --set 'finetune="
        '{"disk_budget_gb": 1e-09}\''
    )
