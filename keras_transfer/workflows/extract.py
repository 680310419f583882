"""The workflow of `extract_features`: features of all images as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from keras_transfer.data.listing import list_data
from keras_transfer.data.loading import no_images, targets_of, to_table
from keras_transfer.data.tables import Listing, Splits
from keras_transfer.errors import KerasTransferError
from keras_transfer.events import Listener
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.features.usable import check_skipped, tell_of_unusable
from keras_transfer.workflows.inputs import Inputs


@dataclass(frozen=True, eq=False, repr=False)
class ImageFeatures:
    """The features of N images with their labels, in the order of DATA.

    Images of a `tf.data.Dataset` are in the order in which it was read, which is its
    own only if it does not shuffle.

    It can be unpacked as `features, labels, sources = ...`.

    Attributes:
        features: float32 `[N, D]` outputs of the frozen base.
        labels: str `[N]` class names; for multi-label data, uint8 `[N, num_classes]`
            with 1 where the class is present.
        sources: str `[N]` identifiers of the images: a path, relative to the data or,
            of paths and tables in Python, absolute; or an id.
        groups: str `[N]` groups for scikit-learn's `GroupKFold` and the like; an image
            without a group is a group of its own, which has the name of its source.
        class_names: Class names, in the order of the columns of multi-label data.
    """

    features: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    groups: np.ndarray
    class_names: tuple[str, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields features, labels and sources."""
        return iter((self.features, self.labels, self.sources))

    def __repr__(self) -> str:
        images, size = self.features.shape
        return (
            f"ImageFeatures({images:,} images, {size:,} features, "
            f"{len(self.class_names)} classes)"
        )


def features_of_data(inputs: Inputs, listener: Listener) -> ImageFeatures:
    """Implements `api.extract_features`.

    Args:
        inputs: Checked inputs; splits are ignored.
        listener: Receives notes, and progress after each image.

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If there are no images, more than `max_skipped` of them are
            unusable, or the weights cannot be used.
    """
    config = inputs.config
    listing = list_data(inputs.data, config)
    if not listing.sources:
        raise no_images(inputs.data)
    for warning in listing.warnings:
        listener.note(warning)
    part = frozen_base(config)
    images = _as_one_split(listing)
    found = frozen_features(part, images, 0, Storage(config.precision), listener)
    check_skipped(config, found.extraction)
    tell_of_unusable(found.extraction, listener)
    table = images.train.keep(found.extraction.digests)
    if not len(table):
        raise KerasTransferError(
            f"None of the {len(images.train)} images can be used. Received: "
            f"{config.data}."
        )
    names = images.class_names
    return ImageFeatures(
        found.head_inputs(table.sources, config.features == "stages")[:],
        table.targets if images.multi_label else np.array(names)[table.targets],
        np.array(table.sources),
        np.array(table.groups),
        names,
    )


def _as_one_split(listing: Listing) -> Splits:
    """Makes all images training images, each with a group."""
    names = listing.classes()
    targets = targets_of(listing.labels, names, listing.multi_label)
    order = range(len(targets))
    if listing.positions is not None:
        order = np.argsort(listing.positions).tolist()
    table = to_table(listing, targets, order)
    groups = (
        group or source
        for source, group in zip(table.sources, table.groups, strict=True)
    )
    table = replace(table, groups=tuple(groups))
    return Splits(
        train=table,
        val=table.keep(()),
        test=table.keep(()),
        class_names=tuple(names),
        multi_label=listing.multi_label,
        read=listing.read,
        warnings=(),
        root=listing.root,
    )
