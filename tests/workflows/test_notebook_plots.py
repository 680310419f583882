import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import keras_transfer
from keras_transfer.advice.probe import (
    QUICK_SHARES,
    learning_curve,
    probe,
    quick_learning_curve,
)
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.reporting import charts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on 24 images of two colors, and one whose image shows both or none."""
    root = tmp_path_factory.mktemp("plots")
    rng = np.random.default_rng(0)
    for number in range(24):
        name = ("red", "blue")[number % 2]
        pixels = rng.integers(0, 120, (40, 40, 3), np.uint8)
        pixels[..., 2 * (number % 2)] += 100
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "data" / name / f"{number}.png")
    options = {
        "base": "alexnet",
        "weights": "none",
        "image_size": 64,
        "runs_dir": root / "runs",
        "cache_dir": root / "cache",
    }
    return root, keras_transfer.fit(str(root / "data"), name="one", **options), options


def png(figure) -> bytes:
    return figure._repr_png_()  # what a notebook asks for


def test_pictures_of_a_run(made):
    _, run, _ = made
    for figure in (
        run.show_batch(4),
        run.plot_confusion(),
        run.plot_top_losses(3),
        run.plot_curves(),
    ):
        assert png(figure).startswith(b"\x89PNG")
    titles = [axes.get_title(loc="left") for axes in run.show_batch(4).axes]
    assert {*titles} == {"red", "blue"} and len(titles) == 4
    assert run.show_batch(4, seed=1).axes[0].images[0].get_array().shape == (64, 64, 3)
    for axes in run.plot_top_losses(2).axes:
        true, said = axes.get_title(loc="left").split("\n")
        assert true in ("true: red", "true: blue") and "%" in said


def test_pictures_that_do_not_exist(made, tmp_path):
    root, run, _ = made
    with pytest.raises(UsageError, match="was not fine-tuned"):
        run.plot_curves("finetune")
    history = run.run_dir / "history.csv"
    text = history.read_text(encoding="utf-8")
    history.write_text(text.splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="has no rows of this phase"):
        run.plot_curves()
    history.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="n=0"):
        run.show_batch(0)
    moved = root / "moved"
    shutil.move(root / "data", moved)
    try:
        with pytest.raises((KerasTransferError, UsageError)):
            run.show_batch()
    finally:
        shutil.move(moved, root / "data")


def test_images_that_are_gone_are_left_out(made):
    root, run, _ = made
    gone = root / "data" / "red" / "0.png"
    kept = gone.read_bytes()
    gone.write_bytes(b"not an image")
    try:
        figure = run.show_batch(100)
        shown = [axes for axes in figure.axes if axes.images]
        assert 0 < len(shown) < 24
    finally:
        gone.write_bytes(kept)


def test_quick_learning_curve_is_that_of_advise(made):
    _, run, _ = made
    config, splits = run.config, run_splits(run)
    storage = Storage(run.manifest.precision, quality=True)
    features = frozen_features(frozen_base(config), splits, 0, storage, SILENT)
    quick = quick_learning_curve(config, splits, features, run.manifest.l2)
    images = len(splits.train)
    # Shares of fewer than two images per fold say nothing.
    assert [count for count, _ in quick] == [
        count for share in QUICK_SHARES if (count := round(share * images)) >= 10
    ]
    full, _ = learning_curve(config, splits, probe(config, splits, features), [1.0])
    assert abs(quick[-1][1].mean - full[1.0].mean) < 0.1
    assert all(0 <= one.low <= one.mean <= one.high <= 1 for _, one in quick)
    assert png(charts.learning_curve(quick)).startswith(b"\x89PNG")
    few = replace(splits, train=splits.train.select(np.arange(4)))
    assert quick_learning_curve(config, few, features) == []
