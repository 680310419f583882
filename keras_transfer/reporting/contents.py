"""Predictions and metrics -> figures, tables and galleries of a report page."""

from collections.abc import Mapping, Sequence

import numpy as np

from keras_transfer.evaluation.metrics import ClassEvaluation, Evaluation
from keras_transfer.evaluation.names import LABELS
from keras_transfer.reporting.album import Album, confidence
from keras_transfer.reporting.page import (
    Cell,
    ClassRow,
    ConfusedPair,
    Confusion,
    Figure,
    Figures,
)
from keras_transfer.reporting.predictions import KeptPredictions

MOST_IN_MATRIX = 20
"""With more classes than this, the matrix has only those that are confused most."""

_LISTED = 15  # classes of a matrix that is cut down
_PAIRS = 10
_NUMBERS = ("macro_f1", "roc_auc", "log_loss", "ece")  # others are percentages
_MORE_LABELS = {"log_loss": "log loss (nats)", "ece": "calibration error"}


def figures_of(evaluation: Evaluation, title: str, learned: np.ndarray) -> Figures:
    """Puts the figures of an evaluation beside those of knowing nothing.

    Args:
        evaluation: The evaluation.
        title: What it was measured on.
        learned: float `[num_classes]` share of each class in the training images.
    """
    names = [*evaluation.classes]
    baselines = _baselines(evaluation, names, learned)
    is_multi_label = evaluation.confusion is None
    figures = []
    for name, text in (LABELS | _MORE_LABELS).items():
        value = getattr(evaluation, name)
        if value is None or (is_multi_label and name in _SINGLE_LABEL_ONLY):
            continue
        low, high = evaluation.intervals.get(name, (None, None))
        baseline, against = baselines.get(name, (None, ""))
        figures.append(
            Figure(
                text[0].upper() + text[1:],
                value,
                low,
                high,
                baseline,
                against,
                is_percent=name not in _NUMBERS,
                has_bar=name not in ("log_loss", "ece"),
            )
        )
    return Figures(title, tuple(figures))


_SINGLE_LABEL_ONLY = ("accuracy", "balanced_accuracy", "ece")


def _baselines(
    evaluation: Evaluation, names: Sequence[str], learned: np.ndarray
) -> Mapping[str, tuple[float, str]]:
    """Returns what is reached without looking at images, and how, by metric.

    The majority class is that of the training images. Its F1 is 2p / (1 + p), that of
    the other classes 0. Giving every image the class shares q of the training images
    has a log loss of -sum p log q. A random order has a ROC AUC of 1/2 and, of many
    images, an average precision of p.
    """
    shown = np.array([evaluation.classes[name].support for name in names], float)
    share = shown / evaluation.images
    chance = {"roc_auc": (0.5, "at random")}
    if evaluation.confusion is None:
        occurring = share[share > 0]
        mean = float(occurring.mean()) if len(occurring) else 0.0
        return {**chance, "mean_average_precision": (mean, "at random")}
    top = int(np.argmax(learned))
    always, p = f"always {names[top]}", float(share[top])
    present = int((shown > 0).sum())
    rows = max(present, int(shown[top] == 0) + present)
    q = np.clip(learned, 1e-7, 1)
    return {
        **chance,
        "accuracy": (p, always),
        "balanced_accuracy": (float(p > 0) / max(present, 1), always),
        "macro_f1": (2 * p / (1 + p) / rows, always),
        "log_loss": (float(-(share * np.log(q)).sum()), "class shares alone"),
        "ece": (evaluation.ece_if_calibrated or 0.0, "expected if calibrated"),
    }


def confusion_of(
    kept: KeptPredictions, names: Sequence[str], album: Album
) -> Confusion:
    """Makes the confusion matrix of single-label predictions, with its images."""
    said = kept.is_predicted.argmax(1)
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (kept.targets, said), 1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    columns = _most_confused(wrong)
    certainty = confidence(kept)

    def cell(true: int, other: int) -> Cell:
        count = int(counts[true, other])
        share = count / max(int(counts[true].sum()), 1)
        return Cell(count, share, open_cell(true, other) if count else "")

    def open_cell(true: int, other: int) -> str:
        key = f"cell-{true}-{other}"
        if key in album.sets:
            return key
        rows = np.flatnonzero((kept.targets == true) & (said == other))
        order = certainty[rows] if true == other else -certainty[rows]
        sources = kept.sources[rows[np.argsort(order, kind="stable")]].tolist()
        is_right = true == other
        title = (
            f"{names[true]}, predicted as {names[other]}"
            if not is_right
            else f"{names[true]}, predicted correctly, the least sure first"
        )
        return album.put(key, title, sources)

    by_count = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(x), len(names)) for x in by_count if wrong.flat[x]]
    shown = tuple(
        ConfusedPair(names[i], names[j], c.count, c.share, c.key)
        for i, j in pairs
        if (c := cell(i, j))
    )
    # Mistakes get their pictures before what is right.
    cells = {(i, j): cell(i, j) for i in columns for j in columns if i != j}
    cells |= {(i, i): cell(i, i) for i in columns}
    is_part = len(columns) < len(names)
    return Confusion(
        class_names=tuple(names[i] for i in columns),
        rows=tuple(tuple(cells[i, j] for j in columns) for i in columns),
        others=tuple(
            int(counts[i].sum() - counts[i, columns].sum()) for i in columns if is_part
        ),
        classes=len(names),
        pairs=shown,
        rest=tuple(_taken_for(wrong, names)) if is_part else (),
    )


