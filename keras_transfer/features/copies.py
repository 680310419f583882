"""Finds copies of images by their perceptual hashes, and puts linked ones together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

RADIUS = 4
"""Most different bits of the hashes of two images that are called copies by their
hashes alone. Re-encoded and shrunk photos all differ in at most 4 bits, 88% or more of
brightened and 65% or more of mirrored ones do, and hardly any different photos
(`tests/benchmarks/duplicates.py`)."""

MOST_EXACT = 20_000
"""Most images all of whose pairs are compared, which takes less than a second of CPU,
or five if all are alike."""

MOST_NEAR = 10
"""Images that each image is paired with, besides those that connect it and the nearest
of each part, so that thousands that are all alike do not give millions of pairs."""

_ORDERS = 24  # of bits, in which neighbors are compared if there are more images
_NEIGHBORS = 12  # in each order
_BLOCK = 128
_FLAT = 4.0  # contrast below which a hash is that of noise
_SAMPLED = 4_000  # images whose pairs tell how many are alike by chance
_FITTED = np.arange(10, 26)  # distances that no copies but many other pairs have
_MOST_BY_CHANCE = 0.05  # of the pairs found
_FEWEST_TOO_MANY, _MOST_IN_GROUP = 10, 0.05  # images of a group that hashes link
_ODD_WAVES = np.uint64(0x5555_5555_5555_5555)
"""Bits whose frequency changes its sign if an image is mirrored left to right."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """Tells images apart that each image is paired with the nearest of.

    Attributes:
        parts: Indices of the images of each part, such as a split. An image may be in
            several. Each image is paired with the nearest and with the first of each.
        labels: int64 `[N]`. Each image is paired with the nearest, and with the nearest
            that has another label than this one.
    """

    parts: Sequence[np.ndarray]
    labels: np.ndarray

    def of(self, rows: np.ndarray) -> "Kinds":
        """Returns the kinds of some of the images, renumbered."""
        place = np.full(len(self.labels), -1)
        place[rows] = np.arange(len(rows))
        parts = [place[part] for part in self.parts]
        return Kinds([part[part >= 0] for part in parts], self.labels[rows])


def hash_pairs(
    quality: np.ndarray, radius: int, kinds: Kinds | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds images whose perceptual hashes are alike, also when one is mirrored.

    Up to 20,000 images all pairs are compared. Where an image has more than 10 others
    that are alike, the first 10 are returned, pairs that connect it with the others
    over some steps, and those of `kinds`.

    Of more images, those are compared that are neighbors when hashes are sorted by
    their bits in one of 24 orders, so that time grows linearly: nearly all pairs that
    differ in few bits are found, but of more than about ten images that are all alike,
    each is paired with some only. Source: Charikar 2002, "Similarity estimation
    techniques from rounding algorithms".

    Args:
        quality: `[N]` of `quality.QUALITY_DTYPE`. Images that were not measured, and
            those without contrast, have no pairs.
        radius: Most bits that differ.
        kinds: Pairs that are returned in any case; None for no further ones.

    Returns:
        (int64 `[P, 2]` pairs with the smaller index first and in order, uint8 `[P]`
        number of bits that differ).
    """
    rows = np.flatnonzero(quality["contrast"] >= _FLAT)
    hashes = quality["perceptual_hash"]
    if len(rows) > MOST_EXACT:
        pairs = rows[_neighbors(hashes[rows], radius)]
    else:
        rows = rows[_nearest(hashes[rows], radius)[0] <= radius]
        pairs = _compared(hashes, rows, radius, kinds)
    return pairs, hash_distance(*hashes[pairs.T])


def hash_copies(quality: np.ndarray, kinds: Kinds | None = None) -> np.ndarray:
    """Finds copies by perceptual hashes alone, in folders where that can be told.

    Where different images are so much alike that as many pairs would be expected by
    chance, as of digits, hashes have to agree in more bits, or nothing is found.

    Args:
        quality: `[N]` of `quality.QUALITY_DTYPE`.
        kinds: As in `hash_pairs`.

    Returns:
        int64 `[P, 2]` pairs with the smaller index first, as `hash_pairs` returns them.
    """
    rows = np.flatnonzero(quality["contrast"] >= _FLAT)
    hashes = quality["perceptual_hash"]
    if len(rows) > MOST_EXACT:
        pairs, bits = hash_pairs(quality, RADIUS)
        found = np.bincount(bits, minlength=RADIUS + 1).cumsum()
    else:
        nearest, found = _nearest(hashes[rows], RADIUS)
    is_few = _by_chance(hashes[rows]) <= np.maximum(1, _MOST_BY_CHANCE * found)
    radii = np.flatnonzero(is_few & (found > 0))
    if not len(radii):
        return np.zeros((0, 2), np.int64)
    if len(rows) > MOST_EXACT:
        return pairs[bits <= radii[-1]]
    return _compared(hashes, rows[nearest <= radii[-1]], radii[-1], kinds)


