"""A classifier -> the TensorFlow functions that are served, including the decoder.

All signatures call one function of pixels, in which BatchNormalization is folded into
convolutions and weights are constants. This halves the latency compared with variables,
and weights are stored only once.
"""

from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import (
    convert_variables_to_constants_v2,
)

from keras_transfer.data.decode import decode_image, require, resize_image
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.decisions import NO_RULE, DecisionRule
from keras_transfer.models.classifier import with_features
from keras_transfer.models.fold import folded_copy

TOLERANCE = 1e-5
"""Maximum absolute difference of a served probability from the model's."""

FEATURES_TOLERANCE = 1e-4
"""Maximum difference of served features from the model's, relative to the largest
feature of the model."""

TOP = 5
"""Maximum number of most likely classes that are returned."""

EXAMPLE_KEY = "image/encoded"
"""Feature of a tf.Example that contains the encoded image."""

# Number of images in a request to decode in parallel. TensorFlow's default of 10 would
# take 5 GB if all images are just below the pixel limit, and a busy server has other
# requests to process in parallel.
_PARALLEL = 2

Network = Callable[[tf.Tensor], dict[str, tf.Tensor]]
"""Takes float32 `[N, image_size, image_size, 3]` pixels in [0, 255]; returns
`probabilities` float32 `[N, C]` and `features` float32 `[N, D]`."""


