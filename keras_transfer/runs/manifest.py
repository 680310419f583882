"""The schema of manifest.json, which records where a model came from."""

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
    """Repeated measurements of a metric on parts of the same images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    """Mean of the measurements."""
    low: float
    """Lower end of the mean's 95% confidence interval."""
    high: float
    """Upper end of the mean's 95% confidence interval."""
    values: tuple[float, ...]
    """The individual measurements."""

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


class FinetuneReport(BaseModel):
    """The record of `kt unfreeze-and-finetune` in `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created: str
    """UTC time at which fine-tuning was completed, ISO 8601."""
    config: FinetuneConfig
    """The resolved options."""
    kept: bool
    """Whether the fine-tuned model became the run's model."""
    reason: str
    """Why it was kept or not, as a sentence."""
    metric: str
    """The metric that decided: `accuracy`, or `mean_average_precision` for multi-label
    data."""
    before: float | None
    """That metric of the run's previous model on the validation images, from 0 to 1;
    None without validation images."""
    after: float | None
    """That metric of the fine-tuned model on the same images, from 0 to 1; None without
    validation images."""
    p_value: float | None
    """Probability of a gain like this if the new model is not better (0 to 1); None
    without validation images."""
    alpha: float
    """Fraction of the fine-tuned weights in the final mix with the weights before
    training, from 0 to 1."""
    alphas: dict[str, float]
    """The metric on the validation images for each alpha that was tried."""
    groups: dict[str, float]
    """Peak learning rate of each trained layer group."""
    trained_parameters: int
    """Number of weights that training could change."""
    split_point: str
    """Last layer of the frozen part; `image` if the tail reads pixels."""
    activation_bytes: int
    """Bytes on disk of one image's cached activation."""
    best_epoch: int
    """Epoch whose weights were used, starting at 1."""
    epochs: int
    """Number of epochs trained, including those before a `--resume`."""
    engine: str
    """Engine that ran the frozen part: `openvino` or `keras`; `cache` if none had to
    run."""
    precision: str
    """Arithmetic of training: `f32`, `bf16` or `f16`."""
    parity: dict[str, float]
    """Agreement of the model on pixels with its tail on cached activations; keys as in
    `Manifest.parity`."""
    images_per_second: float
    """Training throughput in the median epoch."""
    timings: dict[str, float]
    """Wall-clock seconds of the last process that worked on it: `features`, `training`,
    `comparison` and `total`."""
    notes: list[str]
    """Decisions made along the way, each with its measurement."""


class Manifest(BaseModel):
    """The content of `manifest.json`: the exact provenance of a run's model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    """Changes when a key changes its meaning."""
    created: str
    """UTC time at which the run was completed, ISO 8601."""
    data: str
    """The DATA argument; folders and files as absolute paths."""
    data_fingerprint: str
    """SHA-256 over the split, name, bytes and labels of every usable image."""
    class_counts: dict[str, dict[str, int]]
    """Number of usable images by split and class name."""
    skipped: int
    """Number of images that could not be read or decoded, listed in `skipped.csv`."""
    multi_label: bool
    """Whether an image may show several classes, or none."""
    base: str
    """Name of the base."""
    weights: str
    """`imagenet`, `none`, or the absolute path of a weights file."""
    weights_digest: str
    """SHA-256 over the shapes and values of the frozen base's weights."""
    image_size: int
    """Side in pixels of the square images that the model takes."""
    decoder_version: int
    """`decode.DECODER_VERSION`; changes when the same file decodes to other pixels."""
    engine: str
    """Engine that ran the frozen base: `openvino` or `keras`; `cache` if none had to
    run."""
    precision: str
    """Arithmetic of the features the head was trained on: `f32` or `bf16`."""
    notes: list[str]
    """Decisions made along the way, each with its measurement."""
    folds: Estimate | None = None
    """If the head was cross-validated, the accuracy of each fold (for multi-label data,
    the mean average precision), with mean and 95% interval."""
    l2: float
    """The head's L2 strength, chosen on the validation split if there is one."""
    parity: dict[str, float]
    """Agreement of `model.keras` with the head on cached features: `images`,
    `top1_agreement` (0 to 1), `max_probability_difference` and `tolerance`."""
    seed: int
    """Seed of all random choices."""
    versions: dict[str, str]
    """Installed versions of Python and of the main packages, by name."""
    host: dict[str, str | int]
    """The machine: `system`, `machine` (architecture) and `cpu_cores`."""
    timings: dict[str, float]
    """Wall-clock seconds: `features`, including `decode` (waiting for images) and
    `forward` (waiting for the base); `head`, `model` and `total`."""
    images_decoded: int
    """Number of images decoded for their features."""
    images_forwarded: int
    """Number of images that went through the base, including augmented views."""
    phase: Phase = "fit"
    """Phase that produced `model.keras`; the model of the other phase, if any, is
    `model.PHASE.keras`."""
    finetune: FinetuneReport | None = None
    """Record of the last fine-tuning that is stored in the run, if any."""

    def to_json(self) -> str:
        """Formats the manifest as ASCII JSON, since not every path is valid UTF-8."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def now() -> str:
    """Returns the current UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Returns installed versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def host() -> dict[str, str | int]:
    """Describes the machine: system, processor architecture and usable CPU cores."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    }
