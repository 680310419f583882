"""Says what a shortcut is, and how much it matters, in words."""

from collections.abc import Sequence

import numpy as np

from keras_transfer.findings.finding import Finding, Severity
from keras_transfer.findings.properties import Property
from keras_transfer.findings.telling import Gain, Told

LEAST_WAY = 0.2
"""Least part of the way from the majority class (or guessing) to perfect that matters,
such as 0.6 for one class against the others. Photos of ants and bees, of flowers and
digits have several properties that go a tenth of the way."""

MEDIUM_WAY = 0.25
HIGH_WAY = 0.5
"""Parts of the way from the majority class to the model's accuracy (or to perfect) from
which on a shortcut is of medium and of high severity."""

LEAST_CONTENT_WAY = 0.5
CONTENT_WAY = 0.8
"""The parts of the way from which on brightness and the like are reported, and of
medium severity. What is shown may be their reason, as with night and day: in photos of
airplanes, trucks and sunflowers they go 0.2 to 0.4 of the way."""

_MORE = 0.05  # of the way
_LONGEST = 40  # characters of a value in a message, such as a file name
_WHY = {
    "file": "A model may learn that instead of what is shown (DeGrave et al. 2021).",
    "content": (
        "What is shown may be the reason; if it is not, a model may learn that instead."
    ),
    "folder": (
        "A model may learn to tell apart where images come from instead of the classes "
        "(DeGrave et al. 2021)."
    ),
    "name": (
        "Classes may come from different sources, which a model may learn to tell "
        "apart instead (DeGrave et al. 2021)."
    ),
    "column": (
        "If what is shown is not the reason, a model may learn that instead (DeGrave "
        "et al. 2021)."
    ),
}
"""Why it matters. DeGrave, Janizek & Lee 2021 is in Nature Machine Intelligence 3."""


def matters(told: Told) -> bool:
    """Returns whether a property goes a part of the way that is worth a finding."""
    is_content = told.one.nature == "content"
    return told.way >= (LEAST_CONTENT_WAY if is_content else LEAST_WAY)


def severity_of(one: Property, way: float) -> Severity:
    """Returns how much it matters that the class can be told from a property.

    Args:
        one: The property.
        way: Part of the way from the majority class to the model's accuracy, or to
            perfect.
    """
    if one.nature == "content":
        return "medium" if way >= CONTENT_WAY else "low"
    if way >= HIGH_WAY and (one.nature == "file" or one.is_source):
        return "high"
    return "medium" if way >= MEDIUM_WAY else "low"


def finding_of(
    told: Told, class_names: Sequence[str], accuracy: float | None
) -> Finding:
    """Says how well classes can be told from a property.

    Args:
        told: What was measured; at least one of its gains is clear.
        class_names: Names of the classes.
        accuracy: The model's own accuracy, if known.
    """
    one, overall = told.one, told.accuracy
    facts: list[str] = []
    figures = {"images": float(len(told.units))}
    ways, reached = [0.0], -1.0
    if overall is not None and overall.least > 0:
        facts.append(
            f"{_upper(one.name)} alone tells the class of {_figure(overall)} of the "
            "images"
        )
        whole = 1.0
        if accuracy is not None and accuracy > overall.base:
            whole = accuracy
        ways.append(overall.least_way(whole))
        reached = overall.way()
        figures |= _figures("accuracy", overall)
    clear = [(gain, class_names[index]) for gain, index in told.classes]
    clear = [x for x in clear if x[0].least > 0 and x[0].way() >= LEAST_WAY]
    # What the accuracy says of two classes need not be said again.
    is_more = bool(clear) and clear[0][0].way() > reached + _MORE
    if is_more:
        gain, name = clear[0]
        start = ", and" if facts else f"{_upper(one.name)} alone tells"
        facts.append(
            f"{start} {name!r} from all others with a balanced accuracy of "
            f"{_figure(gain)}"
        )
        figures |= _figures("balanced_accuracy", gain)
        figures["told_classes"] = float(len(clear))
    elif overall is not None:
        most = class_names[int(np.bincount(told.units.targets).argmax())]
        facts.append(f" ({overall.base:.2f} by always saying {most!r})")
    ways += [gain.least_way() for gain, _ in clear]
    text = "".join(facts) + _example(told, class_names, clear if is_more else ())
    return Finding(
        kind=_kind(one),
        severity=severity_of(one, min(max(ways), 1.0)),
        message=f"{text}. {_reason(told)}",
        figures=figures,
    )


