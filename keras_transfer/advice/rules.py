"""Rules that turn measurements into a recommended method.

Each rule is a function of plain numbers that returns one `Advice`; `recommend` combines
them. The thresholds below have these sources:

- FEW_PER_CLASS, FEW_IMAGES, NEARLY_RIGHT and SIMILAR_CONFIDENCE: measurements in the
  section "What `kt advise` goes by" of tests/benchmarks/RESULTS.md.
- MUCH_DATA: from 20,000 images on, BiT-HyperRule trains longer and adds MixUp
  (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3).
- Similarity: the usual rule of transfer learning is to begin with feature extraction
  and to fine-tune if there is much or similar data (see Yosinski et al. 2014,
  arXiv:1411.1792, for why the distance to the original task matters). According to the
  measurements, data unlike ImageNet gain more from fine-tuning, so dissimilar data
  lead to fine-tuning of all layers here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from keras_transfer.errors import UsageError
from keras_transfer.events import duration
from keras_transfer.runs.manifest import Estimate

Method = Literal["extract", "finetune-top", "finetune-all", "more-data"]

METHODS: dict[Method, str] = {
    "extract": "feature extraction",
    "finetune-top": "feature extraction, then fine-tuning of the top stage",
    "finetune-all": "feature extraction, then fine-tuning of all layers",
    "more-data": "collect more data; feature extraction until then",
}

FEW_PER_CLASS = 10
RARE_CLASSES = 0.1  # fraction of too small classes from which more data are needed
FEW_IMAGES = 500
MUCH_DATA = 20_000
IMBALANCED = 5.0  # size of the largest class over that of the smallest
NEARLY_RIGHT = 0.98  # probe's `separation` above which little can be gained
SIMILAR_CONFIDENCE = 0.15  # mean probability of the most likely ImageNet class
SEPARATED = 0.5  # nearest neighbors' `separation` in a similar task
RISING = 0.01  # accuracy gained by doubling the data that justifies collecting more


@dataclass(frozen=True)
class Advice:
    """The conclusion of one rule.

    Attributes:
        rule: Name of the rule.
        message: The conclusion as a sentence.
        evidence: The numbers that it is based on, by description.
    """

    rule: str
    message: str
    evidence: Mapping[str, float | None]


@dataclass(frozen=True)
class Evidence:
    """The measurements that the rules use.

    Attributes:
        images: Number of training images.
        class_counts: Number of training images that show a class, by class name.
        accuracy: Accuracy of a linear probe, cross-validated on the training images.
            For multi-label data, accuracy is the mean average precision here and below.
        curve: Accuracy of the probe by fraction of the training images.
        gain: Accuracy with all images minus accuracy with half of them.
        majority: Accuracy of always predicting the most common class; for multi-label
            data, the mean fraction of images that show a class.
        neighbours: Cross-validated accuracy of the 5 nearest neighbors; None for
            multi-label data.
        logme: LogME of the features in nats; see `logme.logme`.
        imagenet_confidence: Mean probability of the most likely ImageNet class,
            according to an ImageNet classifier (0 to 1).
        imagenet_entropy: Mean normalized entropy of the classifier's probabilities,
            from 0 (certain) to 1.
        images_per_second: Throughput of the base on this machine.
        minutes: Estimated minutes for each method once features are cached.
        gigabytes: Size of each method's cached activations, in units of 10^9 bytes.
        disk: Disk space available for cached activations, in units of 10^9 bytes.
    """

    images: int
    class_counts: Mapping[str, int]
    accuracy: Estimate
    curve: Mapping[float, Estimate]
    gain: Estimate
    majority: float
    neighbours: float | None
    logme: float
    imagenet_confidence: float
    imagenet_entropy: float
    images_per_second: float
    minutes: Mapping[Method, float]
    gigabytes: Mapping[Method, float]
    disk: float


def data_size(images: int, class_counts: Mapping[str, int]) -> Advice:
    """Judges the amount of training data."""
    rare = rare_classes(class_counts)
    if images < FEW_IMAGES:
        message = f"{images:,} training images: enough for a head, few for a base"
    elif images < MUCH_DATA:
        message = f"{images:,} training images: enough to fine-tune the top of a base"
    else:
        message = f"{images:,} training images: enough to fine-tune all of a base"
    if rare:
        others = f" and {len(rare) - 1} others" if len(rare) > 1 else ""
        message += f"; of {rare[0]!r}{others} fewer than {FEW_PER_CLASS}: too few"
    evidence = {
        "images": images,
        "least per class": min(class_counts.values()),
        "classes": len(class_counts),
    }
    return Advice("data size", message, evidence)


def rare_classes(class_counts: Mapping[str, int]) -> list[str]:
    """Lists the classes with too few images to learn from or to evaluate on."""
    return [name for name, count in class_counts.items() if count < FEW_PER_CLASS]


def imbalance(class_counts: Mapping[str, int]) -> Advice:
    """Judges whether class sizes are balanced."""
    message = (
        "classes are out of balance: each gets the same weight"
        if is_imbalanced(class_counts)
        else "classes are in balance"
    )
    return Advice(
        "imbalance", message, {"largest over smallest": _ratio_of_classes(class_counts)}
    )


def is_imbalanced(class_counts: Mapping[str, int]) -> bool:
    """Returns whether the head should be trained with balanced class weights."""
    return _ratio_of_classes(class_counts) >= IMBALANCED


def _ratio_of_classes(class_counts: Mapping[str, int]) -> float:
    return max(class_counts.values()) / max(min(class_counts.values()), 1)


def learning_curve(curve: Mapping[float, Estimate], gain: Estimate) -> Advice:
    """Judges whether more images would help."""
    if rises(gain):
        message = "accuracy still rises with the number of images: more would help"
    elif gain.mean >= RISING:
        message = "accuracy may still rise with the number of images"
    else:
        message = "accuracy no longer rises with the number of images"
    evidence = {f"accuracy with {share:.0%}": e.mean for share, e in curve.items()}
    return Advice("learning curve", message, {**evidence, "gain": gain.mean})


def rises(gain: Estimate) -> bool:
    """Returns whether doubling the images gave a significantly better model."""
    return gain.low > 0 and gain.mean >= RISING


def headroom(accuracy: Estimate, majority: float) -> Advice:
    """Judges how much fine-tuning could gain at most."""
    if is_nearly_right(accuracy, majority):
        message = "the frozen features are nearly always right: little is left to win"
    else:
        message = "the frozen features leave something to win"
    evidence = {
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "majority class": majority,
    }
    return Advice("headroom", message, evidence)


def is_nearly_right(accuracy: Estimate, majority: float) -> bool:
    """Returns whether too little can be gained, relative to the majority class."""
    return separation(accuracy.mean, majority) >= NEARLY_RIGHT


def similarity(
    accuracy: float,
    majority: float,
    neighbours: float | None,
    logme: float,
    confidence: float,
    entropy: float,
) -> Advice:
    """Judges how similar the task is to ImageNet, which the base was trained on.

    Args:
        accuracy: Accuracy of a linear probe.
        majority: Accuracy of always predicting the most common class.
        neighbours: Accuracy of the nearest neighbors; None for multi-label data.
        logme: LogME of the features in nats.
        confidence: Mean probability of the most likely ImageNet class.
        entropy: Mean normalized entropy of the ImageNet classifier, from 0 to 1.
    """
    message = (
        "the task is similar to ImageNet: its features fit"
        if is_similar(accuracy, majority, neighbours, confidence)
        else "the task is unlike ImageNet: its features fit only in part"
    )
    evidence = {
        "probe": accuracy,
        "majority class": majority,
        "nearest neighbours": neighbours,
        "LogME": logme,
        "ImageNet confidence": confidence,
        "ImageNet entropy": entropy,
    }
    return Advice("task similarity", message, evidence)


def is_similar(
    accuracy: float, majority: float, neighbours: float | None, confidence: float
) -> bool:
    """Returns whether classes are well separated and an ImageNet classifier confident.

    Separation is measured by the nearest neighbors, or by the probe without them.
    """
    away = separation(accuracy if neighbours is None else neighbours, majority)
    return away >= SEPARATED and confidence >= SIMILAR_CONFIDENCE


def separation(accuracy: float, majority: float) -> float:
    """Rescales an accuracy so that the majority class is 0 and perfect is 1."""
    return (accuracy - majority) / max(1 - majority, 1e-9)


def compute(
    images_per_second: float,
    minutes: Mapping[Method, float],
    gigabytes: Mapping[Method, float],
    budget: float | None,
    disk: float,
) -> Advice:
    """Judges which methods fit the time budget and the disk.

    Args:
        images_per_second: Throughput of the base on this machine.
        minutes: Estimated minutes for each method.
        gigabytes: Size of each method's cached activations, in units of 10^9 bytes.
        budget: Maximum number of minutes; None for no limit.
        disk: Disk space for cached activations, in units of 10^9 bytes.

    Raises:
        UsageError: If no method fits the budget.
    """
    least = min(minutes.values())
    if budget is not None and least > budget:
        raise UsageError(
            f"The budget is too small. Received: {duration(60 * budget)}, and the "
            f"fastest method takes about {duration(60 * least)}. Allow a larger "
            "budget."
        )
    possible = feasible(minutes, gigabytes, budget, disk)
    over = "; ".join(METHODS[method] for method in minutes if method not in possible)
    message = f"takes more time or disk than there is: {over}" if over else "all fits"
    evidence: dict[str, float | None] = {"images/s of the base": images_per_second}
    evidence |= {f"{name} seconds": 60 * needed for name, needed in minutes.items()}
    evidence["budget seconds"] = budget and 60 * budget
    evidence |= {f"{name} GB": size for name, size in gigabytes.items() if size}
    return Advice("compute", message, {**evidence, "disk GB": disk})


def feasible(
    minutes: Mapping[Method, float],
    gigabytes: Mapping[Method, float],
    budget: float | None,
    disk: float,
) -> Collection[Method]:
    """Returns the methods that fit the budget (minutes) and the disk (10^9 bytes)."""
    return {
        method
        for method in minutes
        if (budget is None or minutes[method] <= budget) and gigabytes[method] <= disk
    }


def recommend(
    evidence: Evidence, budget: float | None = None
) -> tuple[Method, Sequence[Advice]]:
    """Recommends a method.

    Args:
        evidence: The measurements.
        budget: Maximum number of minutes that the method may take; None for no limit.

    Returns:
        (recommended method, advice of each rule).

    Raises:
        UsageError: If no method fits the budget.
    """
    advice = [
        data_size(evidence.images, evidence.class_counts),
        imbalance(evidence.class_counts),
        learning_curve(evidence.curve, evidence.gain),
        headroom(evidence.accuracy, evidence.majority),
        similarity(
            evidence.accuracy.mean,
            evidence.majority,
            evidence.neighbours,
            evidence.logme,
            evidence.imagenet_confidence,
            evidence.imagenet_entropy,
        ),
        compute(
            evidence.images_per_second,
            evidence.minutes,
            evidence.gigabytes,
            budget,
            evidence.disk,
        ),
    ]
    possible = feasible(evidence.minutes, evidence.gigabytes, budget, evidence.disk)
    return _choose(evidence, possible), advice


def _choose(evidence: Evidence, possible: Collection[Method]) -> Method:
    counts = evidence.class_counts
    if len(rare_classes(counts)) >= RARE_CLASSES * len(counts):
        return "more-data"
    if is_nearly_right(evidence.accuracy, evidence.majority):
        return "extract"
    if evidence.images < FEW_IMAGES:
        return "more-data" if rises(evidence.gain) else "extract"
    similar = is_similar(
        evidence.accuracy.mean,
        evidence.majority,
        evidence.neighbours,
        evidence.imagenet_confidence,
    )
    deep = evidence.images >= MUCH_DATA or not similar
    if deep and "finetune-all" in possible:
        return "finetune-all"
    return "finetune-top" if "finetune-top" in possible else "extract"
