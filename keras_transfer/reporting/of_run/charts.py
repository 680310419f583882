"""The charts of a run, for its page and as files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.advice.probe import quick_learning_curve
from keras_transfer.evaluation.metrics import deciding_metric
from keras_transfer.evaluation.thresholds import accuracy_coverage
from keras_transfer.reporting import charts
from keras_transfer.reporting.of_run.record import Loaded, RunRecord
from keras_transfer.reporting.page import Chart
from keras_transfer.reporting.predictions import KeptPredictions
from keras_transfer.reporting.projection import LEAST_EMBEDDED, Method, project

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MAPPED = 1000
"""Images of a feature map: more hide each other."""

_LEAST_MAPPED = 3
_SINGLE_IMAGES = (
    " The 95% intervals take images of a group as independent, unlike those of the "
    "figures."
)
_VIEWS: dict[Method, str] = {"pca": "PCA", "tsne": "t-SNE"}


@dataclass(frozen=True)
class Drawn:
    """A chart, for a page or a file.

    Attributes:
        name: Name of the file, without its ending.
        title: What it shows.
        figure: The chart.
        caption: How to read it.
    """

    name: str
    title: str
    figure: "Figure"
    caption: str = ""

    def chart(self) -> Chart:
        """Returns the chart as a part of a page."""
        return Chart(self.title, charts.themed_svg(self.figure), self.caption)


def curves(record: RunRecord) -> Iterator[Drawn]:
    """Draws what the probabilities of the images shown say."""
    if record.shown is None:
        return
    for drawn in _curves(record, record.shown):
        has_intervals = bool(drawn.figure.axes[0].collections)
        more = _SINGLE_IMAGES if record.is_grouped and has_intervals else ""
        yield replace(drawn, caption=drawn.caption + more)


def _curves(record: RunRecord, shown: KeptPredictions) -> Iterator[Drawn]:
    names, p = record.class_names, shown.probabilities
    if record.has_all_probabilities and _has_both(shown.targets, len(names)):
        yield Drawn(
            "roc",
            "ROC",
            charts.roc_curves(shown.targets, p, names),
            "Each class against all others. On the diagonal are random guesses.",
        )
        yield Drawn(
            "precision_recall",
            "Precision and recall",
            charts.precision_recall_curves(shown.targets, p, names),
            "How many of the images named a class show it, against how many of those "
            "that show it are found.",
        )
    if shown.targets.ndim == 1:
        yield Drawn(
            "reliability",
            "Reliability",
            charts.reliability_diagram(p.max(1), shown.is_right),
            "On the diagonal, probabilities are as right as they say.",
        )
        yield Drawn(
            "accuracy_coverage",
            "Accuracy and coverage",
            charts.accuracy_coverage_curve(accuracy_coverage(p, shown.targets)),
            "How accurate the surest predictions are, if the others are left to "
            "people.",
        )


def _has_both(targets: np.ndarray, classes: int) -> bool:
    """Returns whether some class is shown by some images, and not by others."""
    if targets.ndim == 1:
        return len(np.unique(targets)) > 1
    counts = targets.sum(0)
    return bool(((counts > 0) & (counts < len(targets))).any())


def by_class(record: RunRecord) -> Iterator[Drawn]:
    """Draws what the page has as tables: for files only."""
    if record.headline is None:
        return
    evaluation = record.evaluations[record.headline]
    if evaluation.confusion is not None:
        yield Drawn(
            "confusion_matrix",
            "Confusion matrix",
            charts.confusion_matrix(evaluation.confusion, record.class_names),
        )
    metric = "recall" if evaluation.confusion is not None else "average_precision"
    yield Drawn("classes", "Classes", charts.class_bars(evaluation.classes, metric))


def learning(record: RunRecord, loaded: Loaded) -> Iterator[Drawn]:
    """Draws the L2 path and the learning curve."""
    rows = [row for row in record.history if row.get("phase") == "fit"]
    if len({row["l2"] for row in rows if row.get("l2")}) > 1:
        yield Drawn(
            "l2_path",
            "L2 path",
            charts.l2_path(rows, record.manifest.l2),
            "The loss of each strength of the penalty on the head's weights. The one "
            "with the smallest loss on images that were not learned from was chosen.",
        )
    if loaded.splits and loaded.features:
        usable = loaded.splits.keep(loaded.features.extraction.digests)
        l2 = record.manifest.l2 if record.config.head.kind == "linear" else None
        reads = {"features": record.manifest.features}
        config = record.config.model_copy(update=reads)
        points = quick_learning_curve(config, usable, loaded.features, l2)
        if not points:
            return
        metric = deciding_metric(usable.train.targets, record.config.metric)
        yield Drawn(
            "learning_curve",
            "Learning curve",
            charts.learning_curve(points, metric),
            "Cross-validated on parts of the training images. If it still rises at its "
            "end, more images would help.",
        )


def tuning(record: RunRecord) -> Iterator[Drawn]:
    """Draws how fine-tuning went."""
    tuned = record.manifest.finetune
    rows = [row for row in record.history if row.get("phase") == "finetune"]
    if rows:
        yield Drawn(
            "epochs",
            "Loss and rate by epoch",
            charts.epoch_curves(rows),
            "Means over an epoch, a pass over the training images. The rate is that of "
            "the head at its end; layers below have lower ones.",
        )
    if tuned and tuned.groups:
        yield Drawn(
            "layer_rates",
            "Rates by layer",
            charts.layer_rates(tuned.groups),
            "Peak learning rates, from the lowest trained layers to the head.",
        )


def mapped(
    record: RunRecord, loaded: Loaded, is_thorough: bool
) -> tuple[KeptPredictions, list[tuple[str, np.ndarray]]] | None:
    """Projects the features of images that were not learned from.

    Returns:
        (predictions of the images, float32 `[N, 2]` points by name); None without
        features.
    """
    kept = record.honest
    if kept is None or loaded.features is None:
        return None
    known = loaded.features.extraction.digests
    kept = kept.select(np.array([x in known for x in kept.sources.tolist()], bool))
    kept = kept.select(mapped_rows(kept.is_right, record.config.seed))
    if len(kept) < _LEAST_MAPPED:
        return None
    features = loaded.features.rows(kept.sources.tolist())[:]
    methods: list[Method] = ["pca"]
    if is_thorough and len(kept) >= LEAST_EMBEDDED:
        methods.append("tsne")
    seed = record.config.seed
    return kept, [(_VIEWS[x], project(features, x, seed)) for x in methods]


def mapped_rows(is_right: np.ndarray, seed: int) -> np.ndarray:
    """Picks at most 1,000 images of a map at random.

    Mistakes come first, but are at most half of them if there are enough others.

    Args:
        is_right: bool `[N]`.
        seed: Seed of the choice.

    Returns:
        int64 indices, increasing.
    """
    order = np.random.default_rng(seed).permutation(len(is_right))
    wrong, right = order[~is_right[order]], order[is_right[order]]
    wrong = wrong[: max(MOST_MAPPED // 2, MOST_MAPPED - len(right))]
    return np.sort(np.concatenate([wrong, right[: MOST_MAPPED - len(wrong)]]))


def maps(
    record: RunRecord,
    kept: KeptPredictions,
    views: Sequence[tuple[str, np.ndarray]],
    numbers: np.ndarray | None = None,
) -> Iterator[Drawn]:
    """Draws the feature map in each projection.

    Args:
        record: What the run's files say.
        kept: The predictions of the images.
        views: float32 `[N, 2]` points by name of the projection.
        numbers: int64 `[N]` numbers of the images on a page.
    """
    for name, points in views:
        figure = charts.feature_map(
            points, kept.targets, kept.is_right, record.class_names, numbers
        )
        file = f"feature_map_{name.lower().replace('-', '')}"
        yield Drawn(file, name, figure)
