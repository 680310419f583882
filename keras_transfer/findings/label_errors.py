"""Label errors: confident learning on out-of-fold probabilities.

Source: Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty in Dataset
Labels", JAIR 70, as implemented by cleanlab.

Chosen by measurement, which `tests/benchmarks/label_errors.py` repeats. Images are
ranked by the probability of their given label, which puts more flipped labels first
than the normalized margin or the weighted entropy. Of the ways in which cleanlab
decides how many are suspects, taking as many as confident learning counts of each class
(`low_self_confidence`) has the highest precision. It leaves out some clear cases if
there are few, so images whose label has a probability below 0.1 are added.
"""

import importlib.util
import warnings
from collections.abc import Sequence

import numpy as np

from keras_transfer.data.tables import count_classes, label_text
from keras_transfer.findings.classes import FEWEST
from keras_transfer.findings.finding import LABEL_ERRORS, Finding, Suspect, counted
from keras_transfer.findings.images import AuditedImages

INSTALL = (
    "Label errors were not looked for, which needs cleanlab: pip install "
    "'keras-transfer[audit]'."
)
"""The note of an audit without cleanlab."""

_CLEARLY_OTHER = 0.1
"""Probability of the given label. With 5% of the labels of digits flipped, adding those
below finds 90% of them instead of 79%, and 81% of the suspects are flipped."""

_MOST_WRONG = 0.2
"""Share of the images. If more are suspects, the models are mostly wrong themselves: of
faces with 5% of the labels flipped, 40% are, and 1 in 8 of these is flipped."""

_PRESENT = 0.5  # probability from which a class of a multi-label image is believed


def can_find_label_errors() -> bool:
    """Returns whether cleanlab is installed."""
    return importlib.util.find_spec("cleanlab") is not None


def judged_images(images: AuditedImages, probabilities: np.ndarray) -> np.ndarray:
    """Tells which images' labels can be judged.

    Args:
        images: The N images.
        probabilities: As for `label_error_findings`.

    Returns:
        bool `[N]`: images that are predicted, unless their class has so few images
        that no model knows it: each of them would look wrong.
    """
    known = np.isfinite(probabilities).all(1)
    if images.multi_label:
        return known
    counts = count_classes(images.table.targets, len(images.class_names))
    return known & (counts[images.table.targets] >= FEWEST)


def label_error_findings(
    images: AuditedImages, probabilities: np.ndarray
) -> list[Finding]:
    """Finds images whose label is probably wrong.

    Args:
        images: The N images.
        probabilities: float32 `[N, C]` by models that did not learn from the image;
            rows of NaN for images without.

    Returns:
        At most one finding, whose suspects are ordered by how sure it is: by 1 minus
        the probability of the given label; for multi-label data, that of the worst of
        the classes. `other` is the class that is believed.

    Raises:
        ImportError: If cleanlab is not installed.
    """
    known = np.flatnonzero(judged_images(images, probabilities))
    targets, said = images.table.targets[known], probabilities[known]
    if not len(known):
        return []
    if images.multi_label:
        quality, is_suspect = _multi_label(targets, said)
        believed = (said >= _PRESENT).astype(np.uint8)
    else:
        quality, is_suspect = _single_label(targets, said)
        believed = said.argmax(1)
    order = np.argsort(quality, kind="stable")
    order = order[is_suspect[order]]
    if not len(order):
        return []
    suspects = tuple(
        Suspect(
            path=images.table.sources[known[i]],
            score=float(np.clip(1 - quality[i], 0, 1)),
            other=label_text(believed[i], images.class_names),
        )
        for i in order
    )
    count, share = len(order), len(order) / len(known)
    advice = "Look at the first of them, and mend the labels or confirm them."
    if share > _MOST_WRONG:
        advice = (
            "So many say that the models often mistake these classes: only the first "
            "of them are worth a look."
        )
    return [
        Finding(
            kind=LABEL_ERRORS,
            severity="medium" if share <= _MOST_WRONG else "low",
            message=f"{count:,} of {counted(len(known), 'image')} ({share:.1%}) may "
            "have a wrong label: models that did not learn from them say another. "
            f"{advice}",
            suspects=suspects,
            figures={"images": float(count), "share": share},
        )
    ]


def _single_label(
    targets: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes `[n]` quality of the labels, and which of them are suspects.

    Only classes of which an image is labeled take part: cleanlab cannot estimate the
    others.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    shown, labels = np.unique(targets, return_inverse=True)
    if len(shown) < 2:
        return np.ones(len(targets)), np.zeros(len(targets), bool)
    said = probabilities[:, shown].astype(np.float64)
    said /= np.maximum(said.sum(1, keepdims=True), 1e-12)
    quality = get_label_quality_scores(labels, said, method="self_confidence")
    with warnings.catch_warnings():
        # It may say that it found none, or that it kept one image of a class.
        warnings.simplefilter("ignore")
        is_issue = find_label_issues(
            labels, said, filter_by="low_self_confidence", n_jobs=1
        )
    is_other = (said.argmax(1) != labels) & (quality < _CLEARLY_OTHER)
    return quality, np.asarray(is_issue) | is_other


def _multi_label(
    targets: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Does the same for multi-label data; a suspect has a class too many or too few.

    The quality of an image's labels is that of the worst of its classes, which puts
    more flipped ones first than cleanlab's moving average over the classes.
    """
    from cleanlab.multilabel_classification.filter import find_label_issues

    shown = np.flatnonzero(targets.any(0) & ~targets.all(0))
    if not len(shown):
        return np.ones(len(targets)), np.zeros(len(targets), bool)
    labels = _lists(targets[:, shown])
    said = probabilities[:, shown].astype(np.float64)
    quality = np.where(targets[:, shown] > 0, said, 1 - said).min(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_issue = find_label_issues(
            labels, said, filter_by="low_self_confidence", n_jobs=1
        )
    is_suspect = np.asarray(is_issue) | (quality < _CLEARLY_OTHER)
    return quality, is_suspect & (quality < _PRESENT)


def _lists(targets: np.ndarray) -> Sequence[list[int]]:
    return [np.flatnonzero(row).tolist() for row in targets]