def shortened(value: str) -> str:
    """Cuts a value that comes from the data to at most 40 characters and dots."""
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]


def _figure(gain: Gain) -> str:
    low, high = gain.interval
    return f"{gain.value:.2f} ({low:.2f} to {high:.2f})"


def _figures(name: str, gain: Gain) -> dict[str, float]:
    """Returns a gain's numbers by name; those of the accuracy have plain names."""
    low, high = gain.interval
    if name == "accuracy":
        return {name: gain.value, "low": low, "high": high, "baseline": gain.base}
    return {name: gain.value, f"{name}_low": low, f"{name}_high": high}


def _kind(one: Property) -> str:
    """Returns the kind of finding; all columns are of one kind."""
    return f"class told from {'a column' if one.nature == 'column' else one.name}"


def _reason(told: Told) -> str:
    """Says why it matters, and what to do."""
    one = told.one
    if one.nature in ("column", "folder") and _is_pure(told):
        if one.is_source:
            return (
                "Each class has sources of its own, so no figure of these data shows "
                "that a model knows the classes (DeGrave et al. 2021): collect all "
                "classes from the same sources."
            )
        return (
            "Each value goes with one class. If it is not the class under another "
            "name, a model may learn that instead (DeGrave et al. 2021); if it names "
            "patients or objects, give it as group_column."
        )
    return f"{_WHY[one.nature]} {one.advice}".rstrip()


def _is_pure(told: Told) -> bool:
    """Returns whether each value of a category occurs in a single class."""
    if not told.one.is_category or told.accuracy is None:
        return False
    pairs = np.unique(np.stack([told.one.values, told.units.targets]), axis=1)
    return pairs.shape[1] == len(np.unique(pairs[0]))


def _example(
    told: Told, class_names: Sequence[str], clear: Sequence[tuple[Gain, str]]
) -> str:
    """Says how the property differs between classes, where it differs most.

    If a class is named that is told from all others, it is compared with these.
    """
    shown, names = told.units.shown, [repr(name) for name in class_names]
    if clear:
        index = list(class_names).index(clear[0][1])
        shown = np.stack([shown[:, index], ~shown[:, index]], 1)
        names = [names[index], "the others"]
    counts = shown.sum(0)
    kept = np.flatnonzero(counts)
    shown, names = shown[:, kept], [names[index] for index in kept]
    one = told.one
    if one.is_category:
        values = np.arange(len(one.labels))
        shares = (one.values[:, None] == values).T.astype(np.float64) @ shown
        shares /= counts[kept]
        if not len(values):
            return ""
        spread = shares[:, 0] - shares[:, 1] if clear else np.ptp(shares, axis=1)
        value = int(spread.argmax())
        high, low = int(shares[value].argmax()), int(shares[value].argmin())
        label = shortened(one.labels[value])
        label = f"names such as {label!r}" if one.nature == "name" else repr(label)
        return (
            f": {label} in {shares[value, high]:.0%} of {names[high]}, "
            f"{shares[value, low]:.0%} of {names[low]}"
        )
    if not one.labels:
        return ""
    medians = np.stack([np.median(one.values[x], axis=0) for x in shown.T])
    scale = np.maximum(one.values.std(0), 1e-9)
    which = int((np.ptp(medians, axis=0) / scale).argmax())
    high, low = int(medians[:, which].argmax()), int(medians[:, which].argmin())
    if clear:
        high, low = 0, 1  # the class that is told comes first
    if medians[high, which] == medians[low, which]:
        return ""
    words = _measured(one.labels[which], medians[high, which], medians[low, which])
    return f": median {words[0]} of {names[high]}, {words[1]} of {names[low]}"


def _measured(what: str, one: float, other: float) -> tuple[str, str]:
    """Writes what was measured and a number, and another number, with few digits."""
    unit = {"width": " pixels", "height": " pixels"}.get(what, "")
    if what == "bytes":
        what, unit = "file size", " bytes"
        if min(one, other) >= 1000:
            unit, one, other = " KB", one / 1000, other / 1000
    for digits in range(2, 9):
        texts = [
            f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}"
            for x in (one, other)
        ]
        if texts[0] != texts[1]:
            break
    return f"{what} {texts[0]}{unit}", texts[1] + unit * (unit != " pixels")
