"""Finds exact and near copies of images, and what is wrong with them."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from keras_transfer.data.tables import SPLIT_NAMES
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.copies import (
    Kinds,
    connected,
    hash_copies,
    hash_distance,
    hash_pairs,
    same_group,
    same_value,
    trusted,
)
from keras_transfer.findings.finding import Finding, Severity, Suspect, counted
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.neighbors import nearest_pairs
from keras_transfer.findings.registration import SIDE, likeness, pictures_of

LEAST_LIKENESS = 0.9
"""Correlation from which pictures are called copies (`tests/benchmarks/duplicates.py`).
It is raised for data whose different images are as much alike, such as digits."""

_CANDIDATE_BITS = 8  # of hashes; of brightened or mirrored photos, 93% or more
_NEIGHBORS = 5  # by features, of each image
_FEWEST_CANDIDATES = 5_000  # in small data, images have more neighbors
_MOST_COMPARED = 50_000  # pairs whose pixels are compared, in half a minute
_RANDOM_PAIRS = 500  # of different images, which tell how much those are alike
_FEW = 50  # images, of which none are as much alike by chance
_TAIL = (0.8, 0.98)  # quantiles of their likeness, to extrapolate from

_SPLITS = dict(zip(SPLIT_NAMES, ("training", "validation", "test"), strict=True))

Words = tuple[str, Severity, str]
_KINDS: dict[tuple[str, bool], Words] = {
    ("splits", True): (
        "exact duplicates across splits",
        "high",
        "the same bytes as an image in another split, so figures flatter: keep each "
        "image once, or give its copies one group",
    ),
    ("splits", False): (
        "near duplicates across splits",
        "high",
        "a re-encoded, cropped, mirrored or otherwise edited copy in another split, so "
        "figures flatter: give copies one group",
    ),
    ("labels", True): (
        "exact duplicates with other labels",
        "high",
        "the same bytes as an image with another label: at most one of the labels is "
        "right",
    ),
    ("labels", False): (
        "near duplicates with other labels",
        "medium",
        "a near copy with another label: look which label is right",
    ),
    ("same", True): (
        "exact duplicates",
        "low",
        "the same bytes as another image in the same split, so that it counts more "
        "than others: keep each once",
    ),
    ("same", False): (
        "near duplicates",
        "low",
        "a near copy in the same split: give copies one group, so that "
        "folds do not divide them",
    ),
}


@dataclass(frozen=True, eq=False)
class Copies:
    """Which of N images are copies of each other.

    Attributes:
        pairs: int64 `[P, 2]`, smaller index first. Of images with the same bytes each
            is paired with the next, and only the first with near copies. Of many near
            copies of one image, some are left out; see `features.copies.hash_pairs`.
        exact: bool `[P]`, whether both have the same bytes.
        similarity: float32 `[P]` from 0 to 1: 1 for the same bytes, else the
            correlation of pixels, or the fraction of bits that agree in hashes.
        groups: int64 `[N]`; images that are connected by pairs share a number. Pairs by
            hashes alone connect images only as far as they are `trusted`.
        notes: What was not looked at, a line each.
    """

    pairs: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray
    groups: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()


def find_copies(
    images: AuditedImages, listener: Listener = SILENT, thorough: bool = True
) -> Copies:
    """Finds images with the same bytes, and re-encoded or edited copies.

    The cheap way compares perceptual hashes, which takes 0.3 seconds for 10,000 images,
    or 1.5 if all are alike, and finds re-encoded, resized, gray and most brightened or
    mirrored copies. The thorough way takes pairs whose hashes are roughly alike, and
    each image with the 5 that are nearest by features (more in small data), reads those
    images again, and lays one picture over the other: so cropped copies are found too.
    Beyond 20,000 images neighbors are approximate, and the pixels of at most 50,000
    pairs are compared, those with similar hashes first; a note says so. Of more than
    20,000 images that are nearly all alike, not all copies are told in either way.

    Args:
        images: The images.
        listener: Receives progress.
        thorough: Whether to read images again.
    """
    exact = same_value(np.array(images.digests, "S32"))
    notes: tuple[str, ...] = ()
    # Near copies are looked for among different images only.
    number = connected(len(images), [exact])
    _, rows = np.unique(number, return_index=True)
    kinds = _kinds(images, number)
    if thorough:
        candidates, notes = _candidates(images, rows, kinds)
        near, alike, unread = _compared(images, rows, candidates, listener)
        links = near
        notes += unread
    else:
        near = rows[hash_copies(images.quality[rows], kinds)]
        hashes = images.quality["perceptual_hash"][near]
        different = hash_distance(hashes[:, 0], hashes[:, 1])
        alike = (1 - different / 64).astype(np.float32)
        certain = [exact, same_group(images.table.groups)]
        links = trusted(len(images), certain, near)
    pairs = np.concatenate([exact, near])
    return Copies(
        pairs,
        np.arange(len(pairs)) < len(exact),
        np.concatenate([np.ones(len(exact), np.float32), alike]),
        connected(len(images), [exact, links]),
        notes,
    )


def copy_findings(images: AuditedImages, copies: Copies) -> list[Finding]:
    """Tells of copies across splits, with other labels, and within a split.

    Each image is in a finding once, with the copy that is most similar. Of copies
    across splits, those are listed that are not in the training split, or are in the
    test split with a copy in the validation split; of copies within a split, all but
    the first, those that are told of because a copy has another label, and near copies
    of one group.

    Args:
        images: The images.
        copies: Result of `find_copies`.
    """
    if not len(copies.pairs):
        return []
    split, label = _split_and_label(images)
    number = connected(len(images), [copies.pairs[copies.exact]])
    every, group = np.arange(len(images)), np.array(images.table.groups, np.str_)
    equal = _Partners.of(number, every, np.ones(len(images), np.float32), split, label)
    found = {True: equal, False: _near_partners(copies, number, equal, split, label)}
    findings, known = [], {what: np.zeros(len(images), bool) for what, _ in _KINDS}
    for is_exact, partners in found.items():
        one = np.repeat(every, _Partners.MOST)
        other, score = partners.rows[number].ravel(), partners.scores[number].ravel()
        one, other, score = (x[other >= 0] for x in (one, other, score))
        kinds = {
            "splits": split[one] > split[other],
            "labels": label[one] != label[other],
            "same": (split[one] == split[other]) & (one > other),
        }
        for what, is_meant in kinds.items():
            keep = is_meant & ~known[what][one]
            if what == "same":
                is_grouped = (group[one] == group[other]) & (group[one] != "")
                keep &= ~known["labels"][one] & (is_exact | ~is_grouped)
            links = _best(one[keep], other[keep], score[keep])
            known[what][links[0]] = True
            if len(links[0]):
                findings.append(_finding(images, (what, is_exact), *links))
    return findings


def _split_and_label(images: AuditedImages) -> tuple[np.ndarray, np.ndarray]:
    """Returns the split and the set of labels of each image as int64 `[N]` numbers."""
    split = np.array([SPLIT_NAMES.index(name) for name in images.split], np.int64)
    targets = images.table.targets
    if images.multi_label and len(images):
        targets = np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1)
    return split, targets


def _kinds(images: AuditedImages, number: np.ndarray) -> Kinds:
    """Tells images of other splits and labels apart, each file once.

    Args:
        images: The images.
        number: int64 `[N]`, from 0 on, equal for those with the same bytes.
    """
    split, label = _split_and_label(images)
    parts = []
    for one in range(len(SPLIT_NAMES)):
        numbers, first = np.unique(number[split == one], return_index=True)
        parts.append(numbers[np.argsort(first)])
    count = number.max(initial=-1) + 1
    least, most = np.full(count, len(images)), np.full(count, -1)
    np.minimum.at(least, number, label)
    np.maximum.at(most, number, label)
    return Kinds(parts, np.where(least == most, least, -1))


@dataclass(frozen=True, eq=False)
class _Partners:
    """For each of G files, few images that stand for all its copies.

    They are the most similar and the first one in each split, the most similar one of
    all, and the most similar one with another label than this.

    Attributes:
        rows: int64 `[G, 8]` indices of images; -1 for none, or one named before.
        scores: float32 `[G, 8]` similarity.
    """

    MOST = 8
    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(
        cls,
        file: np.ndarray,
        other: np.ndarray,
        score: np.ndarray,
        split: np.ndarray,
        label: np.ndarray,
    ) -> "_Partners":
        """Chooses from links of files (from 0 on) to images.

        Args:
            file: int64 `[L]`.
            other: int64 `[L]` images.
            score: float32 `[L]` similarity.
            split: int64 `[N]` of each image, as are labels; N is not less than G.
            label: int64 `[N]`.
        """
        shape = len(split), cls.MOST
        rows, scores = np.full(shape, -1), np.zeros(shape, np.float32)
        order = np.lexsort((other, -score, file))
        file, other, score = file[order], other[order], score[order]

        def put(slot: int, links: np.ndarray) -> None:
            files, first = np.unique(file[links], return_index=True)
            chosen = other[links][first]
            new = ~(rows[files] == chosen[:, None]).any(1)
            rows[files[new], slot] = chosen[new]
            scores[files[new], slot] = score[links][first][new]

        in_order = np.lexsort((other, file))
        put(0, np.arange(len(file)))
        is_other = label[other] != label[rows[file, 0]]
        put(1, np.flatnonzero(is_other))
        for number in range(len(SPLIT_NAMES)):
            put(2 + 2 * number, np.flatnonzero(split[other] == number))
            put(3 + 2 * number, in_order[split[other[in_order]] == number])
        return cls(rows, scores)


def _near_partners(
    copies: Copies,
    number: np.ndarray,
    equal: _Partners,
    split: np.ndarray,
    label: np.ndarray,
) -> _Partners:
    """Chooses near copies of each file, and images with the same bytes as those."""
    near = number[copies.pairs[~copies.exact]]
    file, copy = np.concatenate([near, near[:, ::-1]]).T
    alike = np.tile(copies.similarity[~copies.exact], 2)
    place, slot = np.nonzero(equal.rows[copy] >= 0)
    other = equal.rows[copy[place], slot]
    return _Partners.of(file[place], other, alike[place], split, label)


def _best(
    one: np.ndarray, other: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each image once, with its most similar copy, the most similar first."""
    order = np.lexsort((other, -score, one))
    order = order[np.unique(one[order], return_index=True)[1]]
    order = order[np.argsort(-score[order], kind="stable")]
    return one[order], other[order], score[order]


