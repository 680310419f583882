"""Predictions -> metrics: pure functions on arrays, without models or files."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from pydantic import BaseModel, ConfigDict, model_validator

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.decisions import DEFAULT_THRESHOLD
from keras_transfer.evaluation.intervals import (
    Groups,
    Interval,
    Macro,
    RankMetric,
    as_interval,
    average_precision,
    of_confusion,
    of_fractions,
    of_mean,
    roc_auc,
    wilson,
)
from keras_transfer.evaluation.names import FIELDS, LABELS, MULTI_LABEL, SINGLE_LABEL
from keras_transfer.markup import html_table

BINS = 15
"""Number of bins of the expected calibration error. Naeini et al. 2015 used 10, Guo et
al. 2017 and most later work 15."""

LEAST_PROBABILITY = 1e-7
"""Probabilities are kept this far from 0 and 1 in the log loss, so that an image's loss
is at most 16 nats."""

_ROUNDS = 200
_MOST_VALUES = 4_000_000  # simulated values held at a time

UNDEFINED = "–"
"""What tables show of a metric that is undefined."""

_OF_SHOWN = ("precision", "recall", "f1")  # say nothing of a class that no image shows


class ClassEvaluation(BaseModel):
    """Metrics of one class, from 0 to 1.

    In runs made by version 0.1.0, the metrics with a default are missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: float
    """Fraction of the images predicted as the class that show it; 0 without any."""
    recall: float
    """Fraction of the images that show the class that were found (sensitivity); 0
    without any."""
    f1: float
    """Harmonic mean of precision and recall; 0 if both are 0."""
    support: int
    """Number of images that show the class."""
    specificity: float | None = None
    """Fraction of the images that do not show the class that were not predicted as it;
    None without any."""
    roc_auc: float | None = None
    """Area under the ROC curve of the class against all others; None unless some images
    show the class and some do not."""
    average_precision: float | None = None
    """Mean precision at each image that shows the class, ordered by its probability;
    None without any."""
    intervals: dict[str, Interval] = {}
    """95% confidence intervals of `recall`, `specificity`, `roc_auc` and
    `average_precision`, where these are defined."""

    def describe(self, metric: str) -> str:
        """Formats the metric of this name with its interval, if it has one.

        Precision, recall and F1 of a class that no image shows are left out.
        """
        is_empty = not self.support and metric in _OF_SHOWN
        value = None if is_empty else getattr(self, metric)
        return _with_interval(value, self.intervals.get(metric))


