"""What manifest.json says: where a model came from."""

import contextlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Literal

from pydantic import BaseModel, ConfigDict

from keras_transfer.config import FinetuneConfig

Phase = Literal["fit", "finetune"]

_PACKAGES = (
    "keras-transfer",
    "keras",
    "tensorflow",
    "openvino",
    "scikit-learn",
    "scipy",
    "numpy",
)


class Estimate(BaseModel):
    """A figure that was measured several times, on parts of the same images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float
    """Of the 95% confidence interval of the mean."""
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


class FinetuneReport(BaseModel):
    """What `manifest.json` says of `kt unfreeze-and-finetune`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created: str
    config: FinetuneConfig
    """What the user chose, resolved."""
    kept: bool
    """Whether the fine-tuned model became the run's model."""
    reason: str
    """Why, in words."""
    metric: str
    """What decided: `accuracy`, or of multi-label data `mean_average_precision`."""
    before: float | None
    """The metric of the run's model so far, on the validation images, if any."""
    after: float | None
    """The metric of the fine-tuned model, on the same images."""
    p_value: float | None
    """How likely a gain like this is if the new model is not better."""
    alpha: float
    """Share of the fine-tuned weights in the mix with those before; 1 is all."""
    alphas: dict[str, float]
    """alpha -> the metric on the validation images."""
    groups: dict[str, float]
    """Trained layer group -> its highest learning rate."""
    trained_parameters: int
    split_point: str
    """The layer up to which activations were computed once; `image`: pixels."""
    activation_bytes: int
    """Size on disk of an image's cached activation."""
    best_epoch: int
    epochs: int
    """Epochs trained, those before a `--resume` included."""
    engine: str
    """What ran the frozen part: `openvino` or `keras`; `cache` if it did not run."""
    precision: str
    """Arithmetic of training."""
    parity: dict[str, float]
    """The model on pixels against the cached activations; as in the manifest."""
    images_per_second: float
    """Of training, the median epoch."""
    timings: dict[str, float]
    """Wall seconds: `features`, `training`, `comparison`, `total`; of the last
    process that worked on it."""
    notes: list[str]


class Manifest(BaseModel):
    """What `manifest.json` says: where a run's model came from, to the byte."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    created: str
    """UTC time at which the run was completed, ISO 8601."""
    data: str
    """The DATA argument; folders and files as absolute paths."""
    data_fingerprint: str
    """SHA-256 over every usable image's split, name, bytes and labels."""
    class_counts: dict[str, dict[str, int]]
    """split -> class name -> number of usable images."""
    skipped: int
    """Images that could not be read or decoded; `skipped.csv` lists them."""
    multi_label: bool
    base: str
    weights: str
    weights_digest: str
    """SHA-256 over the shapes and values of the frozen base's weights."""
    image_size: int
    """Side of the square images that the model takes, in pixels."""
    decoder_version: int
    engine: str
    """What ran the frozen base: `openvino` or `keras`; `cache` if it did not run."""
    precision: str
    """Arithmetic of the features the head was trained on: `f32` or `bf16`."""
    notes: list[str]
    """What was decided on the way, each with its measurement."""
    folds: Estimate | None = None
    """With `--folds`, the accuracy (of multi-label data the mean average precision)
    of each fold, their mean and its 95% interval."""
    l2: float
    """The head's L2 strength, chosen on the validation split."""
    parity: dict[str, float]
    """model.keras against the cached features: `images`, `top1_agreement` (0 to 1),
    `max_probability_difference`, `tolerance`."""
    seed: int
    versions: dict[str, str]
    host: dict[str, str | int]
    timings: dict[str, float]
    """Wall seconds: `features`, and of these the `decode` and `forward` ones during
    which it waited for images and for the base; then `head`, `model`, `total`."""
    images_decoded: int
    images_forwarded: int
    phase: Phase = "fit"
    """Whose model `model.keras` is; the other phase's is `model.PHASE.keras`."""
    finetune: FinetuneReport | None = None

    def to_json(self) -> str:
        """The text of manifest.json, escaped: not every path can be text in UTF-8."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def now() -> str:
    """The time now in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def host() -> dict[str, str | int]:
    """The machine: system, processor architecture and usable CPU cores."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    }
