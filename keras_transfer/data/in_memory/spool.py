"""A temporary file of encoded images, so that they need no memory."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from keras_transfer.errors import KerasTransferError

_CHECK_BYTES = 2**24  # written between two looks at the disk


class _Place(NamedTuple):
    """Where an image lies in the temporary file."""

    offset: int
    size: int


class Spool:
    """A temporary file of images, each of which is kept once.

    The file has no name, so that it is gone with the process however that ends.

    Attributes:
        folder: Directory of the file.
        size: Number of bytes in it.
        close: Closes it, which frees its space; it is called with the last reference.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.gettempdir())
        file = tempfile.TemporaryFile(dir=self.folder)
        self.close = weakref.finalize(self, file.close)
        self._file = file
        self._places: dict[bytes, _Place] = {}
        self.size = 0
        self._checked = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, encoded: bytes) -> tuple[bytes, bool]:
        """Adds an image.

        Returns:
            (its SHA-256, whether it is new).

        Raises:
            KerasTransferError: If it would fill more than half of the free disk.
        """
        digest = hashlib.sha256(encoded).digest()
        if digest in self._places:
            return digest, False
        self._file.write(encoded)
        self._places[digest] = _Place(self.size, len(encoded))
        self.size += len(encoded)
        if self.size - self._checked >= _CHECK_BYTES:
            self._checked = self.size
            free = shutil.disk_usage(self.folder).free
            if self.size > free:
                raise KerasTransferError(
                    "The data set does not end, or is too large for the temporary "
                    f"directory. Received: {len(self):,} images of "
                    f"{self.size / 1e9:.1f} GB so far in {self.folder}, where "
                    f"{free / 1e9:.1f} GB are free. Limit it with take(), or set "
                    "TMPDIR to a directory of a larger disk."
                )
        return digest, True

    def read(self, digests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Yields (source, encoded bytes) in the order of the file."""
        self._file.flush()
        places = ((self._places[digest], name) for name, digest in digests.items())
        for place, name in sorted(places):
            yield name, os.pread(self._file.fileno(), place.size, place.offset)
