"""What a workflow tells while it works."""

from collections.abc import Callable

OnNote = Callable[[str], object]
"""Told what was decided, in words."""

OnProgress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much."""


def duration(seconds: float) -> str:
    """In seconds, or from two minutes on in minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
