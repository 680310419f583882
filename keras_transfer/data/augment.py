"""Deterministic augmented views of images.

A view depends only on the image's bytes, the seed and the view's number, and not on
which images were augmented before, so a view can be cached like the plain image.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import AugmentPolicy

AUGMENT_VERSION = 1
"""Changes whenever any view changes, because features of views are cached."""

_ROTATION = 15 / 360  # maximum rotation in either direction, in full turns
_CROP = 0.875  # side of the crop: 224 of 256 pixels, as is common for ImageNet
_COLOR = 0.2  # strength of brightness, contrast and saturation changes

# Strengths are uniform from 0 to 18 of the paper's 30 steps, and so 9 on average, as
# for ResNet-50 on ImageNet; that they may be drawn is in its appendix.
_STRENGTH = 18 / 30
_OPERATIONS = 2  # applied to each image
_STREAM = 1000  # more random numbers than a step takes

_Step = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""Takes float32 `[1, S, S, 3]` pixels in [0, 255] and an int64 `[2]` seed; returns
changed pixels in the same form."""


def views_key(policy: AugmentPolicy, seed: int) -> str:
    """Stands for the views in the cache: views that differ in it are different."""
    prefix = "" if policy == "standard" else f"{policy} "
    return f"{prefix}{AUGMENT_VERSION}:{seed}"


def make_augmenter(
    image_size: int, seed: int, policy: AugmentPolicy = "standard"
) -> Callable[[np.ndarray, bytes, int], np.ndarray]:
    """Creates a function that computes augmented views; it is not thread-safe.

    Args:
        image_size: Side of the images in pixels.
        seed: Seed of the views, at least 0.
        policy: How images are changed: `standard` mirrors, rotates, crops and changes
            colors a little; `randaugment` mirrors and crops, and then applies 2 of 14
            operations.

    Returns:
        A function from (pixels, the image's SHA-256 digest, the view's number) to
        augmented pixels. Pixels are uint8 `[image_size, image_size, 3]`.
    """
    make, stride = _POLICIES[policy]
    steps = make(image_size)

    @tf.function(
        input_signature=[
            tf.TensorSpec((image_size, image_size, 3), tf.uint8),
            tf.TensorSpec((), tf.int64),
        ],
        autograph=False,
    )
    def augment(pixels: tf.Tensor, image_seed: tf.Tensor) -> tf.Tensor:
        images = tf.cast(pixels, tf.float32)[None]
        for position, step in enumerate(steps):
            images = step(images, tf.stack([image_seed, stride * position]))
        return tf.cast(tf.round(tf.clip_by_value(images[0], 0, 255)), tf.uint8)

    def view(pixels: np.ndarray, digest: bytes, number: int) -> np.ndarray:
        key = hashlib.sha256(digest + seed.to_bytes(8) + number.to_bytes(8)).digest()
        return augment(pixels, int.from_bytes(key[:4])).numpy()

    return view


def _standard(image_size: int) -> list[_Step]:
    crop = round(_CROP * image_size)
    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomRotation(_ROTATION, fill_mode="reflect"),
        keras.layers.RandomCrop(crop, crop),
        keras.layers.Resizing(image_size, image_size),
        keras.layers.RandomColorJitter(
            value_range=(0, 255),
            brightness_factor=_COLOR,
            contrast_factor=_COLOR,
            saturation_factor=(0.5 - _COLOR / 2, 0.5 + _COLOR / 2),
        ),
    ]
    return [_seeded(layer) for layer in layers]


def _randaugment(image_size: int) -> list[_Step]:
    """Returns the steps of RandAugment (Cubuk et al. 2020).

    Keras's own layer of this name turns and moves images in one direction only, by up
    to half a turn, and runs all of its operations on every image, which takes four
    times as long.
    """
    crop = round(_CROP * image_size)
    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomCrop(crop, crop),
        keras.layers.Resizing(image_size, image_size),
    ]
    # As a function of its own, it becomes a graph only once.
    choice = tf.function(_one_of(_randaugment_operations()), autograph=False)
    return [*(_seeded(layer) for layer in layers), *[choice] * _OPERATIONS]


def _randaugment_operations() -> list[_Step]:
    layers, move, enhance = keras.layers, 0.45 * _STRENGTH, 0.9 * _STRENGTH
    both = (0.5 - enhance / 2, 0.5 + enhance / 2)  # less and more, where 0.5 is none
    return [
        *map(
            _seeded,
            (
                layers.Identity(),
                layers.RandomShear(x_factor=0.3 * _STRENGTH),
                layers.RandomShear(y_factor=0.3 * _STRENGTH),
                layers.RandomTranslation(0.0, move),
                layers.RandomTranslation(move, 0.0),
                layers.RandomRotation(30 / 360 * _STRENGTH),
                # Keras adds, so that a gray of medium brightness is scaled as it is
                # in the paper.
                layers.RandomBrightness(enhance / 2),
                layers.RandomContrast((enhance, enhance)),
                layers.RandomSaturation(both),
                layers.RandomSharpness(both),
                layers.RandomPosterization((8 - round(4 * _STRENGTH), 8)),
                layers.AutoContrast(),
                layers.Equalization(),
            ),
        ),
        _solarize,
    ]


def _seeded(layer: keras.layers.Layer) -> _Step:
    """Returns a step that applies a layer, as if its generator were new."""

    def apply(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if hasattr(layer, "generator"):
            state = layer.generator.state
            state.assign(tf.cast(seed, state.dtype))
        return layer(images, training=True)

    return apply


def _solarize(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Inverts bright pixels; Keras's layer would draw thresholds down to 0."""
    threshold = tf.random.stateless_uniform((), seed, 255 * (1 - _STRENGTH), 255)
    return tf.where(images < threshold, images, 255 - images)


def _one_of(steps: Sequence[_Step]) -> _Step:
    """Returns a step that applies one of several, drawn at random."""

    def apply(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        index = tf.random.stateless_uniform((), seed, 0, len(steps), tf.int32)
        inner = seed + tf.constant([0, 1], seed.dtype)
        return tf.switch_case(
            index, [functools.partial(step, images, inner) for step in steps]
        )

    return apply


# The stride between the streams of random numbers of the steps. Cached views of
# `standard` were made with 1.
_POLICIES: dict[AugmentPolicy, tuple[Callable[[int], list[_Step]], int]] = {
    "standard": (_standard, 1),
    "randaugment": (_randaugment, _STREAM),
}
