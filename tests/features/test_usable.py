"""Copies of an image stay together."""

import numpy as np

from keras_transfer.data.tables import Table
from keras_transfer.features.usable import copies_grouped


def table(groups: list[str]) -> tuple[Table, list[str]]:
    names = [str(i) for i in range(len(groups))]
    return Table(tuple(names), np.arange(len(groups)) % 2, tuple(groups)), names


def partition(found: Table) -> set[frozenset[str]]:
    members: dict[str, set[str]] = {}
    for i, (name, group) in enumerate(zip(found.sources, found.groups, strict=True)):
        members.setdefault(group or f"single {i}", set()).add(name)
    return {frozenset(x) for x in members.values()}


def test_without_copies_nothing_changes():
    images, names = table(["", "a", "a", ""])
    assert copies_grouped(images, {x: x.encode() for x in names}) is images
    nothing, _ = table([])
    assert copies_grouped(nothing, {}) is nothing


def test_copies_connect_groups_over_any_number_of_steps():
    images, names = table(["", "", "a", "b", "b", "c", ""])
    digests = dict(zip(names, [b"x", b"x", b"y", b"y", b"z", b"z", b"w"], strict=True))
    found = copies_grouped(images, digests)
    assert partition(found) == {
        frozenset("01"),
        frozenset("2345"),  # a and b by y, b and c by z
        frozenset("6"),
    }
    assert found.sources == images.sources
    np.testing.assert_array_equal(found.targets, images.targets)
