"""Rules that turn measurements into a recommended method.

Each rule is a function of plain numbers that returns one `Advice`; `recommend` combines
them. What fine-tuning gained in a trial is weighed with what it usually gains on such
data; without a trial, the latter decides. Sources of the thresholds:

- WORTH_IT, FEW_IMAGES, NEARLY_RIGHT, SEPARATED and `usual_gain`: measurements in the
  section "What `kt advise` goes by" of tests/benchmarks/RESULTS.md.
- MUCH_DATA: from 20,000 images on, BiT-HyperRule trains longer and adds MixUp
  (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3).
- Similarity: the usual rule of transfer learning is to fine-tune if there is much or
  similar data (see Yosinski et al. 2014, arXiv:1411.1792, for why the distance to the
  original task matters). According to the measurements, data unlike those that the base
  was trained on gain more.
"""

from collections.abc import Mapping, Sequence

from keras_transfer.advice.evidence import METHODS, Advice, Evidence, Method, Trial
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.names import label
from keras_transfer.events import duration
from keras_transfer.runs.manifest import Estimate

FEW_PER_CLASS = 10  # of as many images, all found, a recall may still be 0.72
FEW_IMAGES = 500
MUCH_DATA = 20_000
IMBALANCED = 5.0  # size of the largest class over that of the smallest
NEARLY_RIGHT = 0.98  # probe's `separation` above which little can be gained
SEPARATED = 0.85  # `class_separation` from which a task is similar to the base's own
UNLIKE = 0.5  # the same, below which deeper layers are worth training
RISING = 0.01  # figure gained by doubling the data that justifies collecting more
WORTH_IT = 0.005  # expected gain that justifies fine-tuning
TELLING = 0.5  # share of the images on which a trial without a gain is believed

_Z = 1.96
_MOST_NAMED = 3  # classes


def data_size(images: int, class_counts: Mapping[str, int]) -> Advice:
    """Judges the amount of training data."""
    least, most = min(class_counts.values()), max(class_counts.values())
    enough = "enough to train a head; whether for more, similarity and a trial tell"
    if images >= MUCH_DATA:
        enough = "enough to fine-tune all of a base"
    elif images >= FEW_IMAGES:
        enough = "enough to fine-tune the top of a base"
    message = (
        f"{images:,} training images of {len(class_counts):,} classes, {least:,} to "
        f"{most:,} of each: {enough}"
    )
    evidence = {
        "images": images,
        "least per class": least,
        "classes": len(class_counts),
    }
    return Advice("data size", message, evidence)


def rarity(class_counts: Mapping[str, int]) -> Advice:
    """Tells which classes have too few images for figures of their own."""
    rare = rare_classes(class_counts)
    least = min(class_counts.values())
    evidence = {"rare classes": len(rare), "least per class": least}
    if not rare:
        message = f"none: every class has at least {FEW_PER_CLASS} training images"
        return Advice("rare classes", message, evidence)
    shown = [f"{name!r} ({class_counts[name]:,})" for name in rare[:_MOST_NAMED]]
    if len(rare) > len(shown):
        shown.append(f"{len(rare) - len(shown):,} more")
    # Wilson's lower bound of n found images out of n is n / (n + z^2).
    message = (
        f"fewer than {FEW_PER_CLASS} training images of {', '.join(shown)}: their own "
        f"figures say little (of {least:,} images, all found, the recall may still be "
        f"{least / (least + _Z**2):.2f}); collect more of them if they matter"
    )
    return Advice("rare classes", message, evidence)


def rare_classes(class_counts: Mapping[str, int]) -> list[str]:
    """Lists the classes with too few images to learn or evaluate them, fewest first."""
    rare = [name for name, count in class_counts.items() if count < FEW_PER_CLASS]
    return sorted(rare, key=class_counts.__getitem__)


def imbalance(class_counts: Mapping[str, int]) -> Advice:
    """Judges whether class sizes are balanced."""
    ratio = _ratio_of_classes(class_counts)
    message = f"the largest class has {ratio:,.1f} times the images of the smallest: "
    message += (
        "out of balance, so each gets the same weight"
        if is_imbalanced(class_counts)
        else "in balance"
    )
    return Advice("balance", message, {"largest over smallest": ratio})


def is_imbalanced(class_counts: Mapping[str, int]) -> bool:
    """Returns whether the head should be trained with balanced class weights."""
    return _ratio_of_classes(class_counts) >= IMBALANCED


def _ratio_of_classes(class_counts: Mapping[str, int]) -> float:
    return max(class_counts.values()) / max(min(class_counts.values()), 1)


