"""Lists images that are given as arrays: x and y as for Keras."""

from collections.abc import Iterator, Sequence

import numpy as np

from keras_transfer.data.formats.pixels import CHANNELS
from keras_transfer.data.in_memory.class_labels import read_labels, read_weights
from keras_transfer.data.in_memory.pixels import (
    GIVE_AGAIN,
    PixelRange,
    as_array,
    check_dtype,
    check_image,
    described,
    to_npy,
)
from keras_transfer.data.tables import Listing
from keras_transfer.errors import UsageError

_LEAST_DIGITS = 6  # of the index that names an image


def list_arrays(
    x: object, y: object, sample_weight: object = None, multi_label: bool = False
) -> Listing:
    """Lists images that are given as arrays.

    An image is named by its index, such as `000123`. The arrays are read when they are
    decoded, so they must not change until then.

    Args:
        x: `[N, H, W]` or `[N, H, W, C]` array with 1 to 4 channels, or a list of
            `[H, W]` and `[H, W, C]` arrays; integers or floats in [0, 255].
        y: As in `read_labels`.
        sample_weight: `[N]` weights of the images in the loss; None for equal weights.
        multi_label: Whether to treat one-hot labels as multi-label.

    Raises:
        UsageError: If an array has another shape or dtype, or if their lengths
            differ.
        KerasTransferError: If a pixel, label or weight is not valid.
    """
    pixel_range = PixelRange()
    images, given = _to_images(x, pixel_range)
    labels = as_array(y, "y")
    if labels.shape[:1] != (len(images),):
        raise UsageError(
            f"x and y have the same length. Received: x of {given} and y of "
            f"{described(labels)}."
        )
    classes = read_labels(labels, multi_label=multi_label)
    digits = max(_LEAST_DIGITS, len(str(len(images) - 1)))

    def read(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        for source in sources:
            yield source, to_npy(images[int(source)])

    listing = Listing(read=read, class_names=classes.class_names)
    for index, names in enumerate(classes.of_image):
        listing.add(f"{index:0{digits}d}", names)
    listing.multi_label = classes.multi_label
    listing.warnings += [
        GIVE_AGAIN,
        *pixel_range.finish(),
        *classes.warnings,
    ]
    if sample_weight is not None:
        weights = as_array(sample_weight, "sample_weight")
        listing.sample_weight = read_weights(weights, len(images))
    return listing


def _to_images(
    x: object, pixel_range: PixelRange
) -> tuple[Sequence[np.ndarray] | np.ndarray, str]:
    """Checks the images, each by itself.

    Returns:
        (the images, their description).
    """
    if isinstance(x, (list, tuple)):
        return _check_list(x, pixel_range), f"{len(x)} images"
    images = as_array(x, "x")
    _check_stack(images, pixel_range)
    return images, described(images)


def _check_list(x: Sequence[object], pixel_range: PixelRange) -> list[np.ndarray]:
    if not x:
        raise UsageError("There are no images. Received: x of length 0.")
    images = [as_array(image, f"x[{index}]") for index, image in enumerate(x)]
    for index, image in enumerate(images):
        check_image(image, f"x[{index}]")
        pixel_range.check(image[None], "x[{}]", index)
    return images


def _check_stack(x: np.ndarray, pixel_range: PixelRange) -> None:
    if x.dtype == object and x.size and isinstance(x.flat[0], bytes):  # of tensors
        check_dtype(np.asarray(x.flat[0]).dtype, "x")
    check_dtype(x.dtype, "x")
    is_stack = x.ndim == 3 or (x.ndim == 4 and x.shape[3] in CHANNELS)
    if not is_stack:
        hint = ""
        if x.ndim == 4 and x.shape[1] in CHANNELS:
            hint = " Put the channels last: np.moveaxis(x, 1, -1)."
        raise UsageError(
            "Images are [N, height, width] or [N, height, width, channels] with 1 to 4 "
            f"channels. Received: x of {described(x)}.{hint}"
        )
    if not x.size:
        raise UsageError(f"There are no images. Received: x of {described(x)}.")
    pixel_range.check(x, "x[{}]")
