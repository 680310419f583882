"""Groups of DATA united with those of copies."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from keras_transfer.features.copies import connected, same_group, same_value


def united_groups(
    groups: Sequence[str], numbers: np.ndarray, kept: Sequence[int] | None = None
) -> list[str]:
    """Unites the groups of DATA with those of copies.

    Groups that share copies become one, over any number of steps.

    Args:
        groups: Group of each row, "" for none.
        numbers: int64 `[rows]`, equal for copies.
        kept: Rows that are kept, of which several need a name if they are together;
            None for all.

    Returns:
        The name of each row's group: the first of its names in DATA, or a new name, or
        "" for an image by itself.
    """
    together = connected(len(groups), [same_value(numbers), same_group(groups)])
    names: dict[int, str] = {}
    for number, group in zip(together.tolist(), groups, strict=True):
        if group:
            names.setdefault(number, group)
    taken, next_number = {*groups}, 1
    sizes = Counter((together if kept is None else together[kept]).tolist())
    for number in together.tolist():
        if number in names or sizes[number] < 2:
            continue
        while (name := f"copies-{next_number}") in taken:
            next_number += 1
        names[number] = name
        next_number += 1
    return [names.get(number, "") for number in together.tolist()]
