"""Some images of a run, decoded, for what is measured on real images."""

import contextlib

import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.tables import Splits
from keras_transfer.errors import DecodeError


def sample_images(
    splits: Splits, image_size: int, count: int
) -> list[tuple[str, bytes, np.ndarray]]:
    """(source, bytes, pixels) of some training images, decoded anew.

    They are spread evenly; unusable ones are left out. What is decided on them (a
    precision, whether two models agree) must not be decided on images that figures
    are of.
    """
    table = splits.train
    picks = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int)
    decode = make_decoder(image_size)
    sample = []
    for source, encoded in splits.read([table.sources[i] for i in picks]):
        if isinstance(encoded, bytes):
            with contextlib.suppress(DecodeError):
                sample.append((source, encoded, decode(encoded)))
    return sample
