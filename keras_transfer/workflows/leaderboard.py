"""The workflow of `kt runs`: lists the runs in a directory, and deletes runs.

Only the JSON files of runs are read, so that a thousand runs are listed in a second or
two. A run that cannot be read is listed with the reason.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keras_transfer.config import choices, default_of
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.runs.files import only_process, temporary_directory
from keras_transfer.runs.manifest import Manifest, headline_split
from keras_transfer.runs.run import (
    CONFIG,
    MANIFEST,
    METRICS,
    MODEL,
    Run,
    committing,
    version_dirs,
)

ListedMetric = Literal[
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "log_loss",
    "roc_auc",
    "mean_average_precision",
]
SortKey = Literal[ListedMetric, "date", "name", "data", "base", "size", "speed"]

_METRICS = choices(ListedMetric)
_MARKS = (CONFIG, METRICS, MODEL)  # files that only a run has together


@dataclass(frozen=True)
class ListedRun:
    """A run as it is listed.

    Attributes:
        run_dir: The run's directory.
        problem: Why the run cannot be read; "" if it can. All that follows is then
            empty or None, except the size.
        data: The DATA argument; folders and files as absolute paths.
        base: Name of the base.
        phase: Phase of the run's current model, `fit` or `finetune`.
        metric: Name of the figure: `accuracy`, `mean_average_precision` for multi-label
            data, or the metric that the runs are sorted by.
        split: Images that the figure is of: `test`, or `out_of_fold` or `deciding` for
            a run with fewer than 30 test images; "" without any.
        value: The figure: the log loss in nats, others from 0 to 1; None without any.
        low: Lower end of its 95% confidence interval; None if it has none.
        high: Upper end of the interval.
        images: Number of these images.
        size: Bytes of all files of the run, exported versions included.
        images_per_second: Images per second of the computation of features when the run
            was made, reading included; None if all features came from the cache.
        created: UTC time of the last phase that is stored, ISO 8601.
        versions: Number of exported versions.
    """

    run_dir: Path
    problem: str = ""
    data: str = ""
    base: str = ""
    phase: str = ""
    metric: str = ""
    split: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    images: int = 0
    size: int = 0
    images_per_second: float | None = None
    created: str = ""
    versions: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as JSON types."""
        return {**vars(self), "run_dir": str(self.run_dir)}

    @property
    def figure(self) -> str:
        """The figure with its interval, such as `0.954 (0.908 to 0.978)`."""
        if self.value is None:
            return ""
        text = f"{self.value:.3f}"
        if self.low is not None and self.high is not None:
            text += f" ({self.low:.3f} to {self.high:.3f})"
        return text


