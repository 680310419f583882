"""What TensorBoard and MLflow are told, read back with their own readers."""

import math
import shutil
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Told, fill
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import keras_transfer
from keras_transfer.cli import main
from keras_transfer.config import Config
from keras_transfer.errors import KerasTransferError, ListenerError, UsageError
from keras_transfer.events import Broadcast, Listener, announcing
from keras_transfer.reporting.tracking import (
    MlflowListener,
    TensorBoardListener,
    final_figures,
    flat,
    listener_of,
    without_credentials,
)
from keras_transfer.runs.run import Run

FIGURES = {
    "test": {
        "images": 4,
        "accuracy": 0.75,
        "roc_auc": None,
        "intervals": {"accuracy": (0.3, 0.95)},
        "classes": {"<script>": {"precision": 1.0}},
        "confusion": [[1, 1], [0, 2]],
    }
}
SECRET = "hunter2"


@pytest.fixture(scope="module")
def logged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was logged to tb/ and ml/."""
    folder = tmp_path_factory.mktemp("logged")
    arguments = ["fit", photos, "--image-size", 32, "--folds", 2, "--name", "x"]
    arguments += ["--runs-dir", folder / "runs", "--cache-dir", folder / "cache"]
    for target in (f"tensorboard:{folder}/tb", f"mlflow:{folder}/ml"):
        arguments += ["--log-to", target]
    result = CliRunner().invoke(main, [str(x) for x in arguments])
    assert result.exit_code == 0, result.output
    *_, one, other = result.stderr.splitlines()
    assert (one, other) == (f"Logged to: {folder}/tb", f"Logged to: {folder}/ml")
    return folder


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return events


def text(events: EventAccumulator, name: str) -> str:
    (event,) = events.Tensors(name)
    return event.tensor_proto.string_val[0].decode()


def scalar(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    import tensorflow as tf

    return [
        (x.step, float(tf.make_ndarray(x.tensor_proto))) for x in events.Tensors(name)
    ]


def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowClient(str(folder), str(folder))


@pytest.mark.long
def test_tensorboard_is_told_everything(logged):
    events = read_events(logged / "tb/x/fit")
    run = Run(logged / "runs/x")
    test = run.metrics["fit"]["test"]
    for name, value in {
        "test/accuracy": test["accuracy"],
        "test/accuracy_low": test["intervals"]["accuracy"][0],
        "out_of_fold/log_loss": run.metrics["fit"]["out_of_fold"]["log_loss"],
    }.items():
        assert scalar(events, name) == [(0, pytest.approx(value))]
    steps = [step for step, _ in scalar(events, "fit/val_loss")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1
    assert "| image_size | 32 |" in text(events, "config")
    assert "head.kind | linear" in text(events, "config")
    assert str(run.run_dir).replace("_", "\\_") in text(events, "run")
    assert {"test/confusion", "out_of_fold/confusion"} <= set(events.Tags()["tensors"])


@pytest.mark.long
def test_mlflow_is_told_everything(logged, photos, monkeypatch):
    store = client(logged / "ml", monkeypatch)
    experiment = store.get_experiment_by_name(photos.name)
    (found,) = store.search_runs([experiment.experiment_id])
    run = Run(logged / "runs/x")
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "x fit"
    assert found.data.params["head.kind"] == "linear"
    assert found.data.params["image_size"] == "32"
    test = run.metrics["fit"]["test"]
    assert found.data.metrics["test/accuracy"] == test["accuracy"]
    low, high = test["intervals"]["accuracy"]
    assert found.data.metrics["test/accuracy_low"] == low
    assert found.data.metrics["test/accuracy_high"] == high
    history = store.get_metric_history(found.info.run_id, "fit/val_loss")
    assert [x.step for x in history] == list(range(1, len(history) + 1))
    names = {x.path for x in store.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics.json", "model.keras"} <= names
    assert "report.html" in names or not run.report_path.exists()
    path = store.download_artifacts(found.info.run_id, "model.keras")
    assert Path(path).read_bytes() == run.model_path.read_bytes()


@pytest.fixture(params=["tensorboard", "mlflow"])
def kind(request) -> str:
    return request.param


def follow(listener: Listener, run_dir: Path, epochs: int = 2) -> list[str]:
    """Sends the events of a fine-tuning; returns all notes."""
    told = Broadcast([listener])
    parameters = Config(data="/a/b\udcff\n.csv").model_dump(mode="json")
    with announcing(told, "finetune", run_dir, parameters):
        told.note("a <b>note</b>")
        for number in range(1, epochs + 1):
            row = {"epoch": number, "loss": 1 / number, "val_loss": math.nan}
            told.epoch("finetune", number, row)
    told.finished("finetune", run_dir, FIGURES)
    return told.notes


def test_epochs_are_steps(monkeypatch):
    follow(TensorBoardListener("tb"), Path("runs/x"))
    follow(TensorBoardListener("tb"), Path("runs/x"), epochs=1)
    events = read_events(Path("tb/x/finetune"))
    assert scalar(events, "finetune/loss") == [(1, 1.0), (2, 0.5)]
    assert "finetune/val_loss" not in events.Tags()["tensors"]  # not a number
    assert "a \\<b\\>note" in text(events, "notes")
    assert len(scalar(read_events(Path("tb/x/finetune-2")), "finetune/loss")) == 1

    follow(MlflowListener("ml"), Path("runs/x"))
    store = client(Path("ml"), monkeypatch)
    (found,) = store.search_runs([x.experiment_id for x in store.search_experiments()])
    history = store.get_metric_history(found.info.run_id, "finetune/loss")
    assert [(x.step, x.value) for x in history] == [(1, 1.0), (2, 0.5)]
    assert "note" in found.data.tags["mlflow.note.content"]
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_knows_a_run_that_failed(error, status, monkeypatch):
    told = Broadcast([MlflowListener("ml")])
    with (
        pytest.raises(type(error)),
        announcing(told, "fit", Path("x"), {"data": "digits"}),
    ):
        raise error
    store = client(Path("ml"), monkeypatch)
    experiment = store.get_experiment_by_name("digits")
    (found,) = store.search_runs([experiment.experiment_id])
    assert found.info.status == status


def test_a_store_that_fails_later_costs_one_note():
    """Its folder becomes a file, in which nothing can be written."""
    others = Told()
    told = Broadcast([MlflowListener("store"), others])
    told.started("finetune", Path("runs/x"), {"data": "digits"})
    shutil.rmtree("store")
    Path("store").touch()
    for number in (1, 2):
        told.epoch("finetune", number, {"loss": 1.0})
    told.finished("finetune", Path("runs/x"), FIGURES)
    (note,) = told.notes
    assert note.startswith("Nothing more is logged to store (")
    assert others.notes == [note]
    assert [number for _, number, _ in others.epochs] == [1, 2]


def test_a_full_disk_costs_one_note(kind, small_disk):
    told = Broadcast([listener_of(f"{kind}:{small_disk}/store")])
    told.started("finetune", Path("runs/x"), {"data": "digits"})
    fill(small_disk, 0)
    for number in range(1000):
        told.epoch("finetune", number, {f"loss{i}": 1.0 for i in range(10)})
        if told.notes:
            break
    told.finished("finetune", Path("runs/x"), FIGURES)
    (note,) = told.notes
    assert note.startswith(f"Nothing more is logged to {small_disk}/store (")


def test_a_store_that_fails_at_once_is_an_error_before_any_work(kind, kt, photos):
    Path("store").touch()
    result = kt("fit", photos, "--image-size", 32, "--log-to", f"{kind}:store/sub")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: Nothing can be logged here. Received: store/sub (")
    assert "--log-to" in last
    assert not Path("saved_models").exists()


def test_credentials_are_shown_nowhere(kt, photos):
    with socket.socket() as server:  # nobody listens there
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        uri = f"http://me:{SECRET}@127.0.0.1:{port}/x?token={SECRET}"
        listener = MlflowListener(uri)
        with pytest.raises(UsageError) as caught:
            listener.started("fit", Path("x"), {"data": "digits"})
    assert f"http://...@127.0.0.1:{port}/x (nobody answers there)" in str(caught.value)
    assert SECRET not in str(caught.value)
    for target in (f"mlflow:ftp://me:{SECRET}@h/x", f"nothing:http://me:{SECRET}@h"):
        result = kt("fit", photos, "--log-to", target)
        assert result.exit_code == 2
        assert SECRET not in result.output and "Received: " in result.output


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("logs/a@b", "logs/a@b"),
        ("https://h/p", "https://h/p"),
        ("https://u:p@h/p?x=1#y", "https://...@h/p"),
        ("https://u:p/q@h", "https://...@h"),
        ("mlflow:https://u@h", "mlflow:https://...@h"),
    ],
)
def test_what_is_left_of_an_address(uri, shown):
    assert without_credentials(uri) == shown


@pytest.mark.parametrize(
    "target", ["", "tensorboard:", "mlflow:sqlite:///x.db", "wandb", "mlflow:http://["]
)
def test_a_place_of_another_form_is_a_mistake(target):
    with pytest.raises(UsageError, match="Received: ") as caught:
        listener_of(target)
    assert ("follows the colon" in str(caught.value)) == target.endswith(":")


def test_a_missing_package_is_named(kind, kt, photos, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = kt("fit", photos, "--log-to", kind)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"pip install 'keras-transfer[{kind}]'" in line
    assert not Path(kind).exists()


def test_a_place_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "elsewhere")
    follow(MlflowListener(), Path("x"))
    assert Path("elsewhere").is_dir() and not Path("mlruns").exists()
    assert keras_transfer.MlflowListener is MlflowListener
    assert keras_transfer.TensorBoardListener is TensorBoardListener


def test_names_of_classes_are_no_keys():
    config = {"head": {"kind": "mlp", "class_weight": {"<a> b": 2.0}}, "seed": 0}
    assert flat(config) == {
        "head.kind": "mlp",
        "head.class_weight": {"<a> b": 2.0},
        "seed": 0,
    }
    assert final_figures(FIGURES) == {
        "test/images": 4.0,
        "test/accuracy": 0.75,
        "test/accuracy_low": 0.3,
        "test/accuracy_high": 0.95,
    }


def test_a_listener_that_gives_up_is_left_out():
    class Lost(Listener):
        def note(self, text):
            raise ListenerError("It is full")

    class Faulty(Listener):
        def note(self, text):
            raise KerasTransferError("This ends the work")

    others = Told()
    told = Broadcast([Lost(), others])
    told.note("first")
    told.note("second")
    assert told.notes == others.notes == ["first", "It is full", "second"]
    with pytest.raises(KerasTransferError, match="ends the work"):
        Broadcast([Faulty()]).note("first")
