"""Drift against published intervals, exact tests and simulated sets."""

import json

import numpy as np
import pytest
import scipy.stats

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.drift import (
    Judged,
    compare_sets,
    permutation_test,
    share,
    shift,
)


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=bool)[classes]


def judged(classes, num_classes: int = 3, far: float = 0.0, seed: int = 0) -> Judged:
    rng = np.random.default_rng(seed)
    classes = np.asarray(classes)
    return Judged(one_hot(classes, num_classes), rng.random(len(classes)) < far)


# Newcombe 1998, Table II, method 10: (a of m, b of n, interval of a/m - b/n).
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0000),
        ((10, 10), (0, 10), 0.6075, 1.0000),
    ],
)
def test_shift_has_the_published_interval(first, second, low, high):
    found = shift(second, first)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.is_clear == (low > 0 or high < 0)
    turned = shift(first, second)
    assert (turned.low, turned.high) == pytest.approx((-high, -low), abs=1e-4)


def test_the_interval_of_a_shift_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        a, b = int(rng.binomial(40, 0.1)), int(rng.binomial(60, 0.3))
        found = shift((a, 40), (b, 60))
        inside.append(found.low <= 0.2 <= found.high)
    assert np.mean(inside) >= 0.92


def test_share_is_shown_with_its_interval_and_counts():
    assert repr(share(146, 153)) == "0.954 (0.909 to 0.978), 146 of 153"


def test_the_permutation_test_agrees_with_fishers_exact_test():
    for a, b in ((3, 9), (5, 6), (1, 11)):
        reference = one_hot(np.repeat([0, 1], [a, 12 - a]), 2)
        new = one_hot(np.repeat([0, 1], [b, 12 - b]), 2)
        table = [[a, 12 - a], [b, 12 - b]]
        exact = scipy.stats.fisher_exact(table).pvalue  # equal sizes: the same order
        assert permutation_test(reference, new) == pytest.approx(exact, abs=0.03)


def test_the_permutation_test_agrees_with_chi_square_for_many_images():
    rng = np.random.default_rng(1)
    first, second = (
        rng.integers(0, 4, 900),
        rng.choice(4, 700, p=[0.27, 0.27, 0.23, 0.23]),
    )
    table = [np.bincount(first, minlength=4), np.bincount(second, minlength=4)]
    expected = scipy.stats.chi2_contingency(table, correction=False).pvalue
    found = permutation_test(one_hot(first, 4), one_hot(second, 4))
    assert found == pytest.approx(expected, abs=0.04)


def test_no_drift_is_found_where_there_is_none():
    rng = np.random.default_rng(2)
    found = [
        permutation_test(
            one_hot(rng.integers(0, 3, 30), 3), one_hot(rng.integers(0, 3, 12), 3), seed
        )
        for seed in range(100)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.11  # 95% of binomial(100, 0.05)


def test_a_missing_class_and_far_images_are_found():
    reference = judged(np.repeat([0, 1, 2], 50), far=0.05)
    found = compare_sets(
        reference, judged(np.repeat([0, 1], 30), far=0.5), ("cat", "dog", "emu")
    )
    assert found.p_value < 0.01
    assert found.classes["emu"].is_clear
    assert found.classes["emu"].difference == pytest.approx(-1 / 3)
    assert found.far.is_clear
    assert found.far.new.value > 0.3
    assert "60 new, 150 reference images" in repr(found)
    dumped = json.loads(json.dumps(found.model_dump()))
    assert dumped["classes"]["emu"]["new"]["count"] == 0
    assert dumped["p_value"] == found.p_value


def test_several_classes_per_image():
    rng = np.random.default_rng(3)
    base = rng.random((300, 1)) < 0.5  # the classes depend on each other
    reference = np.concatenate([base, base, rng.random((300, 2)) < 0.2], 1)
    far = np.zeros(100, bool)
    same, more = reference[:100], reference[:100].copy()
    more[:40, 3] = True
    assert permutation_test(reference[100:], same) > 0.05
    found = compare_sets(
        Judged(reference[100:], np.zeros(200, bool)), Judged(more, far), "abcd"
    )
    assert found.p_value < 0.01
    assert [name for name, one in found.classes.items() if one.is_clear] == ["d"]


def test_no_class_predicted_for_any_image_is_no_drift():
    none = Judged(np.zeros((5, 2), bool), np.zeros(5, bool))
    assert compare_sets(none, none, ("a", "b")).p_value == 1.0


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_an_empty_set_is_an_error(sizes):
    reference, new = (judged(np.zeros(size, int)) for size in sizes)
    with pytest.raises(UsageError, match="Received: no (reference|new) images"):
        compare_sets(reference, new, ("a", "b", "c"))
