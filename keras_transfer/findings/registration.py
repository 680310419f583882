"""Tells whether one of two pictures shows a part of the other, by laying it over it."""

import os
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.ndimage

from keras_transfer.data.reading import map_ahead

SIDE = 64
"""Side of the square gray pictures in pixels; see `likeness`."""

_COARSE = 32  # side of the pictures for the search
_SCALES = ((1, 1), (0.9, 0.9), (0.8, 0.8), (0.7, 0.7), (1, 0.8), (0.8, 1))
"""Height and width of the part, as fractions of those of the whole."""

_SMALLEST, _LARGEST = 0.6, 1.05  # bounds of that while it is refined
_LEAST_COARSE = 0.6
"""Least correlation at the best place on the coarse grid that is refined. Of copies
cropped by 5% off each side, between two of the scales, 99% reach 0.69
(`tests/benchmarks/duplicates.py`); of pairs of different photos, hardly any."""

_COARSE_STEPS, _FINE_STEPS = 4, 2  # Gauss-Newton steps
_LARGEST_STEP = 0.06  # of a parameter, in half sides
_STRUCTURE = 4.0  # blur in pixels that leaves what is not compared, such as shading
_CHUNK = 256  # pairs that a thread compares together
_EVERYTHING = np.array([[1, 0]], np.float32)  # as a span; see `_interpolation`


