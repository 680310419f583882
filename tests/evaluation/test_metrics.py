"""Figures, against arithmetic done by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score

from keras_transfer.evaluation.comparison import Comparison, compare
from keras_transfer.evaluation.metrics import ClassEvaluation, evaluate, selection_key

LN2 = math.log(2)


def one_hot_rows(predicted, num_classes, probability=1.0):
    """Probabilities that favour the predicted class."""
    rest = (1 - probability) / (num_classes - 1)
    rows = np.full((len(predicted), num_classes), rest, np.float32)
    rows[np.arange(len(predicted)), predicted] = probability
    return rows


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
    assert a.model_dump() == pytest.approx(
        {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3}
    )
    assert b.model_dump() == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 2, "f1": 0.4, "support": 2}
    )
    assert c == ClassEvaluation(precision=0, recall=0, f1=0, support=1)
    assert result.balanced_accuracy == pytest.approx(7 / 18)  # (2/3 + 1/2 + 0) / 3
    assert result.macro_f1 == pytest.approx(0.4)  # (0.8 + 0.4 + 0) / 3
    # -ln of 1/2, 1/2, 1/4, 1/2, 1/4 and 1/8
    assert result.log_loss == pytest.approx((1 + 1 + 2 + 1 + 2 + 3) / 6 * LN2)
    assert result.mean_average_precision is None


def test_a_class_that_does_not_occur_counts_only_where_it_was_predicted():
    targets = np.array([0, 0, 1, 1])
    unseen = evaluate(targets, one_hot_rows([0, 0, 1, 0], 3), ["a", "b", "c"])
    assert unseen.confusion == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert unseen.classes["c"] == ClassEvaluation(
        precision=0, recall=0, f1=0, support=0
    )
    assert unseen.balanced_accuracy == pytest.approx(3 / 4)  # (1 + 1/2) / 2
    assert unseen.macro_f1 == pytest.approx(11 / 15)  # (4/5 + 2/3) / 2

    predicted = evaluate(targets, one_hot_rows([0, 0, 1, 2], 3), ["a", "b", "c"])
    assert predicted.confusion == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert predicted.balanced_accuracy == pytest.approx(3 / 4)
    assert predicted.macro_f1 == pytest.approx(5 / 9)  # (1 + 2/3 + 0) / 3


def test_a_class_that_is_never_predicted_has_no_precision():
    result = evaluate(np.array([0, 1, 2]), one_hot_rows([0, 1, 0], 3), "abc")
    assert result.classes["c"] == ClassEvaluation(
        precision=0, recall=0, f1=0, support=1
    )
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


def right_and_wrong(right: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(targets, probabilities) of two classes: as many images, so many right."""
    targets = np.arange(len(right)) % 2
    return targets, one_hot_rows(np.where(right, targets, 1 - targets), 2, 0.75)


def compare_counts(both: int, gained: int, lost: int, neither: int) -> Comparison:
    was = [True] * both + [False] * gained + [True] * lost + [False] * neither
    now = [True] * both + [True] * gained + [False] * lost + [False] * neither
    targets, before = right_and_wrong(was)
    _, after = right_and_wrong(now)
    return compare(targets, before, after, "ab")


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1 / 2),
        (2, 0, 1 / 4),
        (3, 0, 1 / 8),
        (0, 1, 1.0),
        (1, 1, 3 / 4),
        (2, 1, 1 / 2),  # (3 + 1) / 8
        (3, 1, 5 / 16),  # (4 + 1) / 16
        (4, 1, 6 / 32),  # (5 + 1) / 32
        (5, 2, 29 / 128),  # (21 + 7 + 1) / 128
        (1, 3, 15 / 16),
    ],
)
def test_mcnemars_test_is_that_of_a_coin_computed_by_hand(gained, lost, p_value):
    result = compare_counts(4, gained, lost, 3)
    images = 7 + gained + lost
    assert result.metric == "accuracy"
    assert result.before == pytest.approx((4 + lost) / images)
    assert result.after == pytest.approx((4 + gained) / images)
    assert result.p_value == pytest.approx(p_value)
    assert result.is_better == (gained > lost and p_value <= 0.25)


