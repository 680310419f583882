"""A short trial of fine-tuning, which shows what it gains before it is paid for.

The top stage is trained for a few epochs on cached activations, in folds: every image
is predicted by a head that did not learn from it, and by the same head after it was
fine-tuned together with the top stage, on the images that the head had learned from.
As in `kt unfreeze-and-finetune`, which uses the same activations, the weights before
and after are mixed, and each half of the images chooses the mix for the other.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_transfer.advice.costs import TuningCosts
from keras_transfer.advice.evidence import Trial
from keras_transfer.advice.probe import deal
from keras_transfer.config import Config
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.comparison import compare
from keras_transfer.evaluation.crossvalidation import fold_numbers
from keras_transfer.evaluation.metrics import deciding_metric
from keras_transfer.evaluation.validation import cross_fit, halves
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.activations import Activations, frozen_activations
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.features.parity import PARITY_IMAGES
from keras_transfer.features.usable import keep_copies_together
from keras_transfer.models.bases import get_bases
from keras_transfer.models.classifier import attach_head, join_bases
from keras_transfer.models.layer_groups import (
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.training.head import train_on_features
from keras_transfer.training.labelled import (
    class_weighting,
    label_features,
    relative_weights,
)
from keras_transfer.training.optim import layer_patterns
from keras_transfer.training.tail import TailData, TailRecipe, train_tail
from keras_transfer.training.tuned import ALPHAS, CutClassifier, Mix

FOLDS = 3
"""Folds: each model learns from two thirds of the images."""

FEWEST_EPOCHS = 5
"""Epochs below which there is no trial. With few images, these are few steps, after
which fine-tuning may look worse than it is; so there are more if time allows."""

FEWEST_IMAGES = 1_000
"""Images that are tried on if there are as many; with fewer, there is no trial."""

SECONDS = 300.0
"""Time that a trial may take without a budget."""

SHARE = 0.25
"""Fraction of a budget that a trial may take."""

_OPTIONS: Mapping[str, Any] = {
    "unfreeze": "top",
    "augment": 0,
    "patience": None,
    "from_scratch_head": False,
}


@dataclass(frozen=True)
class TrialPlan:
    """How much a trial tries.

    Attributes:
        images: Number of training images.
        epochs: Number of epochs in each fold.
        seconds: Estimated duration.
    """

    images: int
    epochs: int
    seconds: float


def plan_trial(
    images: int, epochs: int, costs: TuningCosts, head: float, most: float
) -> tuple[TrialPlan, bool]:
    """Plans a trial: with fewer epochs, then on fewer images, until it fits.

    Args:
        images: Number of training images.
        epochs: Number of epochs that fine-tuning would take.
        costs: What fine-tuning of the top stage takes.
        head: Seconds of training a head.
        most: Seconds that the trial may take.

    Returns:
        (the plan, whether it fits); the smallest possible one if none fits.
    """
    fixed = head + FOLDS * (costs.setup + head)
    fewest = min(epochs, FEWEST_EPOCHS)

    def seconds(images: int, epochs: int) -> float:
        learned = epochs * (FOLDS - 1) * images  # each image is learned from in 2 folds
        return fixed + images * costs.forward + learned * costs.learning

    while epochs > fewest and seconds(images, epochs) > most:
        epochs -= 1
    if (needed := seconds(images, epochs)) > most:
        fitting = int((most - fixed) / (needed - fixed) * images)
        images = max(fitting, min(images, FEWEST_IMAGES))
    needed = seconds(images, epochs)
    return TrialPlan(images, epochs, needed), needed <= most


def try_fine_tuning(
    config: Config,
    splits: Splits,
    part: FrozenPart,
    features: FrozenFeatures,
    plan: TrialPlan,
    listener: Listener,
) -> Trial:
    """Fine-tunes the top stage in folds and compares it with the head alone.

    Only training images are looked at. Copies of an image, and images of a group, are
    in the same fold.

    Args:
        config: The resolved config.
        splits: The usable images.
        part: The frozen base.
        features: The base's features.
        plan: On how many training images to try, and for how many epochs.
        listener: Receives notes and progress.

    Raises:
        UsageError: If there are fewer groups of images than folds.
        DivergenceError: If training diverges.
        KerasTransferError: If the activations do not fit on the disk.
    """
    started = time.perf_counter()
    tuning = config.finetune.model_copy(update={**_OPTIONS, "epochs": plan.epochs})
    config = config.model_copy(update={"finetune": tuning, "augment": 0})
    found = tune_in_folds(config, splits, part, features, plan.images, listener)
    return judge(found, config, plan.epochs, time.perf_counter() - started)


@dataclass(frozen=True)
class Folded:
    """Predictions of images by models that did not learn from them.

    Attributes:
        table: The N images.
        before: float32 `[N, C]` probabilities by the head alone.
        mixes: float32 `[N, C]` by the fraction of the fine-tuned weights in the model.
        folds: Number of folds that these are; all are `FOLDS`.
    """

    table: Table
    before: np.ndarray
    mixes: Mapping[float, np.ndarray]
    folds: int


def tune_in_folds(
    config: Config,
    splits: Splits,
    part: FrozenPart,
    features: FrozenFeatures,
    images: int,
    listener: Listener,
    is_worth_more: Callable[[Folded], bool] = lambda _: True,
) -> Folded:
    """Fine-tunes in folds of the training images; test images are not looked at.

    Copies of an image, and images of a group, are in the same fold.

    Args:
        config: The resolved config, whose `finetune` section says how.
        splits: The usable images.
        part: The frozen base.
        features: The base's features.
        images: Number of training images to use, at most.
        listener: Receives notes and progress.
        is_worth_more: Called after each fold but the last with what is known so far; if
            it returns False, that is returned.

    Raises:
        UsageError: If there are fewer groups of images than folds.
        DivergenceError: If training diverges.
        KerasTransferError: If the activations do not fit on the disk.
    """
    table = keep_copies_together(splits.train, features.extraction)
    if len(table) > images:
        picked = deal(table.targets, config.seed)[:images]
        table = table.select(np.sort(picked))
    numbers = fold_numbers(table, len(splits.class_names), FOLDS, config.seed)
    only = replace(splits, train=table, val=table.keep(()), test=table.keep(()))
    work = _Work.prepare(config, only, part, features, listener)
    shape = len(table), len(splits.class_names)
    said = {alpha: np.zeros(shape, np.float32) for alpha in (0.0, *ALPHAS)}
    for fold in range(FOLDS):
        held_out = numbers == fold
        others = table.select(np.flatnonzero(held_out))
        learned = table.select(np.flatnonzero(~held_out))
        made = work.predict(learned, others, _Progress(listener, fold))
        for alpha, probabilities in made.items():
            said[alpha][held_out] = probabilities
        rows = np.flatnonzero(numbers <= fold)
        mixes = {alpha: said[alpha][rows] for alpha in ALPHAS}
        found = Folded(table.select(rows), said[0.0][rows], mixes, fold + 1)
        if fold < FOLDS - 1 and not is_worth_more(found):
            break
    return found


def judge(found: Folded, config: Config, epochs: int, seconds: float) -> Trial:
    """Compares the head with mixes, each half of the images choosing for the other.

    Args:
        found: The predictions.
        config: The resolved config.
        epochs: Number of epochs that were trained for.
        seconds: How long it took.
    """
    table, before = found.table, found.before
    metric = deciding_metric(table.targets, config.metric)
    first = halves(table, before.shape[1], config.seed)
    after = cross_fit(metric, table.targets, found.mixes, first).uncalibrated
    compared = compare(metric, table.targets, before, after, table.groups)
    low, high = compared.interval
    return Trial(
        metric=metric,
        images=len(table),
        epochs=epochs,
        before=compared.before,
        after=compared.after,
        low=low,
        high=high,
        seconds=seconds,
    )


class _Progress(Listener):
    """Reports the training of all folds as one step, without its notes and epochs."""

    def __init__(self, listener: Listener, fold: int):
        self._listener, self._fold = listener, fold

    def progress(self, step: str, done: int, total: int) -> None:
        self._listener.progress("trial", self._fold * total + done, FOLDS * total)


@dataclass(frozen=True)
class _Work:
    """A classifier that is trained again and again, and what it learns from.

    Attributes:
        config: The resolved config.
        splits: The images that are tried on, as training images.
        features: Their features.
        classifier: The classifier, whose head changes from fold to fold.
        activations: Outputs of its frozen part.
    """

    config: Config
    splits: Splits
    features: FrozenFeatures
    classifier: CutClassifier
    activations: Activations

    @classmethod
    def prepare(
        cls,
        config: Config,
        splits: Splits,
        part: FrozenPart,
        features: FrozenFeatures,
        listener: Listener,
    ) -> "_Work":
        """Builds the classifier and runs its frozen part."""
        head = train_on_features(config, splits, features, SILENT)
        kept = "stages" if head.stages else "last"  # in each fold too
        config = config.model_copy(update={"features": kept})
        model = attach_head(join_bases(part.models, head.stages), head.model)
        first = get_bases(config.base)[0]
        groups = unfrozen_groups(model, first, config.finetune.unfreeze)
        sample = sample_images(splits, part.image_size, PARITY_IMAGES)
        classifier = CutClassifier(model, groups, splits, sample)
        activations = frozen_activations(
            classifier.frozen_part(config),
            splits,
            config,
            classifier.sample_sources,
            classifier.parity,
            listener,
        )
        return cls(config, splits, features, classifier, activations)

    def predict(
        self, learned: Table, others: Table, listener: Listener
    ) -> dict[float, np.ndarray]:
        """Trains a head, then the top stage, and predicts images after each.

        Args:
            learned: Images to learn from.
            others: Images to predict.
            listener: Receives progress.

        Returns:
            float32 `[N, C]` probabilities of the others by the fraction of the
            fine-tuned weights in the model; 0 is the head alone.
        """
        splits = replace(self.splits, train=learned)
        head = train_on_features(self.config, splits, self.features, SILENT)
        classifier = self.classifier
        classifier.set_head(head.model)
        rows = self.activations.features.rows(others.sources)
        with tempfile.TemporaryDirectory() as checkpoint:
            tail = train_tail(
                self._recipe(), self._data(splits), Path(checkpoint), listener
            )
        mix = Mix(classifier, tail.weights, self.config.finetune)
        found = {}
        for alpha in (*mix.alphas, 0.0):  # the last one restores the weights
            mix.set(alpha)
            found[alpha] = classifier.predict(rows)
        return found

    def _recipe(self) -> TailRecipe:
        tuning, cut = self.config.finetune, self.classifier
        return TailRecipe(
            tuning,
            partial(training_copy, cut.tail, cut.unfrozen, tuning.train_bn),
            layer_patterns(
                trained_layers(cut.groups, tuning.train_bn), cut.multipliers(tuning)
            ),
            seed=self.config.seed,
        )

    def _data(self, splits: Splits) -> TailData:
        table, head = splits.train, self.config.head
        weighting = class_weighting(
            table.targets, splits.class_names, head.class_weight, head.logit_adjustment
        )
        features, tuning = self.activations.features, self.config.finetune
        views = [
            features.rows(table.sources, view)
            for view in range(len(self.activations.train))
        ]
        weights = relative_weights(table)
        return TailData(
            label_features(views, table.targets, weighting, weights),
            label_smoothing=tuning.label_smoothing,
        )
