"""What a run says about its model: figures, thresholds, and every prediction.

Everything here comes from images that the model, or a stand-in for it, did not learn
from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.crossvalidation import (
    OUT_OF_FOLD,
    evaluate_out_of_fold,
)
from keras_transfer.evaluation.decisions import DEFAULT_THRESHOLD, DecisionRule
from keras_transfer.evaluation.metrics import Evaluation, evaluate
from keras_transfer.evaluation.out_of_distribution import MOST_FITTED, OutOfDistribution
from keras_transfer.evaluation.thresholds import (
    SureEvaluation,
    abstention_threshold,
    accuracy_coverage,
    class_thresholds,
    evaluate_sure,
)
from keras_transfer.features.frozen_part import FrozenFeatures
from keras_transfer.reporting.predictions import PredictedTable, predictions_csv
from keras_transfer.runs.files import write_atomic
from keras_transfer.runs.manifest import FEW_IMAGES, Abstention, CoveragePoint, Estimate
from keras_transfer.runs.run import FAR, PREDICTIONS
from keras_transfer.training.head import TrainedHead, predict_images

_ROWS = 4096  # whose features are in memory together


@dataclass(frozen=True)
class Judgement:
    """What is known of a classifier from images that it did not learn from.

    Attributes:
        evaluations: Metrics by `out_of_fold` and `test`, the more telling first.
        folds: The deciding metric over folds; None without several folds.
        choices: The thresholds that were chosen.
        detector: Tells images that are far from the training images.
        predictions: A prediction of every image, with how it was made.
        sure: Coverage and accuracy of sure predictions of test images; None without a
            threshold or test images.
    """

    evaluations: Mapping[str, Evaluation]
    folds: Estimate | None
    choices: "Choices"
    detector: OutOfDistribution
    predictions: Sequence[PredictedTable]
    sure: SureEvaluation | None = None

    def write(self, staging: Path, class_names: Sequence[str]) -> None:
        """Writes predictions.csv and far.npz to a folder."""
        multi_label = self.predictions[0].table.targets.ndim == 2
        rule = self.choices.rule(class_names, multi_label)
        text = predictions_csv(self.predictions, class_names, rule)
        write_atomic(staging / PREDICTIONS, text)
        self.detector.save(staging / FAR)


@dataclass(frozen=True)
class Choices:
    """Thresholds chosen on predictions of images that were not learned from.

    Attributes:
        abstention: The threshold of sure predictions; None if none was asked for.
        thresholds: For multi-label data, the threshold of each class by name.
        coverage: The accuracy-coverage curve; None for multi-label data.
    """

    abstention: Abstention | None = None
    thresholds: dict[str, float] | None = None
    coverage: tuple[CoveragePoint, ...] | None = None

    def rule(self, class_names: Sequence[str], multi_label: bool) -> DecisionRule:
        """Returns how probabilities become decisions."""
        chosen = self.thresholds or {}
        values = [chosen.get(name, DEFAULT_THRESHOLD) for name in class_names]
        return DecisionRule(
            self.abstention.threshold if self.abstention else None,
            np.array(values, np.float32) if multi_label else None,
        )


def choose_thresholds(
    config: Config, table: Table, probabilities: np.ndarray, class_names: Sequence[str]
) -> Choices:
    """Chooses thresholds on images that the model did not learn from.

    Args:
        config: The resolved config.
        table: The n images.
        probabilities: float32 `[n, C]`.
        class_names: Class names in the order of the columns.

    Raises:
        UsageError: If the accuracy of sure predictions cannot be reached.
    """
    targets, abstention = table.targets, None
    if targets.ndim == 2:
        return Choices(thresholds=class_thresholds(probabilities, targets, class_names))
    if config.abstain_at_accuracy:
        abstention = abstention_threshold(
            probabilities,
            targets,
            config.abstain_at_accuracy,
            table.groups,
            config.seed,
        )
    return Choices(abstention, None, accuracy_coverage(probabilities, targets))


def judge_head(
    config: Config, splits: Splits, features: FrozenFeatures, head: TrainedHead
) -> Judgement:
    """Evaluates a head out of fold and on the test split, as far as there are any.

    Args:
        config: The resolved config.
        splits: The usable images.
        features: Their features.
        head: The head that `train_on_features` trained on them.

    Raises:
        UsageError: If the accuracy of sure predictions cannot be reached.
    """
    train, test, names = splits.train, splits.test, splits.class_names

    def predict(table: Table) -> np.ndarray:
        return predict_images(head, features, table.sources)

    evaluations, choices, folds, sure = {}, Choices(), None, None
    parts = []
    if found := head.out_of_fold:
        inside = train.select(found.rows)
        said = found.probabilities[found.chosen]
        choices = choose_thresholds(config, inside, said, names)
        thresholds = thresholds_of_others(inside, said, found.folds[found.rows], names)
        evaluations[OUT_OF_FOLD], folds = evaluate_out_of_fold(
            replace(train, groups=head.groups),
            found,
            names,
            thresholds,
            config.metric,
            config.seed,
        )
        parts.append(PredictedTable(inside, "train", "out of fold", said))
    learned = train if found is None else train.select(np.flatnonzero(found.folds < 0))
    parts.append(PredictedTable(learned, "train", "fitted", predict(learned)))
    if len(test):
        parts.append(PredictedTable(test, "test", "test", predict(test)))
        evaluations["test"] = evaluate(
            test.targets,
            parts[-1].probabilities,
            names,
            test.groups,
            choices.rule(names, splits.multi_label).classes,
            config.seed,
        )
        if choices.abstention:
            sure = evaluate_sure(
                parts[-1].probabilities,
                test.targets,
                choices.abstention.threshold,
                test.groups,
            )
    if len(test) >= FEW_IMAGES:
        evaluations = dict(reversed(evaluations.items()))
    detector, parts = told_far(
        train, parts, lambda table: features.rows(table.sources)[:], config.seed
    )
    return Judgement(evaluations, folds, choices, detector, parts, sure)


def told_far(
    learned: Table,
    parts: Sequence[PredictedTable],
    features_of: Callable[[Table], np.ndarray],
    seed: int,
) -> tuple[OutOfDistribution, list[PredictedTable]]:
    """Tells which images are far from those that a model learned from.

    Args:
        learned: The images that the model learned from.
        parts: Predictions to complete.
        features_of: Computes float32 `[n, D]` inputs of the model's head.
        seed: Seed of the choice of images that others are compared with.

    Returns:
        (what tells it, the predictions with `far`). An image that was learned from is
        compared with the others.
    """
    some = np.random.default_rng(seed).permutation(len(learned))[:MOST_FITTED]
    sample = learned.select(np.sort(some))
    detector = OutOfDistribution.fit(
        features_of(sample), sample.targets, sample.groups, seed
    )
    known = set(learned.sources)

    def is_far(table: Table) -> np.ndarray:
        found = [np.zeros(0, bool)]
        for start in range(0, len(table), _ROWS):
            chunk = table.select(np.arange(start, min(start + _ROWS, len(table))))
            is_known = chunk.sources[0] in known
            rows = features_of(chunk)
            if is_known:
                found.append(detector.is_far_left_out(rows, chunk.groups))
            else:
                found.append(detector.is_far(rows))
        return np.concatenate(found)

    return detector, [replace(part, far=is_far(part.table)) for part in parts]


def thresholds_of_others(
    table: Table, probabilities: np.ndarray, folds: np.ndarray, names: Sequence[str]
) -> np.ndarray | None:
    """Chooses each image's thresholds on the images of other folds.

    Figures of thresholds that were chosen on the same images would flatter.

    Returns:
        float32 `[n, C]`; None for single-label data. With one fold, 0.5.
    """
    if table.targets.ndim == 1:
        return None
    thresholds = np.full(probabilities.shape, DEFAULT_THRESHOLD, np.float32)
    for fold in np.unique(folds):
        others = folds != fold
        if others.any():
            chosen = class_thresholds(
                probabilities[others], table.targets[others], names
            )
            thresholds[~others] = [chosen[name] for name in names]
    return thresholds
