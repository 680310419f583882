"""What advice is based on, and what it consists of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from keras_transfer.runs.manifest import Estimate

Method = Literal["extract", "finetune-top", "finetune-all", "more-data"]

METHODS: dict[Method, str] = {
    "extract": "feature extraction",
    "finetune-top": "feature extraction, then fine-tuning of the top stage",
    "finetune-all": "feature extraction, then fine-tuning of all layers",
    "more-data": "collect more data; feature extraction until then",
}


@dataclass(frozen=True)
class Advice:
    """The conclusion of one rule.

    Attributes:
        rule: Name of the rule.
        message: The conclusion as a sentence, with the numbers that it is based on.
        evidence: These numbers, by description.
    """

    rule: str
    message: str
    evidence: Mapping[str, float | None]


@dataclass(frozen=True)
class Trial:
    """What a short trial of fine-tuning showed.

    Attributes:
        metric: A name that `metrics.deciding_metric` returns.
        images: Number of images, each of which was predicted by models that did not
            learn from it.
        epochs: Number of epochs that the top stage was trained for.
        before: Metric of heads on the frozen base: the log loss in nats, others from 0
            to 1.
        after: Metric of the same heads with the top stage fine-tuned.
        low: Lower end of the 95% interval of the gain, of paired predictions.
        high: Upper end of it.
        seconds: Duration of the trial.
    """

    metric: str
    images: int
    epochs: int
    before: float
    after: float
    low: float
    high: float
    seconds: float

    @property
    def gain(self) -> float:
        """How much better fine-tuning was; negative if it was worse."""
        difference = self.after - self.before
        return -difference if self.metric == "log_loss" else difference


@dataclass(frozen=True)
class Evidence:
    """The measurements that the rules use.

    Attributes:
        images: Number of training images.
        class_counts: Number of training images that show a class, by class name.
        metric: `accuracy`, or `mean_average_precision` for multi-label data, which is
            what accuracy means here and below.
        accuracy: Accuracy of a linear probe, cross-validated on the training images.
        curve: Accuracy of the probe by fraction of the training images.
        gain: Accuracy with all images minus accuracy with half of them.
        majority: Accuracy of always predicting the most common class; for multi-label
            data, the mean fraction of images that show a class.
        neighbours: Cross-validated accuracy of the 5 nearest neighbors; None for
            multi-label data.
        logme: LogME of the features in nats; see `logme.logme`.
        images_per_second: Throughput of the base on this machine.
        minutes: Estimated minutes for each method once features are cached.
        gigabytes: Size of each method's cached activations, in units of 10^9 bytes.
        disk: Disk space available for cached activations, in units of 10^9 bytes.
        trial: What a trial of fine-tuning showed; None without one.
        not_tried: Why there was no trial; "" with one.
    """

    images: int
    class_counts: Mapping[str, int]
    metric: str
    accuracy: Estimate
    curve: Mapping[float, Estimate]
    gain: Estimate
    majority: float
    neighbours: float | None
    logme: float
    images_per_second: float
    minutes: Mapping[Method, float]
    gigabytes: Mapping[Method, float]
    disk: float
    trial: Trial | None = None
    not_tried: str = ""
