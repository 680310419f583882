"""Uses exported versions: predicts with them and starts TensorFlow Serving.

This module does not import TensorFlow's Python package.
"""

import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

import numpy as np

from keras_transfer.data.folders import image_files
from keras_transfer.data.formats.convert import to_png
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Prediction, Predictions
from keras_transfer.errors import (
    DecodeError,
    KerasTransferError,
    UsageError,
    refusal,
)
from keras_transfer.evaluation.decisions import NO_RULE, names_of
from keras_transfer.runs.files import write_atomic
from keras_transfer.runs.run import SERVING, Run, open_run, version_dirs
from keras_transfer.runtime.c_api import Arrays, Request, Session

IMAGE = "tensorflow/serving:2.20.0"
"""Container image of TensorFlow Serving; the first version that decodes WebP."""

DAEMON_SECONDS = 10.0
"""Seconds to wait for an answer of docker's daemon."""

_BATCH = 16
_SIGNATURE = "serving_default"

_MODELS = """\
# tensorflow_model_server --model_config_file=THIS_FILE
# In a container base_path must be there too, and with it this file:
# docker run -v BASE_PATH:BASE_PATH ... {image} --model_config_file=THIS_FILE
model_config_list {{
  config {{
    name: "{name}"
    base_path: "{base_path}"
    model_platform: "tensorflow"
  }}
}}
"""

_BATCHING = """\
# tensorflow_model_server --enable_batching --batching_parameters_file=THIS_FILE
# Requests that wait at the same time are answered together. Under load that gives
# more answers a second; a lone request waits batch_timeout_micros longer.
# What is answered together fails together: an unusable image fails the requests beside
# it, and so do images of different sizes in requests to predict_images. Where either
# is common, send files and leave batching off.
max_batch_size { value: 1024 }  # images in a request, which is split
enable_large_batch_splitting { value: true }
max_execution_batch_size { value: 32 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 64 }
# num_batch_threads is left to the server: as many as it has cores.
"""