def learning_curve(
    metric: str, curve: Mapping[float, Estimate], gain: Estimate
) -> Advice:
    """Judges whether more images would help."""
    said = "no longer rises with the number of images"
    if rises(gain):
        said = "still rises with the number of images: more would help"
    elif gain.mean >= RISING:
        said = "may still rise with the number of images"
    points = ", ".join(f"{x.mean:.3f} with {share:.0%}" for share, x in curve.items())
    message = (
        f"{label(metric)} of a probe {said} ({points}; gain by the second half "
        f"{_signed(gain.mean, gain.low, gain.high)})"
    )
    evidence = {f"accuracy with {share:.0%}": e.mean for share, e in curve.items()}
    return Advice("learning curve", message, {**evidence, "gain": gain.mean})


def _signed(gain: float, low: float, high: float) -> str:
    return f"{gain:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"


def rises(gain: Estimate) -> bool:
    """Returns whether doubling the images gave a significantly better model."""
    return gain.low > 0 and gain.mean >= RISING


def headroom(metric: str, accuracy: Estimate, majority: float) -> Advice:
    """Judges how much fine-tuning could gain at most."""
    message = (
        f"{label(metric)} of a probe on the frozen features is {accuracy}, "
        f"{majority:.3f} without looking at images: "
    )
    message += (
        "little is left to win"
        if is_nearly_right(accuracy, majority)
        else "something is left to win"
    )
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
    accuracy: float, majority: float, neighbours: float | None, logme: float
) -> Advice:
    """Judges how similar the task is to the one that the base was trained on.

    Args:
        accuracy: Accuracy of a linear probe.
        majority: Accuracy of always predicting the most common class.
        neighbours: Accuracy of the nearest neighbors; None for multi-label data.
        logme: LogME of the features in nats.
    """
    apart = class_separation(accuracy, majority, neighbours)
    near = accuracy if neighbours is None else neighbours
    by = "a probe is" if neighbours is None else "the nearest neighbors are"
    how = "hardly keep the classes apart, as in tasks unlike the base's own"
    if apart >= SEPARATED:
        how = "keep the classes apart, as in tasks similar to the base's own"
    elif apart >= UNLIKE:
        how = "keep the classes apart in part"
    message = f"{by} right for {near:.3f}: the features {how}"
    evidence = {
        "probe": accuracy,
        "majority class": majority,
        "nearest neighbours": neighbours,
        "LogME": logme,
    }
    return Advice("task similarity", message, evidence)


def class_separation(
    accuracy: float, majority: float, neighbours: float | None
) -> float:
    """Measures how well features separate the classes; 1 is perfect.

    It is measured by the nearest neighbors, or by the probe without them.
    """
    return separation(accuracy if neighbours is None else neighbours, majority)


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
    message = f"more time or disk than there is: {over}" if over else "everything fits"
    takes = ", ".join(
        f"{name} {duration(60 * minutes[name])}"
        + (f" and {gigabytes[name]:,.2f} GB" if gigabytes[name] else "")
        for name in minutes
        if name != "more-data"
    )
    allowed = "any time" if budget is None else duration(60 * budget)
    message += f" (takes about: {takes}; allowed: {allowed}, {disk:,.1f} GB)"
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
) -> set[Method]:
    """Returns the methods that fit the budget (minutes) and the disk (10^9 bytes)."""
    return {
        method
        for method in minutes
        if (budget is None or minutes[method] <= budget) and gigabytes[method] <= disk
    }


def trial_of(trial: Trial | None, not_tried: str) -> Advice:
    """Says what a trial of fine-tuning showed, or why there was none.

    Args:
        trial: The trial, if any.
        not_tried: Why there was none.
    """
    if trial is None:
        return Advice("trial", f"fine-tuning was not tried: {not_tried}", {})
    is_clear = trial.low > 0 or trial.high < 0
    doubt = "" if is_clear else ", which chance may explain"
    epochs = "1 epoch" if trial.epochs == 1 else f"{trial.epochs} epochs"
    message = (
        f"{epochs} of fine-tuning the top stage took the {label(trial.metric)} from "
        f"{trial.before:.3f} to {trial.after:.3f} "
        f"({_signed(trial.gain, trial.low, trial.high)}{doubt}) on {trial.images:,} "
        "training images, each predicted by models that did not learn from it; took "
        f"{duration(trial.seconds)}"
    )
    evidence = {
        "before": trial.before,
        "after": trial.after,
        "gain": trial.gain,
        "low": trial.low,
        "high": trial.high,
        "images": trial.images,
        "epochs": trial.epochs,
        "seconds": trial.seconds,
    }
    return Advice("trial", message, evidence)


