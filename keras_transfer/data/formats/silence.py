"""Holds back what image libraries warn and log of, in the thread that converts.

`warnings.catch_warnings` replaces the filters of all threads, so it cannot be used
where several threads convert at once. Here a filter stays in place, and the class that
it ignores claims every warning as its own only in threads that are converting.
"""

import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_LOGGERS = (
    "PIL.ImageFile",
    "PIL.TiffImagePlugin",
    "pydicom",
    "pydicom.pixels.decoders.base",
    "pydicom.pixels.utils",
)


class _Thread(threading.local):
    is_silent = False


_thread = _Thread()


class _ClaimsAll(type):
    def __subclasscheck__(cls, other: type) -> bool:
        return _thread.is_silent


class _Silenced(Warning, metaclass=_ClaimsAll):
    """The class of all warnings, in a thread that is silent."""


@contextmanager
def silenced() -> Iterator[None]:
    """Suppresses warnings and the libraries' log records in this thread."""
    _silence_loggers()
    # A caller may have put filters in front of it. It is not moved needlessly: each
    # change of the filters makes Python forget which warnings it has shown.
    if not warnings.filters or warnings.filters[0][2] is not _Silenced:
        warnings.simplefilter("ignore", category=_Silenced)
    before, _thread.is_silent = _thread.is_silent, True
    try:
        yield
    finally:
        _thread.is_silent = before


@functools.cache
def _silence_loggers() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(lambda _: not _thread.is_silent)


@functools.cache
def silence_libtiff() -> None:
    """Stops libtiff from printing errors to stderr, which Pillow raises anyway.

    Its handler is one for the process. Where libtiff is linked into Pillow in a way
    that hides its functions, it keeps printing.
    """
    # The name of its file is public only as that of a module.
    found = find_spec("PIL._imaging")
    try:
        library = ctypes.CDLL(found.origin if found else "")
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)
    except (AttributeError, OSError):
        return
