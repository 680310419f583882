"""Temperatures, against a search over a grid and known truths."""

import math

import numpy as np
import pytest
import scipy.special

from keras_transfer.config import HeadConfig
from keras_transfer.evaluation.calibration import (
    PRIOR_DEVIATION,
    apply_temperature,
    temperature,
)
from keras_transfer.models.classifier import build_head, fold_temperature


def draw(images: int, true: float, several: bool = False, seed: int = 0):
    """(probabilities, targets) of a model whose logits are `true` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, 4))
    if several:
        targets = (rng.random((images, 4)) < scipy.special.expit(logits)).astype("u1")
        return scipy.special.expit(true * logits).astype("f4"), targets
    cumulative = scipy.special.softmax(logits, axis=1).cumsum(1)
    targets = (rng.random((images, 1)) > cumulative).sum(1)
    return scipy.special.softmax(true * logits, axis=1).astype("f4"), targets


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("true", [0.7, 1.0, 1.5, 2.4])
def test_with_many_images_the_true_temperature_is_found(true, several):
    found = temperature(*draw(8000, true, several))
    assert found == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("images", [5, 20, 100])
def test_it_minimizes_log_losses_and_the_prior(several, images):
    probabilities, targets = draw(images, 1.8, several)

    logs = np.log(probabilities.astype("f8"))
    if several:  # a sigmoid is a softmax over presence and absence
        logs = np.stack([logs, np.log1p(-probabilities.astype("f8"))], axis=-1)
    shown = np.stack([targets, 1 - targets], -1) if several else np.eye(4)[targets]

    def cost(candidate: float) -> float:
        powers = np.exp(logs / candidate)
        scaled = powers / powers.sum(-1, keepdims=True)
        losses = -np.log(scaled[shown > 0]).sum()
        return losses + math.log(candidate) ** 2 / (2 * PRIOR_DEVIATION**2)

    grid = np.exp(np.linspace(-1.2, 1.2, 1201))
    best = grid[np.argmin([cost(candidate) for candidate in grid])]
    assert temperature(probabilities, targets) == pytest.approx(best, rel=0.003)


@pytest.mark.parametrize("several", [False, True])
def test_it_never_changes_a_class(several):
    probabilities, _ = draw(500, 3.0, several)
    probabilities[0] = [0, 1, 0, 0]
    for value in (0.05, 0.5, 1.0, 2.0, 20.0):
        scaled = apply_temperature(probabilities, value, several)
        assert scaled.dtype == np.float32 and scaled.shape == probabilities.shape
        assert (0 <= scaled).all() and (scaled <= 1).all()
        if several:
            assert ((scaled >= 0.5) == (probabilities >= 0.5)).all()
        else:
            assert scaled.sum(1) == pytest.approx(1, abs=1e-6)
            assert (scaled.argmax(1) == probabilities.argmax(1)).all()
    same = apply_temperature(probabilities, 1.0, several)
    np.testing.assert_allclose(same, probabilities, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_a_handful_of_images_cannot_give_nonsense(several):
    """All of 20 images are right: without a prior the temperature would go to 0."""
    shown = np.eye(4, dtype="f4")[np.arange(20) % 4]
    targets = shown.astype("u1") if several else np.arange(20) % 4
    right = 0.1 + 0.7 * shown if several else (0.1 + 0.6 * shown)
    assert 0.3 < temperature(right, targets) < 1
    wrong = 1 - targets if several else (targets + 1) % 4
    assert 1 < temperature(right, wrong) < 20
    certain = np.eye(4, dtype="f4")[np.arange(20) % 4]
    assert math.isfinite(temperature(certain, wrong))
    assert temperature(right[:0], targets[:0]) == 1.0


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("several", [False, True])
def test_folded_into_a_head_it_gives_the_same_probabilities(kind, several):
    head = build_head(HeadConfig(kind=kind, hidden=(5,)), 6, 3, several)
    head.layers[-1].bias.assign([1.0, -2.0, 0.5])
    rows = np.random.default_rng(0).normal(0, 2, (50, 6)).astype("f4")
    before = head(rows).numpy()
    fold_temperature(head, 2.5)
    expected = apply_temperature(before, 2.5, several)
    np.testing.assert_allclose(head(rows).numpy(), expected, atol=1e-6)
    assert abs(expected - before).max() > 0.1
