"""Groups images by their file names, and tells when that seems to be needed."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from keras_transfer.data.tables import Listing, Splits
from keras_transfer.errors import UsageError

# The hint is for names such as 00000013_005.png. Where it would often be wrong, it is
# not given: a hint that is wrong on common data teaches users to overlook all hints.
_FEWEST_MATCHES = 0.5  # of the names
_FEWEST_GROUPS = 10
_GROUPS_PER_CLASS = 3  # at least; as many groups as classes are the classes
_MOST_PER_GROUP = 40  # images on average; more are a camera, a site or a subclass
_FEWEST_IN_FOLDER = 0.1  # of the images that share a group; see `_is_counter`
_FEWEST_SHARED = 0.05  # of the test or training images, and at least 2
_MOST_NAMES = 10_000  # that the expression is made from
_AS_GOOD = 0.9  # of the names that a general expression matches

_NUMBERED = "(?:[A-Za-z]+[_-])*[A-Za-z]*[0-9][A-Za-z0-9]*"
_BEGINNINGS = [
    re.compile(f"({_NUMBERED})[_-]"),
    re.compile(f"({_NUMBERED}[_-]{_NUMBERED})[_-]"),
]
"""Beginnings of names up to the first and the second part with a digit."""

_NO_GROUP = re.compile(
    r"(?:.*\D)?(?:19|20)\d\d(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d*)?|n\d{8}"
)
"""Beginnings that are years, dates, or the names of classes in ImageNet."""


def group_by_name(
    listing: Listing, regex: str, column: str | None = None, strict: bool = True
) -> None:
    """Assigns groups by file name, in place.

    The expression is searched for in the last component of each source. What its first
    group matches is the group of the image. If that is nothing, the image is a group of
    its own. Groups that the data have are replaced.

    Args:
        listing: The images; what was found is added to its warnings.
        regex: A valid regular expression with a group.
        column: Name of the column of groups that the user asked for; None if none.
        strict: Whether it is an error if no name matches. Otherwise the listing is then
            left as it is.

    Raises:
        UsageError: If no name matches, or a column was asked for too.
    """
    if column is not None:
        raise UsageError(
            "Groups come from a column or from the names of the files. Received: "
            f"group_column={column} and group_regex={regex}. Leave one of them out."
        )
    groups = _groups(listing.sources, regex)
    found = Counter(filter(None, groups))
    if not found:
        if strict and groups:
            raise UsageError(
                f"group_regex matches none of the {len(groups)} file names. Received: "
                f"'{regex}', while the first name is {_name(listing.sources[0])}. "
                "Write an expression with parentheses around the part of the name that "
                "is the group."
            )
        return
    if any(listing.groups):
        listing.warnings.append(
            "The groups that the data have are not used: group_regex was given."
        )
    listing.groups = groups
    listing.warnings.append(
        f"Groups by group_regex: {len(found)}, of {found.total()} images."
    )
    if "" in groups:
        listing.warnings.append(
            f"{groups.count('')} of {len(groups)} names do not match group_regex, such "
            f"as {_name(listing.sources[groups.index('')])}: each is a group of its "
            "own."
        )


def hint_at_groups(splits: Splits) -> list[str]:
    """Suggests a `group_regex` if train and test seem to share groups by their names.

    Names such as `00000013_005.png` often mean the fifth image of a patient or an
    object. Nothing is suggested if images have groups, if the beginnings of names look
    like classes, dates or counters, or if hardly any test image is concerned. Without
    test images, figures are of cross-validation, whose folds share the groups that
    training images share. Of several beginnings the shortest is suggested, for its
    groups are never too small.

    Returns:
        One line, or none.
    """
    if any(group for _, table in splits.items() for group in table.groups):
        return []
    sources = [*splits.train.sources, *splits.test.sources]
    for beginning in _BEGINNINGS:
        some = sources[:: 1 + len(sources) // _MOST_NAMES]
        regex = _regex_of(map(_name, some), beginning)
        groups = _groups(sources, regex) if regex else []
        found = Counter(filter(None, groups))
        if found.total() < max(1, _FEWEST_MATCHES * len(sources)):
            return []
        no_groups = sum(_NO_GROUP.fullmatch(group) is not None for group in found)
        if no_groups > len(found) / 2 or _is_counter(sources, groups, found):
            return []
        fewest = max(_FEWEST_GROUPS, _GROUPS_PER_CLASS * len(splits.class_names))
        if len(found) >= fewest and found.total() <= _MOST_PER_GROUP * len(found):
            return _shared_groups(splits, groups, regex)
    return []


def _shared_groups(splits: Splits, groups: Sequence[str], regex: str) -> list[str]:
    """Returns the hint if enough images share a group with those of another part."""
    train = len(splits.train)
    members: dict[str, list[str]] = {}
    for source, group in zip(splits.train.sources, groups[:train], strict=True):
        members.setdefault(group, []).append(source)
    if len(splits.test):
        total, kind, others = len(splits.test), "test", "training images"
        figures = "figures flatter"
        pairs = [
            (source, members[group][0])
            for source, group in zip(splits.test.sources, groups[train:], strict=True)
            if group and group in members
        ]
    else:
        total, kind, others = train, "training", "one another"
        figures = "figures of cross-validation flatter"
        pairs = [
            (source, found[source == found[0]])
            for group, found in members.items()
            if group and len(found) > 1
            for source in found
        ]
    if len(pairs) < max(2, _FEWEST_SHARED * total):
        return []
    one, other = map(_name, pairs[0])
    return [
        f"{len(pairs)} of {total} {kind} images share the beginning of their name "
        f"with {others}, such as {one} and {other}. If that names a patient or an "
        f"object, {figures}: keep its images together with --group-regex "
        f"{shlex.quote(regex)} (in Python: group_regex)."
    ]


def _is_counter(
    sources: Sequence[str], groups: Sequence[str], found: Counter[str]
) -> bool:
    """Returns whether groups are numbers that start again in every folder.

    Then hardly any of the images that share a group lie in the same folder, as of
    train/frog/12_frog.png and test/ship/12_ship.png.
    """
    places = [
        (source.rpartition("/")[0], group)
        for source, group in zip(sources, groups, strict=True)
        if found[group] > 1
    ]
    in_folder = Counter(places)
    together = sum(in_folder[place] > 1 for place in places)
    return together < _FEWEST_IN_FOLDER * len(places)


def _regex_of(names: Iterable[str], beginning: re.Pattern[str]) -> str:
    r"""Returns the expression that most beginnings of names are in line with.

    It is as special as possible: with `\d{8}` if nearly all numbers have eight digits,
    and with a word if nearly all beginnings have it.

    Returns:
        The expression; "" if no name has such a beginning.
    """
    counts: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
    for name in names:
        if matched := beginning.match(name):
            for count, as_pattern in zip(counts, _AS_PATTERNS, strict=True):
                id_ = _RUN.sub(as_pattern, matched[1])
                count[f"^({id_}){matched[0][-1]}"] += 1
    best = [count.most_common(1)[0] for count in counts if count]
    return next((x for x, count in best if count >= _AS_GOOD * best[-1][1]), "")


_RUN = re.compile("[A-Za-z]+|[0-9]+")


def _as_pattern(run: re.Match[str], exact: bool, literal: bool) -> str:
    """Converts a run of letters or digits to an expression.

    Args:
        run: The run.
        exact: Whether the expression has the number of digits.
        literal: Whether the expression has the letters.
    """
    text = run[0]
    if text.isdigit():
        return (rf"\d{{{len(text)}}}" if len(text) > 1 else r"\d") if exact else r"\d+"
    return text if literal else "[A-Za-z]+"


_AS_PATTERNS = (
    partial(_as_pattern, exact=True, literal=True),
    partial(_as_pattern, exact=False, literal=True),
    partial(_as_pattern, exact=False, literal=False),
)


def _groups(sources: Iterable[str], regex: str) -> list[str]:
    """Returns the group of each image; "" for none."""
    search = re.compile(regex).search
    found = (search(_name(source)) for source in sources)
    return [(matched[1] or "") if matched else "" for matched in found]


def _name(source: str) -> str:
    """Returns the name of a file without its folder."""
    return source.rpartition("/")[2]
