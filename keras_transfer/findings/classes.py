"""Classes and splits: what looks alike, what is too small, what splits make untrue."""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.stats

from keras_transfer.data.tables import Table, count_classes
from keras_transfer.evaluation.intervals import Groups, as_interval, wilson
from keras_transfer.evaluation.thresholds import independent_images
from keras_transfer.findings.finding import Finding, Suspect, counted
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.telling import fraction_interval

_ALIKE = 0.1
"""Share of the images of two classes that are taken for the other one, above which the
classes look alike: the lower end of its 95% interval must exceed it."""
_FEWEST_MIXED = 5  # images; of fewer, a look at the images themselves says more
_MOST_PAIRS = 5  # the worst; others follow from the confusion matrix

FEWEST = 10
"""Images per class. Source: Google's AutoML Vision refuses labels with fewer."""
FEW = 50
"""Images per class. Source: Microsoft's Custom Vision recommends at least 50."""

_BALANCE_P = 1e-3  # of a class's shares, after Bonferroni's correction
_BALANCE = 0.05  # difference of shares that matters
_WIDE = 0.2
"""Width of the 95% interval of the accuracy of test images from which they say little.
With an accuracy of 0.9, 35 images are as many."""
_GUESSED_ACCURACY = 0.9  # if nothing says how good a model is
_SHOWN = 5  # class names in a message


def class_findings(images: AuditedImages, probabilities: np.ndarray) -> list[Finding]:
    """Finds classes that look alike or are too small, and doubtful splits.

    Args:
        images: The N images.
        probabilities: float32 `[N, C]` by models that did not learn from the image;
            rows of NaN for images without.
    """
    return [
        *_shared_groups(images),
        *_absent_classes(images),
        *_balance(images),
        *_small_test(images, probabilities),
        *_few_images(images),
        *_alike(images, probabilities),
    ]


def training_groups(images: AuditedImages) -> np.ndarray:
    """Counts the groups of training images that show each class, as int64 `[C]`.

    An image without a group is one by itself.
    """
    table = images.table.select(np.flatnonzero(images.split == "train"))
    rows, classes = np.arange(len(table)), table.targets
    if images.multi_label:
        rows, classes = np.nonzero(table.targets)
    groups = Groups.of(table.groups)
    units = rows if groups is None else groups.index[rows]
    _, shown = np.unique(np.stack([units, classes]), axis=1)
    return np.bincount(shown, minlength=len(images.class_names))


def single_group_findings(images: AuditedImages) -> list[Finding]:
    """Finds classes whose training images are all of one group.

    Args:
        images: The images; copies share a group.
    """
    lonely = np.flatnonzero(training_groups(images) == 1)
    if not len(lonely):
        return []
    verb = "has" if len(lonely) == 1 else "have"
    total = counted(len(images.class_names), "class", "classes")
    return [
        Finding(
            kind="classes of a single group",
            severity="medium",
            message=f"{len(lonely):,} of {total} {verb} training images of a single "
            "group, or of copies of a single image, only: "
            f"{_names(images, lonely)}. Cross-validation cannot judge them: a model "
            "that did not learn from the group has not learned the class, so its "
            "figures out of fold, such as a recall of 0, say nothing. Collect images "
            "of more groups, such as of other patients or films.",
            figures={"classes": float(len(lonely))},
        )
    ]


