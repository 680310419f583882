"""Removes unusable images from splits, and finds copies and doubtful ones."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import scipy.sparse

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits, Table, count_classes
from keras_transfer.errors import KerasTransferError, UnusableImagesError
from keras_transfer.events import Listener
from keras_transfer.features.extraction import Extraction

_MOST_REASONS = 3  # listed in an error message


def check_skipped(config: Config, extraction: Extraction) -> None:
    """Checks that enough images could be used.

    Raises:
        UnusableImagesError: If more than `max_skipped` of the images are unusable.
    """
    skipped = extraction.skipped
    total = len(skipped) + len(extraction.digests)
    if len(skipped) <= config.max_skipped * total:
        return
    # Cut off file sizes in parentheses, which would make equal reasons differ.
    counts = Counter(reason.partition(" (")[0] for reason in skipped.values())
    shown = counts.most_common(_MOST_REASONS)
    reasons = [f"{reason} ({count:,})" for reason, count in shown]
    others = len(skipped) - sum(count for _, count in shown)
    reasons += [f"other reasons ({others:,})"] if others else []
    raise UnusableImagesError(
        f"{len(skipped):,} of {total:,} images cannot be used, more than "
        f"{config.max_skipped:.0%}: {'; '.join(reasons)}. "
        f"The first is {next(iter(skipped))}. Mend them, or train with a larger "
        "max_skipped.",
        skipped,
    )


def tell_of_unusable(extraction: Extraction, listener: Listener) -> None:
    """Sends a note on how many images are left out, if any."""
    if extraction.skipped:
        source, reason = next(iter(extraction.skipped.items()))
        listener.note(
            f"{len(extraction.skipped):,} images cannot be used and are left out; "
            f"the first is {source}: {reason}"
        )


def usable_splits(config: Config, splits: Splits, extraction: Extraction) -> Splits:
    """Returns the splits without the images that could not be used.

    Raises:
        UnusableImagesError: If more than `max_skipped` of the images are unusable.
        KerasTransferError: If too few classes (two, or one for multi-label data) have
            a training image.
    """
    check_skipped(config, extraction)
    usable = splits.keep(extraction.digests)
    has_images = count_classes(usable.train.targets, len(usable.class_names)) > 0
    if has_images.sum() < (1 if usable.multi_label else 2):
        raise KerasTransferError(
            "Too few classes have a usable training image. Received: "
            f"{len(usable.train)} usable training images."
        )
    return usable


def copies_grouped(table: Table, digests: Mapping[str, bytes]) -> Table:
    """Returns a table in which images with the same bytes belong to the same group.

    Otherwise, a copy of an image that is predicted could be among those learned from.

    Args:
        table: The N images.
        digests: SHA-256 of each image's bytes, by source.

    Returns:
        The table itself if no image is a copy of another.
    """
    _, copy = np.unique([digests[x] for x in table.sources], return_inverse=True)
    if copy.max(initial=-1) + 1 == len(table):
        return table
    # Images that share a group or their bytes are connected, over any number of steps.
    _, group = np.unique(
        [name or f"\0{index}" for index, name in enumerate(table.groups)],
        return_inverse=True,
    )
    count, first_group = len(table), copy.max() + 1
    links = scipy.sparse.coo_array(
        (np.ones(count), (copy, first_group + group)),
        shape=2 * (first_group + group.max() + 1,),
    )
    _, component = scipy.sparse.csgraph.connected_components(links, directed=False)
    return replace(table, groups=tuple(map(str, component[copy])))


def data_warnings(splits: Splits, usable: Splits, extraction: Extraction) -> list[str]:
    """Finds problems in the images' content that bias metrics.

    Args:
        splits: All images; their own warnings are not repeated.
        usable: The images that have features.
        extraction: Digests and quality measures of the images.

    Returns:
        One line per problem: nearly black images, classes without usable images,
        duplicates across splits, and duplicates with different labels.
    """
    digests = extraction.digests
    lines = []
    black = extraction.quality(list(digests))["is_nearly_black"].sum()
    if black:
        lines.append(
            f"{black:,} images have 16 bits of which they use 12 or fewer, and so are "
            "nearly black. Multiply their pixels by 16, or save them in 8 bits."
        )
    known = splits.absent_classes()
    lines += [line for line in usable.absent_classes() if line not in known]
    lines += usable.shared(digests, "are byte for byte in")
    labels = defaultdict(set)
    for _, table in usable.items():
        for source, target in zip(table.sources, table.targets, strict=True):
            labels[digests[source]].add(target.tobytes())
    torn = sum(len(labels[digest]) > 1 for digest in digests.values())
    if torn:
        lines.append(
            f"{torn} images are byte for byte copies of images with other labels."
        )
    return lines
