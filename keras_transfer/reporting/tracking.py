"""Listeners that log training to TensorBoard and MLflow.

What they receive: the config, every epoch, the final metrics with their 95% intervals,
the notes, and the files of the run. A store that fails before the work starts is an
error. One that fails later is left out with a note: no training is lost for it.
"""

import contextlib
import importlib.util
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keras_transfer.errors import (
    KerasTransferError,
    ListenerError,
    UsageError,
)
from keras_transfer.events import Figures, Listener
from keras_transfer.runs.files import numbered
from keras_transfer.runs.run import (
    CONFIG,
    HISTORY,
    LABELS,
    MANIFEST,
    METRICS,
    MODEL,
    REPORT,
)

_SCHEMES = ("", "file", "http", "https")
_FILES = (CONFIG, LABELS, METRICS, MANIFEST, HISTORY, REPORT, MODEL)
_MOST_VALUE = 500  # characters of a parameter that every version of MLflow takes
_MOST_NOTES = 5000  # characters of a tag that every version of MLflow takes
_MOST_CLASSES = 50  # of a picture of the confusion matrix
_CELL = 16  # pixels of it per class
_WORD = re.compile("[A-Za-z0-9_]+")
_SETTINGS = {
    # Plain folders are MLflow's oldest store, and the only local one that its skinny
    # package has; since 3.15 they have to be allowed.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody asked to report their use of MLflow
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it may hold a password
    # By default a server that does not answer stops training for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Environment variables during calls of MLflow; the user's own come first."""


def flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a config by dotted key, such as `head.kind`."""
    found: dict[str, Any] = {}
    for key, value in parameters.items():
        # The keys of a section are words, unlike the names of classes.
        if isinstance(value, Mapping) and all(_WORD.fullmatch(x) for x in value):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def final_figures(figures: Figures) -> dict[str, float]:
    """Returns final metrics by name, such as `test/accuracy` and `test/accuracy_low`.

    Metrics that are not defined are left out, and so are those of single classes.
    """
    found: dict[str, float] = {}
    for split, metrics in figures.items():
        for name, value in metrics.items():
            if isinstance(value, float | int):
                found[f"{split}/{name}"] = float(value)
        for name, ends in metrics.get("intervals", {}).items():
            for side, end in zip(("low", "high"), ends, strict=True):
                found[f"{split}/{name}_{side}"] = float(end)
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Tracker(Listener):
    """Counts epochs, keeps notes, and turns failures of a store into `ListenerError`.

    Attributes:
        place: The store as it is shown, without credentials.
        notes: The notes so far.
    """

    def __init__(self, place: str):
        self.place = place
        self.notes: list[str] = []
        self._strengths = 0

    def note(self, text: str) -> None:
        """Keeps a note until the end."""
        self.notes.append(text)

    def _figures(
        self, phase: str, number: int, figures: Mapping[str, float]
    ) -> tuple[int, dict[str, float]]:
        """Returns the step and the finite figures of an epoch by tag."""
        if phase == "fit":  # one call per L2 strength: its number would not be unique
            self._strengths += 1
            number = self._strengths
        finite = {
            f"{phase}/{name}": float(value)
            for name, value in figures.items()
            if name != "epoch" and math.isfinite(value)
        }
        return number, finite

    @contextlib.contextmanager
    def _writing(self, fails_with: type[KerasTransferError]) -> Iterator[None]:
        """Replaces any error of the block by a line without the library's words.

        These may quote the address of a server with its password.
        """
        try:
            yield
        except Exception as error:
            kind = "nobody answers there" if _is_lost(error) else type(error).__name__
            if fails_with is ListenerError:
                text = f"Nothing more is logged to {self.place} ({kind})"
            else:
                text = (
                    f"Nothing can be logged here. Received: {self.place} ({kind}). "
                    "Name another place with log_to, or leave it out."
                )
            raise fails_with(text) from None


class TensorBoardListener(Tracker):
    """Writes event files for TensorBoard: one folder per run and phase.

    It is shown by `tensorboard --logdir DIR`.

    Args:
        directory: Where the folders `RUN/PHASE` are made; a phase that is there already
            gets a number, as in `RUN/finetune-2`.

    Raises:
        KerasTransferError: If TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path = "tensorboard"):
        _require("tensorboard", "tensorboard")
        super().__init__(str(directory))
        self._directory = Path(directory).expanduser()
        self._writer: Any = None

    def started(self, phase: str, run_dir: Path, parameters: Mapping[str, Any]) -> None:
        """Makes the folder and writes the config as a table."""
        import tensorflow as tf

        self.notes, self._strengths = [], 0
        folders = numbered(self._directory / run_dir.name / phase)
        rows = [f"| {key} | {_markdown(x)} |" for key, x in flat(parameters).items()]
        with self._writing(UsageError):
            folder = next(path for path in folders if not path.exists())
            folder.mkdir(parents=True)
            self._writer = tf.summary.create_file_writer(str(folder))
            self._words("config", ["| key | value |", "|---|---|", *rows])

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of an epoch."""
        step, finite = self._figures(phase, number, figures)
        with self._writing(ListenerError):
            self._scalars(finite, step)

    def finished(self, phase: str, run_dir: Path, figures: Figures) -> None:
        """Writes the final metrics, the confusion matrices and the notes."""
        with self._writing(ListenerError):
            self._scalars(final_figures(figures), 0)
            for split, metrics in figures.items():
                self._picture(split, metrics.get("confusion"))
            self._words("notes", [f"- {_markdown(x)}" for x in self.notes])
            self._words("run", [_markdown(str(run_dir))])
            self._close()

    def failed(self, phase: str, error: BaseException) -> None:
        """Closes the file; epochs so far stay."""
        with contextlib.suppress(Exception):
            self._close()

    def _scalars(self, figures: Mapping[str, float], step: int) -> None:
        import tensorflow as tf

        with self._writer.as_default(step=step):
            for name, value in figures.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def _words(self, name: str, lines: Sequence[str]) -> None:
        import tensorflow as tf

        with self._writer.as_default(step=0):
            tf.summary.text(name, "\n".join(lines))
        self._writer.flush()

    def _picture(self, split: str, confusion: Sequence[Sequence[int]] | None) -> None:
        """Writes a confusion matrix as a picture: rows are true classes, dark is 1."""
        import numpy as np
        import tensorflow as tf

        if not confusion or len(confusion) > _MOST_CLASSES:
            return
        counts = np.array(confusion, np.float64)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        pixels = np.kron(255 * (1 - shares), np.ones((_CELL, _CELL)))
        with self._writer.as_default(step=0):
            image = pixels.round().astype(np.uint8)[None, :, :, None]
            tf.summary.image(f"{split}/confusion", image)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MlflowListener(Tracker):
    """Logs each phase as a run of MLflow, in an experiment named like the data.

    Args:
        uri: A folder, or the `http://` or `https://` address of an MLflow server; None
            for the environment variable `MLFLOW_TRACKING_URI` and, without that, the
            folder `mlruns`. A password is better given in the variables
            `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.

    Raises:
        UsageError: If the address is of another kind.
        KerasTransferError: If MLflow is not installed.
    """

    def __init__(self, uri: str | Path | None = None):
        _require("mlflow", "mlflow")
        chosen = str(uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns")
        super().__init__(without_credentials(chosen))
        scheme = "" if os.name == "nt" and Path(chosen).drive else _scheme(chosen)
        if scheme not in _SCHEMES:
            raise UsageError(
                "MLflow is given a folder or the http address of a server. Received: "
                f"{self.place}. For a database, start: mlflow server "
                "--backend-store-uri DATABASE"
            )
        path = (
            Path(chosen).expanduser().absolute()
        )  # MLflow keeps stores by their names
        self._uri = str(path) if scheme == "" else chosen
        self._client: Any = None
        self._run_id = ""

    def started(self, phase: str, run_dir: Path, parameters: Mapping[str, Any]) -> None:
        """Creates a run of MLflow and logs the config."""
        self.notes, self._strengths, self._run_id = [], 0, ""
        values = flat(parameters)
        experiment = _text(Path(str(values.get("data", ""))).stem) or "keras_transfer"
        with self._writing(UsageError), _settings():
            from mlflow.entities import Param
            from mlflow.tracking import MlflowClient

            # The registry of models is not used, but its default may not exist.
            client = self._client = MlflowClient(self._uri, self._uri)
            found = client.get_experiment_by_name(experiment)
            number = (
                found.experiment_id if found else client.create_experiment(experiment)
            )
            made = client.create_run(
                number,
                tags={
                    "keras_transfer.run": _text(run_dir),
                    "keras_transfer.phase": phase,
                },
                run_name=f"{run_dir.name} {phase}",
            )
            self._run_id = made.info.run_id
            rows = [Param(key, _text(x)[:_MOST_VALUE]) for key, x in values.items()]
            client.log_batch(self._run_id, params=rows)

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Logs the figures of an epoch."""
        step, finite = self._figures(phase, number, figures)
        self._log(lambda: self._metrics(finite, step))

    def finished(self, phase: str, run_dir: Path, figures: Figures) -> None:
        """Logs the final metrics, the notes and the files of the run, and ends it."""

        def log() -> None:
            self._metrics(final_figures(figures), 0)
            self._client.set_tag(self._run_id, "keras_transfer.run", _text(run_dir))
            lines = "".join(f"- {_markdown(text)}\n" for text in self.notes)
            self._client.set_tag(
                self._run_id, "mlflow.note.content", lines[:_MOST_NOTES]
            )
            for name in _FILES:
                if (run_dir / name).is_file():
                    self._client.log_artifact(self._run_id, str(run_dir / name))
            self._client.set_terminated(self._run_id)

        self._log(log)

    def failed(self, phase: str, error: BaseException) -> None:
        """Marks the run as killed or failed."""
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if self._run_id:
            with contextlib.suppress(ListenerError):
                self._log(lambda: self._client.set_terminated(self._run_id, status))

    def _metrics(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        rows = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def _log(self, call: Callable[[], object]) -> None:
        with self._writing(ListenerError), _settings():
            call()


LISTENERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoardListener,
    "mlflow": MlflowListener,
}
"""What `--log-to` accepts, each with or without `:PLACE`."""


def listener_of(target: str) -> Tracker:
    """Creates the listener for a value of `--log-to`, such as `tensorboard:logs`.

    Raises:
        UsageError: If it is of another form.
        KerasTransferError: If a package is missing.
    """
    kind, separator, place = target.partition(":")
    if kind in LISTENERS and separator and not place:
        raise UsageError(
            f"A place follows the colon. Received: log_to={kind}:. Name it, or leave "
            "the colon out."
        )
    if kind not in LISTENERS:
        raise UsageError(
            f"Training is logged to tensorboard[:DIR] or mlflow[:URI]. Received: "
            f"log_to={without_credentials(target)}. Name one of them."
        )
    return LISTENERS[kind](place) if place else LISTENERS[kind]()


def without_credentials(uri: str) -> str:
    """Removes the user, the password and the query of an address; `...` stands there.

    It works on whatever stands before `://` too, as in `mlflow:http://...`.
    """
    before, separator, rest = uri.partition("://")
    if not separator:
        return uri
    _, at, place = rest.rpartition("@")
    place = re.split("[?#]", place)[0]
    return f"{before}://{'...@' if at else ''}{place}"


def _is_lost(error: BaseException | None) -> bool:
    """Returns whether an error comes from a server that does not answer."""
    while error is not None:
        name = type(error).__name__  # that of the library may not be imported here
        if "Connection" in name or "Timeout" in name:
            return True
        error = error.__cause__ or error.__context__
    return False


def _scheme(uri: str) -> str:
    try:
        return urlsplit(uri).scheme
    except ValueError:  # such as a half-open [ of an IPv6 address
        return "invalid"


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise KerasTransferError(
            f"Logging to {extra} needs a package that is not installed. Received: no "
            f"{module}. Install it: pip install 'keras-transfer[{extra}]'."
        )


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Applies `_SETTINGS`, and holds back what MLflow prints and logs."""
    given = {key: x for key, x in _SETTINGS.items() if key not in os.environ}
    os.environ.update(given)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        for key in given:
            os.environ.pop(key, None)


def _text(value: object) -> str:
    """Formats a value as text that is valid UTF-8, which not every path is."""
    return str(value).encode(errors="backslashreplace").decode()


def _markdown(value: object) -> str:
    """Formats a value in Markdown, which is shown as HTML."""
    text = " ".join(_text(value).split())
    for steering in "\\`*_{}[]()#+|<>!":
        text = text.replace(steering, f"\\{steering}")
    return text
