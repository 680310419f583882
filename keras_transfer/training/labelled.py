"""Features and targets of images, with their weights in the loss."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.config import ClassWeight
from keras_transfer.data.tables import Table, count_classes, one_hot
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.features.cache import Features
from keras_transfer.training.losses import losses_of_probabilities

CHUNK_ROWS = 1024
"""Rows of features to process at once."""

_SHOWN_CLASSES = 5  # in an error, of up to thousands

IN_MEMORY_BYTES = 2**30
"""Features up to this size in bytes are read into memory."""


@dataclass(frozen=True)
class Weighting:
    """How much classes count in the loss, by class index.

    Attributes:
        absent: float32 `[C]` weights of images that do not show the class; for
            single-label data they are not used.
        present: float32 `[C]` weights of images that show the class.
        logit_offset: float32 `[C]`, added to the logits in the loss only; see
            `logit_offset`.
    """

    absent: np.ndarray
    present: np.ndarray
    logit_offset: np.ndarray

    @classmethod
    def equal(cls, num_classes: int) -> "Weighting":
        """Returns weights of 1 without an offset."""
        ones = np.ones(num_classes, np.float32)
        return cls(ones, ones, np.zeros(num_classes, np.float32))


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and targets of the images of one split, in one or more views.

    Attributes:
        views: Features `[N, D]` (or rows `[N, ...]`) of each view, plain images first.
        targets: Targets of the N images, as in `tables.Table`.
        weighting: How much classes count in the loss.
        sample_weight: float32 `[N]` weights of the images in the loss, with a mean of
            1; None for 1.
        chunk_rows: Number of rows per chunk.
        widths: Numbers of features of the pooled outputs that rows consist of, which
            are scaled to the same spread; empty for one.
    """

    views: Sequence[Features | np.ndarray]
    targets: np.ndarray
    weighting: Weighting
    sample_weight: np.ndarray | None = None
    chunk_rows: int = CHUNK_ROWS
    widths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.views) * len(self.targets)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.weighting.present)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, or none."""
        return self.targets.ndim == 2

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields (slice of the images, their features), view by view."""
        for view in self.views:
            for start in range(0, len(self.targets), self.chunk_rows):
                rows = slice(start, start + self.chunk_rows)
                yield rows, view[rows]

    def labels(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 (targets, loss weights), both `[n, num_classes]`."""
        targets = one_hot(self.targets[rows], self.num_classes)
        weighting = self.weighting
        if self.multi_label:
            weights = np.where(targets > 0, weighting.present, weighting.absent)
        else:
            weights = weighting.present[self.targets[rows]][:, None]
            weights = np.broadcast_to(weights, targets.shape)
        if self.sample_weight is not None:
            weights = weights * self.sample_weight[rows][:, None]
        return targets, weights

    def losses_of(
        self, probabilities: np.ndarray, rows: slice | np.ndarray = slice(None)
    ) -> np.ndarray:
        """Computes the weighted loss of images in nats, as float32 `[n]`.

        Args:
            probabilities: float32 `[n, C]`.
            rows: The images.
        """
        targets, weights = self.labels(rows)
        # softmax(logits + offset) is proportional to softmax(logits) * exp(offset)
        shifted = probabilities * np.exp(self.weighting.logit_offset)
        if not self.multi_label:
            shifted /= shifted.sum(1, keepdims=True)
        return losses_of_probabilities(shifted, targets, weights, self.multi_label)


def label_features(
    views: Sequence[Features | np.ndarray],
    targets: np.ndarray,
    weighting: Weighting,
    sample_weight: np.ndarray | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
    widths: tuple[int, ...] = (),
) -> LabelledFeatures:
    """Combines features and targets; small features are read into memory.

    The arguments are the attributes of `LabelledFeatures`; views of up to
    `in_memory_bytes` are read.
    """
    fits = sum(view.nbytes for view in views) <= in_memory_bytes
    arrays = [view[:] if fits else view for view in views]
    return LabelledFeatures(arrays, targets, weighting, sample_weight, widths=widths)


def relative_weights(table: Table, is_learned: bool = True) -> np.ndarray | None:
    """Returns the weights of images in the loss, scaled to a mean of 1.

    So L2 strengths and learning rates mean the same with and without weights.

    Args:
        table: The images.
        is_learned: Whether they are learned from. Images that only tell when to stop
            get equal weights if all of theirs are 0.

    Returns:
        float32 `[N]`; None for equal weights.

    Raises:
        KerasTransferError: If images that are learned from all have a weight of 0.
    """
    weights = table.sample_weight
    if weights is None or not len(weights):
        return None
    mean = weights.mean(dtype=np.float64)
    if not mean:
        if not is_learned:
            return None
        raise KerasTransferError(
            f"Nothing is learned from images of weight 0. Received: {len(weights)} "
            "images, all with a sample_weight of 0. Give some a larger one."
        )
    return (weights / mean).astype(np.float32)


def class_weighting(
    targets: np.ndarray,
    class_names: Sequence[str],
    class_weight: ClassWeight = "none",
    tau: float = 0.0,
) -> Weighting:
    """Computes weights in the loss from the training images.

    `balanced` gives each class the same total weight, with a mean weight of 1 (King &
    Zeng 2001, as in scikit-learn). For multi-label data, this applies to the presence
    and absence of each class. A class that no image shows gets the weight 0 and is not
    counted as a class. Weights by class name are used as they are, and 1 for classes
    that are not named.

    Args:
        targets: Targets of the training images, as in `tables.Table`.
        class_names: Class names in the order of the outputs.
        class_weight: `none`, `balanced` or weights by class name.
        tau: Strength of the logit adjustment; see `logit_offset`.

    Raises:
        UsageError: If a class is unknown, or logits of multi-label data are adjusted.
    """
    num_classes = len(class_names)
    equal = Weighting.equal(num_classes)
    offset = logit_offset(targets, num_classes, tau)
    if isinstance(class_weight, Mapping):
        _check_class_names(class_weight, class_names)
        present = [class_weight.get(name, 1.0) for name in class_names]
        return Weighting(equal.absent, np.array(present, np.float32), offset)
    if class_weight == "none":
        return Weighting(equal.absent, equal.present, offset)
    counts = count_classes(targets, num_classes)
    if targets.ndim == 1:
        total = len(targets) / max(int(np.count_nonzero(counts)), 1)
        both = np.stack([counts, counts])
    else:
        total = len(targets) / 2
        both = np.stack([len(targets) - counts, counts])
    weights = np.where(both > 0, total / np.maximum(both, 1), 0)
    absent, present = weights.astype(np.float32)
    return Weighting(absent, present, offset)


def _check_class_names(class_weight: ClassWeight, class_names: Sequence[str]) -> None:
    """Checks that weights are given for classes that exist.

    Raises:
        UsageError: If a class is unknown.
    """
    named = class_weight if isinstance(class_weight, Mapping) else {}
    for name in named:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            some = ", ".join(class_names[:_SHOWN_CLASSES])
            end = ", ..." if len(class_names) > _SHOWN_CLASSES else "."
            raise UsageError(
                f"class_weight names a class that the data do not have. Received: "
                f"{name!r}.{hint} Classes are {some}{end}"
            )


def logit_offset(targets: np.ndarray, num_classes: int, tau: float) -> np.ndarray:
    """Computes what logit adjustment adds to the logits in the loss.

    The loss is computed on logits plus tau times the logarithm of each class's share
    of the training images, so that the logits themselves are those of classes which
    are the more equally frequent the larger tau is. Source: Menon et al. 2021,
    "Long-tail learning via logit adjustment".

    Returns:
        float32 `[num_classes]`; zeros for a tau of 0. A class without images counts as
        if it had one.

    Raises:
        UsageError: If the data are multi-label and tau is not 0.
    """
    if not tau:
        return np.zeros(num_classes, np.float32)
    if targets.ndim == 2:
        raise UsageError(
            "Logits are adjusted where an image shows exactly one class. Received: "
            f"logit_adjustment={tau:g} and multi-label data. Use class_weight instead."
        )
    counts = np.maximum(count_classes(targets, num_classes), 1)
    shares = np.log(counts / counts.sum())
    return (tau * shares).astype(np.float32)


@dataclass(frozen=True)
class Scaling:
    """How the features that a head learns from are scaled.

    Attributes:
        fold: The fold that the head does not learn from; None if it learns from all.
        mean: float64 `[D]` mean of each feature.
        scale: float64 `[D]`, greater than 0, the same for all features of one pooled
            output.
    """

    fold: int | None
    mean: np.ndarray
    scale: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Returns float32 `[n, D]` features with a mean of 0, scaled."""
        scaled = features - self.mean.astype(np.float32)
        scaled /= self.scale.astype(np.float32)
        return scaled


def scalings(data: LabelledFeatures, folds: np.ndarray) -> list[Scaling]:
    """Computes the scaling for all images, and that without the images of each fold.

    There is one standard deviation for all features of a pooled output, because
    dividing each feature by its own would amplify those that hardly vary, and with them
    the rounding differences between engines. An image counts as often as its weight
    says.

    The sums over a head's images are added up from those of the single folds, rather
    than subtracting its own from the total, so that its fold does not even affect their
    rounding.

    Args:
        data: The N images, in any number of views.
        folds: int64 `[N]` fold of each image from 0; -1 for images that are in none.

    Raises:
        UsageError: If a fold leaves no images to learn from.
    """
    groups = np.unique(folds)
    images = np.array([np.count_nonzero(folds == group) for group in groups])
    totals = np.zeros(len(groups))
    sums, squares = np.zeros((2, len(groups), data.views[0].shape[1]))
    for rows, chunk in data.chunks():
        for index, group in enumerate(groups):
            is_inside = folds[rows] == group
            part = chunk[is_inside].astype(np.float64)
            weights = np.ones(len(part))
            if data.sample_weight is not None:
                weights = data.sample_weight[rows][is_inside].astype(np.float64)
            totals[index] += weights.sum()
            sums[index] += weights @ part
            squares[index] += weights @ np.square(part, out=part)
    found = []
    for fold in [None, *groups[groups >= 0].tolist()]:
        used = np.array([group != fold for group in groups.tolist()])
        if not images[used].sum():
            raise UsageError(
                "Every fold must leave images to learn from. Received: all "
                f"{len(folds)} images in fold {fold}. Use at least two folds, or fold "
                "-1 for images that are in none."
            )
        total = max(totals[used].sum(), 1e-12)
        mean = sums[used].sum(0) / total
        variance = np.maximum(squares[used].sum(0) / total - mean**2, 0)
        found.append(Scaling(fold, mean, _spreads(variance, data.widths)))
    return found


def _spreads(variance: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Computes what features are divided by from their variances, both `[D]`.

    A pooled output of few features would hardly count if all features had the same
    variance, and too much if each output had the same one in all. What lies in the
    middle was as good as the better of the two in most of the measurements, which
    tests/benchmarks/stages.py repeats.
    """
    parts = np.split(variance, np.cumsum(widths)[:-1])
    spreads = []
    for part in parts:
        deviation = np.sqrt(part.mean()) or 1.0  # features that are all the same
        share = len(part) / len(parts[-1])
        spreads.append(np.full(len(part), deviation * share**0.25))
    return np.concatenate(spreads)
