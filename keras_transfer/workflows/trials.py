"""Tries ways to make a classifier on training images, out of fold, for `kt search`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import numpy as np

from keras_transfer.advice.costs import tuning_costs
from keras_transfer.advice.evidence import Trial
from keras_transfer.advice.probe import images_per_second
from keras_transfer.advice.rules import separation, usual_gain, weighed_gain
from keras_transfer.advice.space import Way
from keras_transfer.advice.trial import (
    FOLDS,
    Folded,
    judge,
    plan_trial,
    tune_in_folds,
)
from keras_transfer.config import Config, load_config
from keras_transfer.data.tables import Splits
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.comparison import compare
from keras_transfer.evaluation.crossvalidation import evaluate_out_of_fold
from keras_transfer.evaluation.metrics import deciding_metric
from keras_transfer.evaluation.names import FIELDS, label
from keras_transfer.evaluation.prediction import prediction_engine
from keras_transfer.events import Listener, duration
from keras_transfer.features.base import frozen_base
from keras_transfer.features.engine import seconds_per_image
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    FrozenPart,
    Storage,
    frozen_features,
)
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.classifier import attach_head, join_bases
from keras_transfer.models.fold import folded_copy
from keras_transfer.training.head import train_on_features
from keras_transfer.workflows.inputs import prepare
from keras_transfer.workflows.journal import Outcome

TRIED_IMAGES = 1_500
"""Images that fine-tuning is tried on, at most."""

_SHARE = 0.5
"""Share of the time left that trying one way of fine-tuning may take."""

_NONE = (None, None)

GivenUp = Callable[[float], bool]
"""Takes the largest gain that is still plausible; returns whether it is too little."""


@dataclass(frozen=True)
class Prepared:
    """A base with the features of the training images, and a config to use them by."""

    config: Config
    part: FrozenPart
    features: FrozenFeatures
    splits: Splits


class Trials:
    """Tries ways on the training images of a config; test images are not looked at.

    Attributes:
        splits: The training images.
        metric: Name of the metric that decides.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        image_size: int | None,
        is_timed: bool,
        listener: Listener,
    ):
        """Keeps what all ways share.

        Args:
            config: The resolved config.
            splits: The images.
            image_size: Side of the images in pixels; None for each base's own.
            is_timed: Whether anything may depend on the clock.
            listener: Receives notes and progress.
        """
        nothing = splits.train.keep(())
        self.splits = replace(splits, val=nothing, test=nothing)
        self.metric = deciding_metric(splits.train.targets, config.metric)
        self._shared = config if is_timed else _without_clock(config)
        self._image_size = image_size
        self._listener = listener
        self._latencies: dict[str, float] = {}

    def config(self, way: Way) -> Config:
        """Returns the resolved config that makes a classifier in a way."""
        asked = self._shared.model_copy(update={"image_size": self._image_size})
        return prepare(load_config(asked, way.options()), makes_run=False).config

    def prepare(self, way: Way) -> Prepared:
        """Builds the bases of a way and computes the features of training images.

        Raises:
            UnusableImagesError: If too many images are unusable.
            KerasTransferError: If a base cannot be built.
        """
        config = self.config(way)
        part, storage = frozen_base(config), Storage(config.precision, quality=True)
        views = config.augment
        features = frozen_features(part, self.splits, views, storage, self._listener)
        splits = usable_splits(config, self.splits, features.extraction)
        return Prepared(config, part, features, splits)

    def speed(self, made: Prepared) -> float:
        """Measures the images per second that go through the bases of a way."""
        return images_per_second(made.part, made.splits, made.features)

    def head(self, way: Way) -> Outcome:
        """Cross-validates a head on frozen bases.

        Raises:
            UsageError: If there are too few images for folds.
            KerasTransferError: If a base cannot be built.
        """
        made = self.prepare(way)
        started = time.perf_counter()
        head = train_on_features(
            made.config, made.splits, made.features, self._listener
        )
        seconds = time.perf_counter() - started
        if head.out_of_fold is None:
            raise UsageError(
                "A search needs images in at least two folds. Received: "
                f"{len(made.splits.train)} training images. Use more."
            )
        table = replace(made.splits.train, groups=head.groups)
        found, _ = evaluate_out_of_fold(
            table,
            head.out_of_fold,
            made.splits.class_names,
            None,
            made.config.metric,
            made.config.seed,
        )
        field = FIELDS[self.metric]
        value, (low, high) = getattr(found, field), found.intervals.get(field, _NONE)
        if value is None:
            raise UsageError(
                f"The {label(self.metric)} of these images is not known. Received: "
                f"{len(table)} training images. Choose another metric."
            )
        model = attach_head(join_bases(made.part.models, head.stages), head.model)
        return Outcome(
            way,
            self.metric,
            value,
            low,
            high,
            head_seconds=seconds,
            megabytes=4 * model.count_params() / 1e6,
            milliseconds=self._latency(way, model),
        )

    def tuning(
        self, way: Way, parent: Outcome, left: float, is_too_little: GivenUp
    ) -> Outcome:
        """Fine-tunes in folds, and adds what it gains to the figure of the head.

        Args:
            way: The way.
            parent: The same way without fine-tuning.
            left: Seconds that are left, the final run included.
            is_too_little: Asked after each fold but the last; the way is then given up.

        Raises:
            UsageError: If there is not enough time.
            KerasTransferError: If fine-tuning is not possible.
        """
        started = time.perf_counter()
        made, config = self.prepare(way.head_alone), self.config(way)
        images, tuning = min(len(made.splits.train), TRIED_IMAGES), config.finetune
        if left < math.inf:
            images, epochs = self._plan(made, config, images, parent.head_seconds, left)
            tuning = tuning.model_copy(update={"epochs": epochs})
            config = config.model_copy(update={"finetune": tuning})
        found = tune_in_folds(
            config,
            made.splits,
            made.part,
            made.features,
            images,
            self._listener,
            lambda so_far: not is_too_little(self._most(so_far)),
        )
        if found.folds < FOLDS:
            problem = f"given up after {len(found.table):,} images"
            return replace(parent, way=way, problem=problem)
        trial = judge(found, config, tuning.epochs, time.perf_counter() - started)
        return self._gained(parent, way, trial)

    def usual_gain(self, best: Outcome) -> tuple[float, float]:
        """Returns what fine-tuning usually gains on such data.

        It is at most half of what is missing.

        Args:
            best: A way with a head alone.

        Returns:
            (mean of the gain, its standard deviation between data sets).
        """
        targets, least = self.splits.train.targets, 0.0
        if self.metric == "log_loss":
            return usual_gain(0.0, len(targets))[:2]
        if self.metric == "accuracy":
            least = float(np.bincount(targets).max() / len(targets))
        elif self.metric == "auc":
            least = 0.5
        mean, deviation, _ = usual_gain(separation(best.value, least), len(targets))
        most = (1 - best.value) / 2
        return min(mean, most), max(min(deviation, most), 1e-3)

    def _plan(
        self,
        made: Prepared,
        config: Config,
        images: int,
        head_seconds: float,
        left: float,
    ) -> tuple[int, int]:
        """Returns (images, at most as many; epochs) that fit a share of the time."""
        tuning, count = config.finetune, len(made.splits.train)
        costs = tuning_costs(config, made.splits, made.part, tuning.unfreeze)
        views = 1 + tuning.augment if isinstance(tuning.augment, int) else 1
        costs = replace(costs, forward=views * costs.forward)
        plan, fits = plan_trial(
            images, tuning.epochs, costs, head_seconds, _SHARE * left
        )
        final = count * (costs.forward + tuning.epochs * costs.learning)
        if not fits or plan.seconds + final > left:
            raise UsageError(
                f"There is not enough time to try it. Received: {duration(left)}, and "
                f"it takes about {duration(plan.seconds + final)}. Allow more."
            )
        return plan.images, plan.epochs

    def _most(self, found: Folded) -> float:
        """Returns the largest gain of any mix that is plausible after some folds."""
        table = found.table
        return max(
            compare(
                self.metric, table.targets, found.before, said, table.groups
            ).interval[1]
            for said in found.mixes.values()
        )

    def _gained(self, parent: Outcome, way: Way, trial: Trial) -> Outcome:
        """Adds what fine-tuning is expected to gain to the figure of the head."""
        gain, error = trial.gain, (trial.high - trial.low) / 2
        if self.metric != "log_loss":
            gain = weighed_gain(trial, self.usual_gain(parent))
        value, low, high = parent.value + parent.sign * gain, None, None
        if parent.low is not None and parent.high is not None:
            half = math.hypot((parent.high - parent.low) / 2, error)
            low, high = value - half, value + half
            if self.metric != "log_loss":
                low, high = max(low, 0.0), min(high, 1.0)
        return replace(parent, way=way, value=value, low=low, high=high, trial=trial)

    def _latency(self, way: Way, model: keras.Model) -> float:
        """Measures the milliseconds of an image, once for each base."""
        if way.base not in self._latencies:  # heads take next to nothing
            engine = prediction_engine(folded_copy(model))
            pixels = np.zeros((1, *model.input_shape[1:]), np.uint8)
            seconds = min(seconds_per_image(engine, pixels) for _ in range(3))
            self._latencies[way.base] = 1e3 * seconds
        return self._latencies[way.base]


def _without_clock(config: Config) -> Config:
    """Replaces `auto` where it measures time."""
    tuning, precision = config.finetune, config.precision
    if tuning.precision == "auto":
        tuning = tuning.model_copy(update={"precision": "f32"})
    if precision == "auto":
        precision = "f32"
    return config.model_copy(update={"precision": precision, "finetune": tuning})