def _alike(images: AuditedImages, probabilities: np.ndarray) -> Iterator[Finding]:
    """Finds pairs of classes that models take for each other."""
    known = np.isfinite(probabilities).all(1)
    if images.multi_label or not known.any():
        return
    count = len(images.class_names)
    table, said = images.table.select(known), probabilities[known].argmax(1)
    cells = table.targets * count + said
    confusion = np.bincount(cells, minlength=count**2).reshape(count, count)
    mixed = np.triu(confusion + confusion.T, 1)
    right = np.diag(confusion)
    total = mixed + right[:, None] + right
    low, high = np.moveaxis(wilson(mixed / np.maximum(total, 1), total), -1, 0)
    low = np.where(mixed >= _FEWEST_MIXED, low, 0.0)
    if any(table.groups):  # which make intervals wider, so no further pair is found
        for a, b in np.argwhere(low > _ALIKE):
            of_pair = np.isin(table.targets, (a, b)) & np.isin(said, (a, b))
            groups = Groups.of(table.select(of_pair).groups)
            is_mixed = (said != table.targets)[of_pair].astype(float)
            low[a, b], high[a, b] = fraction_interval(is_mixed, groups)
    first, second = np.nonzero(low > _ALIKE)
    for i in np.argsort(-low[first, second], kind="stable")[:_MOST_PAIRS]:
        a, b = int(first[i]), int(second[i])
        one, other = images.class_names[a], images.class_names[b]
        share = mixed[a, b] / total[a, b]
        yield Finding(
            kind="classes that look alike",
            severity="low",
            message=f"{mixed[a, b]:,} of {total[a, b]:,} images of {one!r} and "
            f"{other!r} ({share:.0%}; 95% interval {low[a, b]:.0%} to "
            f"{high[a, b]:.0%}) are taken for the other class. Look whether their "
            "labels follow one rule, and whether the classes need to be apart.",
            figures={
                "share": float(share),
                "low": float(low[a, b]),
                "high": float(high[a, b]),
                "images": float(mixed[a, b]),
            },
        )


def _few_images(images: AuditedImages) -> Iterator[Finding]:
    """Finds classes with too few images to learn, or to learn well."""
    counts = count_classes(images.table.targets, len(images.class_names))
    is_few = counts < FEWEST
    if is_few.any():
        yield Finding(
            kind="classes with too few images",
            severity="medium",
            message=f"{_counted(images, counts, is_few)} fewer than {FEWEST} images: "
            "too few to learn what varies. Collect more, or join them with others.",
            figures={"classes": float(is_few.sum()), "fewest": float(counts.min())},
        )
    is_some = (counts < FEW) & ~is_few
    if is_some.any():
        yield Finding(
            kind="classes with few images",
            severity="low",
            message=f"{_counted(images, counts, is_some)} fewer than {FEW} images. "
            "More would help.",
            figures={"classes": float(is_some.sum())},
        )


def _counted(images: AuditedImages, counts: np.ndarray, is_meant: np.ndarray) -> str:
    order = np.flatnonzero(is_meant)
    order = order[np.argsort(counts[order], kind="stable")]
    shown = [f"{images.class_names[i]!r} {counts[i]:,}" for i in order[:_SHOWN]]
    more = f" and {len(order) - _SHOWN:,} more" if len(order) > _SHOWN else ""
    verb = "has" if len(order) == 1 else "have"
    total = counted(len(counts), "class", "classes")
    return f"{len(order):,} of {total} ({', '.join(shown)}{more}) {verb}"


def _absent_classes(images: AuditedImages) -> Iterator[Finding]:
    """Finds classes that training or test images do not show, although others do."""
    total = count_classes(images.table.targets, len(images.class_names))
    for split, doing in (("train", "learned"), ("test", "judged")):
        counts = _counts(images, split)
        absent = np.flatnonzero((counts == 0) & (total > 0))
        if not counts.any() or not len(absent):
            continue
        yield Finding(
            kind=f"classes absent from {split}",
            severity="medium",
            message=f"The {split} split has no image of {len(absent):,} of "
            f"{len(total):,} classes: {_names(images, absent)}, which cannot be "
            f"{doing}. Divide the images anew, or collect some.",
            figures={"classes": float(len(absent))},
        )


