"""The run directory: its file names, how they are written, how it is found again.

`saved_models/<run>/` is also a TensorFlow Serving model base path: `kt export` adds
integer-named version directories, and Serving ignores every other file. A run is
built in a hidden sibling directory and renamed when it is complete, so whoever lists
`saved_models/` sees a whole run or none. Changes of a run, up to its replacement, are
prepared in a hidden directory too: renaming that to `.committed` decides, and whoever
opens the run next finishes what a killed process had decided.
"""

import contextlib
import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from keras_transfer.config import Config, load_config
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.runs.files import (
    UNFINISHED,
    locked,
    numbered,
    only_process,
    remove,
    remove_left_overs,
    rename_to_first_free,
    settle,
    sync,
    temporary_directory,
    write_atomic,
)
from keras_transfer.runs.manifest import Manifest, Phase

CONFIG = "config.yaml"
HISTORY = "history.csv"
LABELS = "labels.txt"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
MODEL = "model.keras"
SKIPPED = "skipped.csv"
SPLITS = "splits.csv"

OUT_OF_FOLD = "out_of_fold.csv"
"""What the heads of a cross-validation say of the images they were not trained on."""

CHECKPOINT = "checkpoint"
"""The folder of a phase that is not finished."""

SERVING = "serving"
"""The folder with TensorFlow Serving's configuration."""

_COMMITTED = ".committed"
"""The folder of a run with what is decided to be in it, but not in its place yet."""

_REMOVED = ".removed"
"""A file in that folder: the names, as JSON, of what has to go first."""

_READS = 5

_T = TypeVar("_T")


