"""Index of the rows in a table's shards, as NumPy arrays sorted by digest."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.features.shards import INDEX_DTYPE, ShardStore

_KEYED = np.dtype([("key", "<u8"), ("rest", "V24")])  # the layout of a digest
UNKNOWN, SOUND, DAMAGED = range(3)


@dataclass(frozen=True, eq=False)
class Index:
    """Maps an image's digest to the shard and row of its features.

    An image may have several entries, such as one whose row is damaged and a later one.

    Attributes:
        names: Names of the shards.
        starts: int64 `[len(names) + 1]`: index of each shard's first entry, then N.
        entries: `[N]` of `INDEX_DTYPE`, one for each row of each shard.
        states: uint8 `[N]`: `UNKNOWN`, `SOUND` or `DAMAGED` for each row.
        keys: uint64 `[N]`, sorted: the first 8 bytes of the digests.
        order: uint32 `[N]`: index into `entries` for each key.
    """

    names: tuple[str, ...]
    starts: np.ndarray
    entries: np.ndarray
    states: np.ndarray
    keys: np.ndarray
    order: np.ndarray

    @classmethod
    def read(cls, store: ShardStore) -> "Index":
        """Reads the indices of all shards of a store, skipping damaged ones."""
        names, starts, content = [], [0], bytearray()
        for name in store.list():
            with contextlib.suppress(FileNotFoundError, ValueError):
                index = store.index(name)
                content += index.tobytes()
                names.append(name)
                starts.append(starts[-1] + len(index))
        entries = np.frombuffer(content, INDEX_DTYPE)
        keys = _keys(entries["digest"])
        order = np.argsort(keys)
        return cls(
            tuple(names),
            np.array(starts),
            entries,
            np.full(len(entries), UNKNOWN, np.uint8),
            keys[order],
            order.astype(np.uint32),
        )

    def extended(self, name: str, index: np.ndarray) -> "Index":
        """Returns an index with one more shard, all of whose rows are sound.

        Args:
            name: Name of the shard.
            index: `[n]` of `INDEX_DTYPE`, the shard's entries.
        """
        keys = _keys(index["digest"])
        order = np.argsort(keys)
        places = np.searchsorted(self.keys, keys[order])
        count = len(self.entries)
        return Index(
            (*self.names, name),
            np.append(self.starts, count + len(index)),
            np.concatenate([self.entries, index]),
            np.append(self.states, np.full(len(index), SOUND, np.uint8)),
            np.insert(self.keys, places, keys[order]),
            np.insert(self.order, places, (count + order).astype(np.uint32)),
        )

    def take_states(self, other: "Index") -> None:
        """Copies the row states of the shards that both indices have, in place."""
        spans = itertools.pairwise(other.starts)
        known = dict(zip(other.names, spans, strict=True))
        for name, (start, stop) in zip(
            self.names, itertools.pairwise(self.starts), strict=True
        ):
            if name in known:
                self.states[start:stop] = other.states[slice(*known[name])]

    def find(
        self, digests: np.ndarray, are_sound: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Finds a sound entry of each digest.

        Args:
            digests: `[n]` digests; see `as_digests`.
            are_sound: Takes indices of entries; returns bool, whether each is sound.

        Returns:
            int64 `[n]` indices into `entries`; -1 where there is none.
        """
        found = np.full(len(digests), -1, np.int64)
        wanted = _keys(digests)
        places = np.searchsorted(self.keys, wanted)
        asked = np.arange(len(digests))
        while len(asked):
            asked = asked[places[asked] < len(self.keys)]
            asked = asked[self.keys[places[asked]] == wanted[asked]]
            entries = self.order[places[asked]]
            is_hit = self.entries["digest"][entries] == digests[asked]
            is_hit[is_hit] = are_sound(entries[is_hit])
            found[asked[is_hit]] = entries[is_hit]
            asked = asked[~is_hit]
            places[asked] += 1
        return found

    def candidates(self, digest: bytes) -> Iterator[int]:
        """Yields the indices of a digest's entries, sound or not."""
        key = np.uint64(int.from_bytes(digest[:8], "little"))
        for place in range(int(self.keys.searchsorted(key)), len(self.keys)):
            if self.keys[place] != key:
                return
            entry = int(self.order[place])
            if self.entries[entry]["digest"].tobytes() == digest:
                yield entry

    def by_shard(
        self, entries: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Groups entries by shard.

        Args:
            entries: `[n]` indices into the attribute `entries`.

        Yields:
            (name of a shard, rows in ascending order, position of each in `entries`).
        """
        places = np.argsort(entries, kind="stable")
        ordered = entries[places].astype(np.int64)
        shards = np.searchsorted(self.starts, ordered, side="right") - 1
        rows = ordered - self.starts[shards]
        changes = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        for first, last in itertools.pairwise([0, *changes, len(shards)]):
            if first < last:
                name = self.names[shards[first]]
                yield name, rows[first:last], places[first:last]


def as_digests(digests: Sequence[bytes]) -> np.ndarray:
    """Converts SHA-256 digests to an array `[n]` with 32 bytes per element."""
    return np.frombuffer(b"".join(digests), INDEX_DTYPE["digest"])


def _keys(digests: np.ndarray) -> np.ndarray:
    return digests.view(_KEYED)["key"].astype(np.uint64)
