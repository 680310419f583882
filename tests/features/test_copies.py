"""Perceptual hashes tell copies, unless different images are as much alike."""

import numpy as np
import pytest

from keras_transfer.data.decode import DecodedImage
from keras_transfer.data.quality import QUALITY_DTYPE, measure_quality
from keras_transfer.features import copies
from keras_transfer.features.copies import (
    connected,
    hash_copies,
    hash_distance,
    hash_pairs,
    same_value,
)

PNG = b"\x89PNG"  # measured too: the file's type


def measured(hashes: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(hashes), QUALITY_DTYPE)
    rows["contrast"], rows["perceptual_hash"] = 50, hashes
    return rows


def random_hashes(count: int) -> np.ndarray:
    """Hashes of which half of the bits are set, as those of photos."""
    bits = np.random.default_rng(0).random((count, 64)).argsort(1) < 32
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def flipped(hashes: np.ndarray, bits: int) -> np.ndarray:
    return hashes ^ np.uint64(2**bits - 1)


def test_all_pairs_within_the_radius_are_found():
    hashes = random_hashes(50)
    hashes = np.concatenate([hashes, flipped(hashes[:5], 3), flipped(hashes[5:9], 5)])
    pairs, bits = hash_pairs(measured(hashes), 4)
    assert pairs.tolist() == [[i, 50 + i] for i in range(5)]
    assert bits.tolist() == [3] * 5
    assert hash_copies(measured(hashes)).tolist() == pairs.tolist()


def test_a_mirrored_image_has_the_hash_with_odd_waves_turned():
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    image[:, :20] //= 4
    one, other = (
        measure_quality(PNG, DecodedImage(x, 64, 64))["perceptual_hash"]
        for x in (image, image[:, ::-1])
    )
    assert hash_distance(one, other) <= 4
    assert np.bitwise_count(one ^ other) > 16


def test_images_without_contrast_or_hash_have_no_pairs():
    rows = measured(np.zeros(4, np.uint64))
    rows["contrast"] = [0, 1, 50, 2]
    assert len(hash_pairs(rows, 4)[0]) == 0
    assert len(hash_copies(np.zeros(3, QUALITY_DTYPE))) == 0
    assert len(hash_copies(np.zeros(0, QUALITY_DTYPE))) == 0


def test_many_images_are_compared_with_neighbors_only(
    monkeypatch: pytest.MonkeyPatch,
):
    hashes = random_hashes(2000)
    hashes = np.concatenate([hashes, flipped(hashes[:500], 3)])
    every, bits = hash_pairs(measured(hashes), 4)
    monkeypatch.setattr(copies, "MOST_EXACT", 1000)
    some, fewer = hash_pairs(measured(hashes), 4)
    assert {*map(tuple, some.tolist())} <= {*map(tuple, every.tolist())}
    assert len(some) >= 0.99 * len(every)
    assert (fewer <= 4).all() and (some[:, 0] < some[:, 1]).all()


def test_hashes_of_images_that_are_all_alike_tell_nothing():
    rng = np.random.default_rng(1)
    base = random_hashes(1)[0]
    noise = np.packbits(rng.random((600, 64)) < 0.09, axis=1).view(">u8").ravel()
    hashes = base ^ noise.astype(np.uint64)
    assert len(hash_pairs(measured(hashes), 4)[0]) > 100
    assert len(hash_copies(measured(hashes))) == 0


def test_links_connect_over_any_number_of_steps():
    links = [np.array([[0, 1], [1, 4]]), np.array([[4, 5]])]
    found = connected(6, links).tolist()
    assert found[0] == found[1] == found[4] == found[5]
    assert len({*found}) == 3
    assert connected(0, []).tolist() == []
    assert connected(2, []).tolist() == [0, 1]


def test_equal_values_are_linked_with_the_next():
    values = np.array(["b", "a", "b", "c", "b", "a"])
    assert sorted(same_value(values).tolist()) == [[0, 2], [1, 5], [2, 4]]