class Evaluation(BaseModel):
    """Metrics of a model on one split, from 0 to 1 unless noted otherwise.

    Out of fold, the candidate was chosen on the same images. Accuracy, balanced
    accuracy, macro-F1, log loss, ROC AUC and mean average precision (over all classes)
    are then corrected for that choice; the calibration error, the confusion matrix,
    `correct` and the metrics of single classes are not.

    In runs made by version 0.1.0, the metrics with a default are missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    """Number of images."""
    correct: int
    """Number of images whose class is correct; for multi-label data, whose classes are
    all correct."""
    accuracy: float
    """Fraction of images that are correct."""
    balanced_accuracy: float
    """Mean recall over the classes that occur; 0 if none does."""
    macro_f1: float
    """Mean F1 over the classes that occur or were predicted; 0 if none does."""
    log_loss: float | None
    """Mean cross-entropy in nats; for multi-label data, the mean over images and
    classes. None if only the largest probabilities are known."""
    roc_auc: float | None = None
    """Mean area under the ROC curve over the classes for which it is defined; None if
    there are none."""
    mean_average_precision: float | None
    """Mean average precision over the classes that occur; only for multi-label data."""
    ece: float | None = None
    """Expected calibration error of the probability of the predicted class; None for
    multi-label data."""
    ece_if_calibrated: float | None = None
    """The value that it would be expected to have if the probabilities were perfectly
    calibrated: it is never negative, so chance alone increases it."""
    intervals: dict[str, Interval] = {}
    """95% confidence intervals by the name of the metric; see `intervals`. Of fewer
    than 10 images or groups, `log_loss` has none."""
    classes: dict[str, ClassEvaluation]
    """Metrics by class name."""
    confusion: list[list[int]] | None
    """Confusion matrix: a row per true class, a column per predicted class; None for
    multi-label data."""

    @model_validator(mode="before")
    @classmethod
    def _counts_correct(cls, values: Any) -> Any:
        """Adds the number of correct images to metrics of version 0.1.0."""
        if isinstance(values, dict) and "correct" not in values:
            correct = round(values.get("accuracy", 0) * values.get("images", 0))
            values = {**values, "correct": correct}
        return values

    def describe(self, metric: str) -> str:
        """Formats a metric with its interval: `0.954 (0.908 to 0.978), 146 of 153`.

        Args:
            metric: Name of a field, or `auc`. Only of accuracy, images are counted.
        """
        field = FIELDS.get(metric, metric)
        text = _with_interval(getattr(self, field), self.intervals.get(field))
        if field == "accuracy":
            is_counted = abs(self.accuracy * self.images - self.correct) < 1e-3
            text += f", {self.correct:,} of" if is_counted else " on"
            text += f" {self.images:,}" + ("" if is_counted else " images")
        return text

    @property
    def headline(self) -> str:
        """Name of the metric that comes first, as `deciding_metric` returns it."""
        if self.mean_average_precision is None:
            return "accuracy"
        return "mean_average_precision"

    def table(self) -> list[tuple[str, str]]:
        """Returns (name, formatted value) of each metric, the headline first."""
        names = sorted(LABELS, key=lambda name: name != self.headline)
        shown = [
            (LABELS[name], self.describe(name))
            for name in names
            if getattr(self, name) is not None
        ]
        if self.ece is not None and self.ece_if_calibrated is not None:
            usual = f"{self.ece_if_calibrated:.3f} if perfectly calibrated"
            shown.append(("ECE", f"{self.ece:.3f} ({usual})"))
        return shown

    def worst_first(self) -> list[str]:
        """Returns the classes by F1, the lowest first; last those without images."""

        def place(name: str) -> tuple[bool, float]:
            return not self.classes[name].support, self.classes[name].f1

        return sorted(self.classes, key=place)

    def __str__(self) -> str:
        figure = self.describe(self.headline)
        if self.headline == "accuracy":
            return f"accuracy {figure}"
        return f"mAP {figure} on {self.images:,} images"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def _repr_html_(self) -> str:
        """What notebooks show: the metrics, and those of the worst classes."""
        rows = []
        for name in self.worst_first():
            found = self.classes[name]
            figures = (found.describe(x) for x in ("recall", "precision", "f1"))
            rows.append((name, *figures, found.support))
        header = ("class", "recall (95% interval)", "precision", "F1", "images")
        of_all = html_table(self, ("metric", "value (95% interval)"), self.table())
        return of_all + html_table("Classes, the worst first", header, rows)


def evaluate(
    targets: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    groups: Sequence[str] = (),
    thresholds: np.ndarray | None = None,
    seed: int = 0,
) -> Evaluation:
    """Computes metrics of predictions and their 95% confidence intervals.

    `score` computes a single metric in less time. The module `intervals` describes the
    intervals.

    Args:
        targets: int64 `[N]` class indices; for multi-label data, uint8
            `[N, num_classes]` with 1 where the class is present. N is at least 1.
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        class_names: Class names in the order of the columns.
        groups: Name of the group of each image, such as the patient; empty for an image
            without. Intervals then say how metrics would vary with other groups.
        thresholds: float `[num_classes]`, or `[N, num_classes]` if they differ between
            images; for multi-label data, a class is predicted if its probability is at
            least its threshold. None for 0.5.
        seed: Seed of resampling and simulation.
    """
    numbered = Groups.of(groups)
    predicted = _predicted(targets, probabilities, thresholds)
    is_right = _is_right(targets, predicted)
    counts = _counts(targets, predicted, len(class_names))
    totals, losses = counts.sum(0), log_losses(targets, probabilities)
    fractions = _fraction_intervals(counts, is_right, numbered, seed)
    by_class, ranked = _rank_metrics(targets, probabilities, numbered)
    intervals = {
        "accuracy": as_interval(fractions[0]),
        **of_confusion(counts, _confusion_metrics, is_right, numbered, seed),
        **{name: interval for name, (_, interval) in ranked.items()},
    }
    # A wrong prediction gives the true class (of several labels, one) at most 1/2.
    wrong = math.log(2) / (1 if targets.ndim == 1 else len(class_names))
    largest = -math.log(LEAST_PROBABILITY)
    if of_loss := of_mean(losses, numbered, seed, wrong, largest):
        intervals["log_loss"] = of_loss
    values = {name: x.item() for name, x in _confusion_metrics(totals[None]).items()}
    values |= {name: value for name, (value, _) in ranked.items()}
    confidence = probabilities.max(1) if targets.ndim == 1 else None
    classes = _classes(totals, len(targets), fractions, by_class)
    return Evaluation(
        images=len(targets),
        correct=int(is_right.sum()),
        accuracy=float(is_right.mean()),
        log_loss=float(losses.mean()),
        **{"mean_average_precision": None if targets.ndim == 1 else 0.0, **values},
        ece=None if confidence is None else calibration_error(confidence, is_right),
        ece_if_calibrated=(
            None if confidence is None else error_if_calibrated(confidence, seed)
        ),
        intervals=intervals,
        classes=dict(zip(class_names, classes, strict=True)),
        confusion=_confusion(targets, predicted, len(class_names)),
    )


def deciding_metric(targets: np.ndarray, metric: str | None = None) -> str:
    """Returns the name of the metric that decides which of two models is better.

    Args:
        targets: As for `evaluate`.
        metric: The user's choice; None for accuracy, or mean average precision for
            multi-label data.

    Raises:
        UsageError: If the metric does not exist for these data.
    """
    names = metrics_of(targets)
    if metric is None:
        return names[0]
    if metric not in names:
        kind = "single-label" if targets.ndim == 1 else "multi-label"
        raise UsageError(
            f"The metric must exist for the data. Received: metric={metric} and {kind} "
            f"data. Use one of: {', '.join(names)}."
        )
    return metric


def metrics_of(targets: np.ndarray) -> tuple[str, ...]:
    """Returns the names of the metrics that exist for single- or multi-label targets.

    The first is the one that decides by default.
    """
    return SINGLE_LABEL if targets.ndim == 1 else MULTI_LABEL


def score(metric: str, targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Computes one metric for choosing between models; larger is better.

    Args:
        metric: A name that `deciding_metric` returns.
        targets: As for `evaluate`.
        probabilities: As for `evaluate`.

    Returns:
        The metric from 0 to 1, or the negative log loss. A metric that is undefined for
        these images is 0.
    """
    if metric == "log_loss":
        return -float(log_losses(targets, probabilities).mean())
    if metric in ("auc", "mean_average_precision"):
        return _mean_rank_metric(metric, targets, probabilities)
    predicted = _predicted(targets, probabilities)
    if metric == "accuracy":
        return float(_is_right(targets, predicted).mean())
    classes = probabilities.shape[1]
    if targets.ndim == 2:
        parts = [x.sum(0) for x in (targets * predicted, targets, predicted)]
    else:
        values = (targets[targets == predicted], targets, predicted)
        parts = [np.bincount(x, minlength=classes) for x in values]
    return float(_confusion_metrics(np.concatenate(parts)[None])[metric][0])


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Computes the expected calibration error of the predicted class' probability.

    Images are divided into 15 bins of similar confidence. The error is the mean, over
    images, of the difference between a bin's mean confidence and its accuracy. Bins
    hold equally many images, because most models are sure of most images: of 15 bins of
    equal width, one or two would hold nearly all images, and the others would say
    little. Images of equal confidence share a bin. Source: Nixon et al. 2019,
    "Measuring Calibration in Deep Learning".

    Args:
        confidence: float `[N]` largest probability of each image.
        is_right: bool `[N]`.

    Returns:
        The error from 0 to 1.
    """
    bins = confidence_bins(confidence)
    gaps = np.bincount(bins, is_right - confidence.astype(np.float64))
    return float(np.abs(gaps).sum() / len(confidence))


def error_if_calibrated(confidence: np.ndarray, seed: int) -> float:
    """Simulates the expected calibration error of perfectly calibrated probabilities.

    In each of 200 rounds, every image is right with the probability that it is given.

    Args:
        confidence: float `[N]` largest probability of each image.
        seed: Seed of the simulation.

    Returns:
        The mean error of the rounds, from 0 to 1.
    """
    rng = np.random.default_rng(seed)
    ordered = np.sort(confidence).astype(np.float64)
    bins = confidence_bins(ordered)
    starts = np.flatnonzero(np.r_[True, bins[1:] != bins[:-1]])
    rounds = max(min(_ROUNDS, _MOST_VALUES // len(ordered)), 1)
    errors: list[float] = []
    while len(errors) < _ROUNDS:
        is_right = rng.random((rounds, len(ordered))) < ordered
        gaps = np.add.reduceat(is_right - ordered, starts, axis=1)
        errors.extend(np.abs(gaps).sum(1) / len(ordered))
    return float(np.mean(errors))


def confidence_bins(confidence: np.ndarray, count: int = BINS) -> np.ndarray:
    """Divides images into bins of equal count by quantiles of the confidence.

    Args:
        confidence: float `[N]` largest probability of each image.
        count: Number of bins; fewer are used where confidences are equal.

    Returns:
        int64 `[N]` number of each image's bin, from the least confident on.
    """
    edges = np.quantile(confidence, np.arange(1, count) / count, method="higher")
    return np.searchsorted(edges, confidence, side="right")


def _predicted(
    targets: np.ndarray,
    probabilities: np.ndarray,
    thresholds: np.ndarray | None = None,
) -> np.ndarray:
    """Returns predictions in the form of the targets."""
    if targets.ndim == 1:
        return probabilities.argmax(1)
    limit = DEFAULT_THRESHOLD if thresholds is None else thresholds
    return (probabilities >= limit).astype(np.uint8)


def _is_right(targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns bool `[N]`, whether the class or all classes of an image are correct."""
    equal = predicted == targets
    return equal if targets.ndim == 1 else equal.all(1)


