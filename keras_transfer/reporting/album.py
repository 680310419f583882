"""The images that a report page names, the sets that its buttons open, and pictures."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from keras_transfer.data.tables import LABEL_SEPARATOR, label_text
from keras_transfer.reporting.page import ImageSet, ShownImage
from keras_transfer.reporting.predictions import KeptPredictions
from keras_transfer.reporting.thumbnails import Thumbnail
from keras_transfer.runs.run import PREDICTIONS

MOST_IN_SET = 60
"""Number of images that a button opens at most; a file has the others."""

SHOWN_SEPARATOR = f" {LABEL_SEPARATOR} "
"""What stands between several classes of an image."""

MOST_NAMED = 3000
"""Number of images that a page names at most, so that their paths fit in it."""


@dataclass
class Album:
    """Collects the images of a page while its sections are made.

    Attributes:
        images: What is known of each image, by source.
        names: Name that the page shows for a source, which is never an absolute path.
        sets: The sets of images by key.
        first: Sources of pictures that come first, with the longer side in pixels.
    """

    images: dict[str, ShownImage] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    sets: dict[str, ImageSet] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The sources of the images that the page names, in the order of numbers."""
        return [*self._numbers]

    def tell(self, images: Mapping[str, ShownImage]) -> None:
        """Adds what is known of images, unless something is known of them already."""
        self.images = {**images, **self.images}

    def number(self, source: str) -> int | None:
        """Returns the number of an image on the page; None if it has too many."""
        if source not in self._numbers:
            if len(self._numbers) >= MOST_NAMED:
                return None
            self._numbers[source] = len(self._numbers)
        return self._numbers[source]

    def label(self, source: str) -> str:
        """Returns what an image is labeled as; "" if that is unknown."""
        known = self.images.get(source)
        return known.label if known else ""

    def put(
        self,
        key: str,
        title: str,
        sources: Sequence[str],
        notes: Sequence[str] = (),
        table: str = PREDICTIONS,
    ) -> str:
        """Adds a set of images, the most telling first.

        Args:
            key: Its key.
            title: What the images are.
            sources: The images.
            notes: What is said of each of them, if anything is.
            table: Name of the file that lists all of them.

        Returns:
            The key, or "" if there is nothing to show.
        """
        found: dict[int, str] = {}
        said = itertools.chain(notes, itertools.repeat(""))
        for source, note in zip(sources[:MOST_IN_SET], said, strict=False):
            number = self.number(source)
            if number is not None:
                found[number] = note
        if not found:
            return ""
        self.sets[key] = ImageSet(
            title,
            tuple(found),
            len(sources),
            table,
            tuple(found.values()) if notes else (),
        )
        return key

    def wanted(self, count: int, others: Iterable[str] = ()) -> list[str]:
        """Lists the sources whose pictures matter most.

        First come those of galleries, then the first image of each set, the second of
        each set and so on, and then others.

        Args:
            count: Number of pictures.
            others: Further sources by importance.
        """
        sources = self.sources
        turns = itertools.zip_longest(*(one.images for one in self.sets.values()))
        in_sets = (sources[x] for turn in turns for x in turn if x is not None)
        found = dict.fromkeys(itertools.chain(self.first, in_sets, others))
        return [x for x in found if x in self._numbers][:count]

    def shown(self, thumbnails: Mapping[str, Thumbnail]) -> tuple[ShownImage, ...]:
        """Returns the images in the order of their numbers, with their pictures."""
        return tuple(self._shown(source, thumbnails) for source in self.sources)

    def _shown(self, source: str, thumbnails: Mapping[str, Thumbnail]) -> ShownImage:
        known = self.images.get(source, ShownImage(source))
        return ShownImage(
            self.names.get(source, source),
            known.label,
            known.predicted,
            known.confidence,
            known.is_right,
            thumbnails.get(source),
        )


def predicted_images(
    kept: KeptPredictions, class_names: Sequence[str]
) -> dict[str, ShownImage]:
    """Describes predicted images, by source."""
    certainty = confidence(kept)
    return {
        str(source): ShownImage(str(source), label, said, float(sure), bool(is_right))
        for source, label, said, sure, is_right in zip(
            kept.sources,
            _labels(kept.targets, class_names),
            _labels(kept.is_predicted, class_names),
            certainty,
            kept.is_right,
            strict=True,
        )
    }


def confidence(kept: KeptPredictions) -> np.ndarray:
    """Returns how likely the predicted classes are, float32 `[N]`.

    That is the probability of the predicted class; of several, that of the least likely
    one; of no class, that of the most likely class, which was not predicted.
    """
    said = np.where(kept.is_predicted, kept.probabilities, np.inf).min(1)
    return np.where(kept.is_predicted.any(1), said, kept.probabilities.max(1))


def _labels(targets: np.ndarray, class_names: Sequence[str]) -> Iterator[str]:
    for target in targets:
        yield label_text(np.asarray(target), class_names, SHOWN_SEPARATOR)


def relative_names(sources: Iterable[str]) -> dict[str, str]:
    """Returns names for sources that are absolute paths: relative to what they share.

    Args:
        sources: Identifiers of images.

    Returns:
        The name by source, of absolute paths only.
    """
    absolute = [x for x in dict.fromkeys(sources) if os.path.isabs(x)]
    if not absolute:
        return {}
    try:
        shared = os.path.commonpath([os.path.dirname(x) for x in absolute])
    except ValueError:  # on several drives
        return {x: os.path.basename(x) for x in absolute}
    return {x: os.path.relpath(x, shared) for x in absolute}
