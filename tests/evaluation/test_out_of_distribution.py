"""Far images: distances by brute force, thresholds by simulation, damaged files."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.out_of_distribution import (
    FAR_RATE,
    OutOfDistribution,
    distance_limit,
)


def clusters(n: int, seed: int = 0, dims: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[n, dims]` features, not negative, of three classes."""
    centers = np.random.default_rng(99).normal(0, 2, (3, dims))
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    features = np.maximum(centers[targets] + rng.normal(size=(n, dims)), 0)
    return features.astype(np.float32), targets


def elsewhere(n: int, dims: int = 40) -> np.ndarray:
    """float32 features of a class that does not occur in `clusters`."""
    rng = np.random.default_rng(98)
    center = rng.normal(0, 2, dims)
    return np.maximum(center + rng.normal(size=(n, dims)), 0).astype(np.float32)


def by_brute_force(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances of normalized features in float64."""

    def normal(rows: np.ndarray) -> np.ndarray:
        powers = np.sign(rows) * np.abs(rows.astype(np.float64)) ** 0.5
        return powers / np.linalg.norm(powers, axis=1, keepdims=True)

    return cdist(normal(features), normal(others))


def test_scores_are_distances_to_the_nearest_training_image():
    features, targets = clusters(200)
    new = np.concatenate([clusters(50, 1)[0], elsewhere(5), -features[:3]])
    found = OutOfDistribution.fit(features, targets).score(new)
    assert found.dtype == np.float32
    expected = by_brute_force(new, features).min(1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_threshold_is_that_of_distances_leaving_one_out():
    features, targets = clusters(200)
    distances = by_brute_force(features, features)
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances.min(1))[math.ceil(201 * (1 - FAR_RATE)) - 1]
    detector = OutOfDistribution.fit(features, targets)
    assert detector.threshold == pytest.approx(expected, abs=1e-3)
    assert detector.images == 200
    far = distances.min(1) > expected + 1e-3
    assert far.sum() in (2, 3)
    assert (detector.is_far_left_out(features) >= far).all()
    assert not detector.is_far(features).any()


@pytest.mark.parametrize("n", [20, 30, 100, 400])
def test_few_known_images_and_most_others_are_far(n):
    false, true = [], []
    for seed in range(12):
        detector = OutOfDistribution.fit(*clusters(n, seed), seed=seed)
        false.append(detector.is_far(clusters(300, seed + 100)[0]).mean())
        true.append(detector.is_far(elsewhere(100)).mean())
    assert np.mean(false) <= 0.05
    assert np.mean(true) >= 0.9


def test_groups_are_left_out_together():
    """Of bursts of similar photos, a new burst is not far."""
    bursts, targets = clusters(60)
    rng = np.random.default_rng(1)
    near = rng.normal(0, 0.05, (60, 5, 40)).astype(np.float32)
    features = (bursts[:, None] + np.maximum(near, 0)).reshape(-1, 40)
    targets = np.repeat(targets, 5)
    groups = [str(row // 5) for row in range(300)]
    new = clusters(300, 2)[0]
    ignored = OutOfDistribution.fit(features, targets, [""] * 300)
    grouped = OutOfDistribution.fit(features, targets, groups)
    assert ignored.is_far(new).mean() > 0.5
    assert grouped.is_far(new).mean() < 0.1
    alone = OutOfDistribution.fit(features, targets, ["one"] * 300)
    assert alone.threshold == ignored.threshold
    assert grouped.is_far_left_out(features, groups).mean() <= FAR_RATE
    assert not grouped.is_far_left_out(features).any()  # but near to their own group
    lonely = np.concatenate([features, np.repeat(elsewhere(1), 5, 0) + near[0]])
    detector = OutOfDistribution.fit(
        lonely, np.r_[targets, [0] * 5], [*groups, *["lonely"] * 5]
    )
    assert detector.is_far_left_out(lonely[-5:], ["lonely"] * 5).all()
    assert not detector.is_far_left_out(lonely[-5:], [""] * 5).any()


def test_copies_do_not_count_as_others():
    features, targets = clusters(100)
    once = OutOfDistribution.fit(features, targets)
    twice = OutOfDistribution.fit(np.tile(features, (2, 1)), np.tile(targets, 2))
    new = clusters(300, 3)[0]
    assert twice.is_far(new).mean() == pytest.approx(once.is_far(new).mean(), abs=0.02)


def test_a_large_bank_is_a_sample_with_all_images_of_a_rare_class(tmp_path: Path):
    rng = np.random.default_rng(0)
    features = rng.random((3_000, 2_000), np.float32)
    targets = np.zeros(3_000, int)
    targets[:20] = 1
    detector = OutOfDistribution.fit(features, targets, seed=3)
    assert len(detector.bank) == 1_000
    assert (detector.score(features[:20]) < 0.01).all()
    again = OutOfDistribution.fit(features, targets, seed=3)
    np.testing.assert_array_equal(again.bank, detector.bank)
    detector.save(tmp_path / "far.npz")
    assert (tmp_path / "far.npz").stat().st_size < 4.1e6


def test_several_classes_per_image():
    features, targets = clusters(120)
    several = np.eye(3, dtype=np.uint8)[targets]
    several[::5] = 1
    several[1::5] = 0
    detector = OutOfDistribution.fit(features, several)
    assert detector.is_far(clusters(200, 5)[0]).mean() < 0.08
    assert detector.is_far(elsewhere(50)).mean() > 0.9


@pytest.mark.parametrize("n", [1, 2, 3])
def test_without_images_to_compare_nothing_is_far(n):
    features, targets = clusters(n)
    detector = OutOfDistribution.fit(features, targets)
    assert math.isinf(detector.threshold) == (n < 3)
    if n < 3:
        assert not detector.is_far(elsewhere(4)).any()
    assert detector.is_far(np.zeros((0, 40), np.float32)).shape == (0,)


@given(st.integers(49, 400), st.integers(0, 2**32 - 1))
def test_the_limit_is_an_order_statistic(n, seed):
    distances = np.random.default_rng(seed).random(n) + 0.1
    limit = distance_limit(distances, 0.02)
    above = (distances > limit).sum()
    assert above + 1 <= 0.02 * (n + 1) + 1e-6 < above + 2


def test_the_limit_of_few_distances_is_exceeded_at_the_rate():
    rng = np.random.default_rng(0)
    exceeded = []
    for _ in range(3_000):
        sample = np.exp(rng.normal(-1, 0.3, 21))
        exceeded.append(sample[20] > distance_limit(sample[:20], 0.02))
    assert scipy.stats.binomtest(sum(exceeded), 3_000, 0.02).pvalue > 0.001
    assert distance_limit(np.array([1.0, 2.0]), 0.02) == math.inf


def test_features_that_are_not_finite():
    features, targets = clusters(50)
    detector = OutOfDistribution.fit(features, targets)
    features[0, 0] = np.nan
    assert detector.is_far(features[:2]).tolist() == [True, False]
    with pytest.raises(KerasTransferError, match="Features must be finite"):
        OutOfDistribution.fit(features, targets)


def test_features_of_another_model():
    detector = OutOfDistribution.fit(*clusters(50))
    with pytest.raises(KerasTransferError, match="41 features per image instead of 40"):
        detector.is_far(np.zeros((1, 41), np.float32))


def test_a_file_gives_the_same_flags(tmp_path: Path):
    detector = OutOfDistribution.fit(*clusters(60))
    detector.save(tmp_path / "far.npz")
    again = OutOfDistribution.load(tmp_path / "far.npz")
    new = np.concatenate([clusters(50, 1)[0], elsewhere(20)])
    np.testing.assert_array_equal(again.score(new), detector.score(new))
    assert repr(again) == repr(detector)
    assert "60 training images" in repr(again)


def stored(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


BANK = np.full((2, 3), 0.5, np.float16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 and no more",
        stored(bank=BANK, threshold=0.1, images=2)[:-30],
        stored(bank=BANK, threshold=0.1, images=2).replace(b"\0\x38", b"\0\x39"),
        stored(bank=BANK, threshold=0.1),
        stored(bank=BANK.astype(object), threshold=0.1, images=2),
        stored(bank=BANK.astype(np.float32), threshold=0.1, images=2),
        stored(bank=BANK[0], threshold=0.1, images=2),
        stored(bank=BANK[:0], threshold=0.1, images=2),
        stored(bank=BANK * np.nan, threshold=0.1, images=2),
        stored(bank=BANK, threshold=np.nan, images=2),
        stored(bank=BANK, threshold=[0.1, 0.2], images=2),
        stored(bank=BANK, threshold="far", images=2),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "far.npz"
    path.write_bytes(content)
    with pytest.raises(KerasTransferError, match="is damaged") as caught:
        OutOfDistribution.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_no_damaged_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        OutOfDistribution.load(tmp_path / "far.npz")
