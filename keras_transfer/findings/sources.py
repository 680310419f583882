"""Whether a model that learned from some sources knows the images of another one.

Cross-validation on all images says how good a model is for sources that it has seen.
Zech et al. 2018, "Variable generalization performance of a deep learning model to
detect pneumonia in chest radiographs", PLOS Medicine 15, found it worse in hospitals
that it had not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from keras_transfer.config import HeadConfig
from keras_transfer.evaluation.intervals import Groups
from keras_transfer.findings.finding import Finding, Severity
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.probing import (
    cross_validated,
    labelled,
    stratified,
    units_of,
)
from keras_transfer.findings.properties import (
    Property,
    column_properties,
    path_properties,
)
from keras_transfer.findings.telling import Units, fraction_interval, least_mean
from keras_transfer.findings.wording import shortened
from keras_transfer.training.head import predict_head, train_head

_MOST_IMAGES = 2_000
_MOST_PROPERTIES = 6  # those with the fewest values first
_MOST_SOURCES = 10  # values; more are patients, objects or days
_FEWEST_IN_SOURCE = 20  # images to test on
_FEWEST_OF_CLASS = 5  # images of a class, in and outside of a source
_LEVEL = 0.025
_LEAST_LOSS = 0.03
_MEDIUM_LOSS, _HIGH_LOSS = 0.1, 0.2  # lower ends of the loss in accuracy


@dataclass(frozen=True)
class _Loss:
    """What a head loses on a source that it did not learn from.

    Attributes:
        source: Name of the source.
        others: Names of the other sources.
        without: Accuracy of the head that learned from the other sources.
        within: Accuracy of heads that learned from as many images of all sources.
        interval: 95% confidence interval of `without`.
        least: Lower end of the loss, corrected for the number of sources tried.
        images: Number of images of the source.
    """

    source: str
    others: Sequence[str]
    without: float
    within: float
    interval: tuple[float, float]
    least: float
    images: int


def source_findings(
    images: AuditedImages, seed: int, further: Sequence[Property] = ()
) -> list[Finding]:
    """Trains on all sources but one and tests on that one.

    Sources are the values of further columns of the data, of folders and of `further`
    that occur for at least 20 images of at least two classes. The accuracy on a source
    is compared with that of heads that learned from as many images of all sources, its
    own included, on the same images. Sources that hold one class each cannot be tested:
    `shortcut_findings` tells of these.

    Args:
        images: Single-label images with features, of which at most 2,000 are looked at;
            for multi-label data nothing is found.
        seed: Seed of choices and heads.
        further: Properties that were read from files; see `exif.source_properties`.

    Returns:
        A finding for each column with a clear loss, about its worst source.
    """
    if images.multi_label:
        return []
    candidates = [
        one
        for one in (*further, *path_properties(images), *column_properties(images))
        if one.is_category and one.nature != "name" and len(one.labels) <= _MOST_SOURCES
    ]
    candidates.sort(key=lambda one: len(one.labels))
    rows = stratified(images, np.arange(len(images)), _MOST_IMAGES, seed)
    tried = [
        (one, parts)
        for one in candidates[:_MOST_PROPERTIES]
        if len(parts := _parts(one, images.table.targets, rows)) > 1
    ]
    units = units_of(images, rows, seed) if tried else None
    if units is None:
        return []
    probe = _Probe(images.features[rows], units, seed)
    level = _LEVEL / sum(len(parts) for _, parts in tried)
    findings = []
    for one, parts in tried:
        losses = [probe.loss(one, value, one.values[rows], level) for value in parts]
        clear = [loss for loss in losses if loss is not None and loss.least > 0]
        worst = max(clear, key=lambda loss: loss.least, default=None)
        if worst is not None and worst.within - worst.without >= _LEAST_LOSS:
            findings.append(_finding(one, worst))
    return findings


def _parts(one: Property, targets: np.ndarray, rows: np.ndarray) -> list[int]:
    """Returns the values of a property that can be tested on."""
    found = []
    for value in range(len(one.labels)):
        inside = targets[rows[one.values[rows] == value]]
        outside = targets[rows[(one.values[rows] >= 0) & (one.values[rows] != value)]]
        if len(_tested(inside, outside)) > 1 and len(inside) >= _FEWEST_IN_SOURCE:
            found.append(value)
    return found


def _tested(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Returns the classes with enough images in and outside of a source."""
    count = max(inside.max(initial=0), outside.max(initial=0)) + 1
    counts = [np.bincount(part, minlength=count) for part in (inside, outside)]
    return np.flatnonzero(np.minimum(*counts) >= _FEWEST_OF_CLASS)


