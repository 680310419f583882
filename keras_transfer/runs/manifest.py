"""The schema of manifest.json, which records where a model came from."""

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Literal

from pydantic import BaseModel, ConfigDict

from keras_transfer.config import FinetuneConfig

Phase = Literal["fit", "finetune"]

READS = {"last": "the last stage", "stages": "the last three stages"}
"""What a head reads of a base, in words."""

FEW_IMAGES = 30
"""With fewer test images than this, out-of-fold figures come first. At an accuracy of
0.9 on 30 images, the 95% confidence interval is 0.74 to 0.97 (Wilson)."""

_SPLITS = ("test", "out_of_fold", "deciding", "val")  # the most telling first

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
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class CoveragePoint(BaseModel):
    """The accuracy of those predictions whose largest probability is large enough."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float
    """Smallest of their largest probabilities, from 0 to 1."""
    coverage: float
    """Their share of all images, from 0 to 1."""
    accuracy: float
    """Share of them that is correct, from 0 to 1."""
    images: int
    """Their number."""


class Abstention(BaseModel):
    """A threshold from which on predictions are `sure`.

    It is found on images that the model did not learn from: the training images, out of
    fold; after fine-tuning, those that were set aside.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: float
    """Accuracy that sure predictions have at least, in (0, 1), with a one-sided 95%
    bound."""
    threshold: float
    """Smallest largest probability of a sure prediction, from 0 to 1, as float32."""
    coverage: float
    """Share of the predictions of these images that is sure, from 0 to 1."""
    accuracy: float
    """Share of the sure ones among them that is correct, from 0 to 1."""
    images: int
    """Number of these images."""
    independent: int
    """Number of them that the bound was computed on: all, or one per group."""

    def __str__(self) -> str:
        return (
            f"sure from a probability of {self.threshold:.4f} on: "
            f"{self.coverage:.1%} of {self.images:,} images that were not learned "
            f"from, {self.accuracy:.1%} of them correct"
        )


class Calibration(BaseModel):
    """How far the temperature of a fine-tuned model makes its probabilities true.

    The figures are of the images that decide: each half of them with the temperature
    fitted on the other half. The temperature in the model is between both, so they are
    not exactly its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float
    """What the logits of the head were divided by; the geometric mean of both
    halves'."""
    log_loss_before: float
    """Mean cross-entropy in nats without a temperature."""
    log_loss_after: float
    """Mean cross-entropy in nats with it."""
    ece_before: float | None = None
    """Expected calibration error without a temperature, from 0 to 1; None for
    multi-label data."""
    ece_after: float | None = None
    """Expected calibration error with it."""


class FinetuneReport(BaseModel):
    """The record of `kt unfreeze-and-finetune` in `manifest.json`.

    Each half of the images that decide chose a mix of the weights before and after
    training, and a temperature, for the other half to judge. The final model has the
    mean of both mixes and the geometric mean of both temperatures. Where the halves
    chose differently, no image judged exactly this model: `after` and `calibration` are
    those of two models of which it lies in between.
    """

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
    """The metric that decided, as `metrics.deciding_metric` returns it: `accuracy`, or
    `mean_average_precision` for multi-label data, unless the config names another."""
    before: float | None
    """That metric of the model before on the images that decide; None without such
    images. They were set aside from the training images: fine-tuning starts from the
    run's head trained again without them. That is also the model before, unless the run
    has a fine-tuned model already that was judged by the same images."""
    after: float | None
    """That metric of the fine-tuned model on the same images; None without such
    images. Each half of them chose the mix that the other half judges."""
    p_value: float | None
    """Probability of a gain like this if the new model is not better (0 to 1); None
    without images that decide."""
    attempts: int = 1
    """Number of fine-tunings of this run that were judged, including this one."""
    deciding_images: int = 0
    """Number of images that decide; 0 in runs of version 0.1.0."""
    images_needed: int | None = None
    """Estimated number of images that would recognize a model that is 5 points better
    (0.05, of a metric from 0 to 1) in 4 of 5 cases; None if the log loss decides, and
    without images that decide."""
    calibration: Calibration | None = None
    """The temperature of the fine-tuned model; None if it has none."""
    alpha: float
    """Fraction of the fine-tuned weights in the final mix with the weights before
    training, from 0 to 1; the mean of both halves' choices, which differ if it is none
    of `alphas`."""
    alphas: dict[str, float]
    """The metric on all images that decide for each alpha that was tried."""
    groups: dict[str, float]
    """Peak learning rate of each trained layer group."""
    trained_parameters: int
    """Number of weights that training could change."""
    split_point: str
    """Last layer of the frozen part; `image` if the tail reads pixels."""
    activation_bytes: int
    """Bytes on disk of one image's cached activation."""
    best_epoch: int
    """Epoch whose weights were used, starting at 1; with a mean of several epochs, the
    last of them."""
    averaged_epochs: int = 1
    """Number of epochs whose weights were averaged."""
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

    schema_version: int = 2
    """Changes when a key of this file or of metrics.json changes its meaning, or when
    metrics.json gains keys. 2 added intervals."""
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
    """Name of the base, or names of several, joined by `+`."""
    features: Literal["last", "stages"] = "last"
    """Whether the head reads the pooled output of the base (`last`), or also those of
    stages below its top."""
    weights: str
    """`imagenet`, `none`, or the absolute path of a weights file."""
    weights_digest: str
    """SHA-256 over the shapes and values of the frozen base's weights; of several
    bases, joined by `+`."""
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
    """The deciding metric of each fold, corrected for the choice of the L2 strength,
    with mean and 95% interval; None without several folds."""
    coverage: tuple[CoveragePoint, ...] | None = None
    """The accuracy-coverage curve of the same images as in `Abstention`, by increasing
    coverage; None for multi-label data and without such images."""
    abstention: Abstention | None = None
    """The threshold of sure predictions, with `abstain_at_accuracy`."""
    thresholds: dict[str, float] | None = None
    """For multi-label data, the probability in (0, 1) from which on a class is
    predicted, by class name, chosen as in `Abstention`; None stands for 0.5."""
    l2: float
    """The head's L2 strength, chosen by cross-validation on the training images."""
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
    attempts: int = 0
    """Number of fine-tunings that were judged, including any that are not stored."""

    @property
    def next_attempt(self) -> int:
        """The number of the next fine-tuning, starting at 1."""
        stored = self.finetune.attempts if self.finetune else 0
        return max(self.attempts, stored) + 1

    def to_json(self) -> str:
        """Formats the manifest as ASCII JSON, since not every path is valid UTF-8."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def headline_split(images: Mapping[str, int]) -> str:
    """Returns the split whose figures come first; "" if there is none.

    Args:
        images: Number of images by the splits of a phase in metrics.json.
    """
    found = [name for name in _SPLITS if name in images]
    if found[1:] and images[found[0]] < FEW_IMAGES and found[0] == "test":
        return found[1]
    return found[0] if found else ""


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
