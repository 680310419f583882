"""The exceptions that keras_transfer raises deliberately.

Each message is one line that states what is wrong, what was received and how to fix it.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

REFUSED = "refused: "
"""Prefix that marks the decoder's own message inside a longer TensorFlow error."""


class KerasTransferError(Exception):
    """Base class: a failure that the message explains. The CLI exits with status 1."""


class UsageError(KerasTransferError):
    """An invalid request (option, config key or path). The CLI exits with status 2."""


class DecodeError(KerasTransferError):
    """An image cannot be decoded. The message is the reason, without the path."""


class UnusableImagesError(KerasTransferError):
    """Too many images are unusable.

    Attributes:
        skipped: The reason for each unusable image, by source.
    """

    def __init__(self, message: str, skipped: Mapping[str, str]):
        super().__init__(message)
        self.skipped = skipped


class WeightsError(KerasTransferError):
    """The weights of a base are missing, damaged or do not match it."""


class ListenerError(KerasTransferError):
    """A listener cannot go on, which is no reason for the workflow to end."""


class DivergenceError(KerasTransferError):
    """Training produced non-finite numbers, and would do so again if repeated."""


def first_line(error: BaseException | str) -> str:
    """Returns the first line of a library's message, without the final period.

    The name of the type stands for an exception without a message.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextlib.contextmanager
def explaining_full_disk(
    directory: Path | None = None, size: int = 65_536
) -> Iterator[None]:
    """Replaces any library's full-disk error with a one-line explanation.

    Args:
        directory: Directory that the block writes to, if known.
        size: Approximate number of bytes per write. If a library fails without giving
            a reason, a test file of this size is written to `directory` to find out.

    Raises:
        KerasTransferError: If the block failed because the disk is full. All other
            exceptions pass through unchanged.
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
    """Finds a full-disk message in an error or its causes; "" if there is none."""
    full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    while error:
        if any(words in str(error) for words in full):
            said = re.sub("{{.*?}} ", "", str(error))  # nodes of TensorFlow's graph
            return first_line(said)
        error = error.__cause__ or error.__context__
    return ""


def _writing_error(directory: Path, size: int) -> OSError | None:
    """Returns the error from writing `size` bytes to a directory, or None."""
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
    """Extracts from TensorFlow's message why a file of `size` bytes was refused."""
    refused = re.search(REFUSED + r"(.*?)\]", message, re.DOTALL)
    if refused:
        return refused[1]
    if "OOM when allocating" in message:
        return "not enough memory to decode it"
    return f"damaged or truncated, {size:,} bytes"
