"""The comparison of two models, against other implementations and full enumeration."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from keras_transfer.evaluation.comparison import (
    FEWEST_INFORMATIVE,
    LEVEL,
    Comparison,
    best_candidate,
    compare,
    images_needed,
    mcnemar,
)
from keras_transfer.evaluation.metrics import evaluate, metrics_of
from keras_transfer.evaluation.names import FIELDS

METRICS = metrics_of(np.zeros(1, np.int64))
CASES = [(name, False) for name in METRICS]
CASES += [(name, True) for name in metrics_of(np.zeros((1, 1)))]


def right_and_wrong(right: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(targets, probabilities) of two classes: as many images, so many right."""
    targets = np.arange(len(right)) % 2
    said = np.where(right, targets, 1 - targets)
    return targets, np.where(np.arange(2) == said[:, None], 0.75, 0.25).astype("f4")


def compare_counts(
    both: int, gained: int, lost: int, neither: int, **options: object
) -> Comparison:
    was = [True] * both + [False] * gained + [True] * lost + [False] * neither
    now = [True] * both + [True] * gained + [False] * lost + [False] * neither
    targets, before = right_and_wrong(was)
    return compare("accuracy", targets, before, right_and_wrong(now)[1], **options)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1 / 2),
        (1, 0, 1 / 4),
        (2, 0, 1 / 8),
        (3, 0, 1 / 16),
        (0, 1, 3 / 4),
        (1, 1, 1 / 2),
        (2, 1, (1 + 3 / 2) / 8),
        (3, 1, (1 + 4 / 2) / 16),
        (4, 1, (1 + 5 / 2) / 32),
        (5, 2, (7 + 1 + 21 / 2) / 128),
        (1, 3, 1 - (1 + 4 / 2) / 16),
    ],
)
def test_mcnemars_test_is_that_of_a_coin_computed_by_hand(gained, lost, p_value):
    result = compare_counts(4, gained, lost, 3)
    images = 7 + gained + lost
    assert (result.metric, result.images) == ("accuracy", images)
    assert result.before == pytest.approx((4 + lost) / images)
    assert result.after == pytest.approx((4 + gained) / images)
    assert result.p_value == pytest.approx(p_value)
    assert result.is_better == ((gained, lost) in [(3, 0), (4, 1)])  # 2 are too few
    assert result.informative == gained + lost
    assert result.spread == pytest.approx(math.sqrt(gained + lost) / images)


def test_mid_p_lies_halfway_between_both_exact_tests_of_scipy():
    rng = np.random.default_rng(0)
    for gained, lost in rng.integers(0, 30, (30, 2)).tolist():
        if gained + lost:
            strict, lenient = (
                scipy.stats.binom.sf(gained - offset, gained + lost, 0.5)
                for offset in (1, 0)
            )
            exact = scipy.stats.binomtest(gained, gained + lost, alternative="greater")
            assert strict == pytest.approx(exact.pvalue)
            assert mcnemar(gained, lost) == pytest.approx((strict + lenient) / 2)
        first, second = (compare_counts(x, gained, lost, 2 * x) for x in (1, 9))
        assert first.p_value == second.p_value == mcnemar(gained, lost)


def random_pair(images: int, num_classes: int, several: bool, seed: int = 0):
    """(targets, probabilities of a worse model, of a better one), all different."""
    rng = np.random.default_rng(seed)
    if several:
        targets = rng.integers(0, 2, (images, num_classes)).astype(np.uint8)
        shown = targets.astype(np.float32)
    else:
        targets = np.arange(images) % num_classes
        shown = np.eye(num_classes, dtype=np.float32)[targets]
    noise = rng.random((2, images, num_classes)).astype("f4")
    before, after = 0.1 * shown + 0.9 * noise[0], 0.4 * shown + 0.6 * noise[1]
    if not several:
        before, after = (x / x.sum(1, keepdims=True) for x in (before, after))
    return targets, before, after


@pytest.mark.parametrize(("metric", "several"), CASES)
def test_each_metric_is_that_of_the_tables_or_of_scikit_learn(metric, several):
    targets, before, after = random_pair(60, 3, several)
    shown = targets if several else np.eye(3)[targets]
    result = compare(metric, targets, before, after)
    for value, probabilities in ((result.before, before), (result.after, after)):
        figures = evaluate(targets, probabilities, "abc").model_dump()
        area = roc_auc_score(shown, probabilities, average="macro")
        assert figures["roc_auc"] == pytest.approx(area)
        assert value == pytest.approx(figures[FIELDS[metric]])
    assert result.gain > 0 and result.is_better  # a lower log loss too
    assert result.p_value < 0.05
    back = compare(metric, targets, after, before)
    assert back.gain == pytest.approx(-result.gain)
    assert back.p_value > 0.95 and not back.is_better