def _most_confused(wrong: np.ndarray) -> list[int]:
    """Returns the classes of the matrix: all, or those of the largest confusions."""
    if len(wrong) <= MOST_IN_MATRIX:
        return [*range(len(wrong))]
    found: dict[int, None] = {}
    for index in np.argsort(-wrong, axis=None, kind="stable"):
        if len(found) >= _LISTED or not wrong.flat[index]:
            break
        found |= dict.fromkeys(divmod(int(index), len(wrong)))
    return sorted(found) or [*range(_LISTED)]


def _taken_for(wrong: np.ndarray, names: Sequence[str]) -> list[tuple[str, str]]:
    """Lists what each class was taken for, the most confused class first."""
    found = []
    for i in np.argsort(-wrong.sum(1), kind="stable"):
        others = [j for j in np.argsort(-wrong[i], kind="stable") if wrong[i, j]]
        if others:
            text = ", ".join(f"{names[j]} ({wrong[i, j]})" for j in others)
            found.append((names[i], text))
    return found


def class_rows(
    kept: KeptPredictions,
    names: Sequence[str],
    classes: Mapping[str, ClassEvaluation],
    thresholds: Mapping[str, float] | None,
    album: Album,
) -> tuple[ClassRow, ...]:
    """Makes a row per class, the worst first.

    Args:
        kept: The predictions.
        names: Class names in the order of the probabilities.
        classes: Metrics by class name.
        thresholds: Threshold by class name; None for single-label data.
        album: Receives the images that were missed and wrongly said.
    """
    is_multi_label = kept.targets.ndim == 2
    metric = "average_precision" if is_multi_label else "recall"
    shows = (
        kept.targets > 0
        if is_multi_label
        else kept.targets[:, None] == np.arange(len(names))
    )

    def worst(name: str) -> tuple[bool, float]:
        found = classes[name]
        value = getattr(found, metric)
        return not found.support, value if value is not None else 1.0

    rows = []
    for name in sorted(names, key=worst):
        index, found = names.index(name), classes[name]
        said, p = kept.is_predicted[:, index], kept.probabilities[:, index]
        missed = _sorted(kept.sources, shows[:, index] & ~said, p)
        mistaken = _sorted(kept.sources, ~shows[:, index] & said, -p)
        further = ("recall",) if is_multi_label else ()
        rows.append(
            ClassRow(
                name,
                found.support,
                class_figure(found, metric),
                tuple(class_figure(found, x) for x in (*further, "precision", "f1")),
                album.put(f"missed-{index}", f"{name}, missed", missed),
                album.put(
                    f"mistaken-{index}", f"Wrongly predicted as {name}", mistaken
                ),
                None if thresholds is None else thresholds.get(name, 0.5),
            )
        )
    return tuple(rows)


def _sorted(sources: np.ndarray, mask: np.ndarray, order: np.ndarray) -> list[str]:
    rows = np.flatnonzero(mask)
    found: list[str] = sources[rows[np.argsort(order[rows], kind="stable")]].tolist()
    return found


_CLASS_LABELS = {
    "recall": "found (recall)",
    "average_precision": "average precision",
    "precision": "precision",
    "f1": "F1",
}


def class_figure(found: ClassEvaluation, metric: str) -> Figure:
    """Returns a figure of a class; without a value if no image shows it."""
    low, high = found.intervals.get(metric, (None, None))
    value = getattr(found, metric) if found.support else None
    return Figure(_CLASS_LABELS[metric], value, low, high, is_percent=metric != "f1")


def mistakes_and_doubts(
    kept: KeptPredictions,
    thresholds: np.ndarray | None,
    most_mistakes: int,
    most_doubts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the most confident mistakes and the least sure predictions.

    Of multi-label data, a mistake is as confident as the probability is far from the
    label, and a prediction as unsure as some probability is near its threshold.

    Args:
        kept: The predictions.
        thresholds: float32 `[num_classes]`; None for single-label data.
        most_mistakes: Largest number of mistakes.
        most_doubts: Largest number of doubts.

    Returns:
        (int64 rows of mistakes, int64 rows of doubts).
    """
    p = kept.probabilities
    if thresholds is None:
        sure, doubt = p.max(1), p.max(1)
    else:
        sure = (abs(p - kept.targets) * (kept.is_predicted != (kept.targets > 0))).max(
            1
        )
        doubt = abs(p - thresholds).min(1)
    wrong = np.flatnonzero(~kept.is_right)
    mistakes = wrong[np.argsort(-sure[wrong], kind="stable")][:most_mistakes]
    return mistakes, np.argsort(doubt, kind="stable")[:most_doubts]
