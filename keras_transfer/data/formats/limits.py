"""How large an image may be, checked before memory is allocated for it."""

from keras_transfer.errors import DecodeError

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused. Pillow raises an error at the same limit."""


def check_pixels(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Rejects an image that is empty or too large.

    Args:
        width: Width in pixels, as the file's header says.
        height: Height in pixels, as the file's header says.
        limit: Maximum area in pixels.

    Raises:
        DecodeError: If a side is not positive, or the area exceeds the limit.
    """
    if width <= 0 or height <= 0 or width * height > limit:
        raise DecodeError(f"{width}x{height} pixels; at most {limit:,} are decoded")
