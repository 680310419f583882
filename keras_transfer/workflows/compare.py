"""The workflow of `kt runs compare`: a paired test of two runs on common test images.

Only images count that were test images of both runs, with the same bytes and labels,
and that neither run was trained on under any name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keras_transfer.data.cells import utf8
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.evaluation.comparison import (
    FEWEST_INFORMATIVE,
    compare,
    images_needed,
)
from keras_transfer.evaluation.intervals import Interval
from keras_transfer.evaluation.metrics import Evaluation, deciding_metric, evaluate
from keras_transfer.reporting.predictions import (
    MOST_COLUMNS,
    TOP,
    KeptPredictions,
    changes,
    read_predictions,
)
from keras_transfer.runs.run import Run, read_together

LEVEL = 0.05
"""Largest two-sided p-value of a difference that is not attributed to chance."""

_GAIN = 0.05  # that more images could recognize


@dataclass(frozen=True)
class RunComparison:
    """Two runs on the test images that they have in common.

    Attributes:
        names: Directories of both runs.
        metric: The metric that is compared: `accuracy`, or `mean_average_precision`
            for multi-label data.
        first: Metrics of the first run on the common images. If a run has more than
            100 classes, these are without the log loss and the metrics of ranks, since
            not every probability was kept.
        second: Metrics of the second run on them.
        interval: 95% confidence interval of the difference.
        p_value: Probability of a difference at least this large, in either direction,
            if the runs are equally good, from 0 to 1.
        informative: Number of images, or groups, for which the runs differ.
        needed: Estimated number of images that would recognize a difference of 5 points
            in 4 of 5 cases.
        left_out: Number of test images of the first run that do not count, by reason.
        gained: Sources, as in the first run, of the common images that only the second
            run predicts correctly, the surest predictions first.
        lost: Sources of those that only the first run does.
    """

    names: tuple[str, str]
    metric: str
    first: Evaluation
    second: Evaluation
    interval: Interval
    p_value: float
    informative: int
    needed: int
    left_out: Mapping[str, int]
    gained: Sequence[str] = ()
    lost: Sequence[str] = ()

    @property
    def difference(self) -> float:
        """The second run's metric minus the first one's, from -1 to 1."""
        return float(getattr(self.second, self.metric)) - float(
            getattr(self.first, self.metric)
        )

    @property
    def described_difference(self) -> str:
        """The difference with its interval, such as `+0.020 (-0.010 to +0.050)`."""
        low, high = self.interval
        return f"{self.difference:+.3f} ({low:+.3f} to {high:+.3f})"

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than chance may explain."""
        return self.p_value <= LEVEL and self.informative >= FEWEST_INFORMATIVE

    @property
    def sentence(self) -> str:
        """What the comparison says."""
        if self.is_clear:
            better, worse = self.names if self.difference < 0 else self.names[::-1]
            return f"{better} is better than {worse} (p = {self.p_value:.3g})."
        text = f"Which run is better cannot be told (p = {self.p_value:.3g})"
        if self.informative < FEWEST_INFORMATIVE:
            text += f": they differ for {self.informative:,} of the common test images"
        if self.needed > self.first.images:
            text += (
                f". A difference of {_GAIN:g} would take about {self.needed:,} common "
                f"test images, and there are {self.first.images:,}"
            )
        return f"{text}."

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.described_difference} on {self.first.images:,} "
            f"common test images. {self.sentence}"
        )


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a run keeps of its test images.

    Attributes:
        run: The run.
        data: Its DATA argument.
        class_names: Its class names.
        multi_label: Whether its images may show several classes.
        test: Its predictions of the test images.
        sources: Their sources, as in `images`.
        images: (SHA-256, group) of its usable images by source.
        learned: SHA-256 of its training images.
    """

    run: Run
    data: str
    class_names: Sequence[str]
    multi_label: bool
    test: KeptPredictions
    sources: Sequence[str]
    images: Mapping[str, tuple[bytes, str]]
    learned: frozenset[bytes]

    @classmethod
    def of(cls, run: Run) -> "_Kept":
        """Reads what a run keeps."""
        manifest, names = run.manifest, run.class_names
        if not run.predictions_path.exists():
            raise KerasTransferError(
                "Runs are compared by the predictions that they keep. Received: "
                f"{run.run_dir}, which was made by a version that kept none. Train it "
                "again."
            )
        predictions = read_predictions(
            run.predictions_path, names, manifest.multi_label
        )
        images, learned = _read_images(run)
        test = predictions.select(predictions.how == "test")
        sources = [utf8(str(source)) for source in test.sources]
        if not images.keys() >= {*sources}:
            raise KerasTransferError(
                f"{run.images_path} and {run.predictions_path.name} do not belong "
                "together. Train the run again."
            )
        return cls(
            run,
            manifest.data,
            names,
            manifest.multi_label,
            test,
            sources,
            images,
            learned,
        )

    @property
    def has_all_probabilities(self) -> bool:
        """Whether the probability of every class was kept."""
        return len(self.class_names) <= MOST_COLUMNS

    def labels(self, row: int) -> frozenset[str]:
        """Returns the names of the classes that a test image shows."""
        target = self.test.targets[row]
        shown = np.flatnonzero(target) if self.multi_label else [target]
        return frozenset(self.class_names[int(index)] for index in shown)

    def probabilities(self, rows: Sequence[int], names: Sequence[str]) -> np.ndarray:
        """Returns float32 `[n, len(names)]`; 0 for classes that the run lacks."""
        found = np.zeros((len(rows), len(names)), np.float32)
        columns = [names.index(name) for name in self.class_names]
        found[:, columns] = self.test.probabilities[rows]
        return found


def compare_two(first: Run, second: Run) -> RunComparison:
    """Implements `api.compare_runs`.

    Raises:
        UsageError: If only one of the runs has multi-label data, both have and one has
            more than 100 classes, or predictions.csv of a run is damaged.
        KerasTransferError: If the runs have no test image in common, or one has no
            predictions.csv.
    """
    one, other = _read(first), _read(second)
    _check(one, other)
    pairs, left_out = _common(one, other)
    if not pairs:
        reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
        raise KerasTransferError(
            f"The runs have no test image in common. Received: {first.run_dir} of "
            f"{one.data} and {second.run_dir} of {other.data}; of the first one's "
            f"{len(one.test):,} test images, {reasons or 'there are none'}. Train both "
            "with the same splits, as in kt fit DATA --splits RUN/splits.csv."
        )
    rows, others = (list(side) for side in zip(*pairs, strict=True))
    names = list(dict.fromkeys([*one.class_names, *other.class_names]))
    targets = np.array(
        [[name in one.labels(row) for name in names] for row in rows], np.uint8
    )
    if not one.multi_label:
        targets = targets.argmax(1)
    probabilities = one.probabilities(rows, names), other.probabilities(others, names)
    groups = [
        one.images[one.sources[row]][1] or other.images[other.sources[match]][1]
        for row, match in pairs
    ]
    metric = deciding_metric(targets)
    tested = compare(metric, targets, *probabilities, groups)
    evaluations = [evaluate(targets, p, names, groups) for p in probabilities]
    if not (one.has_all_probabilities and other.has_all_probabilities):
        evaluations = [_without_ranks(evaluation) for evaluation in evaluations]
    # The same image may have another name in the other run.
    before, after = one.test.select(np.array(rows)), other.test.select(np.array(others))
    gained, lost = changes(before, replace(after, sources=before.sources))
    return RunComparison(
        (str(first.run_dir), str(second.run_dir)),
        metric,
        evaluations[0],
        evaluations[1],
        tested.interval,
        p_value=min(1.0, 2 * min(tested.p_value, 1 - tested.p_value)),
        informative=tested.informative,
        needed=images_needed(tested, _GAIN, level=LEVEL / 2),
        left_out=left_out,
        gained=gained,
        lost=lost,
    )


def _check(one: _Kept, other: _Kept) -> None:
    """Checks that what two runs keep can be compared.

    Raises:
        UsageError: If it cannot.
    """
    if one.multi_label != other.multi_label:
        raise UsageError(
            "Runs are compared if both have one class per image, or both several. "
            f"Received: {one.run.run_dir} and {other.run.run_dir}. Compare others."
        )
    for kept in (one, other):
        if kept.multi_label and not kept.has_all_probabilities:
            raise UsageError(
                "Multi-label runs are compared by the probabilities of all classes, "
                f"and of more than {MOST_COLUMNS} only the {TOP} most likely are kept. "
                f"Received: {kept.run.run_dir} of {len(kept.class_names):,} classes. "
                "See the figures of both with kt runs."
            )


def _without_ranks(evaluation: Evaluation) -> Evaluation:
    """Leaves out what takes the probability of every class."""

    def kept(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
        return {k: v for k, v in intervals.items() if k not in unknown}

    unknown = ("log_loss", "roc_auc", "average_precision")
    classes = {
        name: one.model_copy(
            update={
                "roc_auc": None,
                "average_precision": None,
                "intervals": kept(one.intervals),
            }
        )
        for name, one in evaluation.classes.items()
    }
    return evaluation.model_copy(
        update={
            "log_loss": None,
            "roc_auc": None,
            "intervals": kept(evaluation.intervals),
            "classes": classes,
        }
    )


def _read(run: Run) -> _Kept:
    return read_together(run, lambda: _Kept.of(run))


def _common(one: _Kept, other: _Kept) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Pairs the test images of two runs by their bytes, wherever they lie.

    Returns:
        (rows of both runs' predictions, the number of the others by reason).
    """
    place = {other.images[x][0]: row for row, x in enumerate(other.sources)}
    sources, pairs, reasons = {*other.sources}, [], Counter[str]()
    for row, source in enumerate(one.sources):
        digest = one.images[source][0]
        found = place.get(digest)
        if digest in one.learned or digest in other.learned:
            reasons["were training images of a run"] += 1
        elif found is None and source in sources:
            reasons["have changed between the runs"] += 1
        elif found is None:
            reasons["are not test images of the other"] += 1
        elif one.labels(row) != other.labels(found):
            reasons["have another label in the other"] += 1
        else:
            pairs.append((row, found))
    return pairs, dict(reasons)


def _read_images(run: Run) -> tuple[dict[str, tuple[bytes, str]], frozenset[bytes]]:
    """Reads the digest and the group of usable images, and the digests of learned ones.

    Raises:
        KerasTransferError: If the image table is missing or damaged.
    """
    try:
        # From bytes, because pyarrow takes only paths that are valid UTF-8.
        source = pa.BufferReader(run.images_path.read_bytes())
        table = pq.read_table(source, columns=["source", "split", "sha256", "group"])
    except (OSError, pa.ArrowException) as error:
        raise KerasTransferError(
            f"{run.images_path} cannot be read ({first_line(error)}). Train the run "
            "again."
        ) from None
    rows = [row for row in table.to_pylist() if row["sha256"] is not None]
    known = {row["source"]: (row["sha256"], row["group"] or "") for row in rows}
    learned = frozenset(row["sha256"] for row in rows if row["split"] == "train")
    return known, learned
