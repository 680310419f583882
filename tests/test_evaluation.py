"""Figures, against arithmetic done by hand."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from keras_transfer.evaluation import ClassEvaluation, evaluate

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
