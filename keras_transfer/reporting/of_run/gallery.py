"""Galleries of a page: predictions that deserve a look, with heat maps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_transfer.data.reading import Reader
from keras_transfer.data.samples import decoded_images
from keras_transfer.findings.borders import BORDER
from keras_transfer.findings.finding import counted
from keras_transfer.reporting.album import Album
from keras_transfer.reporting.explain import heat_maps
from keras_transfer.reporting.page import Card, Figure, Gallery, Heat
from keras_transfer.reporting.predictions import KeptPredictions
from keras_transfer.reporting.thumbnails import LARGE, Thumbnail, heat_overlay


@dataclass(eq=False)
class Galleries:
    """Collects galleries, and explains their images together.

    Attributes:
        album: Receives the images.
        is_multi_label: Whether images may show several classes.
        heat: What is said of all heat maps; None without any.
    """

    album: Album
    is_multi_label: bool
    heat: Heat | None = None
    _groups: list[tuple[str, str, list[str]]] = field(default_factory=list)
    _classes: dict[str, int] = field(default_factory=dict)
    _maps: dict[str, np.ndarray] = field(default_factory=dict)
    _shares: dict[str, float] = field(default_factory=dict)

    def add(self, title: str, lead: str, kept: KeptPredictions) -> None:
        """Adds a gallery of predictions, if there are any."""
        sources = [x for x in kept.sources.tolist() if self.album.number(x) is not None]
        if not sources:
            return
        self._groups.append((title, lead, sources))
        self.album.first |= dict.fromkeys(sources, LARGE)
        best = kept.probabilities.argmax(1).tolist()
        self._classes |= dict(zip(kept.sources.tolist(), best, strict=True))

    def explain(
        self, model: keras.Model, read: Reader, changed: frozenset[str]
    ) -> None:
        """Computes a heat map of the most likely class for each image.

        Args:
            model: The run's model.
            read: Reads the images.
            changed: Sources to leave out.
        """
        wanted = [source for source in self._classes if source not in changed]
        pixels = {
            source: image
            for source, image in decoded_images(read, wanted, model.input_shape[1])
            if image is not None
        }
        if not pixels:
            return
        classes = np.array([self._classes[source] for source in pixels])
        found = heat_maps(model, np.stack([*pixels.values()]), classes)
        has_heat = np.isfinite(found.border_share)
        if not found.is_meaningful or not has_heat.any():
            return
        for row, source in enumerate(pixels):
            if has_heat[row]:
                self._maps[source] = found.maps[row]
                self._shares[source] = float(found.border_share[row])
        self.heat = Heat(
            Figure(
                "Part of the heat that lies on the border, mean of "
                f"{counted(int(has_heat.sum()), 'picture')}",
                float(found.border_share[has_heat].mean()),
                baseline=found.expected_border_share,
                against=f"the outer {BORDER:.0%} on each side",
            ),
            found.is_exact,
            self.is_multi_label,
        )

    def shown(self, pictures: Mapping[str, Thumbnail]) -> tuple[Gallery, ...]:
        """Returns the galleries, with heat to lie on those pictures that there are."""
        return tuple(
            Gallery(title, lead, tuple(self._card(x, pictures) for x in sources))
            for title, lead, sources in self._groups
        )

    def _card(self, source: str, pictures: Mapping[str, Thumbnail]) -> Card:
        number, heat = self.album.number(source), None
        assert number is not None  # `add` took only those that have one
        if source in self._maps and source in pictures:
            picture = pictures[source]
            heat = heat_overlay(self._maps[source], picture.width, picture.height)
        return Card(number, heat, self._shares.get(source))
