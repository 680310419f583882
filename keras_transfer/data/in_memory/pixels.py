"""Decoded images as arrays: which are taken, and the bytes they travel as."""

import io
from collections.abc import Iterator

import numpy as np

from keras_transfer.data.formats.pixels import (
    CHANNELS,
    is_image_shape,
    is_pixel_dtype,
)
from keras_transfer.errors import UsageError, first_line

GIVE_AGAIN = (
    "The images were given in Python and are not kept: evaluate and "
    "unfreeze_and_finetune take them again."
)
"""Warning of images that no other process can read again."""

_CHUNK_BYTES = 2**24  # pixels are checked in pieces of this size
_NEARLY_BLACK = 16  # as of 4 bits, such as scikit-learn's digits
_ENOUGH_TO_JUDGE = 256  # images after which a range of [0, 1] is certain


def to_npy(image: np.ndarray) -> bytes:
    """Saves an image as the content of a .npy file.

    The same pixels give the same bytes, however they lie in memory: integers are saved
    as uint8, and floats in the machine's byte order.

    Args:
        image: `[H, W]` or `[H, W, C]` integers or floats in [0, 255].
    """
    is_float = image.dtype.kind == "f"
    dtype = image.dtype.newbyteorder("=") if is_float else np.dtype(np.uint8)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(image, dtype), allow_pickle=False)
    return file.getvalue()


def as_array(value: object, name: str) -> np.ndarray:
    """Converts an array, a tensor on the CPU or a list to a NumPy array.

    Args:
        value: What was given.
        name: Its name, for the error message.

    Raises:
        UsageError: If it cannot be converted.
    """
    said = ""
    try:
        array = np.asarray(value)
        if array.ndim or array.dtype != object:
            return array
    except Exception as error:  # each library raises its own types
        said = f" ({first_line(error)})"
    raise UsageError(
        f"{name} is no array. Received: {type(value).__name__}{said}. Give NumPy "
        "arrays; images of different sizes go into a list."
    )


def described(array: np.ndarray) -> str:
    """Describes an array by dtype and shape, such as `uint8 [5, 32, 32, 3]`."""
    return f"{array.dtype} {list(array.shape)}"


def check_image(image: np.ndarray, name: str) -> None:
    """Checks the dtype and shape of an image.

    Args:
        image: The image.
        name: Its name, for the error message.

    Raises:
        UsageError: If it is not `[H, W]` or `[H, W, C]` with 1 to 4 channels, or if
            its dtype is neither an integer nor a float of at most 64 bits.
    """
    check_dtype(image.dtype, name)
    if is_image_shape(image.shape) and image.size:
        return
    hint = ""
    if image.ndim == 3 and image.size and image.shape[0] in CHANNELS:
        hint = " Put the channels last: np.moveaxis(image, 0, -1)."
    raise UsageError(
        "An image is [height, width] or [height, width, channels] with 1 to 4 "
        f"channels. Received: {name} of {described(image)}.{hint}"
    )


def check_dtype(dtype: np.dtype, name: str) -> None:
    """Checks that a dtype is an integer or a float of at most 64 bits.

    Args:
        dtype: The dtype of an image, or of several.
        name: Name of the image or images, for the error message.

    Raises:
        UsageError: If it is neither.
    """
    if is_pixel_dtype(dtype):
        return
    hints = {
        "b": " Multiply by 255: x.astype('uint8') * 255.",
        "O": " Give images of different sizes as a list of arrays: list(x).",
        "S": " Give paths as str, and encoded images as files or in a tf.data.Dataset.",
    }
    raise UsageError(
        f"Pixels are integers or floats in [0, 255]. Received: {name} of dtype {dtype}."
        f"{hints.get(dtype.kind, '')}"
    )


class PixelRange:
    """Checks that pixels are in [0, 255], not in [0, 1], one array after another."""

    def __init__(self) -> None:
        self._count = 0
        self._has_floats = False
        self._largest = 0.0

    def check(self, images: np.ndarray, names: str, first: int = 0) -> None:
        """Checks several images without copying them.

        Args:
            images: `[N, H, W]` or `[N, H, W, C]` integers or floats.
            names: Name of the images, with `{}` for the number of one.
            first: Number of the first image.

        Raises:
            UsageError: If a pixel is not in [0, 255], or if it is certain that all are
                in [0, 1].
        """
        self._has_floats |= images.dtype.kind == "f"
        is_safe = images.dtype == np.uint8
        for start, chunk in _chunks(images):
            self._count += len(chunk)
            if is_safe and self._largest > _NEARLY_BLACK:
                continue
            low, high = 0 if is_safe else chunk.min(), chunk.max()
            if not (low >= 0 and high <= 255):
                _refuse_range(chunk, names, first + start)
            self._largest = max(self._largest, float(high))
            if self._count >= _ENOUGH_TO_JUDGE and 0 < self._largest <= 1:
                self.finish()

    def finish(self) -> list[str]:
        """Checks the range of all images together.

        Returns:
            A line if they are nearly black; none otherwise.

        Raises:
            UsageError: If there are images, and no pixel is greater than 1.
        """
        if not self._count or self._largest > _NEARLY_BLACK:
            return []
        if self._largest > 1:
            return [
                f"Images are nearly black: no pixel is above {self._largest:g} of 255. "
                f"Multiply them by {255 / self._largest:.3g} if that is their white."
            ]
        kind, fix = "integers", "Leave out the division by 255, or multiply them by 255"
        if self._has_floats:
            kind, fix = "floats", "Multiply them by 255"
        raise UsageError(
            f"Pixels are in [0, 255], not in [0, 1]. Received: {kind} of at most "
            f"{self._largest:g}. {fix}."
        )


def _chunks(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of the first, a few images)."""
    count = max(1, _CHUNK_BYTES // max(1, images[0].nbytes))
    for start in range(0, len(images), count):
        yield start, images[start : start + count]


def _refuse_range(chunk: np.ndarray, names: str, first: int) -> None:
    is_bad = ~((chunk >= 0) & (chunk <= 255))
    index = np.unravel_index(np.argmax(is_bad), chunk.shape)
    value = chunk[index]
    if np.isnan(value):
        fix = "Replace what is not a number, or leave the image out."
    elif value < 0:
        fix = "Leave out the preprocessing: the base does its own."
    else:
        fix = "Scale the images to [0, 255], such as x / 257 for 16 bits."
    raise UsageError(
        f"Pixels are in [0, 255]. Received: {names.format(first + int(index[0]))} with "
        f"{value:g}. {fix}"
    )
