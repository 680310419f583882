"""Probabilities -> decisions: which classes are predicted, and whether that is sure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from keras_transfer.data.tables import Prediction
from keras_transfer.runs.manifest import Manifest

DEFAULT_THRESHOLD = 0.5
"""Probability from which on a class of multi-label data is predicted by default."""


@dataclass(frozen=True)
class DecisionRule:
    """How a model's probabilities become decisions.

    Attributes:
        sure: Smallest largest probability of a sure prediction, from 0 to 1; None if
            the run has no such threshold.
        classes: float32 `[num_classes]` thresholds in (0, 1) from which on a class is
            predicted; None for single-label data, where the most likely class is.
    """

    sure: float | None = None
    classes: np.ndarray | None = None

    @classmethod
    def of(cls, manifest: Manifest, class_names: Sequence[str]) -> Self:
        """Returns the rule of a run; classes without a threshold have 0.5."""
        found, chosen = manifest.abstention, manifest.thresholds or {}
        values = [chosen.get(name, DEFAULT_THRESHOLD) for name in class_names]
        return cls(
            found.threshold if found else None,
            np.array(values, np.float32) if manifest.multi_label else None,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Attributes of a `Prediction` that say more than its probabilities."""
        columns = {"classes": self.classes is not None, "sure": self.sure is not None}
        return tuple(name for name, is_shown in columns.items() if is_shown)

    def is_sure(self, probabilities: np.ndarray) -> np.ndarray | None:
        """Decides which predictions are sure.

        Args:
            probabilities: float32 `[N, num_classes]` in the range 0 to 1.

        Returns:
            bool `[N]`; None if the run has no threshold.
        """
        if self.sure is None:
            return None
        return probabilities.max(1) >= np.float32(self.sure)

    def predicted(self, probabilities: np.ndarray) -> np.ndarray:
        """Decides which classes are predicted, as bool `[N, num_classes]`."""
        if self.classes is not None:
            return probabilities >= self.classes
        columns = np.arange(probabilities.shape[1])
        return probabilities.argmax(1)[:, None] == columns

    def decide(
        self, predictions: Iterable[Prediction], class_names: Sequence[str]
    ) -> Iterator[Prediction]:
        """Yields predictions with their `classes` and `sure`."""
        for prediction in predictions:
            if prediction.probabilities is None:
                yield prediction
                continue
            row = prediction.probabilities[None]
            sure = self.is_sure(row)
            yield replace(
                prediction,
                classes=names_of(self.predicted(row)[0], row[0], class_names),
                sure=None if sure is None else bool(sure[0]),
            )


NO_RULE = DecisionRule()
"""The most likely class is predicted, and nothing is said about how sure that is."""


def names_of(
    is_predicted: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> tuple[str, ...]:
    """Returns the names of an image's predicted classes, most likely first.

    Args:
        is_predicted: bool `[num_classes]`.
        probabilities: float32 `[num_classes]`.
        class_names: Class names in the order of the columns.
    """
    order = np.argsort(-probabilities, kind="stable")
    return tuple(class_names[i] for i in order if is_predicted[i])