class Run:
    """A finished run on disk.

    Attributes:
        run_dir: The directory, `saved_models/<run>`.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r})"

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.run_dir.name

    @property
    def identity(self) -> bytes:
        """manifest.json as it is: a run that is changed or replaced gets another.

        Nothing, if there is no run.
        """
        try:
            return (self.run_dir / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    @property
    def config(self) -> Config:
        """What the user chose, resolved."""
        return load_config(self.run_dir / CONFIG)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the model's outputs."""
        text = (self.run_dir / LABELS).read_text(encoding="utf-8")
        return text.removesuffix("\n").split("\n")

    @property
    def manifest(self) -> Manifest:
        """Where the model came from."""
        try:
            values = json.loads((self.run_dir / MANIFEST).read_bytes())
            return Manifest.model_validate(values)
        except (OSError, ValueError) as error:
            raise KerasTransferError(
                f"{self.run_dir / MANIFEST} cannot be read: "
                f"{str(error).splitlines()[0]}. Train the run again."
            ) from None

    @property
    def metrics(self) -> dict[str, dict]:
        """For each phase and split, what `evaluation.Evaluation` documents."""
        try:
            return json.loads((self.run_dir / METRICS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise KerasTransferError(
                f"{self.run_dir / METRICS} is damaged: {error}. Train the run again."
            ) from None

    @property
    def model_path(self) -> Path:
        """The Keras model, from [0, 255] RGB pixels to probabilities."""
        return self.run_dir / MODEL

    def phase_model_path(self, phase: Phase) -> Path:
        """The Keras model of a phase.

        Raises:
            UsageError: If the run has no such phase.
        """
        manifest = self.manifest
        if phase == manifest.phase:
            return self.model_path
        if phase == "finetune" and manifest.finetune is None:
            raise UsageError(
                f"The run was not fine-tuned. Received: {self.run_dir}. "
                f"Run: kt unfreeze-and-finetune {self.run_dir}"
            )
        return self.run_dir / phase_model(phase)

    @property
    def checkpoint(self) -> Path:
        """The folder of a phase that is not finished."""
        return self.run_dir / CHECKPOINT

    @property
    def splits_path(self) -> Path:
        """Which image was used for what: path,label,split,group."""
        return self.run_dir / SPLITS


def open_run(run: str | Path | Run) -> Run:
    """Opens a run by its directory, or by its name under `saved_models/`.

    What a killed process had decided is finished first, and what it had not is removed.

    Raises:
        UsageError: If there is no run.
    """
    if isinstance(run, Run):
        return run
    for run_dir in (Path(run), Path("saved_models") / run):
        _recover(run_dir)
        if (run_dir / MANIFEST).is_file():
            remove_left_overs(run_dir)
            remove_left_overs(run_dir.resolve().parent)
            return Run(run_dir)
    raise UsageError(
        f"There is no run here. Received: {run}. A run is a directory that `kt fit` "
        f"made, such as saved_models/NAME."
    )


def read_together(run: Run, read: Callable[[], _T]) -> _T:
    """What `read` reads in a run's files, all of them of one and the same run.

    A run may be replaced, or fine-tuned, between one file and the next. Then they are
    read again.

    Raises:
        KerasTransferError: If it is changed again and again.
    """

    def is_unchanged() -> bool:
        # In this order, for the manifest is what a commit moves last.
        return not (run.run_dir / _COMMITTED).exists() and run.identity == before

    for _ in range(_READS):
        _recover(run.run_dir)
        before = run.identity
        try:
            result = read()
        except Exception:  # what was read may be half of one run, half of another
            if is_unchanged():
                raise
        else:
            if is_unchanged():
                return result
    raise _changed(run.run_dir)


def _changed(run_dir: Path) -> KerasTransferError:
    return KerasTransferError(
        f"Another process changed the run meanwhile. Received: {run_dir}. Nothing was "
        "made of it. Try again."
    )


@dataclass
class NewRun:
    """A run that is about to be made.

    Attributes:
        run_dir: Where it is to be; after `building`, where it is.
        replaces: The `identity` of the run there that it replaces, if any.
    """

    run_dir: Path
    replaces: bytes | None = None


def new_run(runs_dir: Path, name: str, overwrite: bool) -> NewRun:
    """Where a new run will be, checked before any work is done.

    Raises:
        UsageError: If the name is not usable, or taken and not to be overwritten.
        KerasTransferError: If another process is changing the run to be overwritten.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name) or name.isdigit():
        raise UsageError(
            "A run's name is made of letters, digits and _.+-, starts with a letter, "
            f"digit or _ and is not only digits. Received: {name!r}. Choose one with "
            "--name."
        )
    run_dir = runs_dir / name
    remove_left_overs(runs_dir)
    _recover(run_dir)
    if not run_dir.exists():
        return NewRun(run_dir)
    if not overwrite:
        raise UsageError(
            f"The run exists already. Received: {run_dir}. Choose another name with "
            "--name, or replace it with --overwrite."
        )
    if not (run_dir / MANIFEST).is_file():
        raise UsageError(
            f"--overwrite replaces only runs of kt, and this is something else. "
            f"Received: {run_dir}. Choose another name with --name."
        )
    with only_process(run_dir):  # which would put its results into the new run
        return NewRun(run_dir, Run(run_dir).identity)


def version_dirs(run_dir: Path) -> list[Path]:
    """What TensorFlow Serving takes for a version, oldest first; even files."""
    found = [p for p in run_dir.iterdir() if p.name.isascii() and p.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


@contextlib.contextmanager
def building(new: NewRun) -> Iterator[Path]:
    """A hidden directory to build a run in; it becomes `new.run_dir` on success only.

    A run replaces only the one that was to be replaced, as that was when the work
    began. Where something else is by then, or another process is changing it, the new
    run gets the next free name, which `new.run_dir` says afterwards. Versions that were
    exported stay where they are, so that a server has one at any moment.
    """
    parent = new.run_dir.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(parent) as staging:
        yield staging
        settle(staging)
        if new.replaces is None or not _replace(staging, new.run_dir, new.replaces):
            new.run_dir = rename_to_first_free(staging, numbered(new.run_dir))


def _replace(staging: Path, run_dir: Path, replaced: bytes) -> bool:
    """Whether a run could be put in the place of the one with this identity."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir))
        except (BlockingIOError, FileNotFoundError):
            return False
        stack.enter_context(committing(run_dir))
        if Run(run_dir).identity != replaced:
            return False
        _commit(staging, run_dir, _outdated(run_dir, staging))
    return True


def _outdated(run_dir: Path, staging: Path) -> list[str]:
    """What of a run has to go when another takes its place."""
    published = {SERVING, *(path.name for path in version_dirs(run_dir))}
    # What is a file in both is replaced by one rename.
    renewed = {path.name for path in staging.iterdir() if path.is_file()}
    return [
        path.name
        for path in run_dir.iterdir()
        if path.name not in published
        and not path.name.startswith(UNFINISHED)  # another process's
        and not (path.name in renewed and path.is_file())
    ]


@contextlib.contextmanager
def updating(
    run_dir: Path, made_from: bytes | None = None, removed: Sequence[str] = ()
) -> Iterator[Path]:
    """A hidden directory for new files of a run, which replace the old ones together.

    When the block ends well the directory is renamed, and with that the update is
    decided; a process killed while it moves the files leaves the rest to whoever opens
    the run.

    Args:
        run_dir: The run.
        made_from: The `identity` of the run, if only that one may be updated.
        removed: What has to go, relative to the run.

    Raises:
        KerasTransferError: If the run is not the one that `made_from` says.
    """
    with temporary_directory(run_dir) as staging:
        yield staging
        settle(staging)
        with committing(run_dir, made_from):
            _commit(staging, run_dir, removed)


@contextlib.contextmanager
def committing(run_dir: Path, made_from: bytes | None = None) -> Iterator[None]:
    """Keeps other processes from changing which files a run has, for a moment.

    Args:
        run_dir: The run.
        made_from: The `identity` it must have.

    Raises:
        KerasTransferError: If it has another.
    """
    # A run's own lock may be held for hours, by a process that trains.
    with locked(run_dir.resolve().parent, wait=True):
        _finish(run_dir)
        if made_from is not None and Run(run_dir).identity != made_from:
            raise _changed(run_dir)
        yield


def _commit(staging: Path, run_dir: Path, removed: Sequence[str]) -> None:
    write_atomic(staging / _REMOVED, json.dumps(removed))
    staging.rename(run_dir / _COMMITTED)  # from here on nobody can undo it
    sync(run_dir)
    _finish(run_dir)


def _finish(run_dir: Path) -> None:
    """Does what a commit decided; again, from anywhere, if it was killed meanwhile."""
    committed = run_dir / _COMMITTED
    if not committed.is_dir():
        return
    removed = committed / _REMOVED
    # Where directories are not locked another process may do the same.
    with contextlib.suppress(FileNotFoundError):
        if removed.exists():
            for name in json.loads(removed.read_text()):
                remove(run_dir / name)
            sync(run_dir)
            removed.unlink()
            sync(committed)  # before anything is moved, which must not be removed
        # The manifest last: until then a reader can tell that its files change.
        for path in sorted(committed.iterdir(), key=lambda path: path.name == MANIFEST):
            _move(path, run_dir / path.name)
        committed.rmdir()
    sync(run_dir)


def _move(source: Path, target: Path) -> None:
    """Moves a file, or a folder into what there is of it."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
        source.rmdir()
    else:
        source.replace(target)


def _recover(run_dir: Path) -> None:
    """Finishes, or undoes, what a killed process was doing to a run."""
    if (run_dir / _COMMITTED).is_dir():
        with committing(run_dir):
            pass
    if not run_dir.exists():  # which version 0.1.0 moved away before it replaced it
        pattern = f".replaced.????????/{glob.escape(run_dir.name)}"
        for moved in run_dir.parent.glob(pattern):
            moved.rename(run_dir)
            moved.parent.rmdir()
            break


def phase_model(phase: Phase) -> str:
    """File name of the model of a phase that is not the run's."""
    return f"model.{phase}.keras"
