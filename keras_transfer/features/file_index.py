"""Digests of files that need not be read again, similar to git's index.

A file whose size, times and inode are unchanged since it was last read is assumed to
have the same bytes. That is wrong if somebody changes a file and then restores all of
them. On Windows, where `ctime` is the time of creation, restoring `mtime` is enough;
for network drives it relies on the clocks of both machines.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from keras_transfer.data.formats.convert import CONVERTER_VERSION
from keras_transfer.errors import KerasTransferError
from keras_transfer.runs.files import write_atomic

_STATS = ("size", "mtime_ns", "ctime_ns", "inode")
_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),  # bytes, because names may not be valid UTF-8
        *((name, pa.int64()) for name in _STATS),
        ("sha256", pa.binary(32)),
    ]
)
_YOUNG = 2 * 10**9
"""Nanoseconds. A file changed so recently may change again without getting a different
timestamp: FAT has a resolution of two seconds."""


class FileIndex:
    """Digests (`image_digest`) of the files below one folder, as of their last reading.

    The index is a Parquet file with the columns path, size, mtime_ns, ctime_ns, inode
    and sha256. If two processes write it at the same time, one of them wins; the files
    that only the other one read are read again later.
    """

    def __init__(self, directory: Path, root: Path, sources: Sequence[str]):
        """Records the current sizes and times of the files, before any is read.

        Args:
            directory: Directory of the indices.
            root: Folder that the sources are relative to.
            sources: Paths of the files.
        """
        # Digests of images that are converted depend on the converter's version.
        key = os.fsencode(root.resolve()) + b"\0%d" % CONVERTER_VERSION
        name = hashlib.sha256(key).hexdigest()[:32]
        self._path = directory / f"{name}.parquet"
        self._root = root
        self._sources = sources
        self._known: dict[str, bytes] = {}
        self._looked = time.time_ns()
        self._stats = np.array([_stat(root / x) for x in sources], np.int64)
        self._stats = self._stats.reshape(-1, len(_STATS))
        encoded = [x.encode(errors="surrogateescape") for x in sources]
        self._paths = pa.array(encoded, pa.binary())

    def known(self) -> dict[str, bytes]:
        """Returns the digests, by source, of files that are unchanged since read."""
        table = self._read()
        if table is None or not len(table):
            return {}
        places = pc.index_in(self._paths, value_set=table["path"].combine_chunks())
        is_listed = np.asarray(places.is_valid())
        places = np.asarray(places.fill_null(0))
        stats = np.stack([table[name].to_numpy() for name in _STATS], axis=1)
        is_same = is_listed & (stats[places] == self._stats).all(axis=1)
        rows = np.flatnonzero(is_same).tolist()
        digests = table["sha256"].take(pa.array(places[rows])).to_pylist()
        sources = (self._sources[row] for row in rows)
        self._known = dict(zip(sources, digests, strict=True))
        return self._known

    def remember(self, digests: Mapping[str, bytes]) -> None:
        """Saves the digests of files that were read since this object was created.

        Entries of other files below the folder are kept as long as these exist. Does
        nothing if the cache cannot be written, because the index only saves time.

        Args:
            digests: Digests of files, by source.
        """
        if digests == self._known:
            return
        is_old = self._stats[:, 1:3].max(axis=1, initial=0) < self._looked - _YOUNG
        rows = [
            i for i in np.flatnonzero(is_old).tolist() if self._sources[i] in digests
        ]
        table = pa.table(
            [
                self._paths.take(pa.array(rows, pa.int64())),
                *(pa.array(column[rows]) for column in self._stats.T),
                pa.array([digests[self._sources[i]] for i in rows], pa.binary(32)),
            ],
            schema=_SCHEMA,
        )
        others = self._read()
        if others is not None:
            is_ours = pc.is_in(others["path"], value_set=self._paths)
            others = others.filter(pc.invert(is_ours))
            root = os.fsencode(self._root)
            exists = [
                os.path.lexists(os.path.join(root, path))
                for path in others["path"].to_pylist()
            ]
            others = others.filter(pa.array(exists, pa.bool_()))
            table = pa.concat_tables([table, others])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        with contextlib.suppress(OSError, KerasTransferError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, sink.getvalue().to_pybytes())

    def _read(self) -> pa.Table | None:
        try:
            # From bytes, because pyarrow takes only paths that are valid UTF-8.
            table = pq.read_table(pa.BufferReader(self._path.read_bytes()))
        except (OSError, pa.ArrowException):  # missing or damaged
            return None
        with contextlib.suppress(OSError):  # read-only
            os.utime(self._path)  # marks it as used, for `FeatureCache.prune`
        return table if table.schema.equals(_SCHEMA) else None


def _stat(path: Path) -> tuple[int, int, int, int]:
    """Returns size, times and inode; values that match no file if it has none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return (-1, 2**63 - 1, 2**63 - 1, -1)  # never old enough to be saved
    latest = 2**63 - 1  # the year 2262
    mtime, ctime = min(found.st_mtime_ns, latest), min(found.st_ctime_ns, latest)
    return (found.st_size, mtime, ctime, found.st_ino & latest)