def _counts(
    targets: np.ndarray, predicted: np.ndarray, classes: int
) -> scipy.sparse.csr_array:
    """Counts, for each image and class, what metrics of the confusion matrix need.

    Returns:
        Sparse float64 `[N, 3 * num_classes]`: 1 where an image is predicted as a class
        that it shows (a hit), shows a class, and is predicted as a class.
    """
    shown, said = (
        scipy.sparse.csr_array(x, dtype=np.float64)
        if x.ndim == 2
        else scipy.sparse.csr_array(
            (np.ones(len(x)), x, np.arange(len(x) + 1)), (len(x), classes)
        )
        for x in (targets, predicted)
    )
    return scipy.sparse.hstack([shown.multiply(said), shown, said], format="csr")


def _confusion_metrics(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Computes balanced accuracy and macro-F1.

    Args:
        totals: `[R, 3 * num_classes]` sums of `_counts`.

    Returns:
        float64 `[R]` by the name of the metric.
    """
    hits, shown, said = np.split(totals, 3, axis=1)
    occurs, matters = shown > 0, shown + said > 0
    recall = hits / np.where(occurs, shown, 1)
    f1 = 2 * hits / np.where(matters, shown + said, 1)
    return {
        "balanced_accuracy": recall.sum(1) / np.maximum(occurs.sum(1), 1),
        "macro_f1": f1.sum(1) / np.maximum(matters.sum(1), 1),
    }


def _fraction_intervals(
    counts: scipy.sparse.csr_array,
    is_right: np.ndarray,
    groups: Groups | None,
    seed: int,
) -> np.ndarray:
    """Computes intervals of accuracy, of each recall, and of each specificity.

    Returns:
        float64 `[1 + 2 * num_classes, 2]`.
    """
    ones = np.ones(len(is_right))
    if groups is None:
        sums, images, right = (
            counts.sum(0)[None],
            ones.sum()[None],
            is_right.sum()[None],
        )
    else:
        sums = groups.sum_rows(counts).toarray()
        images, right = groups.sum(ones), groups.sum(is_right)
    hits, shown, said = np.split(sums, 3, axis=1)
    images, right = images[:, None], right[:, None]
    among = np.concatenate([images, shown, images - shown], 1)
    good = np.concatenate([right, hits, images - shown - said + hits], 1)
    if groups is not None:
        return of_fractions(good, among, seed)
    return wilson((good / np.maximum(among, 1))[0], among[0])


_Ranked = dict[str, tuple[float, Interval]]  # value and interval by name of a field


def _rank_metrics(
    targets: np.ndarray, probabilities: np.ndarray, groups: Groups | None
) -> tuple[list[_Ranked], _Ranked]:
    """Computes ROC AUC and average precision where they are defined.

    Returns:
        (`roc_auc` and `average_precision` of each class, `roc_auc` and, for multi-label
        data, `mean_average_precision` over the classes).
    """
    means = {"roc_auc": Macro(), "average_precision": Macro()}
    classes = []
    for index in range(probabilities.shape[1]):
        positive, scores = _one_against_rest(targets, probabilities, index)
        found: _Ranked = {}
        for name, function in (
            ("roc_auc", roc_auc),
            ("average_precision", average_precision),
        ):
            if positive.any() and not (name == "roc_auc" and positive.all()):
                metric = function(positive, scores, groups)
                means[name].add(metric)
                found[name] = metric.value, metric.interval
        classes.append(found)
    over_classes = {"roc_auc": means["roc_auc"].mean}
    if targets.ndim == 2:
        over_classes["mean_average_precision"] = means["average_precision"].mean
    return classes, {
        name: (mean.value, mean.interval) for name, mean in over_classes.items() if mean
    }


def _mean_rank_metric(
    metric: str, targets: np.ndarray, probabilities: np.ndarray
) -> float:
    function: Callable[..., RankMetric] = roc_auc
    if metric == "mean_average_precision":
        function = average_precision
    values = []
    for index in range(probabilities.shape[1]):
        positive, scores = _one_against_rest(targets, probabilities, index)
        if positive.any() and not (metric == "auc" and positive.all()):
            values.append(function(positive, scores).value)
    return float(np.mean(values)) if values else 0.0


def _one_against_rest(
    targets: np.ndarray, probabilities: np.ndarray, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (whether images show a class, its probabilities)."""
    positive = targets == index if targets.ndim == 1 else targets[:, index] == 1
    return positive, np.ascontiguousarray(probabilities[:, index])


def _classes(
    totals: np.ndarray,
    images: int,
    fractions: np.ndarray,
    ranked: Sequence[_Ranked],
) -> list[ClassEvaluation]:
    """Puts together the metrics of each class."""
    hits, shown, said = np.split(totals, 3)
    recalls, specificities = np.split(fractions[1:], 2)
    found = []
    for i, metrics in enumerate(ranked):
        others = images - shown[i]
        intervals = {name: interval for name, (_, interval) in metrics.items()}
        if shown[i]:
            intervals["recall"] = as_interval(recalls[i])
        if others:
            intervals["specificity"] = as_interval(specificities[i])
        found.append(
            ClassEvaluation(
                precision=float(hits[i] / max(said[i], 1)),
                recall=float(hits[i] / max(shown[i], 1)),
                f1=float(2 * hits[i] / max(shown[i] + said[i], 1)),
                support=int(shown[i]),
                specificity=(
                    float((others - said[i] + hits[i]) / others) if others else None
                ),
                **{name: value for name, (value, _) in metrics.items()},
                intervals=intervals,
            )
        )
    return found


def _confusion(
    targets: np.ndarray, predicted: np.ndarray, classes: int
) -> list[list[int]] | None:
    if targets.ndim == 2:
        return None
    cells = np.bincount(targets * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def log_losses(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Computes the float64 `[N]` cross-entropy of each image in nats."""
    if targets.ndim == 2:
        clipped = _clipped(probabilities)
        losses = np.where(targets == 1, -np.log(clipped), -np.log(1 - clipped))
        return losses.mean(1)
    return -np.log(_clipped(probabilities[np.arange(len(targets)), targets]))


def _clipped(probabilities: np.ndarray) -> np.ndarray:
    kept = probabilities.astype(np.float64)
    return np.clip(kept, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return UNDEFINED
    if interval is None:
        return f"{value:.3f}"
    low, high = interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