def test_mcnemars_test_is_that_of_scipy_and_ignores_where_models_agree():
    rng = np.random.default_rng(0)
    for _ in range(30):
        both, gained, lost, neither = rng.integers(0, 30, 4).tolist()
        result = compare_counts(both + 1, gained, lost, neither)
        if gained + lost:
            test = scipy.stats.binomtest(
                gained, gained + lost, 0.5, alternative="greater"
            )
            assert result.p_value == pytest.approx(test.pvalue)
        assert result.p_value == compare_counts(5, gained, lost, 0).p_value


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_model_is_not_better_than_itself(multi_label):
    targets = MANY if multi_label else np.array([0, 1, 0, 1])
    result = compare(targets, SCORES, SCORES, "abc")
    assert result.before == result.after
    assert result.p_value == 1.0
    assert not result.is_better


def several_labels(images: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, good scores, scores at random) of three classes."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, (images, 3), np.uint8)
    noise = rng.random((2, images, 3)).astype("f4")
    return targets, 0.3 * targets + 0.7 * noise[0], noise[1]


def test_of_multi_label_models_the_better_is_found():
    targets, good, random = several_labels()
    better = compare(targets, random, good, "abc")
    assert better.metric == "mean_average_precision"
    by_hand = [average_precision_score(targets[:, i], good[:, i]) for i in range(3)]
    assert better.after == pytest.approx(np.mean(by_hand))
    assert better.after > better.before + 0.2
    assert better.p_value == 0
    assert better.is_better
    worse = compare(targets, good, random, "abc")
    assert (worse.before, worse.after) == (better.after, better.before)
    assert worse.p_value == 1
    assert not worse.is_better


def test_what_a_single_image_gains_may_be_an_accident():
    targets, good, _ = several_labels()
    worst = abs(targets - good).max(axis=1).argmax()
    mended = good.copy()
    mended[worst] = targets[worst]
    result = compare(targets, good, mended, "abc")
    assert result.after > result.before
    # A resampled set is without one of 80 images with probability (79/80)^80.
    assert result.p_value == pytest.approx((79 / 80) ** 80, abs=0.1)
    assert not result.is_better


def test_the_bootstrap_is_seeded():
    targets, good, random = several_labels(12)
    mixed = 0.1 * good + 0.9 * random
    values = [compare(targets, random, mixed, "abc", s).p_value for s in (5, 5, 6)]
    assert values[0] == values[1] != values[2]
    assert values[0] == pytest.approx(values[2], abs=0.15)


def test_classes_that_no_image_shows_decide_nothing():
    targets, good, random = several_labels()
    rare = np.zeros_like(targets)
    rare[:, 0] = targets[:, 0]
    rare[7, 1] = 1  # most resampled sets do with one image of it, or none
    result = compare(rare, random, good, "abc")
    assert 0 <= result.p_value <= 1
    assert math.isfinite(result.before) and math.isfinite(result.after)
    only_first = rare * np.array([1, 0, 0], np.uint8)
    assert compare(only_first, random, good, "abc").is_better
    spoilt = good.copy()
    spoilt[:, 1:] = random[:, 1:]
    assert compare(only_first, good, spoilt, "abc").p_value == 1
    nothing = compare(np.zeros_like(targets), random, good, "abc")
    assert (nothing.before, nothing.after, nothing.p_value) == (0, 0, 1)
    assert not nothing.is_better


def test_better_takes_a_better_figure_that_is_no_accident():
    assert Comparison("accuracy", 0.5, 0.6, 0.25).is_better
    assert not Comparison("accuracy", 0.5, 0.6, 0.26).is_better
    assert not Comparison("accuracy", 0.6, 0.6, 0.0).is_better
    assert not Comparison("accuracy", 0.6, 0.5, 0.0).is_better


def test_of_equal_figures_the_surer_model_is_selected():
    targets = np.array([0, 1, 2, 2])
    sure = evaluate(targets, one_hot_rows([0, 1, 2, 2], 3, 0.9), "abc")
    unsure = evaluate(targets, one_hot_rows([0, 1, 2, 2], 3, 0.5), "abc")
    wrong = evaluate(targets, one_hot_rows([0, 1, 2, 1], 3, 0.99), "abc")
    assert selection_key(sure) > selection_key(unsure) > selection_key(wrong)
    assert selection_key(sure) == (1.0, -sure.log_loss)
    several = evaluate(MANY, SCORES, "abc")
    assert selection_key(several) == (several.mean_average_precision, -several.log_loss)
    assert several.mean_average_precision != several.accuracy