class _Probe:
    """Trains heads on some images and tests them on others.

    The L2 strength is chosen once, by cross-validation on all images.
    """

    def __init__(self, rows: np.ndarray, units: Units, seed: int):
        self._rows, self._units, self._seed = rows, units, seed
        self._l2 = cross_validated(rows, units, seed).l2

    def loss(
        self, one: Property, value: int, values: np.ndarray, level: float
    ) -> _Loss | None:
        """Compares learning from other sources with learning from all.

        Args:
            one: The property.
            value: The source, an index into its labels.
            values: int64 `[N]` sources of the images.
            level: Probability that the interval may miss on its lower side.
        """
        units = self._units
        is_source, is_other = values == value, (values >= 0) & (values != value)
        classes = _tested(units.targets[is_source], units.targets[is_other])
        # Groups of the source must not be learned from.
        tested = np.flatnonzero(is_source & np.isin(units.targets, classes))
        learned = np.flatnonzero(is_other & ~self._shares_group(is_source))
        if len(tested) < _FEWEST_IN_SOURCE or len(learned) < _FEWEST_IN_SOURCE:
            return None
        without = self._right(learned, tested)
        within = np.zeros(len(tested))
        rng = np.random.default_rng(self._seed)
        half = units.folds[tested] % 2
        for part in (0, 1):
            held_out = tested[half == part]
            mask = np.zeros(len(units), bool)
            mask[held_out] = True
            allowed = np.flatnonzero(
                (is_source | is_other) & ~mask & ~self._shares_group(mask)
            )
            some = rng.permutation(allowed)[: len(learned)]
            if len(held_out):
                within[half == part] = self._right(some, held_out)
        groups = units.groups
        if groups is not None:
            groups = Groups(np.unique(groups.index[tested], return_inverse=True)[1])
        others = [one.labels[x] for x in np.unique(values[learned])]
        return _Loss(
            one.labels[value],
            others,
            float(without.mean()),
            float(within.mean()),
            fraction_interval(without, groups),
            least_mean(within - without, groups, level),
            len(tested),
        )

    def _shares_group(self, mask: np.ndarray) -> np.ndarray:
        """Returns which images belong to a group of those of a mask."""
        groups = self._units.groups
        if groups is None:
            return mask
        return np.isin(groups.index, groups.index[mask])

    def _right(self, learned: np.ndarray, tested: np.ndarray) -> np.ndarray:
        """Trains on some images; returns which others are told right, as 0 or 1."""
        units = self._units
        some = replace(units, targets=units.targets[learned])
        config = HeadConfig(l2=(self._l2,))
        data = labelled(self._rows[learned], some)
        head = train_head(config, data, None, self._seed).model
        said = predict_head(head, self._rows[tested]).argmax(1)
        return (said == units.targets[tested]).astype(np.float64)


def _finding(one: Property, loss: _Loss) -> Finding:
    severity: Severity = "low"
    if loss.least >= _MEDIUM_LOSS:
        severity = "high" if loss.least >= _HIGH_LOSS else "medium"
    low, high = loss.interval
    source, others = shortened(loss.source), ", ".join(map(shortened, loss.others[:3]))
    others += ", ..." if loss.others[3:] else ""
    return Finding(
        kind="worse on another source",
        severity=severity,
        message=(
            f"Trained on {others} and tested on {source} of {one.name}: accuracy "
            f"{loss.without:.2f} ({low:.2f} to {high:.2f}) instead of "
            f"{loss.within:.2f} when images of {source} are learned from too, as "
            "many in all. Expect that of a source that the model has not seen (Zech et "
            "al. 2018, PLOS Medicine 15). Collect images of more sources, and make "
            "each source a group or a test split of its own."
        ),
        figures={
            "accuracy": loss.without,
            "low": low,
            "high": high,
            "all_sources": loss.within,
            "least_loss": loss.least,
            "images": float(loss.images),
        },
    )
