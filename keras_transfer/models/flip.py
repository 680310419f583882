"""Test-time augmentation by flips: an image and its mirror image, averaged.

Probabilities are averaged and not logits, for neither is better (see
tests/benchmarks/RESULTS.md).
"""

import keras

from keras_transfer.models.classifier import with_features


def flip_averaged(model: keras.Model) -> keras.Model:
    """Averages a classifier's probabilities over images and their mirror images.

    Args:
        model: Model from [0, 255] RGB pixels to probabilities.

    Returns:
        A model with the same input and output, which shares the model's weights and
        takes twice as long.
    """
    image, mirrored = _both_sides(model)
    return keras.Model(image, keras.layers.Average()([model(image), model(mirrored)]))


def flip_averaged_with_features(model: keras.Model) -> keras.Model:
    """As `with_features`, with averaged probabilities; features are of the images."""
    both = with_features(model)
    image, mirrored = _both_sides(model)
    plain, other = both(image), both(mirrored)["probabilities"]
    probabilities = keras.layers.Average()([plain["probabilities"], other])
    outputs = {"probabilities": probabilities, "features": plain["features"]}
    return keras.Model(image, outputs)


def _both_sides(model: keras.Model) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Creates an input for images, and what mirrors them."""
    image = keras.Input(model.input_shape[1:], name="image")
    return image, keras.ops.flip(image, axis=2)
