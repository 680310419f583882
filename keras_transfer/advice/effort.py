"""What the ways that a search may try take, estimated before they are tried.

The unit is a weight and a pixel that go through a base; it is turned into seconds by
the throughput of one base. Without a clock, the ratios decide alone.
"""

from dataclasses import dataclass, field

from keras_transfer.advice.space import Way
from keras_transfer.advice.trial import FOLDS
from keras_transfer.models.bases import own_image_size, parameters_of

_HEAD = {"linear": 0.5, "mlp": 1.0}
"""What training a head takes for an image, in forward passes of its bases."""

_EPOCH = {"top": 1.2, "stages:2": 2.0}
"""What an image takes in an epoch of fine-tuning, in forward passes of the first base,
by what is unfrozen."""


@dataclass
class Effort:
    """Estimates what ways take.

    Attributes:
        images: Number of training images.
        others: Number of other images, which a run looks at.
        tried: Number of images that fine-tuning is tried on.
        epochs: Number of epochs of fine-tuning.
        image_size: Side of the images in pixels; None for each base's own.
        computed: The features that are cached: (base, side, number of the view).
    """

    images: int
    others: int
    tried: int
    epochs: int
    image_size: int | None = None
    computed: set[tuple[str, int, int]] = field(default_factory=set)

    def pixels(self, way: Way) -> int:
        """Returns the side of a way's images in pixels."""
        return self.image_size or own_image_size(way.base)

    def add(self, way: Way) -> None:
        """Remembers that the features of a way are cached."""
        self.computed.update(self._features(way))

    def of_image(self, way: Way) -> float:
        """Returns what an image takes in all bases of a way."""
        return self._pass(way.base, self.pixels(way))

    def of_trial(self, way: Way) -> float:
        """Returns what trying a way takes."""
        if way.tuning is None:
            missing = set(self._features(way)) - self.computed
            passes = sum(self._pass(name, side) for name, side, _ in missing)
            return self.images * (passes + self._head(way))
        return self.tried * (self._frozen(way) + (FOLDS - 1) * self._epochs(way))

    def of_run(self, way: Way) -> float:
        """Returns what making a run in a way takes that was tried."""
        found = self._head(way)
        if way.tuning is not None:
            found += self._frozen(way) + self._epochs(way)
        return self.images * found + self.others * self.of_image(way)

    def _features(self, way: Way) -> list[tuple[str, int, int]]:
        side, views = self.pixels(way), range(way.augment + 1)
        return [(name, side, view) for name in way.base.split("+") for view in views]

    def _pass(self, base: str, side: int) -> float:
        """What an image takes in a base."""
        return parameters_of(base) * side**2

    def _head(self, way: Way) -> float:
        """What an image takes while a head is trained."""
        return _HEAD[way.head] * self.of_image(way)

    def _frozen(self, way: Way) -> float:
        """What the frozen part takes for an image in all views."""
        views = 1 + dict(way.tuning or ()).get("augment", 0)
        return float(views * self.of_image(way))

    def _epochs(self, way: Way) -> float:
        """What an image takes in all epochs of fine-tuning."""
        first, *_ = way.base.split("+")
        each = _EPOCH[dict(way.tuning or ()).get("unfreeze", "top")]
        return self.epochs * each * self._pass(first, self.pixels(way))