def connected(count: int, links: Iterable[np.ndarray]) -> np.ndarray:
    """Numbers images so that those linked over any number of steps share a number.

    Args:
        count: Number of images.
        links: Pairs of indices, each int64 `[P, 2]`.

    Returns:
        int64 `[count]` numbers, starting at 0.
    """
    ends = np.concatenate([np.zeros((0, 2), np.int64), *links])
    graph = scipy.sparse.coo_array(
        (np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count)
    )
    if not count:
        return np.zeros(0, np.int64)
    _, number = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return number.astype(np.int64)


def same_value(values: np.ndarray) -> np.ndarray:
    """Links each value with the next equal one, as int64 `[P, 2]` indices."""
    order = np.argsort(values, kind="stable")
    is_same = values[order[1:]] == values[order[:-1]]
    return np.stack([order[:-1][is_same], order[1:][is_same]], axis=1)


def same_group(groups: Sequence[str]) -> np.ndarray:
    """Links images with the next of their group ("" for none), as int64 `[P, 2]`."""
    names = np.array([*groups], object)
    rows = np.flatnonzero(names != "")
    return rows[same_value(names[rows])]


def trusted(
    count: int, certain: Sequence[np.ndarray], by_hash: np.ndarray
) -> np.ndarray:
    """Leaves out links by hashes that would put much of the images in one group.

    Hashes are not certain, and long chains of images that are alike, as of a film,
    could leave nothing to divide: links are left out where more than 5% of the images
    (and more than 10) would be in one group.

    Args:
        count: Number of images.
        certain: Other links, each int64 `[P, 2]`.
        by_hash: int64 `[P, 2]` links by perceptual hashes alone.

    Returns:
        Those of `by_hash` that remain.
    """
    number = connected(count, [*certain, by_hash])
    is_large = np.bincount(number) > max(_FEWEST_TOO_MANY, _MOST_IN_GROUP * count)
    return by_hash[~is_large[number[by_hash[:, 0]]]]