def _balance(images: AuditedImages) -> Iterator[Finding]:
    """Finds classes whose share of the test images is another than by chance.

    The test is Fisher's exact one, class by class, with Bonferroni's correction. It
    counts groups, or images without one: those that show the class more often than all
    images do.
    """
    tables = [images.table.select(images.split == x) for x in ("train", "test")]
    if not all(map(len, tables)):
        return
    train, test = (
        count_classes(table.targets, len(images.class_names)) for table in tables
    )
    shares = train / len(tables[0]), test / len(tables[1])
    usual = (train + test) / (len(tables[0]) + len(tables[1]))
    differing = np.flatnonzero(np.abs(shares[1] - shares[0]) >= _BALANCE)
    found = []
    for i in differing.tolist():
        cells = [_groups_above(table, i, usual[i]) for table in tables]
        if scipy.stats.fisher_exact(cells).pvalue < _BALANCE_P / len(train):
            found.append(i)
    if not found:
        return
    worst = max(found, key=lambda i: abs(shares[1][i] - shares[0][i]))
    yield Finding(
        kind="class balance of test",
        severity="medium",
        message=f"{len(found):,} of {len(train):,} classes have another share of the "
        f"test than of the training images, which is not by chance: "
        f"{images.class_names[worst]!r} {shares[1][worst]:.0%} instead of "
        f"{shares[0][worst]:.0%}. Accuracy is that of another mix: look at balanced "
        "accuracy and at the classes, or divide the images anew.",
        figures={
            "classes": float(len(found)),
            "train": float(shares[0][worst]),
            "test": float(shares[1][worst]),
        },
    )


def _groups_above(table: Table, index: int, share: float) -> tuple[int, int]:
    """Counts groups that show a class in more than a share of their images, and others.

    An image without a group is one by itself.
    """
    targets = table.targets
    shows = targets == index if targets.ndim == 1 else targets[:, index] > 0
    groups = Groups.of(table.groups)
    shares = shows
    if groups is not None:
        shares = groups.sum(shows) / groups.sum(np.ones(len(shows)))
    above = int(np.count_nonzero(shares > share))
    return above, len(shares) - above


def _small_test(images: AuditedImages, probabilities: np.ndarray) -> Iterator[Finding]:
    """Finds test sets whose figures say little, by the width of an interval."""
    is_test = images.split == "test"
    count = int(np.count_nonzero(is_test))
    shown = count_classes(images.table.targets, len(images.class_names)) > 0
    if not count or count == len(images) or shown.sum() < 2 - images.multi_label:
        return
    accuracy = _GUESSED_ACCURACY
    groups = independent_images(images.table.select(is_test).groups, count)
    low, high = as_interval(wilson(accuracy, groups))
    known = is_test & np.isfinite(probabilities).all(1)
    if known.any() and not images.multi_label:
        table = images.table.select(known)
        right = (probabilities[known].argmax(1) == table.targets).astype(float)
        accuracy = float(right.mean())
        low, high = fraction_interval(right, Groups.of(table.groups))
    if high - low <= _WIDE:
        return
    of_groups = f" of {counted(groups, 'group')}" if groups < count else ""
    yield Finding(
        kind="small test set",
        severity="low",
        message=f"With {counted(count, 'test image')}{of_groups} an accuracy of "
        f"{accuracy:.2f} may be anything from {low:.2f} to {high:.2f} (95% interval). "
        "Prefer figures of cross-validation, or test on more "
        f"{'groups' if of_groups else 'images'}.",
        figures={"images": float(count), "low": float(low), "high": float(high)},
    )


def _shared_groups(images: AuditedImages) -> Iterator[Finding]:
    """Finds groups that are divided between training and test images."""
    groups = np.array(images.table.groups, object)
    known = set(groups[images.split == "train"]) - {""}
    rows = [i for i in np.flatnonzero(images.split == "test") if groups[i] in known]
    if not rows:
        return
    total = int(np.count_nonzero(images.split == "test"))
    verb = "has" if len(rows) == 1 else "have"
    yield Finding(
        kind="groups divided between splits",
        severity="high",
        message=f"{len(rows):,} of {counted(total, 'test image')} {verb} a group "
        "that is in the train split too, so figures flatter. Leave out the split "
        "column, which keeps groups together, or divide whole groups.",
        suspects=tuple(
            Suspect(path=images.table.sources[i], other=str(groups[i])) for i in rows
        ),
        figures={"images": float(len(rows)), "share": len(rows) / total},
    )


def _counts(images: AuditedImages, split: str) -> np.ndarray:
    targets = images.table.targets[images.split == split]
    return count_classes(targets, len(images.class_names))


def _names(images: AuditedImages, classes: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(repr(images.class_names[i]) for i in classes[:_SHOWN])
    return shown + (", ..." if len(classes) > _SHOWN else "")
