"""Predictions -> metrics: pure functions on arrays, no model and no files."""

import warnings
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn import metrics
from sklearn.exceptions import UndefinedMetricWarning


class ClassEvaluation(BaseModel):
    """How well one class is told from the others; shares are 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: float
    """Of the images said to show the class, how many do; 0 if none was said to."""
    recall: float
    """Of the images that show the class, how many were found; 0 if there are none."""
    f1: float
    support: int
    """Number of images that show the class."""


class Evaluation(BaseModel):
    """The figures of one split in `metrics.json`; shares are 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    accuracy: float
    """Share of images whose class is right; of multi-label data, all its classes."""
    balanced_accuracy: float
    """Mean recall over the classes that occur; 0 if none does."""
    macro_f1: float
    """Mean F1 over the classes that occur or were predicted."""
    log_loss: float
    """Mean cross-entropy in nats; of multi-label data, mean over classes."""
    mean_average_precision: float | None
    """Mean over classes, multi-label data only."""
    classes: dict[str, ClassEvaluation]
    confusion: list[list[int]] | None
    """Row: true class, column: predicted class; single-label data only."""


def evaluate(
    targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> Evaluation:
    """Compares predictions with the truth.

    Args:
        targets: int64 `[N]` class indices, or uint8 `[N, num_classes]` of multi-label
            data, where a class is predicted from a probability of 0.5.
        probabilities: float32 `[N, num_classes]`.
        class_names: In the order of the columns.
    """
    multi_label = targets.ndim == 2
    num_classes = len(class_names)
    labels = list(range(num_classes))
    if multi_label:
        predicted = (probabilities >= 0.5).astype(np.uint8)
    else:
        predicted = probabilities.argmax(1)
    with warnings.catch_warnings():
        # A class that does not occur has no recall; zero_division says what it gets.
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
    """Which figure of an `Evaluation` says which model is better."""
    return "accuracy" if targets.ndim == 1 else "mean_average_precision"


def score(evaluation: Evaluation) -> tuple[float, float]:
    """What is compared to find the best of several models: larger is better.

    The deciding metric, and where that is the same the log loss.
    """
    metric = evaluation.mean_average_precision
    return evaluation.accuracy if metric is None else metric, -evaluation.log_loss


def _mean(values: np.ndarray) -> float:
    """Of no class at all, 0."""
    return float(values.mean()) if len(values) else 0.0


def _log_loss(targets: np.ndarray, probabilities: np.ndarray) -> float:
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    if targets.ndim == 2:
        losses = np.where(targets == 1, -np.log(clipped), -np.log(1 - clipped))
        return float(losses.mean())
    return float(-np.log(clipped[np.arange(len(targets)), targets]).mean())