def likeness(pictures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Measures how exactly one of two pictures shows a part of the other.

    The pictures' structure, without shading that is coarser than a sixteenth of the
    side, is correlated at each place and at scales from 0.7 to 1, as is and mirrored
    left to right. The best place is refined by least squares in position and scale of
    both axes (Lucas and Kanade 1981), until structure correlates best. Brightness and
    contrast do not matter. Pairs are compared in all cores.

    Args:
        pictures: uint8 or float32 `[N, 64, 64]` gray pictures.
        pairs: int64 `[P, 2]` indices of pictures.

    Returns:
        float32 `[P]` correlations from -1 to 1; those of pairs without a place that is
        worth refining are at most 0.6.
    """

    def compare(chunk: np.ndarray) -> np.ndarray:
        one, other = pictures[chunk.T].astype(np.float32)
        return _likeness(one, other)

    chunks = [pairs[i : i + _CHUNK] for i in range(0, len(pairs), _CHUNK)]
    found = map_ahead(compare, chunks, os.cpu_count() or 1)
    return np.concatenate([np.zeros(0, np.float32), *found])


def _likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compares float32 `[P, S, S]` pictures, the first of one with the first of other.

    Returns:
        float32 `[P]`.
    """
    coarse = [_structure(_halved(x), 0.5, _STRUCTURE / 2) for x in (one, other)]
    found = [
        _search(whole, part[..., ::turn])
        for whole, part in (coarse, coarse[::-1])
        for turn in (1, -1)
    ]
    scores = np.stack([score for score, _ in found])
    places = np.stack([place for _, place in found])
    best = scores.argmax(0)
    every = np.arange(len(one))
    result = scores[best, every]
    rows = np.flatnonzero(result > _LEAST_COARSE)
    if not len(rows):
        return result
    is_swapped, is_mirrored = np.divmod(best[rows], 2)
    place = places[best[rows], rows]

    def ordered(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the wholes, and the parts as they were turned."""
        swap, turn = (x.astype(bool)[:, None, None] for x in (is_swapped, is_mirrored))
        one, other = (x[rows] for x in pictures)
        part = np.where(swap, one, other)
        return np.where(swap, other, one), np.where(turn, part[..., ::-1], part)

    place = _refined(*ordered(coarse), place, _COARSE_STEPS)
    whole, part = ordered((one, other))
    fine = [_structure(x, 0.5, _STRUCTURE) for x in (whole, part)]
    place = _refined(fine[0], fine[1], place, _FINE_STEPS)
    seen = [_structure(_cut(whole, place), 0.5, _STRUCTURE), fine[1]]
    result[rows] = (_unit(seen[0]) * _unit(seen[1])).sum((1, 2))
    return result


def _search(whole: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Looks for the part in the whole, at all places and a few scales.

    Returns:
        (float32 `[P]` largest correlations, float32 `[P, 4]` places; see `_cut`).
    """
    count = len(whole)
    spectrum = scipy.fft.rfft2(whole)
    sums, squares = (_cumulated(x) for x in (whole, whole * whole))
    best = np.full(count, -1, np.float32)
    places = np.zeros((count, 4), np.float32)
    for scale in _SCALES:
        sides = [round(_COARSE * x) for x in scale]
        height, width = sides
        down, right = (_interpolation(_EVERYTHING, _COARSE, x)[0] for x in sides)
        small = _unit(down @ part @ right.T)
        moved = spectrum * np.conj(scipy.fft.rfft2(small, (_COARSE, _COARSE)))
        last_y, last_x = _COARSE - height + 1, _COARSE - width + 1
        product = scipy.fft.irfft2(moved, (_COARSE, _COARSE))[:, :last_y, :last_x]
        total = _window_sums(sums, height, width)
        spread = _window_sums(squares, height, width) - total**2 / (height * width)
        score = product / np.sqrt(np.maximum(spread, 1e-3))
        flat = score.reshape(count, -1)
        at = flat.argmax(1)
        highest = flat[np.arange(count), at]
        y, x = np.divmod(at, last_x)
        found = np.stack(
            [
                np.full(count, height / _COARSE),
                (2 * y + height) / _COARSE - 1,
                np.full(count, width / _COARSE),
                (2 * x + width) / _COARSE - 1,
            ],
            axis=1,
        )
        is_better = highest > best
        places[is_better] = found[is_better]
        best[is_better] = highest[is_better]
    return best, places


def _refined(
    whole: np.ndarray, part: np.ndarray, places: np.ndarray, steps: int
) -> np.ndarray:
    """Moves and scales the places by Gauss-Newton steps; returns the best ones."""
    count, side, _ = whole.shape
    slopes = [x * np.float32(side / 2) for x in np.gradient(whole, axis=(1, 2))]
    at = _positions(side)
    target = _unit(part)
    best, kept = np.full(count, -2, np.float32), places
    for done in range(steps + 1):
        seen = _cut(whole, places)
        score = (_unit(seen) * target).sum((1, 2))
        is_better = score > best
        best = np.where(is_better, score, best)
        kept = np.where(is_better[:, None], places, kept)
        if done == steps:
            break
        down, right = (_cut(x, places) for x in slopes)
        # target = gain * (seen + columns @ step) + offset, solved for all of them.
        columns = np.stack(
            [down * at[:, None], down, right * at, right, seen, np.ones_like(seen)], 1
        ).reshape(count, 6, -1)
        normal = (columns @ columns.transpose(0, 2, 1)).astype(np.float64)
        normal += np.eye(6) * (1e-3 * np.einsum("pii->pi", normal)[..., None] + 1e-9)
        right_side = (columns @ target.reshape(count, -1, 1)).astype(np.float64)
        solved = np.linalg.solve(normal, right_side)[..., 0]
        gain = np.maximum(solved[:, 4:5], 1e-9)
        step = np.clip(solved[:, :4] / gain, -_LARGEST_STEP, _LARGEST_STEP)
        places = _within(places + step.astype(np.float32))
    return kept


def _within(places: np.ndarray) -> np.ndarray:
    """Limits places to scales that are searched, and to windows in the picture."""
    size = np.clip(places[:, ::2], _SMALLEST, _LARGEST)
    most = np.maximum(1 - size, 0) + np.float32(_LARGEST - 1)
    middle = np.clip(places[:, 1::2], -most, most)
    return np.stack([size, middle], axis=2).reshape(places.shape)


def _cut(pictures: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Cuts windows out of pictures and enlarges them to the same side.

    Args:
        pictures: float32 `[P, S, S]`.
        places: float32 `[P, 4]`: height, middle, width and middle of each window, with
            the picture from -1 to 1.
    """
    side = pictures.shape[1]
    down, right = (
        _interpolation(x, side, side) for x in (places[:, :2], places[:, 2:])
    )
    return down @ pictures @ right.transpose(0, 2, 1)


def _interpolation(spans: np.ndarray, side: int, count: int) -> np.ndarray:
    """Computes the matrices of linear interpolation, float32 `[P, count, side]`.

    Args:
        spans: float32 `[P, 2]`: size and middle, with the picture from -1 to 1.
        side: Number of pixels.
        count: Number of points, evenly spaced within the span.
    """
    at = spans[:, :1] * _positions(count) + spans[:, 1:]
    pixel = np.clip((at + 1) / 2 * side - 0.5, 0, side - 1)
    near = 1 - np.abs(pixel[..., None] - np.arange(side))
    return np.maximum(near, 0).astype(np.float32)


def _positions(count: int) -> np.ndarray:
    """Returns the middles of pixels, from -1 to 1."""
    return ((np.arange(count) + 0.5) / count * 2 - 1).astype(np.float32)


def _structure(pictures: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """Blurs pictures a little, and subtracts them blurred much."""
    little, much = (
        scipy.ndimage.gaussian_filter(pictures, (0, x, x), mode="nearest", truncate=3)
        for x in (fine, coarse)
    )
    return little - much


def _halved(pictures: np.ndarray) -> np.ndarray:
    """Averages squares of four pixels."""
    count, side, _ = pictures.shape
    return pictures.reshape(count, side // 2, 2, side // 2, 2).mean((2, 4))


def _unit(x: np.ndarray) -> np.ndarray:
    """Scales pictures to a mean of 0 and a norm of 1; flat ones stay 0."""
    x = x - x.mean((1, 2), keepdims=True)
    norm = np.sqrt((x * x).sum((1, 2), keepdims=True))
    return x / np.maximum(norm, 1e-3)


def _cumulated(x: np.ndarray) -> np.ndarray:
    """Sums over all pixels above and left of each, float64 `[P, S + 1, S + 1]`."""
    sums = np.zeros((len(x), x.shape[1] + 1, x.shape[2] + 1))
    sums[:, 1:, 1:] = x.cumsum(1, dtype=np.float64).cumsum(2)
    return sums


def _window_sums(sums: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over all windows of a size, from cumulated sums."""
    rows = sums[:, height:] - sums[:, :-height]
    return rows[..., width:] - rows[..., :-width]


def pictures_of(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Converts uint8 `[S, S, 3]` RGB pixels to luminance, uint8 `[N, S, S]`.

    Source: Rec. ITU-R BT.601.
    """
    mix = np.array([0.299, 0.587, 0.114], np.float32)
    found = [np.round(x @ mix).astype(np.uint8) for x in pixels]
    return np.stack(found) if found else np.zeros((0, SIDE, SIDE), np.uint8)
