"""Weights of images in the loss: the one rule for those of tables and arrays."""

from collections.abc import Callable, Sequence

import numpy as np

from keras_transfer.errors import KerasTransferError

_LARGEST = 1e30  # which float32 holds, with room for sums


def check_weights(
    weights: np.ndarray, given: Sequence[object], place: Callable[[int], str]
) -> None:
    """Checks that weights are numbers from 0 to 1e30.

    Args:
        weights: `[N]` numbers; NaN for what is none.
        given: What each was in the data, for the error message.
        place: Says where a row is, such as "labels.csv, line 7".

    Raises:
        KerasTransferError: If one is not.
    """
    is_valid = (weights >= 0) & (weights <= _LARGEST)
    if not is_valid.all():
        row = int(np.argmin(is_valid))
        raise KerasTransferError(
            f"{place(row)}: a sample_weight is a number from 0 to {_LARGEST:g}. "
            f"Received: {given[row]!r}."
        )
