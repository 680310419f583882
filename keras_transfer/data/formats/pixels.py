"""What pixels may be, and what the converters of several formats do with them."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = (1, 2, 3, 4)
"""Numbers of channels of an image: gray or RGB, each with or without alpha."""

_BLOCK_PIXELS = 2**22


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape is `[H, W]` or `[H, W, C]` with 1 to 4 channels."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS)


def is_pixel_dtype(dtype: np.dtype) -> bool:
    """Returns whether a dtype is an integer or a float of at most 64 bits."""
    return dtype.kind in "iu" or (dtype.kind == "f" and dtype.itemsize <= 8)


def to_array(image: "Image.Image") -> np.ndarray:
    """Copies an image's pixels in blocks of rows.

    `numpy.asarray` needs three times the memory of the pixels while it copies them.

    Args:
        image: An image of any mode of whole bytes.

    Returns:
        `[H, W]` or `[H, W, C]`.
    """
    width, height = image.size
    step = max(_BLOCK_PIXELS // width, 1)
    if step >= height:
        return np.asarray(image)
    blocks = (
        np.asarray(image.crop((0, top, width, min(top + step, height))))
        for top in range(0, height, step)
    )
    first = next(blocks)
    pixels = np.empty((height, *first.shape[1:]), first.dtype)
    pixels[:step] = first
    for index, block in enumerate(blocks, 1):
        pixels[index * step : (index + 1) * step] = block
    return pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and mirrors pixels upright.

    Args:
        pixels: `[H, W, ...]`.
        orientation: EXIF or TIFF orientation, tag 0x0112. Values other than 2 to 8
            change nothing.

    Returns:
        `[H, W, ...]`, or `[W, H, ...]` for orientations 5 to 8; may be a view.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
