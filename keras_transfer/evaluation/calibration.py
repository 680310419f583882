"""Makes probabilities say how often a model is right: temperature scaling.

The logits are divided by one number, the temperature, which is fitted on images that
the model was not trained on (Guo et al. 2017, "On Calibration of Modern Neural
Networks"). The order of the classes stays as it is, and so does every prediction.
"""

import math

import numpy as np
import scipy.optimize
import scipy.special

PRIOR_DEVIATION = 0.5
"""Standard deviation of the logarithm of the temperature that is expected of a
fine-tuned model without images to tell.

Two thirds of the temperatures are then expected between 0.6 and 1.6. Measured are 1.5
to 2.4: from some 50 images on, the images outweigh this; with 20 images that all happen
to be classified correctly, it keeps the temperature from falling to 0
(`tests/benchmarks/honesty.py calibration`)."""

_LIMIT = math.log(20.0)
_SMALLEST = float(np.finfo(np.float32).tiny)


def temperature(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Fits the temperature of a model.

    It minimizes the sum of the log losses in nats, plus
    (log T)^2 / (2 PRIOR_DEVIATION^2): a normal prior on the logarithm of T.

    Args:
        probabilities: float32 `[N, num_classes]` in the range 0 to 1, of images that
            the model was not trained on.
        targets: As for `metrics.evaluate`.

    Returns:
        The temperature T, from 0.05 to 20; above 1 if the model is too confident. It is
        1 without images.
    """
    logits = _logits(probabilities, multi_label=targets.ndim == 2)

    def cost(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        prior = (log_temperature / PRIOR_DEVIATION) ** 2 / 2
        if targets.ndim == 2:
            # -log sigmoid(z) = log(1 + exp(-z)); an absent class has the logit -z.
            signed = np.where(targets == 1, scaled, -scaled)
            return float(np.logaddexp(0, -signed).sum()) + prior
        of_target = scaled[np.arange(len(targets)), targets]
        losses = scipy.special.logsumexp(scaled, axis=1) - of_target
        return float(losses.sum()) + prior

    if not len(targets):
        return 1.0
    found = scipy.optimize.minimize_scalar(
        cost, bounds=(-_LIMIT, _LIMIT), method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x)


def apply_temperature(
    probabilities: np.ndarray, temperature: float, multi_label: bool = False
) -> np.ndarray:
    """Computes the probabilities of a model whose logits are divided by a temperature.

    Args:
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        temperature: The temperature, greater than 0.
        multi_label: Whether each class has its own sigmoid; otherwise, all classes
            share a softmax.

    Returns:
        float32 `[N, num_classes]` probabilities.
    """
    scaled = _logits(probabilities, multi_label) / temperature
    if multi_label:
        return scipy.special.expit(scaled).astype(np.float32)
    return scipy.special.softmax(scaled, axis=1).astype(np.float32)


def _logits(probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Computes float64 logits from probabilities.

    The logarithm of a softmax differs from its logits by a constant for each image,
    which does not matter. A float32 sigmoid is 1 from a logit of 17 on; that is read as
    the last value below 1.
    """
    values = np.maximum(probabilities.astype(np.float64), _SMALLEST)
    if multi_label:
        return scipy.special.logit(np.minimum(values, 1 - np.finfo(np.float32).epsneg))
    return np.log(values)
