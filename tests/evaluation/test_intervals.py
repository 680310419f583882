"""Intervals, against published values, brute force and simulated truth."""

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from keras_transfer.evaluation.intervals import (
    Groups,
    Macro,
    average_precision,
    from_trials,
    of_confusion,
    of_fractions,
    of_mean,
    roc_auc,
    weigh,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion"
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_is_that_of_newcombes_table(right, trials, low, high):
    assert wilson(right / trials, trials) == pytest.approx([low, high], abs=6e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_is_that_of_scipy(trials, share):
    right = round(share * trials)
    test = scipy.stats.binomtest(right, trials)
    found = wilson(right / trials, trials)
    expected = test.proportion_ci(method="wilson")
    assert found == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert 0 <= found[0] <= right / trials <= found[1] <= 1


def test_of_nothing_nothing_is_known():
    assert wilson(0.0, 0).tolist() == [0, 1]
    among = np.array([[3.0, 0], [2, 0]])
    right = np.array([[3.0, 0], [1, 0]])
    found = of_fractions(right, among, seed=0)
    assert found[1].tolist() == [0, 1]


def test_students_t_takes_the_place_of_z():
    few = from_trials(0.8, 100, 4)
    t = scipy.stats.t.ppf(0.975, 4)
    trials = 100 * (scipy.stats.norm.ppf(0.975) / t) ** 2
    assert few.tolist() == wilson(0.8, trials).tolist()
    assert from_trials(0.8, 100, np.inf) == pytest.approx(wilson(0.8, 100))


def test_evidence_outweighs_caution():
    assert weigh(1.0, 5.0, 0) == 5
    assert weigh(1.0, 5.0, 1) == 3
    assert weigh(1.0, 5.0, 1e9) == pytest.approx(1)


def test_groups_are_numbered_by_name_and_images_without_are_alone():
    groups = Groups.of(["b", "", "a", "b", ""])
    assert groups.index.tolist() == [0, 1, 2, 0, 3]
    assert len(groups) == 4
    assert groups.sum(np.arange(5.0)).tolist() == [3, 1, 2, 4]
    rows = scipy.sparse.csr_array(np.arange(10.0).reshape(5, 2))
    assert groups.sum_rows(rows).toarray().tolist() == [[6, 8], [2, 3], [4, 5], [8, 9]]
    assert Groups.of([]) is None
    assert Groups.of(["", ""]) is None


def ranked(seed: int, images: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(which images are positive, scores with ties)."""
    rng = np.random.default_rng(seed)
    positive = rng.random(images) < 0.4
    return positive, np.round(rng.normal(size=images) + positive, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_roc_auc_and_its_variance_are_those_of_all_pairs(seed):
    positive, scores = ranked(seed)
    found = roc_auc(positive, scores)
    ahead, behind = scores[positive][:, None], scores[~positive][None]
    wins = (ahead > behind) + 0.5 * (ahead == behind)
    assert found.value == pytest.approx(wins.mean())
    assert found.value == pytest.approx(roc_auc_score(positive, scores))
    of_positive, of_negative = wins.mean(1), wins.mean(0)  # DeLong's V10 and V01
    variance = of_positive.var(ddof=1) / len(of_positive)
    variance += of_negative.var(ddof=1) / len(of_negative)
    assert found.influence @ found.influence == pytest.approx(variance)
    assert found.influence.sum() == pytest.approx(0, abs=1e-12)
    assert found.fewest == min(positive.sum(), (~positive).sum())
    assert found.evidence == min((of_positive < 1).sum(), (of_negative < 1).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_average_precision_and_its_influences_are_derivatives(seed):
    positive, scores = ranked(seed)
    found = average_precision(positive, scores)
    exact = average_precision_score(positive, scores)
    assert found.value == pytest.approx(exact)
    step = 1e-5
    derivatives = []
    for image in range(len(scores)):
        weights = np.ones(len(scores))
        weights[image] += step
        changed = average_precision_score(positive, scores, sample_weight=weights)
        derivatives.append((changed - exact) / step)
    count = positive.sum()
    scale = np.sqrt(count / (count - 1))
    assert found.influence == pytest.approx(scale * np.array(derivatives), abs=1e-5)


def test_the_variance_of_the_average_precision_is_that_of_a_bootstrap():
    positive, scores = ranked(0, 500)
    found = average_precision(positive, scores)
    rng = np.random.default_rng(0)
    resampled = [
        average_precision(positive[rows], scores[rows]).value
        for rows in rng.integers(0, 500, (300, 500))
    ]
    deviation = np.sqrt(found.influence @ found.influence)
    assert deviation == pytest.approx(np.std(resampled), rel=0.12)


def test_a_perfect_order_counts_as_many_trials_as_there_are_images_of_a_kind():
    positive = np.arange(40) < 8
    scores = np.arange(40)[::-1].astype(float)
    area = roc_auc(positive, scores)
    assert (area.value, area.fewest, area.evidence) == (1, 8, 0)
    assert area.interval == pytest.approx(tuple(wilson(1.0, 8)))
    precision = average_precision(positive, scores)
    assert precision.value == 1
    assert precision.interval[0] < wilson(1.0, 8)[0]
    groups = Groups.of(["x"] * 4 + ["y"] * 4 + ["z"] * 32)
    assert roc_auc(positive, scores, groups).fewest == 1
    worst = roc_auc(positive, -scores)
    assert worst.value == 0
    assert worst.interval[0] == 0 and 0.2 < worst.interval[1] < 1


def test_the_variance_of_a_mean_contains_the_covariance():
    positive, scores = ranked(0)
    both, single = Macro(), roc_auc(positive, scores)
    both.add(single)
    both.add(roc_auc(~positive, -scores))  # of two classes, each says the same
    assert both.mean.value == pytest.approx(single.value)
    assert both.mean.influence == pytest.approx(single.influence)
    assert both.mean.fewest == single.fewest
    assert Macro().mean is None


def test_copies_of_images_in_a_group_add_no_information():
    positive, scores = ranked(1)
    copies = np.repeat(np.arange(60), 5)
    groups = Groups.of([f"g{i}" for i in copies])
    for metric in (roc_auc, average_precision):
        once = metric(positive, scores)
        again = metric(positive[copies], scores[copies], groups)
        assert again.value == pytest.approx(once.value)
        deviations = [np.sqrt(x.influence @ x.influence) for x in (once, again)]
        assert deviations[1] == pytest.approx(deviations[0], rel=0.05)
        assert again.fewest == once.fewest
    right = (np.arange(60) % 5 > 0)[:, None].astype(float)
    found = of_fractions(5 * right, np.full((60, 1), 5.0), seed=0)
    assert found[0] == pytest.approx(wilson(0.8, 60), abs=0.015)


def accuracy_of_counts(totals: np.ndarray) -> dict[str, np.ndarray]:
    hits, shown, _ = np.split(totals, 3, axis=1)
    return {"accuracy": hits.sum(1) / shown.sum(1)}


@pytest.mark.parametrize("wrong", [0, 1, 30])
def test_a_resampled_matrix_gives_wilsons_interval_of_the_accuracy(wrong):
    rows = np.zeros((150, 9))
    targets = np.arange(150) % 3
    predicted = np.where(np.arange(150) < wrong, (targets + 1) % 3, targets)
    each = np.arange(150)
    rows[each, 3 + targets] = rows[each, 6 + predicted] = 1
    rows[each, targets] = targets == predicted
    counts, is_right = scipy.sparse.csr_array(rows), targets == predicted
    found = of_confusion(counts, accuracy_of_counts, is_right, None, seed=0)
    expected = wilson(1 - wrong / 150, 150)
    assert found["accuracy"] == pytest.approx(tuple(expected), abs=0.01)
    again = of_confusion(counts, accuracy_of_counts, is_right, None, seed=0)
    assert again == found


LARGEST = 16.1


def loss_interval(losses: np.ndarray, groups: Groups | None = None, seed: int = 0):
    return of_mean(losses, groups, seed, wrong=np.log(2), largest=LARGEST)


def test_the_interval_of_a_mean_follows_the_skewness():
    losses = np.random.default_rng(0).exponential(size=100)
    low, high = loss_interval(losses)
    mean = losses.mean()
    assert low < mean < high
    assert high - mean > 1.1 * (mean - low)
    assert loss_interval(losses) == (low, high) != loss_interval(losses, seed=1)
    groups = Groups.of([f"g{i // 10}" for i in range(100)])
    alike = np.repeat(losses[:10], 10)
    assert np.diff(loss_interval(alike, groups)) > 2 * np.diff(loss_interval(alike))


def test_of_few_images_or_groups_losses_say_nothing():
    losses = np.random.default_rng(0).exponential(size=200)
    assert loss_interval(losses[:9]) is loss_interval(losses[:1]) is None
    assert loss_interval(losses[:10]) is not None
    assert loss_interval(losses, Groups.of([f"g{i % 9}" for i in range(200)])) is None


def test_without_a_mistake_the_mean_loss_may_be_larger():
    low, high = loss_interval(np.full(20, 0.001))
    assert low == pytest.approx(0.001) and 0.05 < high < 0.2
    low, high = loss_interval(np.r_[np.full(9, 0.001), 14.6])
    assert low < 1.46 and 3 < high < 10
    assert loss_interval(np.full(20, LARGEST)) == pytest.approx((LARGEST, LARGEST))


def test_intervals_of_skewed_losses_hold_the_truth():
    """Of 200 samples of 12 images, of which one in 20 has a large loss."""
    rng = np.random.default_rng(0)
    held = 0
    for draw in range(200):
        losses = rng.exponential(np.where(rng.random(12) < 0.05, 2.0, 0.05))
        low, high = loss_interval(losses, seed=draw)
        held += low <= 0.05 * 2.0 + 0.95 * 0.05 <= high
    assert held >= 184


def test_intervals_of_grouped_accuracy_hold_the_truth():
    """Of 200 samples of 20 groups, where a bootstrap's quantiles hold it in 85%."""
    rng = np.random.default_rng(0)
    held = 0
    for draw in range(200):
        sizes = rng.poisson(4, 20) + 1.0
        right = rng.binomial(sizes.astype(int), rng.beta(3.8, 0.2, 20)).astype(float)
        low, high = of_fractions(right[:, None], sizes[:, None], seed=draw)[0]
        held += low <= 0.95 <= high
    assert held >= 184


def test_intervals_of_the_roc_auc_hold_the_truth():
    rng = np.random.default_rng(0)
    positive = np.arange(60) < 10
    truth = scipy.stats.norm.cdf(2 / np.sqrt(2))
    held = 0
    for _ in range(200):
        low, high = roc_auc(positive, rng.normal(size=60) + 2 * positive).interval
        held += low <= truth <= high
    assert held >= 184
