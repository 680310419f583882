"""The errors that keras_transfer raises on purpose.

Each message is one line: what is wrong, what was received, how to fix it.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

REFUSED = "refused: "
"""What the decoder's own messages start with, among what TensorFlow adds."""


class KerasTransferError(Exception):
    """Something failed that the message explains; the CLI exits with 1."""


class UsageError(KerasTransferError):
    """The request itself is wrong (option, config key, path); the CLI exits with 2."""


class DecodeError(KerasTransferError):
    """One image cannot be decoded; the message is the reason, without its path."""


class WeightsError(KerasTransferError):
    """The weights of a base are missing, damaged or do not fit."""


class DivergenceError(KerasTransferError):
    """Training came to numbers that are not finite, and would again."""


@contextlib.contextmanager
def explaining_full_disk(
    directory: Path | None = None, size: int = 65_536
) -> Iterator[None]:
    """Says in one line that a disk is full, whichever library found it out.

    Args:
        directory: What is written to meanwhile, if that is known.
        size: About how many bytes at a time. Where a library fails without saying why,
            it is tried whether these can be written.

    Raises:
        KerasTransferError: Instead of what a library raises, each its own.
    """
    try:
        yield
    except KerasTransferError:
        raise
    except Exception as error:
        cause = _full_disk(error)
        if not cause and directory:
            cause = _full_disk(_writing_error(directory, size))
        if not cause:
            raise
        where = f"{directory} ({cause})" if directory else cause
        raise KerasTransferError(
            f"The disk is full. Received: {where}. Free some space, and start again."
        ) from error


def _full_disk(error: BaseException | None) -> str:
    """What says so in an error, or in those before it; "" if nothing does."""
    full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    while error:
        if any(words in str(error) for words in full):
            said = re.sub("{{.*?}} ", "", str(error))  # nodes of TensorFlow's graph
            return said.splitlines()[0].rstrip(".")
        error = error.__cause__ or error.__context__
    return ""


def _writing_error(directory: Path, size: int) -> OSError | None:
    """Why so many bytes cannot be written to a directory; None if they can."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            for start in range(0, size, 2**20):
                file.write(bytes(min(size - start, 2**20)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def refusal(message: str, size: int) -> str:
    """Why the decoder refused a file of `size` bytes, from TensorFlow's message."""
    refused = re.search(REFUSED + r"(.*?)\]", message, re.DOTALL)
    if refused:
        return refused[1]
    if "OOM when allocating" in message:
        return "not enough memory to decode it"
    return f"damaged or truncated ({size:,} bytes)"