def _candidates(
    images: AuditedImages, rows: np.ndarray, kinds: Kinds
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns pairs of images that may be copies, int64 `[P, 2]`, and notes."""
    by_hash, bits = hash_pairs(images.quality[rows], _CANDIDATE_BITS, kinds)
    by_hash = rows[by_hash[np.argsort(bits, kind="stable")]]
    k = max(_NEIGHBORS, _FEWEST_CANDIDATES // max(len(rows), 1))
    by_features = nearest_pairs(images.features, rows, k)
    pairs = np.concatenate([by_hash, by_features])
    _, first = np.unique(pairs, axis=0, return_index=True)
    pairs = pairs[np.sort(first)]
    if len(pairs) <= _MOST_COMPARED:
        return pairs, ()
    note = (
        f"near copies: only {_MOST_COMPARED:,} of {len(pairs):,} pairs of images that "
        "are alike were compared pixel by pixel"
    )
    few = pairs[: min(len(by_hash), _MOST_COMPARED // 2)]
    rest = np.random.default_rng(0).permutation(pairs[len(few) :])
    return np.concatenate([few, rest[: _MOST_COMPARED - len(few)]]), (note,)


def _compared(
    images: AuditedImages, rows: np.ndarray, pairs: np.ndarray, listener: Listener
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Compares the pixels of pairs.

    Returns:
        (int64 `[P, 2]` pairs that are copies, their float32 `[P]` likeness, notes).
    """
    chance = pairs[:0]
    if len(rows) > _FEW:
        chance = np.random.default_rng(0).choice(rows, (_RANDOM_PAIRS, 2))
        chance = chance[chance[:, 0] != chance[:, 1]]
    needed = np.unique(np.concatenate([pairs, chance]))
    place = np.full(len(images), -1)
    pictures: list[np.ndarray] = []
    sources = [images.table.sources[i] for i in needed]
    row_of = dict(zip(sources, needed.tolist(), strict=True))
    for done, (source, picture) in enumerate(_pictures(images, sources), start=1):
        if picture is not None:
            place[row_of[source]] = len(pictures)
            pictures.append(picture)
        listener.progress("copies", done, len(sources))
    read = np.array(pictures, np.uint8).reshape(-1, SIDE, SIDE)
    pairs, chance = (x[(place[x] >= 0).all(1)] for x in (pairs, chance))
    least = _least_likeness(likeness(read, place[chance]), len(rows))
    alike = likeness(read, place[pairs])
    is_copy = alike >= least
    lost = len(sources) - len(pictures)
    notes = (
        (f"near copies: {counted(lost, 'image')} could not be read again",)
        if lost
        else ()
    )
    return pairs[is_copy], alike[is_copy], notes


def _pictures(
    images: AuditedImages, sources: Sequence[str]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields (source, uint8 `[SIDE, SIDE]` picture, or None if it cannot be read)."""
    from keras_transfer.data.samples import decoded_images  # imports TensorFlow

    threads = os.cpu_count() or 1
    for source, pixels in decoded_images(images.read, sources, SIDE, threads):
        yield source, None if pixels is None else pictures_of([pixels])[0]


def _least_likeness(by_chance: np.ndarray, count: int) -> float:
    """Returns the likeness that less than one pair of different images should reach.

    The upper tail of random pairs is extrapolated to all pairs of images, falling
    exponentially in Fisher's transformation of correlations. Source of the criterion:
    Desolneux et al. 2000, "Meaningful alignments" (a-contrario detection). Pairs that
    may be copies are left out.

    Args:
        by_chance: float32 likeness of random pairs.
        count: Number of images.
    """
    different = by_chance[by_chance < LEAST_LIKENESS]
    if len(different) < _RANDOM_PAIRS // 2:
        return LEAST_LIKENESS
    low, high = np.arctanh(np.quantile(different, _TAIL))
    falls = math.log((1 - _TAIL[0]) / (1 - _TAIL[1])) / max(high - low, 1e-6)
    expected = (1 - _TAIL[1]) * count * (count - 1) / 2
    reached = high + max(math.log(max(expected, 1)), 0) / falls
    return max(LEAST_LIKENESS, float(np.tanh(reached)))


def _finding(
    images: AuditedImages,
    kind: tuple[str, bool],
    rows: np.ndarray,
    others: np.ndarray,
    scores: np.ndarray,
) -> Finding:
    """Puts the images of one kind in words, in the given order."""
    name, severity, words = _KINDS[kind]
    sources = images.table.sources
    suspects = [
        Suspect(path=sources[i], score=score, other=sources[j])
        for i, j, score in zip(
            rows.tolist(), others.tolist(), scores.tolist(), strict=True
        )
    ]
    counts = Counter(images.split[rows].tolist())
    figures = {split: float(counts[split]) for split in SPLIT_NAMES if counts[split]}
    shown = [f"{n:,.0f} {_SPLITS[split]}" for split, n in figures.items()]
    have = "image has" if len(rows) == 1 else "images have"
    return Finding(
        kind=name,
        severity=severity,
        message=f"{' and '.join(shown)} {have} {words}.",
        suspects=tuple(suspects),
        figures=figures,
    )
