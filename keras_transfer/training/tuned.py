"""A classifier that is fine-tuned: cut in two, and mixed with what it was before."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_transfer.config import Config, FinetuneConfig
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.prediction import predict_table, prediction_engine
from keras_transfer.features.activations import (
    Activations,
    ComputedRows,
    split_point_id,
)
from keras_transfer.features.cache import FeatureCache, Features
from keras_transfer.features.engine import predict
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.features.parity import parity
from keras_transfer.models.classifier import (
    HEAD,
    copy_head,
    fold_temperature,
    weights_digest,
    without_head,
)
from keras_transfer.models.cut import cut, pooled_below, split_point
from keras_transfer.models.layer_groups import LayerGroups, changed_variables
from keras_transfer.training.optim import group_multipliers
from keras_transfer.training.tail import inference_function, predict_rows

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the fine-tuned weights to try (WiSE-FT, Wortsman et al. 2022)."""


class CutClassifier:
    """A model cut in two, with its predictions from pixels and from activations.

    Attributes:
        model: Model from [0, 255] RGB pixels to probabilities.
        groups: The layers to train, by group.
        splits: The images.
        sample_sources: Images on which both kinds of predictions are compared.
        split_point: Name of the layer after which the model is cut.
        tail: The part above the cut.
    """

    def __init__(
        self,
        model: keras.Model,
        groups: LayerGroups,
        splits: Splits,
        sample: Sequence[tuple[str, bytes, np.ndarray]],
    ):
        self.model = model
        self.groups = groups
        self.splits = splits
        self.split_point = split_point(model, self.unfrozen)
        self.sample_sources = [source for source, _, _ in sample]
        beside = pooled_below(model, self.split_point, self.unfrozen)
        self._frozen, self.tail = cut(model, self.split_point, beside)
        self._sample = sample
        self._compile()
        own = without_head(model).output
        _, below_head = cut(model, self.split_point, beside, own)
        self._features_of_rows = inference_function(below_head)

    def _compile(self) -> None:
        self._of_pixels = prediction_engine(self.model)
        self._of_rows = inference_function(self.tail)

    def set_head(self, head: keras.Model) -> None:
        """Takes over the weights of a head that was built like the model's."""
        copy_head(head, self.model.get_layer(HEAD))
        self._compile()  # functions keep constants that a head derives from its weights

    @property
    def unfrozen(self) -> set[keras.layers.Layer]:
        """The layers to train."""
        return {layer for layers in self.groups.values() for layer in layers}

    def multipliers(self, tuning: FinetuneConfig) -> dict[str, float]:
        """Returns the multiplier of the head's learning rate by group."""
        relative = tuning.base_lr and tuning.base_lr / tuning.learning_rate
        return group_multipliers(list(self.groups), tuning.decay, relative)

    def rates(self, tuning: FinetuneConfig) -> dict[str, float]:
        """Returns the peak learning rate by group."""
        multipliers = self.multipliers(tuning)
        return {name: m * tuning.learning_rate for name, m in multipliers.items()}

    def frozen_part(self, config: Config) -> FrozenPart:
        """Returns the part below the split point."""
        return FrozenPart(
            self._frozen,
            config.base,
            weights_digest(self._frozen),
            split_point_id(self._frozen),
            config.seed,
            FeatureCache(config.cache_dir),
            config.finetune.augment_policy,
        )

    def predict(self, rows: Features | ComputedRows) -> np.ndarray:
        """Computes float32 `[N, num_classes]` probabilities from activations."""
        return predict_rows(self._of_rows, rows)

    def predict_files(self, table: Table) -> np.ndarray:
        """Computes float32 `[N, num_classes]` probabilities from image files."""
        return predict_table(self.model, table, self.splits.read, self._of_pixels)

    def features(self, rows: Features | ComputedRows) -> np.ndarray:
        """Computes float32 `[N, D]` inputs of the head from activations."""
        return predict_rows(self._features_of_rows, rows)

    def parity(self, features: FrozenFeatures, tolerance: float) -> dict[str, float]:
        """Compares predictions from activations with those from pixels on a sample."""
        known = features.extraction.digests
        images = {source: x for source, _, x in self._sample if source in known}
        if not images:
            return parity(np.zeros((0, 1)), np.zeros((0, 1)), tolerance)
        from_rows = self.predict(features.rows(list(images)))
        from_pixels = predict(self._of_pixels, np.stack(list(images.values())))
        return parity(from_pixels, from_rows, tolerance)


class Mix:
    """A classifier whose weights are a mix of those before and after training.

    Attributes:
        classifier: The classifier, whose model has the mixed weights.
        variables: The variables that training changed.
        alphas: Fractions of the weights after training to try.
        alpha: Fraction of the weights after training that the model has now, from 0 to
            1.
    """

    def __init__(
        self,
        classifier: CutClassifier,
        after: Sequence[np.ndarray],
        tuning: FinetuneConfig,
    ):
        self.classifier = classifier
        self.variables = changed_variables(
            classifier.tail, classifier.unfrozen, tuning.train_bn
        )
        self._interpolate = interpolation(self.variables, after)
        self.alphas = (1.0,) if tuning.from_scratch_head else ALPHAS
        self.alpha = 0.0
        self.set(1.0)

    def set(self, alpha: float) -> None:
        """Sets the model's weights to the mix for `alpha`."""
        self._interpolate(alpha)
        self.alpha = alpha

    def finish(self, alpha: float, temperature: float) -> None:
        """Sets the final mix and divides its logits by a temperature, for good."""
        self.set(alpha)
        fold_temperature(self.classifier.model.get_layer(HEAD), temperature)

    def parity(self, activations: Activations) -> dict[str, float]:
        """Compares predictions from activations with those from pixels."""
        tolerance = activations.parity["tolerance"]
        return self.classifier.parity(activations.features, tolerance)


def interpolation(
    variables: Sequence[keras.Variable], after: Sequence[np.ndarray]
) -> Callable[[float], None]:
    """Creates a function that mixes the current values of variables with new ones.

    Args:
        variables: The variables to set.
        after: The new values.

    Returns:
        A function that takes alpha, the fraction of the new values: 0 restores the
        current values exactly, and 1 sets the new values exactly.
    """
    before = [variable.numpy() for variable in variables]

    def mix(alpha: float) -> None:
        for variable, old, new in zip(variables, before, after, strict=True):
            variable.assign((1 - alpha) * old + alpha * new)

    return mix
