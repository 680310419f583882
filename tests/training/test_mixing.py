"""Mixed images and smoothed labels, beside losses computed in another way."""

import hashlib
from dataclasses import replace

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_transfer.config import FinetuneConfig, load_config, with_finetune
from keras_transfer.errors import UsageError
from keras_transfer.training.labelled import LabelledFeatures, Weighting
from keras_transfer.training.losses import keras_loss, smoothed
from keras_transfer.training.mixing import draw_pairs
from keras_transfer.training.tail import TailData

SIZE, CLASSES = 8, 3


def data(multi_label: bool, images: int = 20) -> LabelledFeatures:
    """Images whose pixels are all the image's number, with weights of all kinds."""
    rng = np.random.default_rng(0)
    shape = (images, CLASSES) if multi_label else images
    targets = rng.integers(0, 2 if multi_label else CLASSES, shape)
    absent, present, offset = rng.uniform(0.5, 2, (3, CLASSES)).astype("f4")
    weighting = Weighting(absent, present, offset * (not multi_label))
    numbers = np.arange(images, dtype=np.uint8)
    pixels = np.broadcast_to(numbers[:, None, None, None], (images, SIZE, SIZE, 3))
    weights = rng.uniform(0, 2, images).astype("f4")
    return LabelledFeatures([pixels], targets, weighting, weights)


def loss_of(found: LabelledFeatures, image: int, logits: np.ndarray) -> float:
    """The loss of one image's true label, without any of the code under test."""
    target, weighting = found.targets[image], found.weighting
    if found.multi_label:
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        losses = -np.log(np.where(target == 1, p, 1 - p))
        weights = np.where(target == 1, weighting.present, weighting.absent)
        return float(found.sample_weight[image] * (weights * losses).sum())
    shifted = np.exp(logits.astype(np.float64) + weighting.logit_offset)
    loss = -np.log(shifted[target] / shifted.sum())
    return float(found.sample_weight[image] * weighting.present[target] * loss)


def unchanged(pixels, picked, epoch, change):
    """In the place of augmentation and the frozen part."""
    return change(pixels) if change else pixels


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_the_loss_of_a_mixture_is_the_mixture_of_losses(mixing, multi_label):
    images = data(multi_label)
    logits = np.random.default_rng(1).normal(size=(20, CLASSES)).astype("f4")
    targets, weights = images.labels(np.arange(20))
    pairs = draw_pairs(mixing, 20, SIZE, np.random.default_rng(2))
    labels = np.concatenate(pairs.labels(targets, weights), axis=1)
    losses = keras_loss(multi_label, images.weighting.logit_offset)(labels, logits)
    expected = [
        share * loss_of(images, i, logits[i])
        + (1 - share) * loss_of(images, partner, logits[i])
        for i, (share, partner) in enumerate(
            zip(pairs.shares, pairs.partners, strict=True)
        )
    ]
    assert len({*pairs.partners}) == 20 and (pairs.partners != np.arange(20)).any()
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_smoothed_labels_are_those_of_keras(multi_label):
    images = replace(data(multi_label), sample_weight=None)
    images = replace(images, weighting=Weighting.equal(CLASSES))
    logits = np.random.default_rng(1).normal(size=(20, CLASSES)).astype("f4")
    targets, weights = images.labels(np.arange(20))
    labels = np.concatenate([smoothed(targets, 0.2, multi_label), weights], axis=1)
    losses = keras_loss(multi_label, images.weighting.logit_offset)(labels, logits)
    options = {"from_logits": True, "label_smoothing": 0.2, "reduction": "none"}
    if multi_label:  # Keras takes the mean of the classes, and we their sum
        expected = 3 * keras.losses.BinaryCrossentropy(**options)(targets, logits)
    else:
        expected = keras.losses.CategoricalCrossentropy(**options)(targets, logits)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_smoothing_leaves_weights_to_the_true_label():
    images = data(False)
    plain = next(TailData(images).batches(20, 0, 0))[1]
    spread = next(TailData(images, label_smoothing=0.3).batches(20, 0, 0))[1]
    np.testing.assert_array_equal(plain[:, CLASSES:], spread[:, CLASSES:])
    np.testing.assert_allclose(
        spread[:, :CLASSES], 0.7 * plain[:, :CLASSES] + 0.1, rtol=1e-6
    )


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["mixup", "cutmix"]),
    st.integers(1, 9),
    st.sampled_from([1, 7, 32]),
    st.integers(0, 10**6),
)
def test_pixels_are_mixed_in_the_proportion_of_the_labels(mixing, count, size, seed):
    images = np.zeros((count, size, size, 3), np.uint8)
    pairs = draw_pairs(mixing, count, size, np.random.default_rng(seed))
    assert sorted(pairs.partners) == list(range(count))
    assert (pairs.shares >= 0).all() and (pairs.shares <= 1).all()
    for row, partner in enumerate(pairs.partners):
        images[:] = 0
        images[row] = 200
        own = pairs.pixels(images)[row].mean() / 200
        share = 1.0 if partner == row else pairs.shares[row]
        assert own == pytest.approx(share, abs=0.003 if mixing == "mixup" else 1e-6)
        if mixing == "cutmix":
            assert {*np.unique(pairs.pixels(images))} <= {0, 200}
    assert images.dtype == pairs.pixels(images).dtype


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_batches_are_mixed_anew_in_every_epoch_and_the_same_every_time(mixing):
    images = replace(
        data(False),
        targets=np.arange(20) % CLASSES,
        weighting=Weighting.equal(CLASSES),
        sample_weight=None,
    )
    plain = TailData(images, transform=unchanged)
    mixed = replace(plain, mixing=mixing)
    found = [list(mixed.batches(8, 3, epoch)) for epoch in (0, 1, 0)]
    for first, again in zip(found[0], found[2], strict=True):
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
    marks = [
        hashlib.sha256(b"".join(labels.tobytes() for _, labels in batches)).hexdigest()
        for batches in found[:2]
    ]
    assert marks[0] != marks[1]
    targets = np.concatenate([labels for _, labels in found[0]])[:, :CLASSES]
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
    assert (targets.max(1) < 0.99).any()
    # Mixing takes nothing from the random numbers of the order.
    before = np.concatenate([rows for rows, _ in plain.batches(8, 3, 0)])
    after = np.concatenate([rows for rows, _ in mixed.batches(8, 3, 0)])
    same = (before == after).all(axis=(1, 2, 3)).mean()
    assert before.shape == after.shape and 0 < same < 1


@pytest.mark.parametrize("augment", [0, 3])
def test_mixtures_are_made_online(augment):
    options = {"mix": "mixup", "augment": augment}
    words = f"Received: mix=mixup and augment={augment}. Use augment=online"
    with pytest.raises(UsageError, match=words):
        FinetuneConfig(**options)
    with pytest.raises(UsageError, match=words):
        load_config(None, {"data": "x", "finetune": options})
    config = load_config(None, {"data": "x"})
    with pytest.raises(UsageError, match=words):
        with_finetune(config, options)
    assert with_finetune(config, {"mix": "cutmix", "augment": "online"})
    assert with_finetune(config, {"label_smoothing": 0.1, "augment": augment})
