"""Figures, against arithmetic done by hand."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics
from sklearn.metrics import average_precision_score

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.metrics import (
    Evaluation,
    calibration_error,
    deciding_metric,
    error_if_calibrated,
    evaluate,
    score,
)

LN2 = math.log(2)


def one_hot_rows(predicted, num_classes, probability=1.0):
    """Probabilities that favour the predicted class."""
    rest = (1 - probability) / (num_classes - 1)
    rows = np.full((len(predicted), num_classes), rest, np.float32)
    rows[np.arange(len(predicted)), predicted] = probability
    return rows


def counted(one) -> tuple[float, float, float, int]:
    """The figures of a class that follow from counts of its predictions."""
    return one.precision, one.recall, one.f1, one.support


def test_figures_of_three_classes_are_those_computed_by_hand():
    targets = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.array(
        [
            [0.500, 0.250, 0.250],  # a, right
            [0.500, 0.250, 0.250],  # a, right
            [0.250, 0.500, 0.250],  # a, taken for b
            [0.250, 0.500, 0.250],  # b, right
            [0.250, 0.250, 0.500],  # b, taken for c
            [0.250, 0.625, 0.125],  # c, taken for b
        ],
        np.float32,
    )
    result = evaluate(targets, probabilities, ["a", "b", "c"])
    assert result.images == 6
    assert result.accuracy == 3 / 6
    assert result.confusion == [[2, 1, 0], [0, 1, 1], [0, 1, 0]]
    a, b, c = result.classes.values()
    assert list(result.classes) == ["a", "b", "c"]
    assert result.correct == 3
    assert counted(a) == pytest.approx((1.0, 2 / 3, 0.8, 3))
    assert counted(b) == pytest.approx((1 / 3, 1 / 2, 0.4, 2))
    assert counted(c) == (0, 0, 0, 1)
    # Of the images without a, b or c: 3 of 3, 2 of 4 and 4 of 5 are not taken for it.
    assert [x.specificity for x in (a, b, c)] == pytest.approx([1, 2 / 4, 4 / 5])
    # Each a (1/2, 1/2, 1/4) against each other image (1/4, 1/4, 1/4), ties by half.
    assert a.roc_auc == pytest.approx((3 + 3 + 1.5) / 9)
    assert result.balanced_accuracy == pytest.approx(7 / 18)  # (2/3 + 1/2 + 0) / 3
    assert result.macro_f1 == pytest.approx(0.4)  # (0.8 + 0.4 + 0) / 3
    # -ln of 1/2, 1/2, 1/4, 1/2, 1/4 and 1/8
    assert result.log_loss == pytest.approx((1 + 1 + 2 + 1 + 2 + 3) / 6 * LN2)
    assert result.mean_average_precision is None


def test_a_class_that_does_not_occur_counts_only_where_it_was_predicted():
    targets = np.array([0, 0, 1, 1])
    unseen = evaluate(targets, one_hot_rows([0, 0, 1, 0], 3), ["a", "b", "c"])
    assert unseen.confusion == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert counted(unseen.classes["c"]) == (0, 0, 0, 0)
    assert unseen.classes["c"].specificity == 1
    assert unseen.classes["c"].roc_auc is None
    assert unseen.classes["c"].average_precision is None
    assert list(unseen.classes["c"].intervals) == ["specificity"]
    assert unseen.balanced_accuracy == pytest.approx(3 / 4)  # (1 + 1/2) / 2
    assert unseen.macro_f1 == pytest.approx(11 / 15)  # (4/5 + 2/3) / 2

    predicted = evaluate(targets, one_hot_rows([0, 0, 1, 2], 3), ["a", "b", "c"])
    assert predicted.confusion == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert predicted.balanced_accuracy == pytest.approx(3 / 4)
    assert predicted.macro_f1 == pytest.approx(5 / 9)  # (1 + 2/3 + 0) / 3


def test_a_class_that_is_never_predicted_has_no_precision():
    result = evaluate(np.array([0, 1, 2]), one_hot_rows([0, 1, 0], 3), "abc")
    assert counted(result.classes["c"]) == (0, 0, 0, 1)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.balanced_accuracy == pytest.approx(2 / 3)
    assert result.macro_f1 == pytest.approx(5 / 9)  # (2/3 + 1 + 0) / 3


MANY = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], np.uint8)
SCORES = np.array(
    [[0.5, 0.25, 0.25], [0.75, 0.25, 0.0], [0.5, 0.75, 0.5], [0.25, 0.125, 0.25]],
    np.float32,
)


def test_figures_of_multi_label_data_are_those_computed_by_hand():
    result = evaluate(MANY, SCORES, ["a", "b", "c"])
    # Predicted from a half: [a], [a], [a, b, c] and nothing
    assert result.accuracy == 2 / 4
    a, b, c = result.classes.values()
    assert (a.precision, a.recall, a.support) == (pytest.approx(2 / 3), 1, 2)
    assert (b.precision, b.recall, b.support) == (1, 1 / 2, 2)
    assert (c.precision, c.recall, c.support) == (0, 0, 0)
    assert result.balanced_accuracy == pytest.approx(3 / 4)
    assert result.macro_f1 == pytest.approx(22 / 45)  # (4/5 + 2/3 + 0) / 3
    # Both classes: one found first (precision 1), the other in a tie with a wrong
    # image (precision 2/3); the class that does not occur is left out.
    assert result.mean_average_precision == pytest.approx(5 / 6)
    by_sklearn = [average_precision_score(MANY[:, i], SCORES[:, i]) for i in (0, 1)]
    assert result.mean_average_precision == pytest.approx(np.mean(by_sklearn))
    right = np.where(MANY == 1, SCORES, 1 - SCORES).astype(np.float64)
    assert result.log_loss == pytest.approx(-np.log(right).mean(), rel=1e-6)
    assert result.confusion is None


def test_multi_label_figures_are_those_of_scikit_learn_class_by_class():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (50, 6), np.uint8)
    scores = (rng.random((50, 6)) * 0.5 + 0.5 * targets * rng.random()).astype("f4")
    result = evaluate(targets, scores, "abcdef")
    expected = [average_precision_score(targets[:, i], scores[:, i]) for i in range(6)]
    assert result.mean_average_precision == pytest.approx(np.mean(expected))
    assert result.accuracy == np.mean(((scores >= 0.5) == targets).all(1))


@pytest.mark.parametrize("multi_label", [False, True])
def test_perfect_predictions(multi_label):
    targets = MANY[:3, :2] if multi_label else np.array([0, 1, 2])
    probabilities = targets.astype("f4") if multi_label else one_hot_rows([0, 1, 2], 3)
    result = evaluate(targets, probabilities, "ab" if multi_label else "abc")
    assert result.accuracy == result.balanced_accuracy == result.macro_f1 == 1
    assert result.log_loss == pytest.approx(1e-7, rel=0.01)
    assert result.mean_average_precision == (1 if multi_label else None)
    assert all(one.f1 == 1 for one in result.classes.values())


@pytest.mark.parametrize("multi_label", [False, True])
def test_predictions_that_are_all_wrong(multi_label):
    targets = MANY[:3, :2] if multi_label else np.array([0, 1, 2])
    wrong = 1 - targets.astype("f4") if multi_label else one_hot_rows([1, 2, 0], 3)
    result = evaluate(targets, wrong, "ab" if multi_label else "abc")
    assert result.accuracy == result.balanced_accuracy == result.macro_f1 == 0
    assert result.log_loss == pytest.approx(7 * math.log(10))  # 1e-7 is the least


def test_no_class_may_be_present_at_all():
    result = evaluate(np.zeros((4, 3), np.uint8), 0.1 * SCORES, "abc")
    assert result.accuracy == 1
    json.dumps(result.model_dump(), allow_nan=False)


@pytest.mark.parametrize("multi_label", [False, True])
def test_figures_are_json(multi_label):
    targets = MANY if multi_label else np.array([0, 1, 0, 1])
    result = evaluate(targets, SCORES, ["a", "ü", 'c"'])
    values = json.loads(result.model_dump_json())
    assert values == json.loads(json.dumps(result.model_dump(), allow_nan=False))
    assert type(result).model_validate(values) == result
    assert list(values["classes"]) == ["a", "ü", 'c"']


def drawn(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(targets, probabilities) of a model that is often right."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return targets, probabilities.astype(np.float32)


def test_single_label_figures_are_those_of_scikit_learn():
    targets, probabilities = drawn(200, 4)
    result = evaluate(targets, probabilities, "abcd")
    predicted = probabilities.argmax(1)
    kept = probabilities.astype(np.float64)
    assert result.correct == (predicted == targets).sum()
    assert result.accuracy == metrics.accuracy_score(targets, predicted)
    assert result.balanced_accuracy == pytest.approx(
        metrics.balanced_accuracy_score(targets, predicted)
    )
    f1 = metrics.f1_score(targets, predicted, average="macro")
    assert result.macro_f1 == pytest.approx(f1)
    one_hot = np.eye(4)[targets]
    area = metrics.roc_auc_score(one_hot, kept, average="macro")
    assert result.roc_auc == pytest.approx(area)
    loss = -np.log(kept[np.arange(200), targets]).mean()
    assert result.log_loss == pytest.approx(loss)
    assert result.confusion == metrics.confusion_matrix(targets, predicted).tolist()
    for index, one in enumerate(result.classes.values()):
        mine, said = targets == index, predicted == index
        assert one.recall == pytest.approx(metrics.recall_score(mine, said))
        assert one.precision == pytest.approx(metrics.precision_score(mine, said))
        assert one.specificity == pytest.approx(metrics.recall_score(~mine, ~said))
        assert one.roc_auc == pytest.approx(
            metrics.roc_auc_score(mine, probabilities[:, index])
        )
        assert one.average_precision == pytest.approx(
            average_precision_score(mine, probabilities[:, index])
        )


def several_labels(images: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, good scores, scores at random) of three classes."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, (images, 3), np.uint8)
    noise = rng.random((2, images, 3)).astype("f4")
    return targets, 0.3 * targets + 0.7 * noise[0], noise[1]


def test_every_figure_lies_in_its_interval():
    targets, probabilities = drawn(60, 3)
    several, good, _ = several_labels()
    groups = [f"patient {i // 3}" for i in range(60)]
    for result in (
        evaluate(targets, probabilities, "abc"),
        evaluate(targets, probabilities, "abc", groups),
        evaluate(several, good, "abc"),
    ):
        names = {"accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc"}
        if result.mean_average_precision is not None:
            names.add("mean_average_precision")
        assert result.intervals.keys() == names
        for one in (result, *result.classes.values()):
            for name, (low, high) in one.intervals.items():
                assert 0 <= low < getattr(one, name) < high
                assert high <= 1 or name == "log_loss"


def test_of_few_images_the_log_loss_has_no_interval():
    targets, probabilities = drawn(10, 3)
    few = evaluate(targets[:9], probabilities[:9], "abc")
    assert "log_loss" not in few.intervals and "accuracy" in few.intervals
    assert few.describe("log_loss") == f"{few.log_loss:.3f}"
    _, high = evaluate(targets, probabilities, "abc").intervals["log_loss"]
    wrong = one_hot_rows(1 - targets % 2, 3)
    _, highest = evaluate(targets % 2, wrong, "abc").intervals["log_loss"]
    assert high <= highest == pytest.approx(7 * math.log(10))


def test_a_model_without_a_mistake_is_not_certain_to_make_none():
    result = evaluate(np.arange(20) % 2, one_hot_rows(np.arange(20) % 2, 2, 0.9), "ab")
    assert result.accuracy == result.macro_f1 == result.roc_auc == 1
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc"):
        low, high = result.intervals[name]
        assert low < 0.9 and high == 1
    assert str(result) == "accuracy 1.000 (0.839 to 1.000), 20 of 20"


def test_groups_widen_intervals_where_their_images_resemble_each_other():
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(80) % 2, 5)
    right_together = np.repeat(rng.random(80) < 0.8, 5)
    groups = [f"g{i // 5}" for i in range(400)]
    said = one_hot_rows(np.where(right_together, targets, 1 - targets), 2, 0.75)
    alone, grouped = (evaluate(targets, said, "ab", g) for g in ((), groups))
    for name, (low, high) in alone.intervals.items():
        wide_low, wide_high = grouped.intervals[name]
        assert wide_high - wide_low > 1.8 * (high - low)  # at most sqrt(5), and t
    own = [f"g{i}" for i in range(400)]
    single = evaluate(targets, said, "ab", own)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc"):
        assert single.intervals[name] == pytest.approx(alone.intervals[name], abs=0.01)


def test_an_image_without_a_group_is_its_own():
    targets, probabilities = drawn(40, 3)
    given = evaluate(targets, probabilities, "abc", ["x"] * 4 + [""] * 36)
    named = [f"n{i}" for i in range(36)]
    spelt = evaluate(targets, probabilities, "abc", ["x"] * 4 + named)
    assert given == spelt
    assert evaluate(targets, probabilities, "abc", [""] * 40) == evaluate(
        targets, probabilities, "abc"
    )


def test_thresholds_replace_a_half():
    low = evaluate(MANY, SCORES, "abc", thresholds=np.array([0.5, 0.25, 0.9]))
    _, b, c = low.classes.values()
    # b is said of the first three images, and shown by the second and third.
    assert (b.precision, b.recall, b.specificity) == pytest.approx((2 / 3, 1, 1 / 2))
    assert c.specificity == 1
    assert low.correct == 2  # predicted: three times [a, b], and nothing
    assert low.roc_auc == evaluate(MANY, SCORES, "abc").roc_auc


def test_metrics_of_version_0_1_0_can_still_be_read():
    one = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 10}
    old = {
        "images": 180,
        "accuracy": 175 / 180,
        "balanced_accuracy": 0.97,
        "macro_f1": 0.97,
        "log_loss": 0.1,
        "mean_average_precision": None,
        "classes": {"a": one},
        "confusion": [[1]],
    }
    read = Evaluation.model_validate(old)
    assert read.correct == 175
    assert str(read) == "accuracy 0.972, 175 of 180"
    assert read.roc_auc is None and read.intervals == {}
    assert read.describe("auc") == "–"
    assert read.classes["a"].describe("recall") == "0.800"


@pytest.mark.parametrize(
    ("multi_label", "names"),
    [
        (False, ["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc"]),
        (True, ["mean_average_precision", "macro_f1", "log_loss", "auc"]),
    ],
)
def test_scores_are_the_figures_that_are_reported(multi_label, names):
    targets, probabilities = drawn(90, 3)
    if multi_label:
        targets, probabilities, _ = several_labels()
    result = evaluate(targets, probabilities, "abc")
    assert deciding_metric(targets) == names[0]
    for name in names:
        assert deciding_metric(targets, name) == name
        expected = getattr(result, "roc_auc" if name == "auc" else name)
        sign = -1 if name == "log_loss" else 1
        assert score(name, targets, probabilities) == pytest.approx(sign * expected)


def test_a_metric_must_exist_for_the_data():
    for targets, name in (
        (MANY, "accuracy"),
        (MANY, "balanced_accuracy"),
        (np.array([0, 1]), "mean_average_precision"),
        (np.array([0, 1]), "recall"),
    ):
        with pytest.raises(UsageError, match=rf"Received: metric={name} and .*-label"):
            deciding_metric(targets, name)


def test_a_score_that_is_undefined_is_0():
    one_class, probabilities = np.zeros(4, int), SCORES
    assert score("auc", one_class, probabilities) == 0
    nothing = np.zeros((4, 3), np.uint8)
    assert score("mean_average_precision", nothing, probabilities) == 0


def test_the_calibration_error_is_that_computed_bin_by_bin():
    rng = np.random.default_rng(0)
    confidence = rng.permutation(np.linspace(0.3, 0.99, 150))
    is_right = rng.random(150) < 0.6
    order = np.argsort(confidence)
    bins = np.array_split(order, 15)
    by_hand = np.mean([abs((is_right[b] - confidence[b]).mean()) for b in bins])
    found = calibration_error(confidence, is_right)
    assert found == pytest.approx(by_hand, abs=0.01)  # one image may be a bin farther
    assert calibration_error(np.full(10, 0.75), np.arange(10) < 5) == 0.25
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0
    # Equal confidences share a bin, so the order of the images does not matter.
    tied = np.r_[np.full(20, 0.9), np.full(10, 0.6)]
    right = np.arange(30) % 3 > 0
    shuffled = rng.permutation(30)
    assert calibration_error(tied, right) == pytest.approx(
        calibration_error(tied[shuffled], right[shuffled])
    )


def test_perfect_calibration_has_an_error_too():
    # One bin of n images of confidence p: the mean of |share right - p| is about
    # sqrt(2 p (1 - p) / (pi n)).
    found = error_if_calibrated(np.full(400, 0.8), seed=0)
    assert found == pytest.approx(math.sqrt(2 * 0.16 / math.pi / 400), rel=0.2)
    assert error_if_calibrated(np.ones(10), seed=0) == 0
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.4, 1, 500)
    drawn_errors = [
        calibration_error(confidence, rng.random(500) < confidence) for _ in range(200)
    ]
    expected = error_if_calibrated(confidence, seed=0)
    assert expected == pytest.approx(np.mean(drawn_errors), rel=0.05)


def test_overconfidence_shows():
    targets, probabilities = drawn(500, 3)
    honest = evaluate(targets, probabilities, "abc")
    sharp = probabilities.astype(np.float64) ** 4
    sharp /= sharp.sum(1, keepdims=True)
    sure = evaluate(targets, sharp.astype(np.float32), "abc")
    assert sure.ece > 3 * sure.ece_if_calibrated
    assert sure.ece > honest.ece
    assert evaluate(MANY, SCORES, "abc").ece is None