def disagreement(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> str:
    """Compares served outputs with the model's.

    Args:
        actual: Served outputs; only `probabilities` and `features` are compared, if
            present.
        expected: The model's `probabilities` and `features`.

    Returns:
        A description of the first difference that is too large; "" if there is none.
    """
    largest = np.abs(expected["features"]).max()
    allowed = {"probabilities": TOLERANCE, "features": FEATURES_TOLERANCE * largest}
    for name, most in allowed.items():
        if name in actual:
            apart = np.abs(actual[name] - expected[name]).max()
            if not apart <= most:
                return f"{name} differ by {apart:.2g}, at most {most:.2g} is allowed"
    return ""


def frozen_network(
    model: keras.Model,
    pixels: np.ndarray,
    expected: Mapping[str, np.ndarray],
    fold: Callable[[keras.Model], keras.Model] = folded_copy,
) -> tuple[Network, bool]:
    """Converts a model to a function without variables.

    BatchNormalization is folded if the function then still agrees with the model.

    Args:
        model: Keras model from [0, 255] RGB pixels to probabilities.
        pixels: uint8 `[n, image_size, image_size, 3]` images to compare outputs on.
        expected: The model's `probabilities` and `features` for them.
        fold: Folds the normalization of a copy of the model.

    Returns:
        (network, whether BatchNormalization is folded).

    Raises:
        KerasTransferError: If the function does not agree with the model.
    """
    for is_folded, make in ((True, fold), (False, lambda model: model)):
        network = _constants(make(model))
        wrong = disagreement(network(tf.constant(pixels, tf.float32)), expected)
        if not wrong:
            return network, is_folded
    raise KerasTransferError(
        f"The model's graph does not agree with the model: {wrong}. Nothing was "
        "exported."
    )


def _constants(model: keras.Model) -> Network:
    both = with_features(model)
    function = tf.function(lambda pixels: both(pixels, training=False), autograph=False)
    shape = (None, *model.input_shape[1:])
    concrete = function.get_concrete_function(tf.TensorSpec(shape, tf.float32))
    frozen = convert_variables_to_constants_v2(concrete)
    structure = concrete.structured_outputs
    return lambda pixels: tf.nest.pack_sequence_as(structure, frozen(pixels))


def flip_averaged_network(network: Network) -> Network:
    """Averages a network's probabilities over images and their mirror images.

    Features remain those of the images.
    """

    def averaged(images: tf.Tensor) -> dict[str, tf.Tensor]:
        both = network(tf.concat([images, tf.reverse(images, [2])], 0))
        plain, mirrored = tf.split(both["probabilities"], 2)
        features, _ = tf.split(both["features"], 2)
        return {"probabilities": (plain + mirrored) / 2, "features": features}

    return averaged


class ServingBundle:
    """A network and the image decoder, as the signatures of a SavedModel.

    `image_bytes` is string `[N]`, the content of files that `decode.decode_image`
    accepts. A classification consists of `probabilities` float32 `[N, C]` and, for the
    k = min(5, C) most likely classes, `classes` string `[N, k]`, `scores` float32
    `[N, k]` and `indices` int32 `[N, k]`. If the rule has a threshold for it, there is
    also `sure` bool `[N]`; for multi-label data, `predicted` bool `[N, C]`. With
    `flip_tta`, probabilities are averaged over each image and its mirror image.

    Attributes:
        signatures: Functions of one tensor by signature name.
    """

    def __init__(
        self,
        network: Network,
        image_size: int,
        class_names: Sequence[str],
        rule: DecisionRule = NO_RULE,
        flip_tta: bool = False,
    ):
        self._network = network
        self._classifier = flip_averaged_network(network) if flip_tta else network
        self._rule = rule
        self._image_size = image_size
        self._class_names = list(class_names)
        square = (None, image_size, image_size, 3)
        self.signatures = {
            "serving_default": _function(
                self._predict_bytes, tf.TensorSpec((None,), tf.string, "image_bytes")
            ),
            "predict_images": _function(
                self._predict_images,
                tf.TensorSpec((None, None, None, 3), tf.uint8, "images"),
            ),
            "predict_tensor": _function(
                self._predict_tensor, tf.TensorSpec(square, tf.float32, "images")
            ),
            "classify": _function(
                self._classify, tf.TensorSpec((None,), tf.string, "inputs")
            ),
            "embed": _function(
                self._embed, tf.TensorSpec((None,), tf.string, "image_bytes")
            ),
        }

    def _predict_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images -> classification."""
        return self._predict_pixels(self._decode(image_bytes))

    def _predict_images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """uint8 `[N, H, W, 3]` RGB images, upright, of any size -> classification."""
        pixels = tf.map_fn(
            lambda image: resize_image(image, self._image_size),
            images,
            parallel_iterations=_PARALLEL,
            fn_output_signature=self._square(tf.uint8),
        )
        return self._predict_pixels(tf.cast(pixels, tf.float32))

    def _predict_tensor(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """float32 `[N, image_size, image_size, 3]` in [0, 255] -> classification."""
        is_finite = tf.reduce_all(tf.math.is_finite(images))
        return self._predict_pixels(
            require(images, is_finite, "pixels that are not finite numbers")
        )

    def _predict_pixels(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = self._classifier(images)["probabilities"]
        top = min(TOP, len(self._class_names))
        scores, indices = tf.math.top_k(probabilities, top)
        found = {
            "probabilities": probabilities,
            "classes": tf.gather(tf.constant(self._class_names), indices),
            "scores": scores,
            "indices": indices,
        }
        if self._rule.sure is not None:
            found["sure"] = tf.reduce_max(probabilities, 1) >= self._rule.sure
        if self._rule.classes is not None:
            found["predicted"] = probabilities >= self._rule.classes
        return found

    def _classify(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialized tf.Examples with `image/encoded` -> `classes` and `scores`."""
        files = {EXAMPLE_KEY: tf.io.FixedLenFeature((), tf.string)}
        image_bytes = tf.io.parse_example(inputs, files)[EXAMPLE_KEY]
        found = self._predict_bytes(image_bytes)
        return {name: found[name] for name in ("classes", "scores")}

    def _embed(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images -> `features` float32 `[N, D]`, for search and drift."""
        return {"features": self._network(self._decode(image_bytes))["features"]}

    def _decode(self, image_bytes: tf.Tensor) -> tf.Tensor:
        pixels = tf.map_fn(
            lambda encoded: decode_image(encoded, self._image_size),
            image_bytes,
            parallel_iterations=_PARALLEL,
            fn_output_signature=self._square(tf.uint8),
        )
        return tf.cast(pixels, tf.float32)

    def _square(self, dtype: tf.DType) -> tf.TensorSpec:
        return tf.TensorSpec((self._image_size, self._image_size, 3), dtype)


def _function(
    method: Callable[[tf.Tensor], dict[str, tf.Tensor]], spec: tf.TensorSpec
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Compiles a signature that verifies the shape of its input.

    A session does not check shapes, and some kernels abort the process if they receive
    a tensor of the wrong rank.
    """

    def signature(tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        tensor = tf.ensure_shape(tensor, spec.shape)
        is_filled = tf.shape(tensor)[0] > 0
        return method(require(tensor, is_filled, "an empty batch; send an image"))

    return tf.function(signature, input_signature=[spec], autograph=False)