def _nearest(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Compares all pairs.

    Returns:
        (uint8 `[N]` fewest bits in which each differs from another one, int64
        `[radius + 1]` numbers of pairs that differ in at most as many bits).
    """
    nearest = np.full(len(hashes), 255, np.uint8)
    counts = np.zeros(radius + 1, np.int64)
    for start in range(0, len(hashes), _BLOCK):
        stop = start + _BLOCK
        apart = hash_distance(hashes[start:stop, None], hashes[None, start:])
        apart[np.tril_indices(len(apart), m=apart.shape[1])] = 255
        np.minimum(nearest[start:], apart.min(0), out=nearest[start:])
        least = apart.min(1)
        np.minimum(nearest[start:stop], least, out=nearest[start:stop])
        if least.min() <= radius:
            counts += [np.count_nonzero(apart <= bits) for bits in range(radius + 1)]
    return nearest, counts


def _compared(
    hashes: np.ndarray, among: np.ndarray, radius: int, kinds: Kinds | None
) -> np.ndarray:
    """Compares all pairs of some images, block by block.

    Args:
        hashes: uint64 `[N]` of all images.
        among: int64 `[n]` indices of the images that are compared.
        radius: Most bits that differ.
        kinds: As in `hash_pairs`.

    Returns:
        int64 `[P, 2]` pairs as `hash_pairs` returns them.
    """
    hashes, kinds = hashes[among], kinds and kinds.of(among)
    number = np.arange(len(hashes), dtype=np.int32)
    pairs = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(hashes), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(hashes)))
        apart = hash_distance(hashes[rows, None], hashes[None])
        apart[rows - start, rows] = 255
        is_near = apart <= radius
        ones, others = np.nonzero(is_near & (is_near.cumsum(1, np.int32) <= MOST_NEAR))
        found = [(rows[ones], others)]
        if is_near.sum(1).max() > MOST_NEAR:
            number, links = _connecting(is_near, rows, number)
            found += links
            if kinds is not None:
                found += [(rows, x) for x in _nearest_of_kinds(apart, is_near, kinds)]
        one, other = (np.concatenate(x) for x in zip(*found, strict=True))
        keep = is_near[one - start, other]
        pairs.append(np.stack([one[keep], other[keep]], axis=1))
    return among[_each_once(np.concatenate(pairs), len(hashes))]


def _connecting(
    is_near: np.ndarray, rows: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns new numbers of connected images, and the pairs that connect them."""
    links: list[tuple[np.ndarray, np.ndarray]] = []
    while True:
        joins = is_near & (number[rows, None] != number)
        others = np.flatnonzero(joins.any(0))
        if not len(others):
            return number, links
        _, first = np.unique(number[others], return_index=True)
        others = others[first]
        ones = rows[joins[:, others].argmax(0)]
        links.append((ones, others))
        ends = np.stack([number[ones], number[others]], axis=1)
        number = connected(len(number), [ends])[number].astype(np.int32)


def _nearest_of_kinds(
    apart: np.ndarray, is_near: np.ndarray, kinds: Kinds
) -> Iterator[np.ndarray]:
    """Yields columns of the images that each row is paired with, near or not."""
    for part in kinds.parts:
        if len(part):
            yield part[apart[:, part].argmin(1)]
            yield part[is_near[:, part].argmax(1)]
    nearest = apart.argmin(1)
    yield nearest
    is_other = kinds.labels != kinds.labels[nearest, None]
    yield np.where(is_other, apart, 255).argmin(1)


def _each_once(pairs: np.ndarray, count: int) -> np.ndarray:
    """Sorts pairs, and leaves out repeated ones and those of an image with itself."""
    one, other = pairs.min(1), pairs.max(1)
    numbers = np.unique((one * count + other)[one < other])
    return np.stack(np.divmod(numbers, max(count, 1)), axis=1)


def _neighbors(hashes: np.ndarray, radius: int) -> np.ndarray:
    """Compares neighbors in several orders of the bits."""
    rng = np.random.default_rng(0)
    count = len(hashes)
    both = np.concatenate([hashes, hashes ^ _ODD_WAVES])
    unpacked = np.unpackbits(both.view(np.uint8).reshape(-1, 8), axis=1)
    pairs = np.zeros((0, 2), np.int64)
    for _ in range(_ORDERS):
        shuffled = np.packbits(unpacked[:, rng.permutation(64)], axis=1)
        numbers = np.ascontiguousarray(shuffled).view(np.uint64).byteswap().ravel()
        order = np.argsort(numbers, kind="stable")
        found = [pairs]
        for step in range(1, _NEIGHBORS + 1):
            one, other = order[:-step], order[step:]
            is_near = np.bitwise_count(both[one] ^ both[other]) <= radius
            found.append(np.stack([one[is_near], other[is_near]], axis=1) % count)
        pairs = _each_once(np.concatenate(found), count)
    return pairs


def hash_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Counts the bits that differ, uint8, as images are or with one mirrored."""
    different = one ^ other
    return np.minimum(
        np.bitwise_count(different), np.bitwise_count(different ^ _ODD_WAVES)
    )


def _by_chance(hashes: np.ndarray) -> np.ndarray:
    """Estimates how many pairs of different images have hashes that are alike.

    The logarithm of the number of pairs by distance is close to a parabola, as of a
    normal distribution. It is fitted to distances that copies do not have.

    Returns:
        float64 `[RADIUS + 1]` numbers of pairs that differ in at most as many bits.
    """
    some = np.random.default_rng(0).permutation(len(hashes))[:_SAMPLED]
    counts = np.zeros(65, np.int64)
    for start in range(0, len(some), _BLOCK):
        block = hashes[some[start : start + _BLOCK], None]
        apart = hash_distance(block, hashes[None, some[start:]])
        counts += np.bincount(apart.ravel(), minlength=65)
    fitted = _FITTED[counts[_FITTED] > 0]
    if len(fitted) < 3:
        return np.zeros(RADIUS + 1)
    weights = np.sqrt(counts[fitted])
    parabola = np.polyfit(fitted, np.log(counts[fitted]), 2, w=weights)
    expected = np.exp(np.polyval(parabola, np.arange(RADIUS + 1)))
    return np.cumsum(expected) * (len(hashes) / max(len(some), 1)) ** 2
