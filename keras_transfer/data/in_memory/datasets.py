"""Lists the images of a `tf.data.Dataset`, which is read once into a temporary file."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from keras_transfer.data.formats.pixels import CHANNELS
from keras_transfer.data.in_memory.class_labels import read_labels, read_weights
from keras_transfer.data.in_memory.pixels import (
    GIVE_AGAIN,
    PixelRange,
    check_dtype,
    check_image,
    to_npy,
)
from keras_transfer.data.in_memory.spool import Spool
from keras_transfer.data.tables import Listing
from keras_transfer.errors import (
    KerasTransferError,
    UsageError,
    explaining_full_disk,
    first_line,
)

_TAKEN = "A data set gives (image, label) or (image, label, sample_weight)."
_NAME_DIGITS = 16  # of the SHA-256 that names an image
_FEW_COPIES = 1000  # images in a row that any data set may repeat


def is_dataset(data: object) -> bool:
    """Returns whether DATA is a `tf.data.Dataset`, without importing TensorFlow."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


@dataclass
class DatasetImages:
    """The images of a data set, which can be listed several times.

    Attributes:
        class_names: Names of the classes by index, from the data set; None for none.
        spool: The images.
        digests: SHA-256 of each image, in the order of the data set.
        labels: `[B]` or `[B, K]` labels of some images each.
        weights: Weights of the images in the loss; empty if the data set has none.
        warnings: What the user should know about the pixels, a line each.
    """

    class_names: list[str] | None
    spool: Spool = field(default_factory=Spool)
    digests: list[bytes] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def list(self, multi_label: bool) -> Listing:
        """Lists the images, in the order of their content.

        An image is named by the start of its SHA-256, because a shuffled data set has
        no order; copies have `-2`, `-3` appended.

        Args:
            multi_label: Whether to treat one-hot labels as multi-label.

        Raises:
            UsageError: If the labels or weights have another shape or dtype.
            KerasTransferError: If one of them is not valid.
        """
        if not self.digests:
            raise UsageError("There are no images. Received: a data set without any.")
        if len({labels.shape[1:] for labels in self.labels}) > 1:
            shapes = sorted({str([*labels.shape[1:]]) for labels in self.labels})
            raise UsageError(
                "Labels of a data set have one shape. Received: labels of "
                f"{' and '.join(shapes)}."
            )
        classes = read_labels(
            np.concatenate(self.labels), self.class_names, multi_label
        )
        weights = [1.0] * len(self.digests)
        if self.weights:
            weights = read_weights(np.concatenate(self.weights), len(weights))
        positions = range(len(weights))
        rows = sorted(
            zip(self.digests, classes.of_image, weights, positions, strict=True)
        )
        of_source: dict[str, bytes] = {}

        def read(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
            return self.spool.read({source: of_source[source] for source in sources})

        listing = Listing(read=read, class_names=classes.class_names)
        copies: Counter[str] = Counter()
        for digest, names, _, _ in rows:
            source = digest.hex()[:_NAME_DIGITS]
            copies[source] += 1
            if copies[source] > 1:
                source += f"-{copies[source]}"
            of_source[source] = digest
            listing.add(source, names)
        if self.weights:
            listing.sample_weight = [weight for _, _, weight, _ in rows]
        listing.positions = [position for *_, position in rows]
        listing.multi_label = classes.multi_label
        listing.warnings += [GIVE_AGAIN, *self.warnings, *classes.warnings]
        return listing


def read_dataset(dataset: Any) -> DatasetImages:
    """Reads a data set once, in one order, and keeps its images on the disk.

    Args:
        dataset: A `tf.data.Dataset` of (image, label) or (image, label, sample_weight),
            or of dictionaries with the keys image and label, batched or not. Images are
            encoded (string scalars) or decoded: `[H, W]` or `[H, W, C]` integers or
            floats in [0, 255]. A list of class names in the attribute `class_names`, as
            Keras sets it, names integer labels.

    Raises:
        UsageError: If it is infinite, or its elements are of another form.
        KerasTransferError: If it fails, repeats its images without an end, is too
            large for the disk, or has a pixel that is not valid.
    """
    if int(dataset.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise UsageError(
            "The data set has no end. Received: a data set of infinite cardinality. "
            "Leave out repeat(), or limit it with take()."
        )
    _check_spec(dataset.element_spec)
    names = getattr(dataset, "class_names", None)
    images = DatasetImages(None if names is None else [str(name) for name in names])
    try:
        with explaining_full_disk(images.spool.folder):
            _fill(images, dataset)
    except BaseException:  # its traceback may live on, and with it the file
        images.spool.close()
        raise
    return images


def _fill(images: DatasetImages, dataset: Any) -> None:
    pixel_range = PixelRange()
    repeated = 0
    for element in _elements(dataset):
        batch = _to_batch(element, len(images.digests))
        images.labels.append(batch.labels)
        if batch.weights is not None:
            images.weights.append(batch.weights)
        for image in batch.images:
            encoded = _to_bytes(image, len(images.digests), pixel_range)
            digest, is_new = images.spool.add(encoded)
            images.digests.append(digest)
            repeated = 0 if is_new else repeated + 1
        if repeated > 2 * len(images.spool) + _FEW_COPIES:
            raise KerasTransferError(
                f"The data set repeats its images. Received: {len(images.digests):,} "
                f"images, of which {len(images.spool):,} are different. Leave out "
                "repeat()."
            )
    images.warnings += pixel_range.finish()


def _elements(dataset: Any) -> Iterator[Any]:
    """Yields the elements.

    Raises:
        KerasTransferError: If the data set fails.
    """
    import tensorflow as tf

    iterator = iter(dataset)
    count = 0
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            said = first_line(error.message)
            said = said.split("}} ", maxsplit=1)[-1]  # behind a graph node
            raise KerasTransferError(
                f"The data set failed after {count} elements. Received: {said}."
            ) from None
        yield element
        count += 1


def _parts(element: Any) -> tuple[Any, ...]:
    """Returns (image, label) or (image, label, weight) of an element or its spec.

    Raises:
        UsageError: If it has another structure.
    """
    if isinstance(element, dict) and {"image", "label"} <= set(element):
        return element["image"], element["label"]
    if isinstance(element, (tuple, list)) and len(element) in (2, 3):
        return tuple(element)
    if isinstance(element, dict):
        given = f"dictionaries of {', '.join(map(str, element))}"
    elif isinstance(element, (tuple, list)):
        given = f"tuples of {len(element)}"
    else:
        given = str(element)
    raise UsageError(
        f"{_TAKEN} Received: {given}. Select them with map(), such as "
        "map(lambda x: (x['image'], x['label']))."
    )


def _check_spec(spec: Any) -> None:
    """Refuses what cannot be an image with its label, before anything is read."""
    import tensorflow as tf

    image, *others = _parts(spec)
    if not isinstance(image, (tf.TensorSpec, tf.RaggedTensorSpec)) or not all(
        isinstance(other, tf.TensorSpec) for other in others
    ):
        kinds = ", ".join(type(part).__name__ for part in (image, *others))
        raise UsageError(f"{_TAKEN} Received: {kinds}. Each is one dense tensor.")
    if image.dtype != tf.string:
        check_dtype(np.dtype(image.dtype.as_numpy_dtype), "images")


class _Batch(NamedTuple):
    """Some images of a data set.

    Attributes:
        images: Encoded images, or `[H, W]` or `[H, W, C]` pixels.
        labels: `[B]` or `[B, K]`.
        weights: `[B]` or None.
    """

    images: Sequence[bytes | np.ndarray]
    labels: np.ndarray
    weights: np.ndarray | None


def _to_batch(element: Any, first: int) -> _Batch:
    """Converts an element, batched or not, to a batch.

    Args:
        element: The element.
        first: Number of its first image, for error messages.

    Raises:
        UsageError: If its parts have no possible shapes, or different lengths.
    """
    image, label, *weight = _parts(element)
    labels = np.asarray(label)
    weights = np.asarray(weight[0]) if weight else None
    images = _unstacked(image, labels.ndim)
    if images is None:
        images, labels = [_to_numpy(image)], labels[None]
        weights = None if weights is None else weights[None]
    is_valid = labels.ndim in (1, 2) and len(labels) == len(images)
    if not is_valid or (weights is not None and weights.shape[:1] != (len(images),)):
        parts = [f"image {[*image.shape]}", f"label {[*label.shape]}"]
        parts += [f"sample_weight {[*part.shape]}" for part in weight]
        raise UsageError(
            f"{_TAKEN} Received: {', '.join(parts)} (element of image {first})."
        )
    return _Batch(images, labels, weights)


def _unstacked(image: Any, label_rank: int) -> Sequence[bytes | np.ndarray] | None:
    """Returns the images of a batch; None if it is a single image.

    `[A, B, C]` is an image if its label is a scalar or if C may be channels; otherwise
    it is a batch of grayscale images.
    """
    import tensorflow as tf

    if isinstance(image, tf.RaggedTensor):
        return [_to_numpy(one) for one in image]
    pixels = np.asarray(image)
    rank = pixels.ndim
    if image.dtype == tf.string:
        return pixels.tolist() if rank == 1 else None
    is_batch = rank == 4 or (
        rank == 3 and label_rank >= 1 and pixels.shape[2] not in CHANNELS
    )
    return list(pixels) if is_batch else None


def _to_numpy(image: Any) -> np.ndarray:
    return np.asarray(image.to_tensor() if hasattr(image, "to_tensor") else image)


def _to_bytes(image: bytes | np.ndarray, index: int, pixel_range: PixelRange) -> bytes:
    """Returns the bytes that an image travels as."""
    if isinstance(image, np.ndarray) and image.dtype == object and not image.ndim:
        image = image.item()
    if isinstance(image, bytes):
        return image
    name = f"image {index}"
    check_image(image, name)
    pixel_range.check(image[None], "image {}", index)
    return to_npy(image)
