"""The errors that keras_transfer raises on purpose.

Each message is one line: what is wrong, what was received, how to fix it.
"""


class KerasTransferError(Exception):
    """Something failed that the message explains; the CLI exits with 1."""


class UsageError(KerasTransferError):
    """The request itself is wrong (option, config key, path); the CLI exits with 2."""


class DecodeError(KerasTransferError):
    """One image cannot be decoded; the message is the reason, without its path."""


class WeightsError(KerasTransferError):
    """The weights of a base are missing, damaged or do not fit."""
