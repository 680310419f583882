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
- similarity and compute: the usual rule of transfer learning, which begins with
  feature extraction and fine-tunes with much or similar data (Yosinski et al. 2014,
  arXiv:1411.1792, for why distance to the first task counts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from keras_transfer.errors import UsageError
from keras_transfer.run import Estimate

Method = Literal["extract", "finetune-top", "finetune-all", "more-data"]

METHODS: dict[Method, str] = {
    "extract": "feature extraction",
    "finetune-top": "feature extraction, then fine-tuning of the top stage",
    "finetune-all": "feature extraction, then fine-tuning of all layers",
    "more-data": "collect more data; feature extraction until then",
}

FEW_PER_CLASS = 10
FEW_IMAGES = 500
MUCH_DATA = 20_000
IMBALANCED = 5.0  # largest over smallest class
NEARLY_RIGHT = 0.98  # above that, there is little to win
SIMILAR_CONFIDENCE = 0.5  # mean probability of the likeliest ImageNet class
SEPARATED = 0.5  # share of the way from guessing to perfect that nearest neighbours go
RISING = 0.01  # gain of the second half of the data that is worth more data


class Advice(NamedTuple):
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
        class_counts: Training images of each class.
        accuracy: Of a linear probe, cross-validated on the training images (of
            multi-label data the mean average precision, as everywhere below).
        curve: Share of the training images to the probe's accuracy with so many.
        gain: Accuracy with all images less that with half of them.
        majority: Accuracy of always naming the commonest class; of multi-label data
            the mean share of images that show a class.
        neighbours: Accuracy of the 5 nearest neighbours; None of multi-label data.
        logme: `transferability.logme` of the features.
        imagenet_confidence: Mean probability of the likeliest ImageNet class, by the
            base's own classifier; None where the weights have none.
        imagenet_entropy: Mean entropy of its probabilities, 0 (certain) to 1.
        minutes: Each method's time on this machine, from images to a model.
        gigabytes: Each method's cached activations, in 10^9 bytes.
    """

    class_counts: Mapping[str, int]
    accuracy: Estimate
    curve: Mapping[float, Estimate]
    gain: Estimate
    majority: float
    neighbours: float | None
    logme: float
    imagenet_confidence: float | None
    imagenet_entropy: float | None
    minutes: Mapping[Method, float]
    gigabytes: Mapping[Method, float]


def data_size(class_counts: Mapping[str, int]) -> Advice:
    """How much there is to learn from."""
    total, least = sum(class_counts.values()), min(class_counts.values())
    if least < FEW_PER_CLASS:
        message = f"a class has only {least} training images: too few to learn from"
    elif total < FEW_IMAGES:
        message = f"{total:,} training images: enough for a head, few for a base"
    elif total < MUCH_DATA:
        message = f"{total:,} training images: enough to fine-tune the top of a base"
    else:
        message = f"{total:,} training images: enough to fine-tune all of a base"
    evidence = {"images": total, "least per class": least, "classes": len(class_counts)}
    return Advice("data size", message, evidence)


def imbalance(class_counts: Mapping[str, int]) -> Advice:
    """Whether some classes will be neglected."""
    most, least = max(class_counts.values()), max(min(class_counts.values()), 1)
    if most >= IMBALANCED * least:
        message = "classes are out of balance: add --class-weight balanced"
    else:
        message = "classes are in balance"
    return Advice("imbalance", message, {"largest over smallest": most / least})


def learning_curve(curve: Mapping[float, Estimate], gain: Estimate) -> Advice:
    """Whether more images would help."""
    if gain.low > 0 and gain.mean >= RISING:
        message = "accuracy still rises with the number of images: more would help"
    elif gain.mean >= RISING:
        message = "accuracy may still rise with the number of images"
    else:
        message = "accuracy no longer rises with the number of images"
    evidence = {f"accuracy with {share:.0%}": e.mean for share, e in curve.items()}
    return Advice("learning curve", message, {**evidence, "gain": gain.mean})


def headroom(accuracy: Estimate) -> Advice:
    """How much fine-tuning could win at all."""
    if accuracy.mean >= NEARLY_RIGHT:
        message = "the frozen features are nearly always right: little is left to win"
    else:
        message = "the frozen features leave something to win"
    evidence = {"accuracy": accuracy.mean, "low": accuracy.low, "high": accuracy.high}
    return Advice("headroom", message, evidence)


def similarity(
    accuracy: float,
    majority: float,
    neighbours: float | None,
    logme: float,
    confidence: float | None,
    entropy: float | None,
) -> Advice:
    """How near the task is to what the base was trained on."""
    away = separation(accuracy if neighbours is None else neighbours, majority)
    similar = is_similar(away, confidence)
    message = (
        "the task is similar to ImageNet: its features fit"
        if similar
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


def separation(accuracy: float, majority: float) -> float:
    """The share of the way from guessing (0) to perfect (1)."""
    return (accuracy - majority) / max(1 - majority, 1e-9)


def is_similar(separation: float, confidence: float | None) -> bool:
    """Classes that lie apart, and images that ImageNet's classifier recognizes."""
    recognized = confidence is None or confidence >= SIMILAR_CONFIDENCE
    return separation >= SEPARATED and recognized


def compute(
    minutes: Mapping[Method, float],
    gigabytes: Mapping[Method, float],
    budget: float | None,
) -> Advice:
    """What each method takes here, and what the budget allows.

    Raises:
        UsageError: If the budget allows nothing.
    """
    if budget is not None and min(minutes.values()) > budget:
        raise UsageError(
            f"The budget is too small. Received: {budget:g} minutes, and the fastest "
            f"method takes about {min(minutes.values()):.1f}. Allow more with --budget."
        )
    over = [METHODS[m] for m, needed in minutes.items() if needed > (budget or needed)]
    message = f"over the budget: {'; '.join(over)}" if over else "all is feasible"
    evidence: dict[str, float | None] = {
        f"{name} minutes": needed for name, needed in minutes.items()
    }
    evidence |= {f"{name} GB": size for name, size in gigabytes.items() if size}
    return Advice("compute", message, {**evidence, "budget minutes": budget})


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
        data_size(evidence.class_counts),
        imbalance(evidence.class_counts),
        learning_curve(evidence.curve, evidence.gain),
        headroom(evidence.accuracy),
        similarity(
            evidence.accuracy.mean,
            evidence.majority,
            evidence.neighbours,
            evidence.logme,
            evidence.imagenet_confidence,
            evidence.imagenet_entropy,
        ),
        compute(evidence.minutes, evidence.gigabytes, budget),
    ]
    feasible = {
        method
        for method, needed in evidence.minutes.items()
        if budget is None or needed <= budget
    }
    return _choose(evidence, feasible), advice


def _choose(evidence: Evidence, feasible: set[Method]) -> Method:
    total = sum(evidence.class_counts.values())
    rises = evidence.gain.low > 0 and evidence.gain.mean >= RISING
    if evidence.accuracy.mean >= NEARLY_RIGHT:
        return "extract"
    if min(evidence.class_counts.values()) < FEW_PER_CLASS:
        return "more-data"
    if total < FEW_IMAGES:
        return "more-data" if rises else "extract"
    if total >= MUCH_DATA and "finetune-all" in feasible:
        return "finetune-all"
    return "finetune-top" if "finetune-top" in feasible else "extract"
