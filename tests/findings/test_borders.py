"""A marker at the border is found, and its features are cached."""

from pathlib import Path

import numpy as np
from PIL import Image

from keras_transfer.config import Config
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.findings.borders import border_findings, hiding
from keras_transfer.findings.images import AuditedImages
from keras_transfer.workflows.inputs import prepare


def test_views_show_the_border_the_center_and_the_corners():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    before, views = pixels.copy(), hiding(40)
    view = views.make()
    border, center = view(pixels, b"", 1), view(pixels, b"", 2)
    is_center = np.zeros((40, 40), bool)
    is_center[6:34, 6:34] = True
    np.testing.assert_array_equal(border[~is_center], pixels[~is_center])
    np.testing.assert_array_equal(center[is_center], pixels[is_center])
    assert len(np.unique(border[is_center], axis=0)) == 1
    assert len(np.unique(center[~is_center], axis=0)) == 1
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:6, -6:] = 200
    corners = view(halves, b"", 3)
    assert (corners[:18, 22:] == 200).all() and (corners[22:] == 0).all()
    assert (corners[:18, :18] == 0).all()
    np.testing.assert_array_equal(pixels, before)


def framed(tmp_path: Path, spots: int) -> Path:
    """Noise in two classes, one of which has a white frame, and some of it a spot."""
    rng = np.random.default_rng(0)
    for index in range(60):
        name = ("plain", "marked")[index % 2]
        pixels = rng.integers(0, 120, (64, 64, 3)).astype(np.uint8)
        if name == "marked":
            pixels[:8] = pixels[-8:] = pixels[:, :8] = pixels[:, -8:] = 255
            if index < 2 * spots:
                pixels[20:44, 20:44] = 255
        path = tmp_path / "data" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


def test_a_border_that_tells_all_that_the_whole_does_is_told(tmp_path):
    data = str(framed(tmp_path, 27))
    config = Config(data=data, base="alexnet", weights="none", image_size=64)
    inputs = prepare(config, makes_run=False)
    part = frozen_base(inputs.config)
    plain = frozen_features(part, inputs.splits, 0, Storage(quality=True))
    images = AuditedImages.of(inputs.splits, plain)
    (found,) = border_findings(images, inputs.splits, part, inputs.config)
    figures = found.figures
    # That is not clearly more than the center, which tells nearly as much.
    assert figures["border"] == figures["whole"] == 1 > figures["center"] > 0.9
    assert found.severity == "medium" and "marker" in found.message


def test_a_frame_is_found_and_its_features_are_cached(tmp_path):
    folder = framed(tmp_path, 0)
    config = Config(data=str(folder), base="alexnet", weights="none", image_size=64)
    inputs = prepare(config, makes_run=False)
    part = frozen_base(inputs.config)
    plain = frozen_features(part, inputs.splits, 0, Storage(quality=True))
    images = AuditedImages.of(inputs.splits, plain)
    (found,) = border_findings(images, inputs.splits, part, inputs.config)
    assert found.kind == "class told from the border" and found.severity == "high"
    figures = found.figures
    assert figures["border"] > 0.9 > 0.75 > figures["center"]
    assert figures["baseline"] == 0.5 and figures["images"] == 60
    assert "marker" in found.message

    again = frozen_features(part, inputs.splits, hiding(64), Storage(quality=True))
    assert again.extraction.engine is None  # nothing was missing
    for number in (1, 2, 3):
        rows = again.rows(inputs.splits.train.sources, number)[:]
        assert np.abs(rows - plain.rows(inputs.splits.train.sources)[:]).max() > 0
    assert border_findings(images, inputs.splits, part, inputs.config) == [found]
