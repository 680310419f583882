"""`kt export` beside Keras's own `model.export()`: size, and latency of one image.

    python tests/benchmarks/export_vs_keras.py
    python tests/benchmarks/export_vs_keras.py --base ResNet50 --weights none

Both SavedModels hold the same model, of the digits of the quick start, and are asked
in turn by the same C++ session for one image as a float32 tensor (`predict_tensor` of
this package, `serve` of Keras); figures are medians, ratios of neighbours.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_transfer
from keras_transfer.runtime.c_api import ABOUT, Request, Session
from keras_transfer.serving.savedmodel import read_signatures


def plain_export(model: keras.Model, path: Path) -> None:
    """Keras's export, with a note of its tensors' names for `Session`."""
    model.export(path, verbose=False)
    about = {"signatures": read_signatures(path)}
    (path / ABOUT).parent.mkdir()
    (path / ABOUT).write_text(json.dumps(about))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def seconds(session: Session, request: Request) -> float:
    started = time.perf_counter()
    session.run(request)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="MobileNetV2")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = keras_transfer.fit(
            "digits",
            base=arguments.base,
            weights=arguments.weights,
            image_size=arguments.image_size,
            runs_dir=folder,
            cache_dir=Path(folder, "cache"),
        )
        model = keras.saving.load_model(run.model_path, compile=False)
        ours, theirs = keras_transfer.export(run), Path(folder, "keras")
        plain_export(model, theirs)
        print(
            f"size: {size(ours) / 1e6:.1f} MB, Keras {size(theirs) / 1e6:.1f} MB, "
            f"ratio {size(ours) / size(theirs):.2f}"
        )
        pixels = np.random.default_rng(0).uniform(0, 255, (1, *model.input_shape[1:]))
        pixels = pixels.astype(np.float32)
        sessions = Session(ours), Session(theirs)
        (plain_input,) = sessions[1].about["signatures"]["serve"]["inputs"]
        requests = (
            Request("predict_tensor", {"images": pixels}),
            Request("serve", {plain_input: pixels}),
        )
        pairs = [
            [seconds(*both) for both in zip(sessions, requests, strict=True)]
            for _ in range(20 + arguments.requests)
        ][20:]
        for session in sessions:
            session.close()
    mine, plain = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"one image: {mine:.1f} ms, Keras {plain:.1f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
