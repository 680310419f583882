"""Rules: measured numbers -> which method suits a task.

Each rule is a function of plain numbers that returns one `Advice`; `recommend` weighs
them. Thresholds stand here, with where they come from:

- FEW_PER_CLASS, FEW_IMAGES: on 245 photos of ants and bees fine-tuning was never
  better than the head alone, on 3,000 of flowers it was by 7 points (measurements in
  this repository, `config.FinetuneConfig`).
- NEARLY_RIGHT: fine-tuning the top stage took 5.0% of errors to 1.5% on 1,257 scanned
  digits, 28.9% to 22.0% on flowers (tests/benchmarks/advice.py): more than halving 2%
  is hard to see on a validation split of some hundred images.
- MUCH_DATA: BiT-HyperRule trains longer and changes more from 20,000 images on
  (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3).
- SIMILAR_CONFIDENCE: an ImageNet classifier's mean confidence is 0.67 on ants and
  bees, 0.20 on flowers, 0.12 on chest X-rays, 0.08 on digits.
- similarity: the usual rule of transfer learning begins with feature extraction and
  fine-tunes with much or similar data (Yosinski et al. 2014, arXiv:1411.1792, for why
  distance to the first task counts). Measured, data unlike ImageNet gain more from
  it, and perhaps from deeper layers: of 1,076 digits (two seeds, MobileNetV2) the head
  got 47 wrong, the top stage 17, all layers 12 in six times the time; of flowers, all
  layers got no more right than the top stage.
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
RARE_CLASSES = 0.1  # share of the classes that may have so few
FEW_IMAGES = 500
MUCH_DATA = 20_000
IMBALANCED = 5.0  # largest over smallest class
NEARLY_RIGHT = 0.98  # of the way from guessing to perfect; then little is left to win
SIMILAR_CONFIDENCE = 0.15  # mean probability of the likeliest ImageNet class
SEPARATED = 0.5  # share of the way from guessing to perfect that nearest neighbours go
RISING = 0.01  # gain of the second half of the data that is worth more data


@dataclass(frozen=True)
class Advice:
    """What one rule says.

    Attributes:
        rule: Its name.
        message: What it says, in words.
        evidence: The numbers that it looked at.
    """

    rule: str
    message: str
    evidence: Mapping[str, float | None]


@dataclass(frozen=True)
class Evidence:
    """What was measured.

    Attributes:
        images: Training images.
        class_counts: Those that show a class, by class.
        accuracy: Of a linear probe, cross-validated on the training images (of
            multi-label data the mean average precision, as everywhere below).
        curve: Share of the training images to the probe's accuracy with so many.
        gain: Accuracy with all images less that with half of them.
        majority: Accuracy of always naming the commonest class; of multi-label data
            the mean share of images that show a class.
        neighbours: Accuracy of the 5 nearest neighbours; None of multi-label data.
        logme: `transferability.logme` of the features.
        imagenet_confidence: Mean probability of the likeliest ImageNet class, by a
            classifier that was trained on ImageNet.
        imagenet_entropy: Mean entropy of its probabilities, 0 (certain) to 1.
        images_per_second: That the base computes features of here.
        minutes: What each method still takes here, now that features are cached.
        gigabytes: Each method's cached activations, in 10^9 bytes.
        disk: 10^9 bytes that cached activations may take.
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
    """How much there is to learn from."""
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
    """Classes with too few images to learn from, or to measure with."""
    return [name for name, count in class_counts.items() if count < FEW_PER_CLASS]


def imbalance(class_counts: Mapping[str, int]) -> Advice:
    """Whether some classes will be neglected."""
    message = (
        "classes are out of balance: each gets the same weight"
        if is_imbalanced(class_counts)
        else "classes are in balance"
    )
    return Advice(
        "imbalance", message, {"largest over smallest": _ratio_of_classes(class_counts)}
    )


def is_imbalanced(class_counts: Mapping[str, int]) -> bool:
    """Whether the head should be trained with balanced class weights."""
    return _ratio_of_classes(class_counts) >= IMBALANCED


def _ratio_of_classes(class_counts: Mapping[str, int]) -> float:
    return max(class_counts.values()) / max(min(class_counts.values()), 1)


def learning_curve(curve: Mapping[float, Estimate], gain: Estimate) -> Advice:
    """Whether more images would help."""
    if rises(gain):
        message = "accuracy still rises with the number of images: more would help"
    elif gain.mean >= RISING:
        message = "accuracy may still rise with the number of images"
    else:
        message = "accuracy no longer rises with the number of images"
    evidence = {f"accuracy with {share:.0%}": e.mean for share, e in curve.items()}
    return Advice("learning curve", message, {**evidence, "gain": gain.mean})


def rises(gain: Estimate) -> bool:
    """Whether twice the images certainly gave a better model."""
    return gain.low > 0 and gain.mean >= RISING


def headroom(accuracy: Estimate, majority: float) -> Advice:
    """How much fine-tuning could win at all."""
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
    """Whether nothing worth the effort is left, also where one class is common."""
    return separation(accuracy.mean, majority) >= NEARLY_RIGHT


def similarity(
    accuracy: float,
    majority: float,
    neighbours: float | None,
    logme: float,
    confidence: float,
    entropy: float,
) -> Advice:
    """How near the task is to what the base was trained on."""
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
    """Classes that lie apart, in images that an ImageNet classifier recognizes."""
    away = separation(accuracy if neighbours is None else neighbours, majority)
    return away >= SEPARATED and confidence >= SIMILAR_CONFIDENCE


def separation(accuracy: float, majority: float) -> float:
    """The share of the way from guessing (0) to perfect (1)."""
    return (accuracy - majority) / max(1 - majority, 1e-9)


def compute(
    images_per_second: float,
    minutes: Mapping[Method, float],
    gigabytes: Mapping[Method, float],
    budget: float | None,
    disk: float,
) -> Advice:
    """What each method takes here, and what time and disk allow.

    Raises:
        UsageError: If the budget allows nothing.
    """
    least = min(minutes.values())
    if budget is not None and least > budget:
        raise UsageError(
            f"The budget is too small. Received: {duration(60 * budget)}, and the "
            f"fastest method takes about {duration(60 * least)}. Allow more with "
            "--budget."
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
    """The methods that time and disk allow."""
    return {
        method
        for method in minutes
        if (budget is None or minutes[method] <= budget) and gigabytes[method] <= disk
    }


def recommend(
    evidence: Evidence, budget: float | None = None
) -> tuple[Method, Sequence[Advice]]:
    """The method that suits, and what each rule said.

    Args:
        evidence: What was measured.
        budget: The most minutes that it may take.

    Raises:
        UsageError: If the budget allows nothing.
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
