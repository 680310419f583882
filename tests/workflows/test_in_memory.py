"""Runs of images that are given in Python: made, evaluated, fine-tuned, exported."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from conftest import CLASSES, Told, draw, encode

import keras_transfer
from keras_transfer.config import load_config, to_yaml
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.workflows.advise import command_line
from keras_transfer.workflows.inputs import prepare

SMALL = {
    "report": False,
    "image_size": 32,
    "weights": "none",
    "folds": 2,
    "head": {"l2": 0.1},
    "cache_dir": "features",
}
FINETUNE = {"unfreeze": "from:top_conv", "epochs": 1, "batch_size": 8, "force": True}


@pytest.fixture(scope="module")
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """60 images `[48, 48, 3]` of three kinds, with integer labels `[60, 1]`."""
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    return np.stack([draw(CLASSES[y], rng, 48) for y in labels]), labels[:, None]


def dataset(arrays: tuple[np.ndarray, np.ndarray], seed: int) -> tf.data.Dataset:
    """The images in an order that differs with the seed."""
    made = tf.data.Dataset.from_tensor_slices(arrays)
    return made.shuffle(60, seed=seed, reshuffle_each_iteration=True).batch(16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, arrays) -> tuple[Path, list[str]]:
    """A run of the arrays that tests work on copies of, and the notes of its making."""
    told, folder = Told(), tmp_path_factory.mktemp("runs")
    options = {**SMALL, "cache_dir": folder / "cache", "report": True}
    keras_transfer.fit(arrays, name="run", runs_dir=folder, listeners=[told], **options)
    return folder / "run", told.notes


@pytest.fixture
def run(made, tmp_path) -> keras_transfer.Run:
    shutil.copytree(made[0], tmp_path / "run")
    return keras_transfer.open_run(tmp_path / "run")


@pytest.mark.long
def test_a_run_of_arrays_takes_them_again(made, run, arrays):
    assert any("take them again" in note for note in made[1])
    assert run.config.data == "memory:arrays"
    assert run.class_names == ["0", "1", "2"]

    # The images that it was made from: its own test split.
    again = run.evaluate(arrays)
    assert again.data == "test"
    assert again.images == run.metrics["fit"]["test"]["images"] == 9
    assert again.accuracy == run.metrics["fit"]["test"]["accuracy"]
    # Others: all of them.
    x, y = arrays
    other = run.evaluate((255 - x, y))
    assert (other.data, other.images) == ("memory:arrays", 60)

    tuned = run.unfreeze_and_finetune(data=arrays, **FINETUNE)
    assert tuned.manifest.phase == "finetune"
    assert tuned.evaluate(arrays).images == 9


@pytest.mark.long
def test_a_run_of_arrays_refuses_others_and_says_what_to_do(run, arrays):
    x, y = arrays
    before = run.manifest
    for work in (run.evaluate, lambda: run.unfreeze_and_finetune(**FINETUNE)):
        with pytest.raises(UsageError, match="Give them again, to evaluate"):
            work()
    for others, words in (
        ((x[::-1], y[::-1]), "40 of 60 labels are others, such as '2' instead of '0'"),
        ((255 - x, y), "60 of 60 differ"),
        ((x[:50], y[:50]), "10 of 60 are missing, such as"),
        ((x, y + 1), "classes of the data are not those"),
        ((x, (y + 1) % 3), "60 of 60 labels are others, such as '1' instead of '0'"),
    ):
        with pytest.raises(KerasTransferError, match=words):
            run.unfreeze_and_finetune(data=others, **FINETUNE)
    with pytest.raises(KerasTransferError, match="no class '3'"):
        run.evaluate((x, y + 1))
    assert run.manifest == before


def test_images_beside_those_of_the_run_are_evaluated_too(run, arrays):
    x, y = arrays
    more = run.evaluate((np.concatenate([x, 255 - x]), np.concatenate([y, y])))
    assert (more.data, more.images) == ("memory:arrays", 120)
    told = Told()
    other = run.evaluate((x, (y + 1) % 3), listeners=[told])
    assert (other.data, other.images) == ("test", 9)
    assert any("9 of 9 labels are others" in note for note in told.notes)


def test_options_of_a_listing_need_data(run):
    with pytest.raises(UsageError, match="Received: label_column=y and none"):
        run.evaluate(label_column="y")
    with pytest.raises(UsageError, match="'seed'. Keys are path_column, label_column"):
        run.evaluate("data", seed=1)


@pytest.mark.long
def test_a_run_of_arrays_is_exported(run):
    assert (run.export() / "saved_model.pb").exists()


@pytest.mark.long
def test_arrays_and_files_of_the_same_pixels_give_the_same_model(arrays, tmp_path):
    x, y = arrays
    paths = [tmp_path / f"{index}.png" for index in range(len(x))]
    for path, pixels in zip(paths, x, strict=True):
        path.write_bytes(encode(pixels, "PNG"))
    options = {**SMALL, "splits": {"test": 0.0}}
    of_arrays = keras_transfer.fit(arrays, name="arrays", **options)
    of_paths = keras_transfer.fit(
        (iter(paths), [str(label) for label in y[:, 0]]), name="paths", **options
    )
    expected = of_arrays.metrics["fit"]["out_of_fold"]
    assert of_paths.metrics["fit"]["out_of_fold"] == expected
    tuned = of_paths.unfreeze_and_finetune(**FINETUNE)
    assert tuned.manifest.phase == "finetune"


@pytest.mark.long
def test_a_dataset_may_come_in_another_order(arrays):
    run = keras_transfer.fit(dataset(arrays, 1), name="run", **SMALL)
    again = run.evaluate(dataset(arrays, 2))
    assert (again.data, again.images) == ("test", 9)
    assert again.accuracy == run.metrics["fit"]["test"]["accuracy"]
    tuned = run.unfreeze_and_finetune(data=dataset(arrays, 3), **FINETUNE)
    assert tuned.manifest.phase == "finetune"

    # One whose images are others in each pass, though as many, is no longer the same.
    told = Told()
    noisy = dataset(arrays, 4).map(lambda x, y: (x ^ 1, y))
    found = run.evaluate(noisy, listeners=[told])
    assert (found.data, found.images) == ("memory:dataset", 60)
    assert any("images are others in each pass" in note for note in told.notes)
    with pytest.raises(KerasTransferError, match="same images in each pass"):
        run.unfreeze_and_finetune(data=noisy, **FINETUNE)


@pytest.mark.long
def test_lists_of_labels_stay_lists(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(24)]
    for index, path in enumerate(paths):
        path.write_bytes(encode(draw(CLASSES[index % 2], rng, 48), "PNG"))
    labels = [["a"], ["b"], ["a"], []] * 6
    run = keras_transfer.fit((paths, labels), name="run", precision="f32", **SMALL)
    again, expected = run.evaluate(), run.metrics["fit"]["test"]
    assert again.mean_average_precision == expected["mean_average_precision"]
    assert (again.images, again.accuracy) == (expected["images"], expected["accuracy"])


@pytest.mark.long
def test_a_frame_of_paths_is_found_again(arrays, tmp_path, kt):
    x, y = arrays
    for index, pixels in enumerate(x):
        (tmp_path / f"{index:02d}.png").write_bytes(encode(pixels, "PNG"))
    frame = pd.DataFrame(
        {
            "picture": [Path(f"{index:02d}.png") for index in range(len(x))],
            "diagnosis": [CLASSES[label] for label in y[:, 0]],
            "patient": [f"p{index // 2}" for index in range(len(x))],
            "age": np.arange(len(x)) + 20,
            "sample_weight": np.linspace(0.5, 2, len(x)),
        }
    )
    columns = {"path_column": "picture", "label_column": "diagnosis"}
    run = keras_transfer.fit(frame, name="run", **columns, **SMALL)
    assert run.config.data == "memory:paths"
    images = pq.read_table(run.images_path).to_pandas().set_index("source")
    row = images.loc[str(tmp_path / "07.png")]
    assert (row["group"], row["age"], row["label"]) == ("p3", 27, CLASSES[7 % 3])
    assert images["sample_weight"].between(0.49, 2.01).all()

    assert run.evaluate().images == run.metrics["fit"]["test"]["images"]
    assert kt("evaluate", run.run_dir).exit_code == 0
    other = run.evaluate(frame.drop(columns="sample_weight"))
    assert (other.data, other.images) == ("memory:paths", 60)


@pytest.mark.parametrize(
    ("data", "method", "expected"),
    [
        ("memory:arrays", "extract", "keras_transfer.fit(data, image_size=32)"),
        (
            "memory:dataset",
            "finetune-all",
            "keras_transfer.unfreeze_and_finetune(keras_transfer.fit(data, "
            "image_size=32), unfreeze='all', data=data)",
        ),
        (
            "memory:paths",
            "finetune-top",
            "keras_transfer.unfreeze_and_finetune(keras_transfer.fit(data, "
            "image_size=32), unfreeze='top')",
        ),
    ],
)
def test_advice_on_images_in_memory_is_a_python_call(arrays, data, method, expected):
    config = load_config(None, {"data": data, "image_size": 32})
    inputs = prepare(config, makes_run=False, in_memory=arrays)
    assert command_line(inputs, method, {"image_size": 32}, False) == expected
    balanced = command_line(inputs, "extract", {}, True)
    assert balanced == "keras_transfer.fit(data, head={'class_weight': 'balanced'})"


def test_data_are_given_again_only_where_they_are_not_kept(run, photos):
    config = run.config.model_copy(update={"data": str(photos)})
    (run.run_dir / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UsageError, match="Leave data out"):
        run.unfreeze_and_finetune(data=photos, **FINETUNE)
