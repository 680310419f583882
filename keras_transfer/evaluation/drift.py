"""How the predictions for new images differ from those for a run's held-out images.

Labels are not needed: what is compared is how many images lie far from the training
images, and how often each class is predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.intervals import as_interval, wilson
from keras_transfer.markup import html_table

_CHUNK = 50  # divisions of the images that are drawn at once
_ROUNDS = 40 * _CHUNK  # the smallest p-value is 1 / (_ROUNDS + 1)


@dataclass(frozen=True, repr=False)
class Share:
    """A fraction of images with its 95% confidence interval (Wilson 1927).

    Attributes:
        count: Number of images that are counted, from 0 to `images`.
        images: Number of images, at least 1.
        value: Their quotient, from 0 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    count: int
    images: int
    value: float
    low: float
    high: float

    def __repr__(self) -> str:
        return (
            f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}), {self.count:,} of "
            f"{self.images:,}"
        )


@dataclass(frozen=True, repr=False)
class Shift:
    """The difference between two shares, with its 95% confidence interval.

    Attributes:
        reference: The share among the reference images.
        new: The share among the new images.
        difference: `new` minus `reference`, from -1 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    reference: Share
    new: Share
    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference does not contain 0."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        return (
            f"{self.reference.value:.3f} -> {self.new.value:.3f}: "
            f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f})"
        )


@dataclass(frozen=True, repr=False)
class Drift:
    """How new images differ from reference images, judged by a model's predictions.

    Attributes:
        images: Number of new images.
        reference_images: Number of reference images.
        far: Shift of the share of images far from the training images.
        classes: Shift of the share of images for which a class is predicted, by class
            name. With many classes, one in 20 intervals excludes 0 by chance.
        p_value: Probability, from 0 to 1, that shares of predicted classes differ at
            least this much if both sets are drawn from the same images.
    """

    images: int
    reference_images: int
    far: Shift
    classes: dict[str, Shift]
    p_value: float

    def __repr__(self) -> str:
        return (
            f"Drift({self.images:,} new, {self.reference_images:,} reference images, "
            f"far {self.far}, predicted classes p = {self.p_value:.4f})"
        )

    def _repr_html_(self) -> str:
        """What notebooks show: the shifts, the largest ones first."""
        most = sorted(self.classes.items(), key=lambda x: -abs(x[1].difference))
        named = [("far from the training images", self.far)]
        named += [(f"predicted {name}", shift) for name, shift in most]
        rows = [
            (
                name,
                x.reference,
                x.new,
                f"{x.difference:+.3f} ({x.low:+.3f} to {x.high:+.3f})",
            )
            for name, x in named
        ]
        return html_table(
            f"{self.images:,} new images beside {self.reference_images:,} of the run; "
            f"predicted classes: p = {self.p_value:.4f}",
            ("", "run", "new", "shift (95% interval)"),
            rows,
        )

    def model_dump(self) -> dict[str, Any]:
        """Returns the attributes as plain nested dictionaries, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """What a model says about a set of images.

    Attributes:
        predicted: bool `[N, num_classes]`, whether a class is predicted for an image;
            exactly one per row for single-label data.
        far: bool `[N]`, whether the image is far from the training images.
    """

    predicted: np.ndarray
    far: np.ndarray


def compare_sets(
    reference: Judged, new: Judged, class_names: Sequence[str], seed: int = 0
) -> Drift:
    """Compares the predictions for new images with those for reference images.

    All figures assume that images are independent; of several images of one object,
    intervals are too narrow.

    Args:
        reference: The images to compare with, such as a run's test images. The model
            was not trained on them.
        new: The new images.
        class_names: Class names in the order of the columns.
        seed: Seed of the permutation test.

    Raises:
        UsageError: If one of the sets is empty.
    """
    for name, judged in (("reference", reference), ("new", new)):
        if not len(judged.far):
            raise UsageError(
                f"Drift is between two sets of images. Received: no {name} images. "
                "Name a folder with images, and train with test images."
            )
    totals, counts = reference.predicted.sum(0), new.predicted.sum(0)
    sizes = len(reference.far), len(new.far)
    return Drift(
        images=sizes[1],
        reference_images=sizes[0],
        far=shift((int(reference.far.sum()), sizes[0]), (int(new.far.sum()), sizes[1])),
        classes={
            class_name: shift((int(before), sizes[0]), (int(after), sizes[1]))
            for class_name, before, after in zip(
                class_names, totals, counts, strict=True
            )
        },
        p_value=permutation_test(reference.predicted, new.predicted, seed),
    )


def share(count: int, images: int) -> Share:
    """Computes a share and its Wilson interval without continuity correction."""
    low, high = as_interval(wilson(count / images, images))
    return Share(count, images, count / images, low, high)


def shift(reference: tuple[int, int], new: tuple[int, int]) -> Shift:
    """Computes the difference between two independent shares with its interval.

    The interval is the hybrid score interval of Newcombe (1998, "Interval estimation
    for the difference between independent proportions", method 10). With p1, p2 the
    shares and [l1, u1], [l2, u2] their Wilson intervals, it is

        p2 - p1 - sqrt((p2 - l2)^2 + (u1 - p1)^2) to
        p2 - p1 + sqrt((u2 - p2)^2 + (p1 - l1)^2).

    Args:
        reference: (count, number of images) of the reference images.
        new: The same of the new images.
    """
    one, two = share(*reference), share(*new)
    difference = two.value - one.value
    below = math.hypot(two.value - two.low, one.high - one.value)
    above = math.hypot(two.high - two.value, one.value - one.low)
    return Shift(one, two, difference, difference - below, difference + above)


def permutation_test(reference: np.ndarray, new: np.ndarray, seed: int = 0) -> float:
    """Tests whether two sets of predictions have the same shares of classes.

    The statistic is the sum over classes of (difference of shares)^2 / (share in both
    sets together), which for one class per image is Pearson's chi-square up to a
    constant. Its distribution is that of random divisions of all images into sets of
    these sizes (Monte Carlo), so that it also holds for few images, rare classes, and
    several classes per image.

    Args:
        reference: bool `[N, num_classes]`, whether a class is predicted.
        new: bool `[M, num_classes]`.
        seed: Seed of the random divisions.

    Returns:
        The p-value, from 1 / 2001 to 1.
    """
    both = np.concatenate([reference, new]).astype(np.int64)
    both = both[:, both.any(0)]
    if not both.size:  # no class is predicted for any image
        return 1.0
    # Images with the same classes are interchangeable: draw how many of each kind.
    kinds, index, totals = np.unique(
        both, axis=0, return_inverse=True, return_counts=True
    )
    observed = np.bincount(index.reshape(-1)[len(reference) :], minlength=len(kinds))
    expected = both.mean(0) * len(new)  # images of each class in the new set

    def statistic(of_kinds: np.ndarray) -> np.ndarray:
        return ((of_kinds @ kinds - expected) ** 2 / expected).sum(-1)

    # Sums in another order may differ in the last bits: near ties count as ties.
    least = statistic(observed) * (1 - 1e-9)
    rng = np.random.default_rng(seed)
    as_large = 0
    for _ in range(_ROUNDS // _CHUNK):  # one matrix for all could take gigabytes
        drawn = rng.multivariate_hypergeometric(totals, len(new), _CHUNK)
        as_large += int((statistic(drawn) >= least).sum())
    return (1 + as_large) / (1 + _ROUNDS)
