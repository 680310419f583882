"""What is left of splits when some images cannot be used, and what is doubtful."""

from collections import defaultdict

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits, count_classes
from keras_transfer.errors import KerasTransferError
from keras_transfer.features.extraction import Extraction


def usable_splits(config: Config, splits: Splits, extraction: Extraction) -> Splits:
    """The splits without the images that could not be used.

    Raises:
        KerasTransferError: If they are too many, or too few classes are left.
    """
    skipped = extraction.skipped
    total = len(skipped) + len(extraction.digests)
    if len(skipped) > config.max_skipped * total:
        path, reason = next(iter(skipped.items()))
        raise KerasTransferError(
            f"{len(skipped)} of {total} images cannot be used, more than "
            f"{config.max_skipped:.0%}. The first is {path}: {reason}. Mend them, or "
            "allow more with kt fit --max-skipped."
        )
    usable = splits.keep(extraction.digests)
    shown = count_classes(usable.train.targets, len(usable.class_names)) > 0
    if shown.sum() < (1 if usable.multi_label else 2):
        raise KerasTransferError(
            "Too few classes have a usable training image. Received: "
            f"{len(usable.train)} usable training images."
        )
    return usable


def doubts(splits: Splits, usable: Splits, extraction: Extraction) -> list[str]:
    """What the images' bytes show that makes figures look better than they are.

    Args:
        splits: All images, whose own warnings were given already.
        usable: Those that have features.
        extraction: Where their digests are.
    """
    digests = extraction.digests
    lines = []
    black = sum(digest in extraction.nearly_black for digest in digests.values())
    if black:
        lines.append(
            f"{black} images are PNGs of 16 bits that use 12 or fewer, and so nearly "
            "black. Multiply their pixels by 16, or save them in 8 bits."
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
