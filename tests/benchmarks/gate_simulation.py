"""Simulates the gate of fine-tuned models and their calibration, with a known truth.

Two parts of `tests/benchmarks/honesty.py`. `gate`: how often `kt unfreeze-and-finetune`
keeps a fine-tuned model that is as good as the one before, or 2 or 5 points better.
`calibration`: what a temperature fitted on few images costs or gains.
"""

import numpy as np
import scipy.special
import scipy.stats

from keras_transfer.evaluation.calibration import apply_temperature, temperature
from keras_transfer.evaluation.comparison import (
    FEWEST_INFORMATIVE,
    LEVEL,
    Comparison,
    compare,
    images_needed,
    mcnemar,
)

ALPHAS = np.array([0.25, 0.5, 0.75, 1.0])
OLD_LEVEL = 0.25
OLD_EPOCHS = 10
SIZES = (50, 100, 300, 1000)
ACCURACIES = (0.6, 0.8, 0.9, 0.95)
CORRELATIONS = (0.5, 0.8, 0.95)
"""Of the margins of both models: with the accuracies, these give images that exactly
one model classifies correctly in 2 to 20% of all (at 0.8: 3 to 12%)."""


class Models:
    """Margins of a model before fine-tuning, and of mixes with one after it.

    A margin is the log-odds, up to a factor, of the true class against the best other
    one: a model is right if it is positive. Margins are normal, and those of both
    models are correlated. Each mix is scaled to the same deviation and has the accuracy
    before plus a gain of `gain * alpha * (2 - alpha)`, which saturates as measured
    ones do. So without a gain, all mixes are exactly as good as the model before.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int],
        accuracy: float,
        correlation: float,
        gain: float = 0.0,
    ):
        self.rng, self.shape, self.correlation = rng, shape, correlation
        self.noise = rng.standard_normal(shape, np.float32)
        self.is_right = self.noise + scipy.stats.norm.ppf(accuracy) > 0
        gains = gain * ALPHAS * (2 - ALPHAS)
        self.offsets = scipy.stats.norm.ppf(accuracy + gains).astype(np.float32)

    def fine_tuned(self, own: np.ndarray) -> np.ndarray:
        """Noise of a fine-tuned model's margins from the part of it that is its own."""
        return self.correlation * self.noise + np.sqrt(1 - self.correlation**2) * own

    def mixes(self, tuned: np.ndarray) -> np.ndarray:
        """`[4, trials, images]` margins."""
        found = []
        for alpha, offset in zip(ALPHAS, self.offsets, strict=True):
            cross = 2 * alpha * (1 - alpha) * self.correlation
            deviation = np.sqrt((1 - alpha) ** 2 + alpha**2 + cross)
            mix = ((1 - alpha) * self.noise + alpha * tuned) / deviation
            found.append(mix + offset)
        return np.stack(found)


def key(margins: np.ndarray) -> np.ndarray:
    """Number of images that are right; the log loss breaks ties."""
    return (margins > 0).sum(-1) - np.logaddexp(0, -2 * margins).mean(-1) / 100


def new_gate(models: Models) -> tuple[np.ndarray, np.ndarray]:
    """Images (gained, lost) `[trials]`: alpha from one half, judged on the other."""
    own = models.rng.standard_normal(models.shape, np.float32)
    margins = models.mixes(models.fine_tuned(own))
    trials, half = np.arange(models.shape[0]), models.shape[1] // 2
    first, second = margins[..., :half], margins[..., half:]
    judged = [
        second[key(first).argmax(0), trials],
        first[key(second).argmax(0), trials],
    ]
    after = np.concatenate(judged[::-1], axis=1) > 0
    return difference(models.is_right, after)