def predict_bundle(
    bundle: str | Path,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> Predictions:
    """Classifies images with an exported SavedModel and TensorFlow's C++ runtime.

    Args:
        bundle: A version directory, such as `saved_models/RUN/1`.
        paths: An image file or a folder of images, or several of them.
        recursive: Whether to search subfolders too.

    Returns:
        One prediction per image. They have no `classes` if a version of multi-label
        data was exported before it had thresholds.

    Raises:
        UsageError: If the directory was not made by `kt export`, or a folder contains
            no images.
        KerasTransferError: If the SavedModel cannot be loaded.
    """
    sources = list(image_files(paths, recursive))
    session = Session(Path(bundle))
    outputs = session.about["signatures"][_SIGNATURE]["outputs"]
    columns = {"classes": "predicted", "sure": "sure"}
    return Predictions(
        session.about["labels"],
        tuple(column for column, output in columns.items() if output in outputs),
        len(sources),
        _predictions(session, sources),
    )


def _predictions(session: Session, sources: Sequence[str]) -> Iterator[Prediction]:
    batch: list[_Item] = []
    with session:
        for item in read_files(sources, Path()):
            batch.append(_converted(item))
            if len(batch) == _BATCH:
                yield from _predict_batch(session, batch)
                batch = []
        yield from _predict_batch(session, batch)


_Item = tuple[str, bytes | OSError | DecodeError]


def _converted(item: tuple[str, bytes | OSError]) -> _Item:
    source, encoded = item
    if isinstance(encoded, OSError):
        return item
    try:
        return source, to_png(encoded)
    except DecodeError as error:
        return source, error


def _predict_batch(session: Session, batch: Sequence[_Item]) -> Iterator[Prediction]:
    def predict(sources: Sequence[str], files: Sequence[bytes]) -> list[Prediction]:
        inputs = {"image_bytes": np.array(files, object)}
        return _decided(session, sources, session.run(Request(_SIGNATURE, inputs)))

    usable = [item for item in batch if isinstance(item[1], bytes)]
    try:
        rows: Iterator[Prediction] | None = iter(
            predict(*zip(*usable, strict=True)) if usable else ()
        )
    except KerasTransferError:
        rows = None  # an image is unusable; predict one by one to find out which
    for source, encoded in batch:
        if isinstance(encoded, OSError):
            yield Prediction(source, None, f"cannot be read: {encoded.strerror}")
        elif isinstance(encoded, DecodeError):
            yield Prediction(source, None, str(encoded))
        elif rows is not None:
            yield next(rows)
        else:
            try:
                yield from predict([source], [encoded])
            except KerasTransferError as error:
                yield Prediction(source, None, refusal(str(error), len(encoded)))


def _decided(
    session: Session, sources: Sequence[str], outputs: Arrays
) -> list[Prediction]:
    """Converts the outputs of a request to predictions."""
    labels = session.about["labels"]
    probabilities = outputs["probabilities"]
    sure = outputs.get("sure", [None] * len(sources))
    predicted = outputs.get("predicted")
    if predicted is None and not session.about["multi_label"]:
        predicted = NO_RULE.predicted(probabilities)
    return [
        Prediction(
            source,
            row,
            classes=() if predicted is None else names_of(predicted[i], row, labels),
            sure=None if sure[i] is None else bool(sure[i]),
        )
        for i, (source, row) in enumerate(zip(sources, probabilities, strict=True))
    ]


def server_command(
    run: str | Path | Run,
    port: int,
    rest_port: int,
    host: str = "127.0.0.1",
    flags: Sequence[str] = (),
) -> list[str]:
    """Builds the command that serves a run with TensorFlow Serving.

    Args:
        run: A run, or its directory or name.
        port: Port for gRPC.
        rest_port: Port for REST.
        host: IPv4 address to listen on. The binary tensorflow_model_server always
            listens on all addresses, so it is used only for 0.0.0.0; the container is
            used otherwise, or if there is no binary.
        flags: Additional flags of tensorflow_model_server.

    Returns:
        The command and its arguments.

    Raises:
        UsageError: If the run does not exist or has no exported version, or the host is
            not an IPv4 address.
        KerasTransferError: If neither the binary nor docker can be used.
    """
    run = open_run(run)
    if not version_dirs(run.run_dir):
        raise UsageError(
            f"The run has no version to serve. Received: {run.run_dir}. Run: "
            f"kt export {shlex.quote(str(run.run_dir))}"
        )
    is_everywhere = _is_everywhere(host)
    run_dir, name = run.run_dir.resolve(), run.run_dir.resolve().name
    server, docker = shutil.which("tensorflow_model_server"), shutil.which("docker")
    if server and is_everywhere:
        return [server, *_arguments(port, rest_port, name, str(run_dir)), *flags]
    trouble = _docker_trouble(docker) if docker else "No docker is on PATH."
    if docker and not trouble:
        base_path = f"/models/{name}"
        return [
            *(docker, "run", "--rm"),
            # The image's own entry point is a script that does not pass on Ctrl-C.
            *("--init", "--entrypoint", "tensorflow_model_server"),
            *("-p", f"{host}:{port}:8500", "-p", f"{host}:{rest_port}:8501"),
            *("--mount", f"type=bind,source={run_dir},target={base_path},readonly"),
            IMAGE,
            *_arguments(8500, 8501, name, base_path),
            *flags,
        ]
    if server:
        raise KerasTransferError(
            "tensorflow_model_server listens at every address of this machine and has "
            f"no option for one. Received: host={host}. {trouble} Start docker, or "
            "give host=0.0.0.0 if whoever reaches this machine may ask."
        )
    raise KerasTransferError(
        "TensorFlow Serving cannot be started. Received: no tensorflow_model_server on "
        f"PATH. {trouble} Install the first as "
        "https://www.tensorflow.org/tfx/serving/setup says, or start docker and "
        f"`docker pull {IMAGE}`."
    )


def _is_everywhere(host: str) -> bool:
    """Returns whether an IPv4 address stands for all addresses of the machine.

    Raises:
        UsageError: If the host is not an IPv4 address.
    """
    try:
        return IPv4Address(host).is_unspecified
    except AddressValueError:
        raise UsageError(
            f"The host is no IPv4 address. Received: {host!r}. Give 127.0.0.1 for this "
            "machine alone, or 0.0.0.0 for whoever reaches it."
        ) from None


def _docker_trouble(docker: str) -> str:
    """Returns why docker cannot run a container, or "".

    Docker's client would report it too, but only later.
    """
    try:
        asked = subprocess.run(
            [docker, "version"], capture_output=True, text=True, timeout=DAEMON_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"Docker has no daemon that answers (in {DAEMON_SECONDS:g} s)."
    if asked.returncode:
        said = (asked.stderr.strip() or "it says nothing").splitlines()[-1]
        return f"Docker has no daemon that answers ({said.rstrip('.')})."
    return ""


def _arguments(port: int, rest_port: int, name: str, base_path: str) -> list[str]:
    return [
        f"--port={port}",
        f"--rest_api_port={rest_port}",
        f"--model_name={name}",
        f"--model_base_path={base_path}",
    ]


def write_serving_config(run: str | Path | Run) -> tuple[Path, Path]:
    """Writes a run's `serving/models.config` and `serving/batching.config`.

    Returns:
        (path of models.config, path of batching.config).
    """
    run = open_run(run)
    folder, run_dir = run.run_dir / SERVING, run.run_dir.resolve()
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # the server must be able to read it, whatever the umask
    models, batching = folder / "models.config", folder / "batching.config"
    name, base_path = (
        text.replace("\\", "\\\\").replace('"', '\\"')
        for text in (run_dir.name, str(run_dir))
    )
    write_atomic(models, _MODELS.format(name=name, base_path=base_path, image=IMAGE))
    write_atomic(batching, _BATCHING)
    return models, batching
