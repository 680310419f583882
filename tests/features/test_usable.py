"""Copies of an image stay together."""

import numpy as np

from keras_transfer.data.quality import QUALITY_DTYPE
from keras_transfer.data.tables import Table
from keras_transfer.features.usable import copies_grouped


def table(groups: list[str]) -> tuple[Table, list[str]]:
    names = [str(i) for i in range(len(groups))]
    return Table(tuple(names), np.arange(len(groups)) % 2, tuple(groups)), names


def unmeasured(count: int) -> np.ndarray:
    return np.zeros(count, QUALITY_DTYPE)


def partition(found: Table) -> set[frozenset[str]]:
    members: dict[str, set[str]] = {}
    for i, (name, group) in enumerate(zip(found.sources, found.groups, strict=True)):
        members.setdefault(group or f"single {i}", set()).add(name)
    return {frozenset(x) for x in members.values()}


def test_without_copies_nothing_changes():
    images, names = table(["", "a", "a", ""])
    assert (
        copies_grouped(images, {x: x.encode() for x in names}, unmeasured(4)) is images
    )
    nothing, _ = table([])
    assert copies_grouped(nothing, {}, unmeasured(0)) is nothing


def test_copies_connect_groups_over_any_number_of_steps():
    images, names = table(["", "", "a", "b", "b", "c", ""])
    digests = dict(zip(names, [b"x", b"x", b"y", b"y", b"z", b"z", b"w"], strict=True))
    found = copies_grouped(images, digests, unmeasured(7))
    assert partition(found) == {
        frozenset("01"),
        frozenset("2345"),  # a and b by y, b and c by z
        frozenset("6"),
    }
    assert found.sources == images.sources
    np.testing.assert_array_equal(found.targets, images.targets)


def hashes(*of: int) -> np.ndarray:
    """Quality of images with these hashes, far apart unless equal."""
    bits = np.random.default_rng(0).random((1 + max(of), 64)).argsort(1) < 32
    known = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    rows = np.zeros(len(of), QUALITY_DTYPE)
    rows["contrast"], rows["perceptual_hash"] = 50, known[[*of]]
    return rows


def test_copies_by_their_hashes_are_grouped_too():
    images, names = table(["", "a", "", "a", "", ""])
    digests = dict(zip(names, [b"x", b"y", b"x", b"z", b"u", b"v"], strict=True))
    found = copies_grouped(images, digests, hashes(0, 1, 2, 3, 1, 4))
    assert partition(found) == {frozenset("02"), frozenset("134"), frozenset("5")}


def test_hashes_do_not_link_most_images():
    images, names = table([""] * 40)
    digests = {x: x.encode() for x in names}
    digests["1"] = digests["0"]
    film = [0] * 20  # frames that are all alike
    found = copies_grouped(images, digests, hashes(*film, *range(1, 19), 19, 19))
    sizes = sorted(map(len, partition(found)))
    assert sizes[-2:] == [2, 2]  # equal bytes, and the last two by their hashes
    assert frozenset("01") in partition(found)
