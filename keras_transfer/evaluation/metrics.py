"""Predictions -> metrics: pure functions on arrays, without models or files."""

import warnings
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn import metrics
from sklearn.exceptions import UndefinedMetricWarning


class ClassEvaluation(BaseModel):
    """Metrics of one class, from 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: float
    """Fraction of the images predicted as the class that show it; 0 without any."""
    recall: float
    """Fraction of the images that show the class that were found; 0 without any."""
    f1: float
    """Harmonic mean of precision and recall; 0 if both are 0."""
    support: int
    """Number of images that show the class."""


class Evaluation(BaseModel):
    """Metrics of a model on one split, from 0 to 1 unless noted otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    """Number of images."""
    accuracy: float
    """Fraction of images whose class is correct; for multi-label data, whose classes
    are all correct."""
    balanced_accuracy: float
    """Mean recall over the classes that occur; 0 if none does."""
    macro_f1: float
    """Mean F1 over the classes that occur or were predicted; 0 if none does."""
    log_loss: float
    """Mean cross-entropy in nats; for multi-label data, the mean over images and
    classes."""
    mean_average_precision: float | None
    """Mean average precision over the classes that occur; only for multi-label data."""
    classes: dict[str, ClassEvaluation]
    """Metrics by class name."""
    confusion: list[list[int]] | None
    """Confusion matrix: a row per true class, a column per predicted class; None for
    multi-label data."""

    def __str__(self) -> str:
        metric, _ = selection_key(self)
        name = "accuracy" if self.mean_average_precision is None else "mAP"
        return f"{name} {metric:.4f} on {self.images:,} images"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


def evaluate(
    targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> Evaluation:
    """Computes metrics of predictions.

    For multi-label data, a class is predicted if its probability is at least 0.5.

    Args:
        targets: int64 `[N]` class indices; for multi-label data, uint8
            `[N, num_classes]` with 1 where the class is present.
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        class_names: Class names in the order of the columns.
    """
    multi_label = targets.ndim == 2
    num_classes = len(class_names)
    labels = list(range(num_classes))
    if multi_label:
        predicted = (probabilities >= 0.5).astype(np.uint8)
    else:
        predicted = probabilities.argmax(1)
    with warnings.catch_warnings():
        # The recall of a class that does not occur is undefined; zero_division sets it.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.filterwarnings("ignore", message="No positive class found")
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            targets, predicted, labels=labels, average=None, zero_division=0.0
        )
        average_precision = (
            metrics.average_precision_score(targets, probabilities, average=None)
            if multi_label
            else None
        )
    said = (
        predicted.sum(0) if multi_label else np.bincount(predicted, None, num_classes)
    )
    occurs = support > 0
    return Evaluation(
        images=len(targets),
        accuracy=float(metrics.accuracy_score(targets, predicted)),
        balanced_accuracy=_mean(recall[occurs]),
        macro_f1=_mean(f1[occurs | (said > 0)]),
        log_loss=_log_loss(targets, probabilities),
        mean_average_precision=(
            None if average_precision is None else _mean(average_precision[occurs])
        ),
        classes={
            name: ClassEvaluation(
                precision=float(precision[i]),
                recall=float(recall[i]),
                f1=float(f1[i]),
                support=int(support[i]),
            )
            for i, name in enumerate(class_names)
        },
        confusion=(
            None
            if multi_label
            else metrics.confusion_matrix(targets, predicted, labels=labels).tolist()
        ),
    )


def deciding_metric(targets: np.ndarray) -> str:
    """Returns the name of the metric that decides which of two models is better."""
    return "accuracy" if targets.ndim == 1 else "mean_average_precision"


def selection_key(evaluation: Evaluation) -> tuple[float, float]:
    """Returns the sort key for choosing the best of several models; larger is better.

    Returns:
        (deciding metric, negative log loss); the latter breaks ties.
    """
    metric = evaluation.mean_average_precision
    return evaluation.accuracy if metric is None else metric, -evaluation.log_loss


def _mean(values: np.ndarray) -> float:
    """Computes the mean; 0 for an empty array."""
    return float(values.mean()) if len(values) else 0.0


def _log_loss(targets: np.ndarray, probabilities: np.ndarray) -> float:
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    if targets.ndim == 2:
        losses = np.where(targets == 1, -np.log(clipped), -np.log(1 - clipped))
        return float(losses.mean())
    return float(-np.log(clipped[np.arange(len(targets)), targets]).mean())
