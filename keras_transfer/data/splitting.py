"""Assigns images without a split to train or test."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_transfer.config import SplitsConfig
from keras_transfer.data.tables import Listing, splits_of
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import UsageError

_ROUNDING = 1e-6  # tolerance for rounding errors, in images


def settle_validation(splits: list[str]) -> str:
    """Turns validation images into test or training images, in place.

    The L2 strength is chosen by cross-validation, so nothing is held out for it. Images
    that the data call validation are the test split if there is no other; else they are
    trained on.

    Args:
        splits: `train`, `val`, `test` or "" for each image.

    Returns:
        What the validation images became, as a sentence; "" if there are none.
    """
    if "val" not in splits:
        return ""
    becomes = "train" if "test" in splits else "test"
    splits[:] = [becomes if split == "val" else split for split in splits]
    if becomes == "train":
        return (
            "Validation images are trained on too: the L2 strength is chosen by "
            "cross-validation."
        )
    return "Validation images are the test split: nothing is chosen with them."


def keep_old_splits(listing: Listing, file: Path) -> None:
    """Assigns images to the splits given by an earlier run's table, in place.

    Raises:
        UsageError: If the table contains none of the images.
        KerasTransferError: If a cell is not the name of a split.
    """
    rows = read_table(file)
    names = splits_of(
        [row.get("split", "") for _, row in rows],
        lambda index: f"{file}, line {rows[index][0]}",
    )
    said = settle_validation(names)
    if said and said not in listing.warnings:
        listing.warnings.append(said)
    # Hand-written tables may have spaces around their cells, as DATA may.
    paths = [row["path"] for _, row in rows]
    old = dict(zip((path.strip() for path in paths), names, strict=True))
    old |= dict(zip(paths, names, strict=True))
    for i, source in enumerate(listing.sources):
        if source in old:
            listing.splits[i] = old[source]
    if not set(listing.sources) & set(old):
        raise UsageError(
            f"The old splits name none of these images. Received: {file}, whose first "
            f"path is {next(iter(old), '(none)')}; the data's first is "
            f"{listing.sources[0]}."
        )


@dataclass
class _Shares:
    """Current and intended sizes of the splits that are being filled.

    Attributes:
        shares: Intended fraction of the images by split, greater than 0.
        total: Number of images to divide.
        count: Current number of images by split.
    """

    shares: Mapping[str, float]
    total: int
    count: Counter[str]

    def missing(self, split: str) -> float:
        """Returns how many images a split still lacks; negative if it has too many."""
        return self.shares[split] * self.total - self.count[split]


class _Unit(NamedTuple):
    """Images that stay together: a group, or a single image without a group."""

    indices: list[int]
    of_class: _Shares


def assign_splits(
    listing: Listing, config: SplitsConfig, seed: int, has_test: bool
) -> None:
    """Assigns every image without a split to one, in place.

    Splits that the data define are not extended. Groups are never divided (an image
    without a group is a group of its own), and a group that is already in a split stays
    there. Images of several classes count for the rarest of them.

    Each class is first divided in the configured proportions as far as whole groups
    allow. Its first group goes to train, so a class with a single image is trained on.
    The remaining groups of all classes then go to the splits that lack the most images
    overall. In this way the splits reach their intended sizes even if the classes are
    too small to be divided.

    Args:
        listing: The images.
        config: Fraction of the test split.
        seed: Seed of the assignment.
        has_test: Whether the data define a test split.
    """
    if all(listing.splits):
        return
    shares = {"train": 1.0}
    if config.test and not has_test:
        shares = {"train": 1 - config.test, "test": config.test}

    strata, taken = _strata(listing, set(shares))
    divided = sum(name == "" or name in shares for name in listing.splits)
    overall = _Shares(shares, divided, sum(taken.values(), Counter()))
    rng = np.random.default_rng(seed)
    left_over: list[_Unit] = []

    def assign(unit: _Unit, split: str) -> None:
        for shares in (unit.of_class, overall):
            shares.count[split] += len(unit.indices)
        for i in unit.indices:
            listing.splits[i] = split

    for stratum in sorted(strata):
        total = sum(map(len, strata[stratum])) + taken[stratum].total()
        of_class = _Shares(shares, total, taken[stratum])
        for unit in _largest_first([_Unit(x, of_class) for x in strata[stratum]], rng):
            neediest = max(shares, key=of_class.missing)
            if not of_class.count["train"]:
                assign(unit, "train")
            elif of_class.missing(neediest) >= len(unit.indices) - _ROUNDING:
                assign(unit, neediest)
            else:
                left_over.append(unit)

    for unit in _largest_first(left_over, rng):
        if "test" in shares and not overall.count["test"]:
            split = "test"  # an oversized test split is better than an empty one
        else:
            lacking = [name for name in shares if unit.of_class.missing(name) > 0]
            split = max(lacking or shares, key=overall.missing)
        assign(unit, split)


def _largest_first(units: Sequence[_Unit], rng: np.random.Generator) -> list[_Unit]:
    """Sorts groups by decreasing size, with ties in random order."""
    shuffled = [units[i] for i in rng.permutation(len(units))]
    return sorted(shuffled, key=lambda unit: len(unit.indices), reverse=True)


def _strata(
    listing: Listing, shares: Set[str]
) -> tuple[dict[str, list[list[int]]], dict[str, Counter[str]]]:
    """Collects the groups of images without a split by their rarest class.

    If part of a group already has a split, the rest is assigned to it in place.

    Returns:
        (unassigned groups of indices by class, number of images that each of `shares`
        already has by class).
    """
    frequency = Counter(name for labels in listing.labels for name in labels)
    members = defaultdict(list)
    for i, group in enumerate(listing.groups):
        members[(group, -1) if group else ("", i)].append(i)
    strata = defaultdict(list)
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    for indices in members.values():
        names = {name for i in indices for name in listing.labels[i]}
        stratum = min(names, key=lambda name: (frequency[name], name), default="")
        fixed = {listing.splits[i] for i in indices} - {""}
        if not fixed:
            strata[stratum].append(indices)
            continue
        split = min(fixed)
        for i in indices:
            listing.splits[i] = listing.splits[i] or split
            if listing.splits[i] in shares:
                taken[stratum][listing.splits[i]] += 1
    return strata, taken
