"""What a run was asked and what was found, in sentences; and text without paths."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_transfer.config import FLAGS, Config, default_of
from keras_transfer.data.reading import is_on_disk
from keras_transfer.evaluation.metrics import Evaluation
from keras_transfer.findings.finding import Audit, counted
from keras_transfer.models.bases import own_image_size
from keras_transfer.reporting.page import Figure, percent
from keras_transfer.runs.manifest import Manifest

# Folders of an absolute path, but neither those of a relative one nor of a URL.
_FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s/:,;'\"<>()]+/)+")

_OWN = ("data", "name", "runs_dir", "overwrite", "export", "report", "cache_dir")
"""Config keys that say where results go, not what they are."""


class WithoutPaths:
    """Makes absolute paths in text relative: a page may be shown to anybody."""

    def __init__(self, paths: Iterable[Path | str | None]):
        known = {str(path) for path in paths if path and os.path.isabs(path)}
        known |= {os.path.dirname(path) for path in known}
        self._known = sorted(known - {"/"}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Returns the text with the last parts of its paths only."""
        for path in self._known:
            text = text.replace(path + os.sep, "").replace(path, os.path.basename(path))
        return _FOLDERS.sub("", text)


def data_name(config: Config) -> str:
    """Returns the name of DATA without its folder."""
    if is_on_disk(config.data):
        return os.path.basename(config.data)
    return config.data.removeprefix("memory:")


def asked(manifest: Manifest, config: Config, images: int, test: int) -> str:
    """Says what a run was asked, in a sentence.

    Args:
        manifest: Its manifest.
        config: Its resolved config.
        images: Number of all images.
        test: Number of test images.
    """
    classes = len(manifest.class_counts["train"])
    pretrained = {
        "imagenet": ", pretrained on ImageNet",
        "none": " with random weights",
    }.get(manifest.weights, f" with the weights {os.path.basename(manifest.weights)}")
    what = ("label",) if manifest.multi_label else ("class", "classes")
    return (
        f"Asked to tell {counted(classes, *what)} of {counted(images, 'image')} in "
        f"{data_name(config)} "
        f"({images - test:,} to learn from, {test:,} to test with), a "
        f"{config.head.kind} head was trained on {manifest.base}{pretrained}"
        f"{', and both were fine-tuned' if manifest.phase == 'finetune' else ''}."
    )


def found(evaluation: Evaluation, headline: Figure, what: str) -> str:
    """Says how good a model is, in a sentence.

    Args:
        evaluation: Its evaluation.
        headline: The figure that comes first.
        what: What it was measured on, such as `648 test images`.
    """
    if headline.value is None:
        return f"Nothing says how good it is on {what}."
    interval = ""
    if headline.low is not None and headline.high is not None:
        ends = f"{percent(headline.low)} to {percent(headline.high)}"
        interval = f" (95% interval {ends})"
    value = percent(headline.value)
    if evaluation.headline == "accuracy":
        says = f"It is right about {value} of {what}{interval}"
        would = "would be right about"
    else:
        says = f"On {what}, its mean average precision is {value}{interval}"
        would = "would be"
    if headline.baseline is None:
        return f"{says}."
    guess = headline.against.replace("always", "always saying")
    return f"{says}; {guess} {would} {percent(headline.baseline)}."


def stands_out(evaluation: Evaluation, audit: Audit | None) -> str:
    """Says what deserves a look first, in a sentence."""
    parts = []
    if evaluation.correct == evaluation.images:
        parts.append("no image was wrong")
    elif evaluation.confusion is not None:
        parts += _most_frequent_mistake(evaluation.confusion, [*evaluation.classes])
    else:
        known = {
            name: one.average_precision
            for name, one in evaluation.classes.items()
            if one.average_precision is not None
        }
        if known:
            name = min(known, key=known.__getitem__)
            value = percent(known[name])
            parts.append(f"the hardest class is {name} (average precision {value})")
    if audit:
        high, total = len(audit.at_least("high")), len(audit.findings)
        serious = f", {high:,} of high severity" if high else ""
        parts.append(f"the audit has {counted(total, 'finding')}{serious}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _most_frequent_mistake(
    confusion: Sequence[Sequence[int]], names: Sequence[str]
) -> Iterator[str]:
    """Says which class is taken most often for which other one, if any is."""
    wrong = np.array(confusion)
    np.fill_diagonal(wrong, 0)
    true, said = divmod(int(wrong.argmax()), len(names))
    if count := int(wrong[true, said]):
        yield (
            f"the most frequent mistake is to take {names[true]} for {names[said]} "
            f"({counted(count, 'image')})"
        )


def commands(config: Config, manifest: Manifest, name: str) -> tuple[str, ...]:
    """Returns command lines that repeat a run, with relative paths.

    Args:
        config: Its resolved config.
        manifest: Its manifest.
        name: Name of the run.
    """
    if config.data.startswith("memory:"):
        return ()
    fit = ["kt", "fit", data_name(config), *_flags(config.model_dump(mode="json"))]
    lines = [shlex.join([*fit, "--name", name])]
    if tuned := manifest.finetune:
        given = [
            f"--set=finetune.{key}={json.dumps(value)}"
            for key, value in tuned.config.model_dump(mode="json").items()
            if value != default_of(f"finetune.{key}")
        ]
        run = f"{config.runs_dir.name}/{name}"
        lines.append(shlex.join(["kt", "unfreeze-and-finetune", run, *given]))
    return tuple(lines)


def _flags(values: Mapping[str, Any], section: str = "") -> list[str]:
    """Returns the options of all keys that differ from the defaults."""
    flags: list[str] = []
    for key, value in values.items():
        name = f"{section}{key}"
        if name in _OWN or name == "finetune":
            continue
        if name in ("splits", "head"):
            flags += _flags(value, f"{name}.")
        elif value is not None and value != _default(name, values):
            flags += _flag(name, value)
    return flags


def _default(name: str, values: Mapping[str, Any]) -> Any:
    """Returns the value of a key that needs no option, as JSON has it."""
    if name == "image_size":
        return own_image_size(values["base"])
    default = default_of(name)
    return [*default] if isinstance(default, tuple) else default


def _flag(name: str, value: Any) -> Sequence[str]:
    if isinstance(value, str) and os.path.isabs(value):
        value = os.path.basename(value)
    if isinstance(value, bool | dict | list) or name not in FLAGS:
        return ("--set", f"{name}={json.dumps(value)}")
    return (FLAGS[name], str(value))
