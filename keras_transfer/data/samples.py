"""Decoded sample images, for measurements that need real images."""

from collections.abc import Iterator, Sequence

import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.data.tables import Splits
from keras_transfer.errors import DecodeError, KerasTransferError


def sample_images(
    splits: Splits, image_size: int, count: int
) -> list[tuple[str, bytes, np.ndarray]]:
    """Decodes a sample of the training images.

    The sample is drawn from the training split only, because decisions that are based
    on it (a precision, whether two models agree) must not depend on images that metrics
    are computed on.

    Args:
        splits: The images.
        image_size: Side of the decoded images in pixels.
        count: Maximum number of images, which are spread evenly over the split.

    Returns:
        (source, encoded bytes, uint8 `[image_size, image_size, 3]` pixels) for each
        sampled image that is usable.

    Raises:
        KerasTransferError: If none of them is, although the cache may have features of
            theirs.
    """
    table = splits.train
    picks = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int)
    decode = make_decoder(image_size)
    sample, reasons = [], []
    for source, encoded in splits.read([table.sources[i] for i in picks]):
        if isinstance(encoded, OSError):
            reasons.append(f"{source} cannot be read: {encoded.strerror}")
            continue
        try:
            sample.append((source, encoded, decode(encoded)))
        except DecodeError as error:
            reasons.append(f"{source}: {error}")
    if reasons and not sample:
        raise KerasTransferError(
            f"None of {len(reasons)} sampled images can be decoded. Received: "
            f"{reasons[0]}."
        )
    return sample


def decoded_images(
    read: Reader, sources: Sequence[str], image_size: int, threads: int = 2
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Reads and decodes images in threads, in the order in which they are read.

    Yields:
        (source, uint8 `[image_size, image_size, 3]` pixels, or None if the image cannot
        be read).
    """
    decode = make_decoder(image_size)

    def decoded(item: tuple[str, bytes | OSError]) -> tuple[str, np.ndarray | None]:
        source, encoded = item
        if isinstance(encoded, OSError):
            return source, None
        try:
            return source, decode(encoded)
        except DecodeError:
            return source, None

    yield from map_ahead(decoded, read(sources), threads)