def recommend(
    evidence: Evidence, budget: float | None = None
) -> tuple[Method, str, Sequence[Advice]]:
    """Recommends a method.

    Args:
        evidence: The measurements.
        budget: Maximum number of minutes that the method may take; None for no limit.

    Returns:
        (recommended method, the reason for it, advice of each rule).

    Raises:
        UsageError: If no method fits the budget.
    """
    advice = [
        data_size(evidence.images, evidence.class_counts),
        rarity(evidence.class_counts),
        imbalance(evidence.class_counts),
        learning_curve(evidence.metric, evidence.curve, evidence.gain),
        headroom(evidence.metric, evidence.accuracy, evidence.majority),
        similarity(
            evidence.accuracy.mean,
            evidence.majority,
            evidence.neighbours,
            evidence.logme,
        ),
        compute(
            evidence.images_per_second,
            evidence.minutes,
            evidence.gigabytes,
            budget,
            evidence.disk,
        ),
        trial_of(evidence.trial, evidence.not_tried),
    ]
    possible = feasible(evidence.minutes, evidence.gigabytes, budget, evidence.disk)
    method, reason = _choose(evidence, possible)
    return method, reason, advice


def usual_gain(apart: float, images: int) -> tuple[float, float, str]:
    """Returns what fine-tuning usually gains before it is tried.

    Args:
        apart: How well the features separate the classes; see `class_separation`.
        images: Number of training images.

    Returns:
        (mean of the gain, its standard deviation between data sets, where it is usual).
    """
    if apart < SEPARATED:
        return 0.03, 0.04, "the features do not keep the classes well apart"
    if images >= FEW_IMAGES:
        return 0.02, 0.03, f"there are at least {FEW_IMAGES} images"
    return 0.0, 0.03, "the features keep the classes of few images apart"


def expected_gain(
    trial: Trial | None, usual: tuple[float, float], images: int
) -> float:
    """Returns what fine-tuning can be expected to gain; see `weighed_gain`.

    If few of the images were tried, the result is at least the usual gain, since
    fine-tuning gains more from more images.

    Args:
        trial: The trial, if any.
        usual: Mean and standard deviation of the usual gain.
        images: Number of training images.
    """
    mean, _ = usual
    if trial is None:
        return mean
    expected = weighed_gain(trial, usual)
    return max(expected, mean) if trial.images < TELLING * images else expected


def weighed_gain(trial: Trial, usual: tuple[float, float]) -> float:
    """Weighs the gain in a trial with the usual one, by their variances.

    Each counts the more the less it varies, as in the mean of a normal distribution
    after a measurement.

    Args:
        trial: The trial.
        usual: Mean and standard deviation of the usual gain.
    """
    mean, deviation = usual
    error = (trial.high - trial.low) / (2 * _Z)
    weight = deviation**2 / (deviation**2 + error**2)
    return weight * trial.gain + (1 - weight) * mean


def _choose(evidence: Evidence, possible: set[Method]) -> tuple[Method, str]:
    """Returns the method and the reason for it."""
    if not possible & {"finetune-top", "finetune-all"}:
        return "extract", "fine-tuning takes more time or disk than there is"
    if is_nearly_right(evidence.accuracy, evidence.majority):
        return "extract", "little is left to win"
    images, trial, metric = evidence.images, evidence.trial, label(evidence.metric)
    apart = class_separation(
        evidence.accuracy.mean, evidence.majority, evidence.neighbours
    )
    *usual, where = usual_gain(apart, images)
    expected = expected_gain(trial, (usual[0], usual[1]), images)
    reason = (
        f"fine-tuning usually changes the {metric} by {usual[0]:+.3f} where {where}"
    )
    if trial:
        reason = (
            f"fine-tuning can be expected to change the {metric} by {expected:+.3f}: "
            f"{trial.gain:+.3f} in the trial, weighed with the {usual[0]:+.3f} that is "
            f"usual where {where}"
        )
    if expected >= WORTH_IT:
        is_deep = images >= (FEW_IMAGES if apart < UNLIKE else MUCH_DATA)
        if is_deep and "finetune-all" in possible:
            return "finetune-all", reason
        return "finetune-top", reason
    if trial and images < FEW_IMAGES and rises(evidence.gain):
        return "more-data", f"more images would help; {reason}"
    return "extract", reason
