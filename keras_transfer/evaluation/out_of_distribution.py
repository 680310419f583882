"""Tells images that are far from the training images, by a classifier's features.

A classifier gives a class to any image, also to one that shows none of the classes. How
far an image is from the training images is the distance of its features to those of the
nearest one (Sun et al. 2022, "Out-of-distribution detection with deep nearest
neighbors"). Features are power-normalized first (Perronnin et al. 2010, "Improving the
Fisher kernel for large-scale image classification"), so that a few large features do
not outweigh all others: x -> sign(x) sqrt(|x|), divided by its length.

Chosen by measurement, which `tests/benchmarks/far.py` repeats: leaving one class out,
the normalization raises the area under the ROC curve by about 0.05, one neighbor is
better than 5 or 10, and Mahalanobis distances are as good on average (better with 100
images, worse with 1,000), but assume that features are spread alike in every class.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats

from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.intervals import Groups

FAR_RATE = 0.02
"""Fraction of images like the training images that is called far, in expectation."""

MOST_FITTED = 5_000
"""Training images to fit on, at most, which a caller may draw before reading features.
The bank has hardly room for more, and they are enough for a quantile."""

_BANK_BYTES = 4_000_000
_BLOCK = 1_024  # rows whose distances are computed together

_FEWEST = 3  # distances to estimate a spread from

_COPY_DISTANCE = 1e-2
"""Training images that are nearer than this are copies of one image: distances between
different ones are 0.2 and more, those between copies come from rounding."""


@dataclass(frozen=True, eq=False, repr=False)
class OutOfDistribution:
    """A test of whether images are far from a model's training images.

    Attributes:
        bank: float16 `[B, D]`, normalized features of training images; at most 4 MB.
        threshold: Distance, from 0 to 2, above which an image is far; infinite if there
            were hardly any training images to compare.
        images: Number of training images whose distances the threshold is from.
        bank_groups: Name of the group of each image of the bank, "" for none; None
            without groups, and always if the test was read from a file.
    """

    bank: np.ndarray
    threshold: float
    images: int
    bank_groups: Sequence[str] | None = None

    def __repr__(self) -> str:
        return (
            f"OutOfDistribution({len(self.bank):,} training images, threshold "
            f"{self.threshold:.4f} from {self.images:,} distances)"
        )

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        targets: np.ndarray,
        groups: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "OutOfDistribution":
        """Stores training images and finds the threshold from their own distances.

        Each training image is compared with the others, leaving out its copies and the
        images of its group; see `distance_limit` for the threshold that follows.

        If the images take more than the bank's bytes, it consists of an equal number of
        random images of each class, as far as there are that many.

        Args:
            features: float32 `[N, D]`, the inputs of the head, N at least 1.
            targets: int64 `[N]` class indices; for multi-label data, uint8
                `[N, num_classes]`, where every combination counts as a class.
            groups: Group of each image, "" for none; None if there are no groups.
            seed: Seed of the choice of images.

        Raises:
            KerasTransferError: If a feature is not finite.
        """
        if not np.isfinite(features).all():
            raise KerasTransferError(
                f"Features must be finite numbers. Received: {features.shape} features "
                "that are not all finite. Train the run again."
            )
        rng = np.random.default_rng(seed)
        most = max(1, _BANK_BYTES // (2 * features.shape[1]))
        chosen = _equal_share(targets, most, rng)
        bank = _normalize(features[chosen]).astype(np.float16)
        tested = rng.permutation(len(features))[:MOST_FITTED]
        detector = cls(bank, math.inf, 0, _one_of_several(groups, chosen))
        nearest = detector.score_left_out(
            features[tested], groups and [groups[row] for row in tested]
        )
        found = nearest[np.isfinite(nearest)]
        limit = distance_limit(found, FAR_RATE)
        return replace(detector, threshold=limit, images=len(found))

    def score(self, features: np.ndarray) -> np.ndarray:
        """Computes how far images are from the training images.

        Args:
            features: float32 `[n, D]` of the same model as in `fit`.

        Returns:
            float32 `[n]`, the distance to the nearest training image, from 0 to 2.

        Raises:
            KerasTransferError: If the number of features is not that of `fit`.
        """
        if features.shape[1] != self.bank.shape[1]:
            raise KerasTransferError(
                "Features must come from the model that was trained. Received: "
                f"{features.shape[1]} features per image instead of "
                f"{self.bank.shape[1]}. Train the run again."
            )
        blocks = [distances.min(1) for distances in _distances(features, self.bank)]
        return np.concatenate([np.zeros(0, np.float32), *blocks])

    def is_far(self, features: np.ndarray) -> np.ndarray:
        """Returns bool `[n]`, whether the score exceeds the threshold; see `score`."""
        return ~(self.score(features) <= self.threshold)  # not finite is far

    def is_far_left_out(
        self, features: np.ndarray, groups: Sequence[str] | None = None
    ) -> np.ndarray:
        """Returns bool `[n]`, whether training images are far from the other ones.

        As for the threshold, each image, its copies and the images of its group are
        left out of the images that it is compared with.

        Args:
            features: float32 `[n, D]`, as given to `fit`.
            groups: Group of each image, as given to `fit`.
        """
        nearest = self.score_left_out(features, groups)
        return np.isfinite(nearest) & (nearest > self.threshold)

    def score_left_out(
        self, features: np.ndarray, groups: Sequence[str] | None = None
    ) -> np.ndarray:
        """Computes how far training images are from the other ones.

        Args:
            features: As in `is_far_left_out`.
            groups: As in `is_far_left_out`.

        Returns:
            float32 `[n]`, the distance to the nearest other training image, from 0 to
            2; infinite without others.
        """
        own = bank = np.zeros(0, np.int64)  # numbers of groups
        if groups and self.bank_groups:
            numbered = Groups.of([*groups, *self.bank_groups])
            if numbered is not None:
                own, bank = np.split(numbered.index, [len(features)])
        found, start = [np.zeros(0, np.float32)], 0
        for distances in _distances(features, self.bank):
            distances[distances < _COPY_DISTANCE] = np.inf
            if len(own):
                end = start + len(distances)
                distances[own[start:end, None] == bank] = np.inf
                start = end
            found.append(distances.min(1))
        return np.concatenate(found)

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        with path.open("wb") as file:  # its path may not be valid UTF-8
            np.savez(file, bank=self.bank, threshold=self.threshold, images=self.images)

    @classmethod
    def load(cls, path: Path) -> "OutOfDistribution":
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            KerasTransferError: If the file is damaged.
        """
        try:
            with (
                path.open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                bank, threshold, images = (
                    arrays[name] for name in ("bank", "threshold", "images")
                )
            if bank.dtype != np.float16 or bank.ndim != 2 or not bank.size:
                raise ValueError(f"its bank is {bank.dtype} {list(bank.shape)}")
            if not np.isfinite(bank).all() or not threshold >= 0:
                raise ValueError("it contains impossible numbers")
            return cls(bank, float(threshold), int(images))
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, zlib and NumPy each raise their own types
            reason = str(error).strip().splitlines()
        raise KerasTransferError(
            f"{path} is damaged ({reason[0] if reason else 'no content'}). Train the "
            "run again."
        )


def distance_limit(distances: np.ndarray, rate: float) -> float:
    """Returns the distance that a new one exceeds with a probability of about `rate`.

    With enough distances, it is the ceil((n + 1) (1 - rate))-th smallest of them, which
    a new one exceeds with a probability of at most `rate`, whatever their distribution
    (split conformal prediction, Vovk et al. 2005). If n is below 1 / rate - 1, not even
    the largest is far enough: a new one exceeds it with a probability of 1 / (n + 1).
    Then it is the upper prediction limit of a log-normal distribution,

        exp(m + t s sqrt(1 + 1 / n)),

    if that is larger, with m and s the mean and standard deviation of the logarithms,
    and t the quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        distances: `[n]` positive distances of images like the new one.
        rate: From 0 to 1, both excluded.

    Returns:
        The limit; infinity if n is below 3.
    """
    n = len(distances)
    if n < _FEWEST:
        return math.inf
    rank = math.ceil((n + 1) * (1 - rate) - 1e-9)  # 1e-9 against rounding
    if rank <= n:
        return float(np.partition(distances, rank - 1)[rank - 1])
    logs = np.log(distances.astype(np.float64))
    spread = scipy.stats.t.ppf(1 - rate, n - 1) * logs.std(ddof=1)
    limit = math.exp(logs.mean() + spread * math.sqrt(1 + 1 / n))
    return max(limit, float(distances.max()))


def _normalize(features: np.ndarray) -> np.ndarray:
    powers = np.sign(features) * np.sqrt(np.abs(features))
    lengths = np.linalg.norm(powers, axis=1, keepdims=True)
    return powers / np.maximum(lengths, 1e-12)


def _distances(features: np.ndarray, bank: np.ndarray) -> Iterator[np.ndarray]:
    """Yields float32 `[up to _BLOCK, B]` distances of normalized features."""
    rows = bank.astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    for start in range(0, len(features), _BLOCK):
        block = _normalize(features[start : start + _BLOCK].astype(np.float32))
        # |a - b|^2 = 2 - 2 a.b for vectors of length 1
        yield np.sqrt(np.maximum(2 - 2 * (block @ rows.T), 0))


def _one_of_several(groups: Sequence[str] | None, rows: np.ndarray) -> list[str] | None:
    """Returns the groups of the rows; None without groups, or if there is only one."""
    if not groups or len({*groups}) == 1:
        return None
    return [groups[row] for row in rows]


def _equal_share(
    targets: np.ndarray, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Chooses rows, of each class the same number as far as there are that many."""
    order = rng.permutation(len(targets))
    _, kinds = np.unique(targets[order], axis=0, return_inverse=True)
    turn = np.zeros(len(targets), np.int64)  # how many of its class came before
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds.reshape(-1) == kind)
        turn[rows] = np.arange(len(rows))
    return np.sort(order[np.argsort(turn, kind="stable")[:most]])
