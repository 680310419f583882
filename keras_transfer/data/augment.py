"""Deterministic augmented views of images.

A view depends only on the image's bytes, the seed and the view's number, and not on
which images were augmented before, so a view can be cached like the plain image.
"""

import hashlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

AUGMENT_VERSION = 1
"""Changes whenever any view changes, because features of views are cached."""

_ROTATION = 15 / 360  # maximum rotation in either direction, in full turns
_CROP = 0.875  # side of the crop: 224 of 256 pixels, as is common for ImageNet
_COLOR = 0.2  # strength of brightness, contrast and saturation changes


def augmentation_layers(image_size: int) -> list[keras.layers.Layer]:
    """Creates the Keras layers that are applied in turn.

    They take and return `[N, image_size, image_size, 3]` pixels in [0, 255].
    """
    crop = round(_CROP * image_size)
    return [
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


def make_augmenter(
    image_size: int, seed: int
) -> Callable[[np.ndarray, bytes, int], np.ndarray]:
    """Creates a function that computes augmented views; it is not thread-safe.

    Args:
        image_size: Side of the images in pixels.
        seed: Seed of the views, at least 0.

    Returns:
        A function from (pixels, the image's SHA-256 digest, the view's number) to
        augmented pixels. Pixels are uint8 `[image_size, image_size, 3]`.
    """
    layers = augmentation_layers(image_size)

    @tf.function(
        input_signature=[
            tf.TensorSpec((image_size, image_size, 3), tf.uint8),
            tf.TensorSpec((), tf.int64),
        ],
        autograph=False,
    )
    def augment(pixels: tf.Tensor, image_seed: tf.Tensor) -> tf.Tensor:
        images = tf.cast(pixels, tf.float32)[None]
        for position, layer in enumerate(layers):
            if hasattr(layer, "generator"):
                state = layer.generator.state
                state.assign(tf.cast([image_seed, position], state.dtype))
            images = layer(images, training=True)
        return tf.cast(tf.round(tf.clip_by_value(images[0], 0, 255)), tf.uint8)

    def view(pixels: np.ndarray, digest: bytes, number: int) -> np.ndarray:
        key = hashlib.sha256(digest + seed.to_bytes(8) + number.to_bytes(8)).digest()
        return augment(pixels, int.from_bytes(key[:4])).numpy()

    return view