def by_enumeration(score, before, after, groups) -> float:
    """The mid-p value over all ways to swap groups."""
    names = sorted(set(groups))
    gains = []
    for swaps in itertools.product([False, True], repeat=len(names)):
        swapped = dict(zip(names, swaps, strict=True))
        rows = np.array([swapped[group] for group in groups])[:, None]
        one, other = np.where(rows, after, before), np.where(rows, before, after)
        gains.append(score(other) - score(one))
    gains, gain = np.array(gains), score(after) - score(before)
    larger = (gains > gain + 1e-9).mean()
    return larger + (abs(gains - gain) <= 1e-9).mean() / 2


@pytest.mark.parametrize("metric", METRICS)
def test_the_permutation_test_comes_close_to_all_permutations(metric):
    targets, before, after = random_pair(20, 2, several=False, seed=4)
    after = 0.6 * before + 0.4 * after
    groups = [f"g{i // 2 % 8}" for i in range(20)]
    shown = np.eye(2)[targets]

    def score(probabilities: np.ndarray) -> float:
        said = probabilities.argmax(1)
        of_ranks = scipy.stats.rankdata(probabilities, axis=0)
        return {
            "accuracy": lambda: (said == targets).mean(),
            "balanced_accuracy": lambda: (said == targets).mean(),  # as many of each
            "macro_f1": lambda: f1_score(targets, said, average="macro"),
            "log_loss": lambda: np.log(
                np.clip(probabilities[shown > 0], 1e-7, 1 - 1e-7)
            ).mean(),
            "auc": lambda: roc_auc_score(shown, of_ranks),
            "mean_average_precision": lambda: average_precision_score(shown, of_ranks),
        }[metric]()

    pair = (before, after)
    if metric in ("auc", "mean_average_precision"):
        pair = tuple(scipy.stats.rankdata(p, axis=0) for p in pair)
    expected = by_enumeration(score, *pair, groups)
    result = compare(metric, targets, before, after, groups)
    rounds = 300 if metric in ("auc", "mean_average_precision") else 2000
    deviation = math.sqrt(expected * (1 - expected) / rounds)
    assert 0 < expected < 1
    assert result.p_value == pytest.approx(expected, abs=4 * deviation + 2 / rounds)


@pytest.mark.parametrize(("metric", "several"), CASES)
def test_a_model_is_not_better_than_itself(metric, several):
    targets, _, after = random_pair(30, 3, several)
    result = compare(metric, targets, after, after, ["a", "b", "c"] * 10)
    assert result.before == result.after
    assert (result.p_value, result.spread) == (0.5, 0)
    assert not result.is_better


