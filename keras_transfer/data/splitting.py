"""Images without a split -> train, validation and test."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_transfer.config import SplitsConfig
from keras_transfer.data.listing import Listing, read_table, split_name
from keras_transfer.errors import UsageError

_ROUNDING = 1e-6  # images


def free_train(listing: Listing) -> None:
    """Lets train give up a part of itself, but no group that is held out elsewhere."""
    pairs = list(zip(listing.splits, listing.groups, strict=True))
    torn = {group for split, group in pairs if group and split not in ("", "train")}
    listing.splits = [
        "" if split == "train" and group not in torn else split
        for split, group in pairs
    ]


def keep_old_splits(listing: Listing, file: Path) -> None:
    """Gives each image the split that a table of a former run gives it.

    Raises:
        UsageError: If the table names none of the images.
    """
    rows = read_table(file)
    # A table that a person wrote may have spaces around its cells, as DATA may.
    old = {row["path"].strip(): (line, row) for line, row in rows}
    old |= {row["path"]: (line, row) for line, row in rows}
    for i, source in enumerate(listing.sources):
        if source in old:
            listing.splits[i] = split_name(file, *old[source])
    if not set(listing.sources) & set(old):
        raise UsageError(
            f"--splits names none of these images. Received: {file}, whose first path "
            f"is {next(iter(old), '(none)')}; the data's first is {listing.sources[0]}."
        )


@dataclass
class _Shares:
    """How many images the splits that are being filled have, and shall have.

    Attributes:
        shares: Split to its share of the images, above 0.
        total: How many images are divided.
        count: Split to how many it has.
    """

    shares: Mapping[str, float]
    total: int
    count: Counter[str]

    def missing(self, split: str) -> float:
        """How many images a split lacks; below 0 if it has too many."""
        return self.shares[split] * self.total - self.count[split]


class _Unit(NamedTuple):
    """Images that go into one split together: a group, or one without a group."""

    indices: list[int]
    of_class: _Shares


def assign_splits(
    listing: Listing, config: SplitsConfig, seed: int, held_out: Set[str]
) -> None:
    """Gives every image that has none a split, in place.

    Splits that the data hold out themselves get no more images. A group is never
    divided (an image without one is its own), and one with a split already stays with
    it. Images of several classes count for their rarest one.

    Each class is divided in the shares of `config` as far as whole groups go, the first
    of them to train, so that a class with one image is trained on. What is left over of
    all classes then goes where most images are missing over all of them: where classes
    are too small to be divided, the splits are as large as they shall be all the same.
    """
    if all(listing.splits):
        return
    wanted = {
        "train": 1 - config.val - config.test,
        "val": config.val,
        "test": config.test,
    }
    wanted = {x: share for x, share in wanted.items() if x not in held_out and share}
    shares = {name: share / sum(wanted.values()) for name, share in wanted.items()}

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
            split = "test"  # to test on more than its share is better than on nothing
        else:
            lacking = [name for name in shares if unit.of_class.missing(name) > 0]
            split = max(lacking or shares, key=overall.missing)
        assign(unit, split)


def _largest_first(units: Sequence[_Unit], rng: np.random.Generator) -> list[_Unit]:
    """Groups by their size, equal ones in random order."""
    shuffled = [units[i] for i in rng.permutation(len(units))]
    return sorted(shuffled, key=lambda unit: len(unit.indices), reverse=True)


def _strata(
    listing: Listing, shares: Set[str]
) -> tuple[dict[str, list[list[int]]], dict[str, Counter[str]]]:
    """The groups of images that have no split yet, by their rarest class.

    Images without a split join those of their group that have one.

    Returns:
        (class to groups of indices, class to how many images each of `shares` has).
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
