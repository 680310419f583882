"""Layer-wise learning rates, lower toward the input, and the learning rate schedule."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

LrMultipliers = Sequence[tuple[str, float]]
"""Pairs of a regular expression and a multiplier: a variable whose path starts with a
match of the expression is trained with the learning rate times the multiplier."""


@keras.saving.register_keras_serializable("keras_transfer")
class LayerwiseAdamW(keras.optimizers.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with a separate learning rate per variable.

    `learning_rate` applies to variables with the multiplier 1 and can be read and set
    as in every Keras optimizer. Scaling the gradients instead would have no effect,
    because Adam's step does not depend on their magnitude.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        lr_multipliers: LrMultipliers = (("", 1.0),),
        **options: Any,
    ):
        """Creates the optimizer.

        Args:
            learning_rate: A number, a `LearningRateSchedule` or a callable.
            lr_multipliers: Patterns and multipliers. Each trainable variable must match
                exactly one pattern, and each pattern must match a variable.
            **options: Options of `keras.optimizers.AdamW`. The multipliers apply to
                weight decay too.
        """
        super().__init__(learning_rate, **options)
        self._lr_multipliers = [(str(p), float(m)) for p, m in lr_multipliers]
        self._multipliers: list[float] = []

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the optimizer's variables.

        Raises:
            ValueError: If a variable does not match exactly one pattern, or a pattern
                matches no variable.
        """
        if not self.built:
            paths = [variable.path for variable in variables]
            self._multipliers = match_once(paths, self._lr_multipliers)
        super().build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable, with its own learning rate."""
        super().update_step(gradient, variable, learning_rate * self._of(variable))

    def _apply_weight_decay(self, variables: Any) -> None:
        for variable in variables:
            if self._use_weight_decay(variable):
                rate = keras.ops.cast(self.learning_rate, variable.dtype)
                decay = rate * self._of(variable) * self.weight_decay
                self.assign_sub(variable, keras.ops.multiply(variable, decay))

    def _of(self, variable: keras.Variable) -> float:
        return self._multipliers[self._get_variable_index(variable)]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "lr_multipliers": self._lr_multipliers}


def match_once(paths: Sequence[str], lr_multipliers: LrMultipliers) -> list[float]:
    """Returns the multiplier of each variable.

    Args:
        paths: Paths of the variables.
        lr_multipliers: Patterns and multipliers.

    Raises:
        ValueError: If a path matches no pattern or several, or a pattern matches no
            path.
    """
    found = []
    unused = [pattern for pattern, _ in lr_multipliers]
    for path in paths:
        hits = [(p, m) for p, m in lr_multipliers if re.match(p, path)]
        if len(hits) != 1:
            raise ValueError(
                "Every trainable variable must match exactly one pattern of "
                f"lr_multipliers. Received: {path!r}, matched by "
                f"{[pattern for pattern, _ in hits]}."
            )
        pattern, multiplier = hits[0]
        found.append(multiplier)
        if pattern in unused:
            unused.remove(pattern)
    if unused:
        raise ValueError(
            "Every pattern of lr_multipliers must match a trainable variable. "
            f"Received: {unused}, which match none of {len(paths)}."
        )
    return found


def group_multipliers(
    groups: Sequence[str], layer_decay: float, base_rate: float | None = None
) -> dict[str, float]:
    """Returns the learning rate multiplier of each layer group; the head's is 1.

    Args:
        groups: Names of the groups from the input up; the last is the head.
        layer_decay: Ratio of each group's rate to that of the group above it (Howard &
            Ruder 2018).
        base_rate: Ratio of the rate of the base's last group to the head's; None for
            `layer_decay`.
    """
    top = layer_decay if base_rate is None else base_rate
    *base, head = groups
    depths = range(len(base) - 1, -1, -1)
    multipliers = {
        name: top * layer_decay**depth for name, depth in zip(base, depths, strict=True)
    }
    return {**multipliers, head: 1.0}


def layer_patterns(
    layer_names: Mapping[str, Sequence[str]], multipliers: Mapping[str, float]
) -> list[tuple[str, float]]:
    """Builds patterns for `LayerwiseAdamW` that match the variables of each group.

    Args:
        layer_names: Names of the layers with trainable variables, by group.
        multipliers: Multipliers by group.
    """
    return [
        (
            rf"(?:.+/)?(?:{'|'.join(re.escape(name) for name in names)})/.+$",
            multipliers[group],
        )
        for group, names in layer_names.items()
        if names
    ]


def warmup_cosine(
    learning_rate: float, steps: int, warmup: float
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Creates a schedule with a linear warm-up from 0 and cosine decay to 0.

    Args:
        learning_rate: Peak learning rate.
        steps: Total number of steps.
        warmup: Fraction of the steps used for the warm-up, from 0 to 1.
    """
    warmup_steps = round(warmup * steps)
    if not warmup_steps:
        return keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=max(steps - warmup_steps, 1),
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