@pytest.mark.parametrize("metric", METRICS)
def test_the_permutations_are_seeded(metric):
    targets, before, after = random_pair(24, 3, several=False, seed=1)
    mixed, groups = 0.7 * before + 0.3 * after, [str(i // 2) for i in range(24)]
    runs = [compare(metric, targets, before, mixed, groups, seed=s) for s in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0].p_value == pytest.approx(runs[2].p_value, abs=0.15)


def test_images_of_a_group_are_not_independent_evidence():
    alone = compare_counts(10, 6, 0, 4)
    assert alone.p_value == 0.5**7 and alone.is_better
    together = compare_counts(10, 6, 0, 4, groups=["a"] * 20)
    # One group: swapped or not, both are equally likely.
    assert together.p_value == pytest.approx((1000 / 2000) / 2, abs=0.03)
    assert not together.is_better
    apart = compare_counts(10, 6, 0, 4, groups=[str(i) for i in range(20)])
    assert apart.p_value == pytest.approx(alone.p_value, abs=0.01)
    some = compare_counts(10, 6, 0, 4, groups=["a", "a"] + [""] * 18)
    assert some.p_value == pytest.approx(alone.p_value, abs=0.01)  # "" is no group


def test_a_more_confident_model_does_not_rank_better():
    targets, before, after = random_pair(60, 3, several=True)
    sharper = (after**4).astype("f4")
    for metric in ("auc", "mean_average_precision"):
        plain, sharp = (compare(metric, targets, before, x) for x in (after, sharper))
        assert (plain.after, plain.p_value) == (sharp.after, sharp.p_value)


def test_classes_that_no_image_shows_decide_nothing():
    targets, before, after = random_pair(80, 3, several=True)
    targets[:, 1:] = 0
    spoilt = after.copy()
    spoilt[:, 1:] = before[:, 1:]
    for metric in ("auc", "mean_average_precision"):
        whole, first = (compare(metric, targets, before, x) for x in (after, spoilt))
        assert whole.is_better and whole == first
        nothing = compare(metric, np.zeros_like(targets), before, after)
        assert (nothing.before, nothing.after, nothing.p_value) == (0, 0, 0.5)


def test_each_further_attempt_has_to_be_clearer():
    def is_better(*figures: object, attempts: int = 1) -> bool:
        return Comparison(*figures, attempts, informative=9).is_better

    assert is_better("accuracy", 0.5, 0.6, LEVEL)
    assert not is_better("accuracy", 0.5, 0.6, LEVEL + 0.001)
    assert not is_better("accuracy", 0.6, 0.6, 0.0)
    assert not is_better("accuracy", 0.6, 0.5, 0.0)
    assert is_better("log_loss", 0.6, 0.5, LEVEL)
    assert not is_better("log_loss", 0.5, 0.6, 0.0)
    assert is_better("accuracy", 0.5, 0.6, LEVEL / 3, attempts=3)
    assert not is_better("accuracy", 0.5, 0.6, LEVEL / 3, attempts=4)
    assert compare_counts(4, 3, 0, 3).is_better  # p = 1/16
    assert not compare_counts(4, 3, 0, 3, attempts=3).is_better


@pytest.mark.parametrize("metric", METRICS)
def test_two_groups_are_too_few_to_tell(metric):
    """In a quarter of the cases, both of two favor a model that is no better."""
    targets = np.arange(24) % 2
    unsure = np.where(np.eye(2)[targets] > 0, 0.45, 0.55).astype("f4")
    ranks = np.arange(24, dtype="f4")[:, None] / 1000  # no ties
    before, after = unsure + ranks, 1 - unsure + ranks[::-1]
    for groups in (2, 3, 8):
        names = [f"g{i * groups // 24}" for i in range(24)]
        result = compare(metric, targets, before, after, names)
        assert result.informative == groups
        assert result.p_value == pytest.approx(0.5 ** (groups + 1), abs=0.04)
        assert result.is_better == (groups > 2)
    same = compare(metric, targets, before, before, names)
    assert same.informative == 0


@pytest.mark.parametrize("images", [3, 5, 10, 20, 50, 100, 300, 1000])
@pytest.mark.parametrize("differing", [0.02, 0.05, 0.1, 0.2, 0.5])
def test_of_models_that_are_no_better_few_are_kept(images, differing):
    """Exactly, summed over all numbers of images that differ and of those gained."""
    rate = 0.0
    for count in range(images + 1):
        gained = np.arange(count + 1)
        kept = (gained > count - gained) & (mcnemar(gained, count - gained) <= LEVEL)
        kept &= count >= FEWEST_INFORMATIVE
        chance = scipy.stats.binom.pmf(gained[kept], count, 0.5).sum()
        rate += scipy.stats.binom.pmf(count, images, differing) * chance
    assert rate <= 0.145
    assert rate >= 0.03 or images * differing < 3  # and not none at all


def test_as_many_images_as_are_needed_recognize_a_gain_four_times_in_five():
    seen = compare_counts(80, 10, 5, 5)  # 15% of the images differ
    size = images_needed(seen)
    rng = np.random.default_rng(0)
    gained, lost, _ = rng.multinomial(size, [0.10, 0.05, 0.85], 4000).T
    recognized = (gained > lost) & (mcnemar(gained, lost) <= LEVEL)
    assert recognized.mean() == pytest.approx(0.8, abs=0.03)
    more = images_needed(compare_counts(80, 10, 5, 5, attempts=4))
    assert more > 1.5 * size
    assert images_needed(seen, gain=0.1) == pytest.approx(size / 4, abs=1)
    assert images_needed(seen, power=0.5) < size
    assert images_needed(seen, level=0.025) > size
    # Even if no image differs so far, 5 points take at least 5% of images that do.
    assert images_needed(compare_counts(100, 0, 0, 0)) == pytest.approx(78, abs=1)


@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.0), (0.05, 0.05), (0.2, 0.1)])
def test_intervals_of_a_gain_cover_it_as_often_as_they_say(gain, loss):
    rng, images, rounds = np.random.default_rng(0), 40, 4000
    counts = rng.multinomial(images, [gain, loss, 1 - gain - loss], rounds)
    covered = []
    for (gained, lost, _), times in zip(
        *np.unique(counts, axis=0, return_counts=True), strict=True
    ):
        found = compare_counts(images - gained - lost, gained, lost, 0)
        assert found.units == images
        low, high = found.interval
        covered.append((low <= gain - loss <= high) * times)
    assert sum(covered) / rounds >= 0.94


def test_an_interval_of_groups_is_that_of_as_many_images():
    targets, before = right_and_wrong([True, True, False, False] * 6)
    after = right_and_wrong([True] * 24)[1]
    alone = compare("balanced_accuracy", targets, before, after)
    groups = [name for name in "abcdefghijkl" for _ in "12"]
    found = compare("balanced_accuracy", targets, before, after, groups)
    every = compare("balanced_accuracy", targets, before, after, ["a"] * 24)
    assert (alone.units, found.units, every.units) == (24, 12, 1)
    widths = [high - low for low, high in (alone.interval, found.interval)]
    assert widths[1] == pytest.approx(widths[0] * math.sqrt(2), rel=0.2)
    assert every.interval == (-1, 1)


def test_of_candidates_the_best_is_taken_and_of_equals_the_surer():
    targets, sure = right_and_wrong([True] * 6)
    unsure, wrong = 0.5 + 0.5 * (sure - 0.5), 1 - sure
    for metric in METRICS:
        candidates = {0.25: wrong, 0.5: unsure, 0.75: sure, 1.0: wrong}
        assert best_candidate(metric, targets, candidates) == 0.75
    assert best_candidate("accuracy", targets, {1.0: sure, 0.5: sure}) == 1.0