class _Figures(BaseModel):
    """The fields of `metrics.Evaluation` that are listed, without what it imports."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    images: Annotated[int, Field(ge=1)]
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    roc_auc: float | None = None
    mean_average_precision: float | None = None
    intervals: dict[str, tuple[float, float]] = {}


def list_runs_in(
    runs_dir: Path, data: str | None = None, sort: SortKey = "date"
) -> list[ListedRun]:
    """Implements `api.list_runs`.

    Args:
        runs_dir: Directory that contains the runs.
        data: Lists only runs of these data: the DATA argument as it was given, a path
            to the same folder or file, or its last part; None for all.
        sort: What to sort by: dates and figures from the best (or newest, fastest,
            largest) on, texts by the alphabet. Runs without it come last.

    Raises:
        UsageError: If the directory does not exist.
    """
    if not runs_dir.is_dir():
        raise UsageError(
            f"Runs are listed from a directory. Received: runs_dir={runs_dir}. Name "
            "the one that contains them."
        )
    metric = sort if sort in _METRICS else None
    with os.scandir(runs_dir) as entries:
        folders = [
            Path(entry)
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir()
        ]
    found = [list_run(x, metric) for x in sorted(folders) if _looks_like_a_run(x)]
    if data is not None:
        found = [one for one in found if _is_of(one, data)]
    return sorted(found, key=lambda one: _sort_key(one, sort))


def _looks_like_a_run(folder: Path) -> bool:
    """Returns whether a folder is a run, or what is left of one.

    One file alone, such as a config.yaml, is no sign: other folders have that too.
    """
    marks = sum(os.path.lexists(folder / name) for name in _MARKS)
    return os.path.lexists(folder / MANIFEST) or marks > 1


def list_run(folder: Path, metric: str | None = None) -> ListedRun:
    """Reads what is listed of a run.

    Args:
        folder: The run's directory.
        metric: Name of the figure; None for the headline metric.
    """
    size, versions = _bytes_of(folder), 0
    with contextlib.suppress(OSError):
        versions = len(version_dirs(folder))
    if not os.path.lexists(folder / MANIFEST):
        reason = f"It has no {MANIFEST}: it is damaged, or a copy was not finished"
        return ListedRun(folder, reason, size=size, versions=versions)
    try:
        manifest = Run(folder).manifest
        metrics = Run(folder).metrics.get(manifest.phase, {})
        known = {name: _Figures.model_validate(x) for name, x in metrics.items()}
        split = headline_split({name: one.images for name, one in known.items()})
        figures = known.get(split)
    except (KerasTransferError, ValidationError, OSError) as error:
        reason = first_line(error)
        if isinstance(error, ValidationError):
            reason = f"{folder / METRICS} is damaged"
        return ListedRun(folder, reason, size=size, versions=versions)
    except (ArithmeticError, AttributeError, LookupError, TypeError, RecursionError):
        reason = f"{folder / METRICS} is damaged"
        return ListedRun(folder, reason, size=size, versions=versions)
    if metric is None:
        is_multi = figures and figures.mean_average_precision is not None
        metric = "mean_average_precision" if is_multi else "accuracy"
    low, high = figures.intervals.get(metric, (None, None)) if figures else (None, None)
    return ListedRun(
        run_dir=folder,
        data=manifest.data,
        base=manifest.base,
        phase=manifest.phase,
        metric=metric,
        split=split,
        value=getattr(figures, metric, None),
        low=low,
        high=high,
        images=figures.images if figures else 0,
        size=size,
        images_per_second=_speed(manifest),
        created=manifest.finetune.created if manifest.finetune else manifest.created,
        versions=versions,
    )


def _speed(manifest: Manifest) -> float | None:
    seconds = manifest.timings.get("features", 0.0)
    if manifest.images_forwarded <= 0 or not seconds > 0:
        return None
    return manifest.images_forwarded / seconds


def _bytes_of(folder: Path) -> int:
    """Adds up the files of a folder; links and what cannot be read count nothing."""
    total, pending = 0, [str(folder)]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _is_of(one: ListedRun, data: str) -> bool:
    if not one.data:
        return False
    path = os.path.abspath(os.path.expanduser(data))
    return one.data in (data, path) or Path(one.data).name == data


def _sort_key(one: ListedRun, sort: SortKey) -> tuple[Any, ...]:
    """Returns a key that puts runs without the wanted value last."""
    if one.problem:
        return (2, one.run_dir.name)
    if sort in ("name", "data", "base"):
        text = one.run_dir.name if sort == "name" else getattr(one, sort)
        return (0, text, one.run_dir.name)
    if sort == "date":  # newest first: their text has one form, in UTC
        return (0, [-ord(x) for x in one.created], one.run_dir.name)
    value = {"size": one.size, "speed": one.images_per_second}.get(sort, one.value)
    if value is None or not math.isfinite(value):
        return (1, one.run_dir.name)
    return (0, value if sort == "log_loss" else -value, one.run_dir.name)


@dataclass(frozen=True)
class Deletion:
    """A run that is going to be deleted.

    Attributes:
        run_dir: Its directory.
        identity: Its `Run.identity` when it was chosen.
    """

    run_dir: Path
    identity: bytes


def runs_to_delete(
    names: Iterable[str], runs_dir: Path | None = None
) -> list[Deletion]:
    """Finds runs that are going to be deleted; damaged ones too.

    Args:
        names: Directories of runs, written with a separator, or their names in
            `runs_dir`.
        runs_dir: Directory that contains the runs; None for `saved_models`.

    Raises:
        UsageError: If one is not a run, or a link to one.
        KerasTransferError: If another process is changing one of them.
    """
    found = {}
    for name in names:
        run_dir = _named(name, runs_dir or Path(default_of("runs_dir")))
        if not (name and run_dir.is_dir() and _looks_like_a_run(run_dir)):
            raise UsageError(
                f"There is no run here. Received: {run_dir if name else repr(name)}. "
                "Name a run in runs_dir, or a run's directory with a separator, as in "
                "./NAME."
            )
        if run_dir.is_symlink():
            raise UsageError(
                f"This is a link to a run, not one. Received: {run_dir}. Name the "
                "run itself, or delete the link."
            )
        # A change that a killed process had committed is completed first.
        with only_process(run_dir), committing(run_dir):
            found[run_dir.resolve()] = Deletion(run_dir, Run(run_dir).identity)
    return list(found.values())


def _named(name: str, runs_dir: Path) -> Path:
    """Returns the directory that a name, or a path with a separator, stands for."""
    is_path = os.path.basename(name) != name or name in (os.curdir, os.pardir)
    return Path(name) if is_path else runs_dir / name


def delete_run(run: Deletion) -> None:
    """Deletes a run with everything in it, exported versions included.

    It disappears from its directory at once, and then from the disk.

    Raises:
        KerasTransferError: If another process is changing the run, or has changed it
            since it was chosen.
    """
    run_dir = run.run_dir.resolve()
    with temporary_directory(run_dir.parent) as trash, only_process(run_dir):
        with committing(run_dir, run.identity):
            run_dir.rename(trash / run_dir.name)


def describe_deletion(runs: Sequence[Deletion]) -> str:
    """Says in a line what is lost if runs are deleted."""
    size = sum(_bytes_of(run.run_dir) for run in runs)
    versions = sum(len(version_dirs(run.run_dir)) for run in runs)
    words = [f"{size / 1e6:,.1f} MB"]
    if versions:
        words.append(f"{versions} exported version{'s' * (versions > 1)}")
    names = ", ".join(str(run.run_dir) for run in runs)
    runs_word = "this run" if len(runs) == 1 else f"these {len(runs)} runs"
    return f"Delete {runs_word} ({' and '.join(words)}): {names}?"
