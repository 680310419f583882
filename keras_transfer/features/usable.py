"""Removes unusable images from splits, and finds copies and doubtful ones."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits, Table, count_classes
from keras_transfer.errors import KerasTransferError, UnusableImagesError
from keras_transfer.events import Listener
from keras_transfer.features.copies import (
    connected,
    hash_copies,
    same_group,
    same_value,
    trusted,
)
from keras_transfer.features.extraction import Extraction

_MOST_REASONS = 3  # listed in an error message
_DETAIL = re.compile(r" \(.*|, [\d,]+ bytes$")  # makes equal reasons differ


def check_skipped(config: Config, extraction: Extraction) -> None:
    """Checks that enough images could be used.

    Raises:
        UnusableImagesError: If more than `max_skipped` of the images are unusable.
    """
    skipped = extraction.skipped
    total = len(skipped) + len(extraction.digests)
    if len(skipped) <= config.max_skipped * total:
        return
    counts = Counter(_DETAIL.sub("", reason) for reason in skipped.values())
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
        count = len(extraction.skipped)
        source, reason = next(iter(extraction.skipped.items()))
        words = "image cannot be used and is left out:"
        if count > 1:
            words = "images cannot be used and are left out; the first is"
        listener.note(f"{count:,} {words} {source}: {reason}")


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


def copies_grouped(
    table: Table, digests: Mapping[str, bytes], quality: np.ndarray
) -> Table:
    """Returns a table in which copies of an image belong to the same group.

    Otherwise, a copy of an image that is predicted could be among those learned from.
    Copies have the same bytes, or their perceptual hashes tell so, as far as these are
    `trusted`.

    Args:
        table: The N images.
        digests: SHA-256 of each image's bytes, by source.
        quality: `[N]` of `quality.QUALITY_DTYPE`; zeros for images not measured.

    Returns:
        The table itself if no image is a copy of another.
    """
    count = len(table)
    equal = same_value(np.array([digests[x] for x in table.sources], "S32"))
    alike = hash_copies(quality)
    if not len(equal) and not len(alike):
        return table
    certain = [equal, same_group(table.groups)]
    number = connected(count, [*certain, trusted(count, certain, alike)])
    return replace(table, groups=tuple(map(str, number)))


def keep_copies_together(table: Table, extraction: Extraction) -> Table:
    """Returns a table as `copies_grouped` does, from what was found while extracting.

    Args:
        table: Images that have features.
        extraction: Their digests and quality measures.
    """
    quality = extraction.quality(table.sources)
    return copies_grouped(table, extraction.digests, quality)
