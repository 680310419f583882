"""Thresholds: references by brute force and scipy, and promises kept in simulations."""

import numpy as np
import pytest
import scipy.stats

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.thresholds import (
    abstention_threshold,
    accuracy_coverage,
    check_reachable,
    class_thresholds,
    evaluate_sure,
    images_needed,
    independent_images,
)


def of_confidence(confidence: np.ndarray, is_right: np.ndarray):
    """float32 `[N, 3]` probabilities and targets with these largest probabilities."""
    rest = (1 - confidence[:, None]) / 2
    probabilities = np.hstack([confidence[:, None], rest, rest]).astype(np.float32)
    return probabilities, np.where(is_right, 0, 1)


def drawn(rng: np.random.Generator, count: int, excess: float = 0.0):
    """Predictions whose probabilities exceed their chance to be right."""
    confidence = 0.4 + 0.6 * rng.beta(3, 0.6, count)
    chance = confidence - excess * confidence * (1 - confidence)
    return of_confidence(confidence, rng.random(count) < chance)


def lower_bound(right: int, count: int) -> float:
    found = scipy.stats.binomtest(right, count, alternative="greater")
    return found.proportion_ci(0.95, "exact").low


@pytest.mark.parametrize(("accuracy", "count"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_images_needed_without_a_mistake_are_the_published_ones(accuracy, count):
    assert images_needed(accuracy) == count


@pytest.mark.parametrize("mistakes", [0, 1, 5])
@pytest.mark.parametrize("accuracy", [0.3, 0.9, 0.97])
def test_images_needed_are_those_of_the_exact_bound(accuracy, mistakes):
    count = images_needed(accuracy, mistakes)
    assert lower_bound(count - mistakes, count) >= accuracy
    assert lower_bound(count - 1 - mistakes, count - 1) < accuracy


def test_the_curve_counts_what_reaches_each_threshold():
    rng = np.random.default_rng(0)
    confidence = np.round(rng.uniform(0.5, 1, 333), 2)  # many are equal
    probabilities, targets = of_confidence(confidence, rng.random(333) < confidence)
    points = accuracy_coverage(probabilities, targets)
    assert 10 <= len(points) <= 20
    assert points[-1].coverage == 1
    assert [*points] == sorted(points, key=lambda point: point.images)
    for point in points:
        covered = probabilities.max(1) >= np.float32(point.threshold)
        assert point.images == covered.sum()
        assert point.coverage == pytest.approx(covered.mean())
        assert point.accuracy == pytest.approx((targets[covered] == 0).mean())
    (only,) = accuracy_coverage(probabilities[:1], targets[:1])
    assert (only.coverage, only.images) == (1, 1)
    assert len(accuracy_coverage(np.full((9, 2), 0.5, np.float32), np.zeros(9))) == 1


def test_sure_predictions_are_bounded_and_no_wider_step_was_passed_over():
    probabilities, targets = drawn(np.random.default_rng(1), 600)
    found = abstention_threshold(probabilities, targets, 0.9)
    sure = probabilities.max(1) >= np.float32(found.threshold)
    right, count = int((targets[sure] == 0).sum()), int(sure.sum())
    assert lower_bound(right, count) >= 0.9
    assert found.coverage == count / 600 and found.accuracy == right / count
    assert found.images == found.independent == 600
    # A fiftieth of the images more is too many, else the search would have gone on.
    wider = np.argsort(-probabilities.max(1))[: count + 12]
    assert lower_bound(int((targets[wider] == 0).sum()), count + 12) < 0.9
    for point in accuracy_coverage(probabilities, targets):
        assert isinstance(point.model_dump_json(), str)


def test_what_was_right_does_not_move_the_order_of_the_search():
    """A lucky streak behind an unlucky one is not found."""
    confidence = np.linspace(1, 0.5, 400)
    is_right = np.ones(400, bool)
    is_right[60:100] = False  # then 300 right ones: 90% of all
    with pytest.raises(UsageError, match="40 are wrong"):
        abstention_threshold(*of_confidence(confidence, is_right), 0.85)
    assert lower_bound(360, 400) > 0.85


def test_all_are_sure_if_all_are_right():
    confidence = np.full(100, 1.0)
    found = abstention_threshold(*of_confidence(confidence, confidence > 0), 0.95)
    assert (found.threshold, found.coverage, found.accuracy) == (0, 1, 1)


def test_equal_probabilities_are_not_torn_apart():
    confidence = np.repeat([0.9999999, 0.8], 100).astype(np.float32)
    is_right = np.arange(200) < 100
    found = abstention_threshold(*of_confidence(confidence, is_right), 0.95)
    assert 0.8 < found.threshold <= 0.9999999
    assert found.coverage == 0.5
    with pytest.raises(UsageError):  # only all of them have a threshold
        even = np.full(200, 0.8, np.float32)
        abstention_threshold(*of_confidence(even, is_right), 0.95)


@pytest.mark.parametrize("excess", [0.0, 0.6])
@pytest.mark.parametrize(("accuracy", "count"), [(0.9, 100), (0.9, 400), (0.95, 300)])
def test_the_promise_is_broken_by_at_most_5_percent_of_samples(accuracy, count, excess):
    rng = np.random.default_rng(2)
    population, truth = drawn(rng, 100_000, excess)
    largest, is_right = population.max(1), truth == 0
    broken, draws = 0, 200
    for _ in range(draws):
        try:
            found = abstention_threshold(*drawn(rng, count, excess), accuracy)
        except UsageError:
            continue
        broken += is_right[largest >= np.float32(found.threshold)].mean() < accuracy
    # If 5% were broken, more than this would be seen in 2% of the tests.
    assert broken <= scipy.stats.binom.ppf(0.98, draws, 0.05)


def grouped(rng: np.random.Generator, groups: int, size: int):
    """Images of patients, of whom some are hard in every image."""
    is_hard = np.repeat(rng.random(groups) < 0.11, size)
    confidence = rng.uniform(0.9, 1, groups * size)
    probabilities, targets = of_confidence(confidence, ~is_hard)
    return probabilities, targets, [f"p{i // size}" for i in range(groups * size)]


def test_the_promise_holds_for_images_of_new_patients_too():
    rng, with_groups, without = np.random.default_rng(3), 0, 0
    for _ in range(200):  # 89% are right: 90% must not be promised
        probabilities, targets, groups = grouped(rng, 60, 20)
        for names in (groups, ()):
            try:
                abstention_threshold(probabilities, targets, 0.9, names)
            except UsageError:
                continue
            with_groups, without = with_groups + bool(names), without + (not names)
    assert with_groups <= 17
    assert without > 40  # as the binomial bound of all images would


def test_one_image_of_each_group_counts():
    rng = np.random.default_rng(4)
    probabilities, targets = of_confidence(rng.uniform(0.9, 1, 400), np.ones(400, bool))
    groups = [f"p{i // 4}" for i in range(400)]
    found = abstention_threshold(probabilities, targets, 0.95, groups)
    assert (found.independent, found.images) == (100, 400)
    with pytest.raises(UsageError, match="at least 59 images.* and 40 "):
        abstention_threshold(
            probabilities, targets, 0.95, [f"p{i // 10}" for i in range(400)]
        )
    assert independent_images(["a", "", "a", ""], 4) == 3
    assert independent_images([""] * 4, 4) == independent_images((), 4) == 4


def test_what_cannot_be_reached_is_one_clear_line():
    rng = np.random.default_rng(5)
    probabilities, targets = drawn(rng, 298)
    with pytest.raises(UsageError) as few:
        abstention_threshold(probabilities, targets, 0.99)
    for part in ("0.99", "299", "298", "all predicted correctly"):
        assert part in str(few.value)
    wrong = np.where(np.arange(1000) % 10, targets[0], 2)
    with pytest.raises(UsageError) as worse:
        abstention_threshold(np.tile(probabilities[:1], (1000, 1)), wrong, 0.95)
    for part in ("59 without", "1,000 independent", "100 are wrong"):
        assert part in str(worse.value)
    assert "\n" not in f"{few.value}{worse.value}"
    with pytest.raises(UsageError, match="Multi-label"):
        abstention_threshold(probabilities, np.ones((298, 3), np.uint8), 0.9)
    with pytest.raises(UsageError, match="at least 59 images"):
        check_reachable(0.95, targets[:58])
    check_reachable(0.95, targets[:59])


def test_sure_images_are_evaluated_with_wilsons_interval():
    probabilities, targets = drawn(np.random.default_rng(6), 200)
    found = evaluate_sure(probabilities, targets, 0.8)
    sure = probabilities.max(1) >= np.float32(0.8)
    right, count = int((targets[sure] == 0).sum()), int(sure.sum())
    assert found.images == count
    for part, whole, value, interval in (
        (count, 200, found.coverage, found.coverage_interval),
        (right, count, found.accuracy, found.accuracy_interval),
    ):
        expected = scipy.stats.binomtest(part, whole).proportion_ci(method="wilson")
        assert value == part / whole
        assert interval == pytest.approx((expected.low, expected.high))
    none = evaluate_sure(probabilities, targets, 1.0)
    assert (none.images, none.coverage) == (0, 0)
    assert none.accuracy is none.accuracy_interval is None
    wider = evaluate_sure(probabilities, targets, 0.8, ["p"] * 100 + ["q"] * 100)
    assert wider.coverage_interval[0] < found.coverage_interval[0]


def f1_of(scores: np.ndarray, is_positive: np.ndarray, threshold: float) -> float:
    predicted = scores >= np.float32(threshold)
    return 2 * (predicted & is_positive).sum() / (predicted.sum() + is_positive.sum())


def chosen(scores: np.ndarray, is_positive: np.ndarray) -> float:
    columns = scores[:, None].astype(np.float32), is_positive[:, None].astype(np.uint8)
    return class_thresholds(*columns, ["x"])["x"]


def test_a_threshold_of_much_data_has_the_best_f1():
    rng = np.random.default_rng(7)
    for _ in range(5):
        logits = rng.normal(-2, 2, 2000)
        is_positive = rng.random(2000) < 1 / (1 + np.exp(-logits))
        scores = (1 / (1 + np.exp(-logits / 3 - 1))).astype(np.float32)
        best = max(f1_of(scores, is_positive, x) for x in np.unique(scores)[::5])
        assert f1_of(scores, is_positive, chosen(scores, is_positive)) > best - 0.01
        assert best > f1_of(scores, is_positive, 0.5) + 0.05


def test_a_threshold_of_little_data_is_drawn_to_a_half():
    scores = np.array([0.05] * 20 + [0.15] * 5)
    # The best is 0.1, midway; with 5 positives its logit counts half: 1 / (1 + 3).
    assert chosen(scores, scores > 0.1) == pytest.approx(0.25)
    scores = np.array([0.05] * 100 + [0.15] * 45)
    assert chosen(scores, scores > 0.1) == pytest.approx(1 / (1 + 9**0.9))


@pytest.mark.parametrize("positives", [0, 1, 4, 30])
def test_a_class_that_few_or_all_images_show_keeps_a_half(positives):
    scores = np.random.default_rng(8).random(30)
    assert chosen(scores, np.arange(30) < positives) == 0.5


@pytest.mark.parametrize("value", [0.0, 1e-45, 0.3, 1.0])
def test_thresholds_are_between_0_and_1_whatever_the_ties(value):
    scores = np.full(30, value)
    assert 0 < chosen(scores, np.arange(30) < 10) < 1
    scores[:10] = 1.0
    assert 0 < chosen(scores, np.arange(30) < 10) < 1
    assert 0 < chosen(scores[::-1], np.arange(30) < 10) < 1


def test_thresholds_are_on_average_no_worse_than_a_half_on_fresh_images():
    """The scale of the logits says how well 0.5 fits: at 3, it is the best there is."""
    rng = np.random.default_rng(9)
    for location, scale, least in ((-3, 2, 0.0), (-2, 1, 0.05), (-2, 3, -0.015)):
        logits = rng.normal(location, scale, 20_000)
        truth = rng.random(20_000) < 1 / (1 + np.exp(-logits))
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        gains = []
        for rows in rng.integers(0, 20_000, (60, 40)):
            threshold = chosen(scores[rows], truth[rows])
            gains.append(f1_of(scores, truth, threshold) - f1_of(scores, truth, 0.5))
        assert np.mean(gains) > least
