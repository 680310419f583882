"""Lists data sets that packages deliver: digits and tensorflow-datasets."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_transfer.data.tables import Listing, split_of
from keras_transfer.errors import KerasTransferError, UsageError, first_line


def list_digits() -> Listing:
    """Lists scikit-learn's 1,797 scanned 8x8 digits, encoded as grayscale PNGs.

    Source: UCI Optical Recognition of Handwritten Digits (test set).
    """
    import tensorflow as tf
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    encoded = {
        f"digits/{i:04d}.png": tf.io.encode_png(image).numpy()
        for i, image in enumerate(pixels)
    }
    listing = Listing(read=lambda names: ((name, encoded[name]) for name in names))
    for source, digit in zip(encoded, bunch.target, strict=True):
        listing.add(source, (str(digit),))
    return listing


def list_tfds(name: str, data_dir: Path | None) -> Listing:
    """Lists a tensorflow-datasets data set; images stay encoded as they are stored."""
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir)
    image_key, label_key = _tfds_keys(builder, name)
    label_names = builder.info.features[label_key].names

    def stream(split: str) -> Iterator[tuple[str, bytes, int]]:
        dataset = builder.as_dataset(
            split=split,
            decoders={image_key: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(add_tfds_id=True, try_autocache=False),
        )
        for example in dataset.as_numpy_iterator():
            source = f"{split}/{example['tfds_id'].decode()}"
            yield source, example[image_key], int(example[label_key])

    def read(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        wanted = set(sources)
        for split in builder.info.splits:
            if any(source.startswith(f"{split}/") for source in wanted):
                for source, encoded, _ in stream(split):
                    if source in wanted:
                        yield source, encoded

    listing = Listing(read=read)
    known_splits = [split for split in builder.info.splits if split_of(split)]
    for split in known_splits:
        given = "" if len(known_splits) == 1 else split_of(split)
        for source, _, label in stream(split):
            listing.add(source, (label_names[label],), given)
    present = {names[0] for names in listing.labels}
    listing.class_names = [label for label in label_names if label in present]
    return listing


def _tfds_builder(name: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # tfds raises many types for an unknown name
        raise UsageError(
            f"tensorflow-datasets has no such data set. Received: {name!r} "
            f"({first_line(error)})."
        ) from None
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise KerasTransferError(
            f"The data set {name!r} is not prepared in {builder.data_path} and could "
            f"not be downloaded ({type(error).__name__}). Prepare it where there is a "
            "network, copy it there, and name its parent as data_dir."
        ) from None
    return builder


def _tfds_keys(builder: Any, name: str) -> tuple[str, str]:
    """Finds the feature keys of the image and the class label of an example."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    if builder.info.supervised_keys:
        image, label, *_ = builder.info.supervised_keys
        if image in images and label in labels:
            return image, label
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise UsageError(
        f"A data set needs one image and one class label. Received: {name!r} with "
        f"{', '.join(features)}."
    )