def old_gate(models: Models, shared: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Images (gained, lost): the best of 10 epochs and 4 mixes on the same images."""
    common = models.rng.standard_normal(models.shape, np.float32)
    epochs = []
    for _ in range(OLD_EPOCHS):
        own = models.rng.standard_normal(models.shape, np.float32)
        own = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
        epochs.append(models.fine_tuned(own))
    scores = np.stack([key(epoch + models.offsets[-1]) for epoch in epochs])
    trials = np.arange(models.shape[0])
    margins = models.mixes(np.stack(epochs)[scores.argmax(0), trials])
    after = margins[key(margins).argmax(0), trials] > 0
    return difference(models.is_right, after)


def difference(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (after & ~before).sum(-1), (before & ~after).sum(-1)


def kept(gained: np.ndarray, lost: np.ndarray) -> float:
    is_better = (gained > lost) & (mcnemar(gained, lost) <= LEVEL)
    return float(np.mean(is_better & (gained + lost >= FEWEST_INFORMATIVE)))


def kept_before(gained: np.ndarray, lost: np.ndarray) -> float:
    p_values = scipy.stats.binom.sf(gained - 1, gained + lost, 0.5)
    return float(np.mean((gained > lost) & (p_values <= OLD_LEVEL)))


def gate(rng: np.random.Generator, trials: int) -> None:
    """Prints how often a model is kept, by images and by its true gain."""
    rates: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for size in SIZES:
        for gain in (0.0, 0.02, 0.05):
            for accuracy in ACCURACIES:
                for correlation in CORRELATIONS:
                    if accuracy + gain >= 1:
                        continue
                    settings = (accuracy, correlation, gain)
                    new = kept(*new_gate(Models(rng, (trials, size), *settings)))
                    few = Models(rng, (max(trials // 8, 50), size), *settings)
                    old = kept_before(*old_gate(few))
                    rates.setdefault((size, gain), []).append((new, old))
    print(f"kept if p <= {LEVEL} (old: {OLD_LEVEL}); mean (least to most) over")
    print(f"accuracies {ACCURACIES} and correlations {CORRELATIONS}")
    print(
        "| images | true gain | kept | kept by the old gate |\n"
        "| ---: | ---: | --- | --- |"
    )
    for (size, gain), pairs in rates.items():
        cells = [
            f"{np.mean(one):.2f} ({min(one):.2f} to {max(one):.2f})"
            for one in zip(*pairs, strict=True)
        ]
        print(f"| {size:,} | {100 * gain:+.0f} | {cells[0]} | {cells[1]} |")
    groups(rng, max(trials // 10, 50))
    needed(rng, trials)


def groups(rng: np.random.Generator, trials: int, each: int = 5) -> None:
    """Prints how often groups of alike images make chance look like a gain."""
    print(f"\nno difference, groups of {each} images that are alike, accuracy 0.8:")
    print("| images | groups kept whole | as if independent |\n| ---: | ---: | ---: |")
    for size in SIZES[:3]:
        names = [str(i // each) for i in range(size)]
        targets, results = np.zeros(size, np.int64), []
        for _ in range(trials):
            of_group = np.repeat(rng.standard_normal((2, size // each)), each, axis=1)
            of_image = rng.standard_normal((2, size))
            right = 0.8 * of_group + 0.6 * of_image + scipy.stats.norm.ppf(0.8) > 0
            before, after = np.stack([right, ~right], -1).astype(np.float32)
            pair = (before, after)
            results.append(
                [compare("accuracy", targets, *pair, x).is_better for x in (names, ())]
            )
        whole, alone = np.mean(results, axis=0)
        print(f"| {size} | {whole:.3f} | {alone:.3f} |")


def needed(rng: np.random.Generator, trials: int) -> None:
    """Prints the power at +5 points with as many images as are said to be needed."""
    print(
        "\nimages said to be needed for +5 points with 80% power, and the power there:"
    )
    print(
        "| accuracy | only one right | images | power |\n| ---: | ---: | ---: | ---: |"
    )
    for accuracy in ACCURACIES[:3]:
        settings = (accuracy, 0.8, 0.05)
        pilot = Models(rng, (1, 20_000), *settings)
        differing = float(np.add(*new_gate(pilot))[0]) / 20_000
        seen = Comparison(
            "accuracy", 0, 0, 1, images=100, spread=np.sqrt(differing / 100)
        )
        size = images_needed(seen)
        power = kept(*new_gate(Models(rng, (trials, size), *settings)))
        print(f"| {accuracy} | {differing:.3f} | {size} | {power:.2f} |")


def calibration(rng: np.random.Generator, trials: int) -> None:
    """Prints the log loss and ECE of 5 classes before and after a fitted temperature.

    The logits are those of normal classes with equal covariance, which are calibrated,
    times the true temperature.
    """

    def draw(images: int, true: float, distance: float) -> tuple[np.ndarray, ...]:
        targets = rng.integers(0, 5, images)
        points = rng.standard_normal((images, 5))
        points[np.arange(images), targets] += distance
        logits = true * distance * points
        return scipy.special.softmax(logits, axis=1).astype(np.float32), targets

    print(
        "| accuracy | true T | images | log loss before | after | ECE before | after |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for distance in (1.3, 2.9):
        for true in (1.0, 1.5, 2.4):
            many = draw(20_000, true, distance)
            accuracy = np.mean(many[0].argmax(1) == many[1])
            for images in (20, 50, 100, 300):
                losses, errors = [], []
                for _ in range(max(trials // 50, 10)):
                    found = temperature(*draw(images, true, distance))
                    after = apply_temperature(many[0], found)
                    losses.append(log_loss(after, many[1]))
                    errors.append(calibration_error(after, many[1]))
                print(
                    f"| {accuracy:.2f} | {true} | {images} | {log_loss(*many):.3f} | "
                    f"{np.mean(losses):.3f} | {calibration_error(*many):.3f} | "
                    f"{np.mean(errors):.3f} |"
                )


def log_loss(probabilities: np.ndarray, targets: np.ndarray) -> float:
    of_target = probabilities[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(of_target, 1e-7)).mean())


def calibration_error(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = 15
) -> float:
    """Expected calibration error of the predicted class (Naeini et al. 2015)."""
    sure = probabilities.max(1)
    gap = (probabilities.argmax(1) == targets) - sure
    of_bin = np.bincount(np.minimum((sure * bins).astype(int), bins - 1), gap, bins)
    return float(abs(of_bin).sum() / len(targets))
