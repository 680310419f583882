"""Decides whether a fine-tuned model is better than the model before.

Some training images are set aside to decide that. Each half of them chooses how much to
mix both models and the temperature; the other half judges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from keras_transfer.advice.evidence import Trial
from keras_transfer.config import Config, FinetuneConfig
from keras_transfer.data.tables import Splits, Table
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.comparison import (
    FEWEST_INFORMATIVE,
    Comparison,
    compare,
    images_needed,
)
from keras_transfer.evaluation.metrics import (
    Evaluation,
    calibration_error,
    evaluate,
    score,
)
from keras_transfer.evaluation.names import label
from keras_transfer.evaluation.validation import (
    ENOUGH,
    CrossFit,
    can_judge,
    carve,
    carve_again,
    cross_fit,
    halves,
)
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.activations import Activations
from keras_transfer.features.image_table import known_hashes, known_images
from keras_transfer.features.parity import is_close
from keras_transfer.features.usable import copies_grouped
from keras_transfer.reporting.predictions import PredictedTable
from keras_transfer.runs.manifest import Calibration, Phase
from keras_transfer.runs.run import Run
from keras_transfer.training.tuned import Mix
from keras_transfer.workflows.judging import (
    Choices,
    Judgement,
    choose_thresholds,
    thresholds_of_others,
    told_far,
)


@dataclass(frozen=True)
class Parts:
    """The images of a run, divided for fine-tuning.

    Attributes:
        splits: `train` trains the head and the tail, `val` is all that was set aside.
        judging: Images that decide whether the new model is better; only with force may
            there be none.
        stopping: Images whose loss ends training; empty without `patience`.
        rival: Phase of the model that the new one has to surpass: the head-only model,
            trained again without these images, or the run's fine-tuned model, which has
            not learned from the judging images either.
    """

    splits: Splits
    judging: Table
    stopping: Table
    rival: Phase


def divide(run: Run, config: Config, splits: Splits, listener: Listener) -> Parts:
    """Sets aside training images to decide by.

    Runs of version 0.1.0 have validation images that chose the head's L2 strength; they
    count as training images here. If the run's model was fine-tuned, the images that
    judged it judge the new one too, because it has learned from all others.

    Args:
        run: The run.
        config: The resolved config.
        splits: The run's images.
        listener: Receives a note if the model so far has learned from all images.

    Raises:
        UsageError: If there are too few, unless the new model is kept by force anyway.
    """
    num_classes = len(run.class_names)
    everything = _with_copies(run, splits.train.joined(splits.val))
    rival = run.manifest.phase
    train, judging = carve_again(everything, _judged_before(run))
    if not can_judge(judging):
        train, judging = _set_aside(everything, num_classes, config)
        if rival == "finetune" and len(judging):
            listener.note(
                "the new model is compared with the head-only model, trained again "
                "without the deciding images, and not with the earlier fine-tuned one: "
                "too few images are known that the latter has not learned from"
            )
        rival = "fit"
    stopping = train.keep(())
    if config.finetune.patience is not None:
        # Images that choose the epoch must not judge it.
        train, stopping = _set_aside(train, num_classes, config)
    splits = replace(splits, train=train, val=judging.joined(stopping))
    return Parts(splits, judging, stopping, rival)


def _with_copies(run: Run, table: Table) -> Table:
    """Groups copies of an image, so that none judges a model that learned from it."""
    known = known_images(run.images_path, SILENT)
    digests = {source: digest for source, (_, digest) in known.items()}
    if not digests.keys() >= {*table.sources}:  # a run of version 0.1.0
        return table
    hashes = known_hashes(run.images_path, table.sources)
    return copies_grouped(table, digests, hashes)


def _judged_before(run: Run) -> set[str]:
    """Returns the sources of images that the run's fine-tuned model was judged by.

    There are none if it was not fine-tuned, kept by force without any such images, or
    fine-tuned by version 0.1.0.
    """
    manifest = run.manifest
    known = manifest.finetune is not None and manifest.finetune.deciding_images > 0
    if manifest.phase == "fit" or not known:
        return set()
    try:
        rows = read_table(run.predictions_path)
    except UsageError:  # the file was deleted or damaged
        return set()
    return {row["path"] for _, row in rows if row.get("how") == "out of fold"}


def _set_aside(table: Table, num_classes: int, config: Config) -> tuple[Table, Table]:
    """Divides images as `carve` does; with force, none may be set aside."""
    try:
        return carve(table, num_classes, config.seed)
    except UsageError:
        if not config.finetune.force:
            raise
    return table, table.keep(())


def usable_parts(
    run: Run, parts: Parts, usable: Splits, tuning: FinetuneConfig
) -> Parts:
    """Leaves out images that cannot be read."""
    judging, stopping = (
        table.keep(usable.val.sources) for table in (parts.judging, parts.stopping)
    )
    if can_judge(judging):
        return Parts(usable, judging, stopping, parts.rival)
    if not tuning.force:
        raise UsageError(
            "Too few of the images set aside to decide whether a fine-tuned model is "
            f"better can be read. Received: {run.run_dir}, of which {len(judging)} of "
            f"{len(parts.judging)} can. Restore them, or keep the model whatever it is "
            "with force=True."
        )
    return Parts(usable, judging.keep(()), stopping, parts.rival)


@dataclass(frozen=True)
class Verdict:
    """What the judging images say of the new model.

    Attributes:
        comparison: The new model beside the model before.
        chosen: What each half of the images chose for the other.
        images: The judging images.
        halves: int64 `[N]` half of each image, 0 or 1.
        scores: The metric of each alpha on all of them.
    """

    comparison: Comparison
    chosen: CrossFit
    images: Table
    halves: np.ndarray
    scores: dict[str, float]


class HeldOut:
    """Predictions of mixes, and of the model before, for held-out images.

    All are computed in the same way: from cached activations, or from image files if
    activations do not give the model's own predictions.
    """

    def __init__(
        self,
        mix: Mix,
        activations: Activations,
        class_names: Sequence[str],
        so_far: np.ndarray | None,
        listener: Listener,
    ):
        """Decides how to predict.

        Args:
            mix: The new model.
            activations: Inputs of its tail.
            class_names: Class names in the order of the outputs.
            so_far: Predictions of the rival for the files of judging images; None if
                training started from it.
            listener: Receives a note if image files have to be used.
        """
        self._mix = mix
        self._activations = activations
        self._class_names = class_names
        self._so_far = so_far
        found = mix.parity(activations)
        if not is_close(found):
            listener.note(
                "figures are of the model on image files: what it says of cached "
                "activations differs by up to "
                f"{found['max_probability_difference']:.2g}"
            )
        self._from_files = so_far is not None or not is_close(found)

    def judge(
        self, judging: Table, metric: str, attempts: int, seed: int
    ) -> Verdict | None:
        """Compares mixes with the model before; None without judging images.

        Args:
            judging: The images that decide.
            metric: The metric that decides.
            attempts: Number of models judged for this run, including this one.
            seed: Seed of the division in halves.
        """
        if not len(judging):
            return None
        before, targets = self._so_far, judging.targets
        if before is None:
            before = self._of_mix(0.0, judging)
        said = {alpha: self._of_mix(alpha, judging) for alpha in self._mix.alphas}
        first = halves(judging, len(self._class_names), seed)
        chosen = cross_fit(metric, targets, said, first)
        return Verdict(
            compare(
                metric,
                targets,
                before,
                chosen.probabilities,
                judging.groups,
                attempts,
                seed,
            ),
            chosen,
            judging,
            first.astype(np.int64),
            {
                f"{alpha:g}": abs(score(metric, targets, probabilities))
                for alpha, probabilities in said.items()
            },
        )

    def describe(
        self, config: Config, parts: Parts, verdict: Verdict | None, listener: Listener
    ) -> Judgement:
        """Says all that is known of the final model.

        Args:
            config: The resolved config.
            parts: The images.
            verdict: What the judging images say of it, if there are any.
            listener: Receives a note if there is no threshold of sure predictions.
        """
        splits, names, choices = parts.splits, self._class_names, Choices()
        evaluations, said = {}, []
        if verdict:
            judges, probabilities = verdict.images, verdict.chosen.probabilities
            choices = self._choose(config, verdict, listener)
            thresholds = thresholds_of_others(
                judges, probabilities, verdict.halves, names
            )
            evaluations["deciding"] = self._evaluate(judges, probabilities, thresholds)
            said.append(PredictedTable(judges, "train", "out of fold", probabilities))
        learned = [splits.train, *([parts.stopping] if len(parts.stopping) else [])]
        for table in learned:
            rows = self._activations.rows(table.sources)
            fitted = self._mix.classifier.predict(rows)
            said.append(PredictedTable(table, "train", "fitted", fitted))
        if len(splits.test):
            probabilities = self._predict(splits.test)
            rule = choices.rule(names, splits.multi_label)
            evaluations["test"] = self._evaluate(
                splits.test, probabilities, rule.classes
            )
            said.append(PredictedTable(splits.test, "test", "test", probabilities))
        detector, said = told_far(splits.train, said, self._features, config.seed)
        return Judgement(evaluations, None, choices, detector, said)

    def _choose(self, config: Config, verdict: Verdict, listener: Listener) -> Choices:
        """Chooses thresholds on the judging images, each judged by the other half."""
        images, probabilities = verdict.images, verdict.chosen.probabilities
        try:
            return choose_thresholds(config, images, probabilities, self._class_names)
        except UsageError as error:
            listener.note(f"The fine-tuned model marks nothing as sure: {error}")
        plain = config.model_copy(update={"abstain_at_accuracy": None})
        return choose_thresholds(plain, images, probabilities, self._class_names)

    def _evaluate(
        self, table: Table, probabilities: np.ndarray, thresholds: np.ndarray | None
    ) -> Evaluation:
        return evaluate(
            table.targets, probabilities, self._class_names, table.groups, thresholds
        )

    def _features(self, table: Table) -> np.ndarray:
        rows = self._activations.rows(table.sources)
        return self._mix.classifier.features(rows)

    def _of_mix(self, alpha: float, table: Table) -> np.ndarray:
        self._mix.set(alpha)
        return self._predict(table)

    def _predict(self, table: Table) -> np.ndarray:
        classifier, activations = self._mix.classifier, self._activations
        if self._from_files:
            return classifier.predict_files(table)
        return classifier.predict(activations.features.rows(table.sources))


@dataclass(frozen=True)
class Decision:
    """Whether the new model becomes the run's model; fields as in `FinetuneReport`."""

    metric: str
    kept: bool
    reason: str
    before: float | None = None
    after: float | None = None
    p_value: float | None = None
    attempts: int = 1
    deciding_images: int = 0
    images_needed: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None


def decide(
    metric: str,
    verdict: Verdict | None,
    phase: Phase,
    rival: Phase,
    force: bool,
    trial: Trial | None = None,
) -> Decision:
    """Decides whether the new model becomes the run's model, and gives the reason.

    Args:
        metric: The metric that decides.
        verdict: What the judging images say; None without any, which takes force.
        phase: Phase of the run's model.
        rival: Phase of the model that the new one was compared with.
        force: Whether to keep the new model even if it is not better.
        trial: What the same options gained in folds of the training images; with it,
            both together have to show a gain, the judging images alone need not.
    """
    if verdict is None:
        reason = "the fine-tuned model was kept by force, compared with nothing"
        return Decision(metric, True, reason)
    found = verdict.comparison
    figures, is_better = _figures(found), found.is_better
    if trial:
        gain = _gain_of_both(found, trial)
        is_better = gain > 0
        figures = (
            f"{_change(found)}; together with {trial.gain:+.3f} in a trial on "
            f"{trial.images:,} training images, {gain:+.3f}"
        )
    if is_better:
        reason = f"the fine-tuned model was kept: {figures}"
    elif force:
        reason = f"the fine-tuned model was kept by force: {figures}"
    else:
        names = {"fit": "head-only", "finetune": "earlier fine-tuned"}
        than = "" if rival == phase else f" than the {names[rival]} one"
        reason = (
            f"the {names[phase]} model stays, for the new one is not clearly better"
            f"{than}: {figures}"
        )
    return Decision(
        metric=metric,
        kept=is_better or force,
        reason=reason,
        before=found.before,
        after=found.after,
        p_value=found.p_value,
        attempts=found.attempts,
        deciding_images=found.images,
        images_needed=_images_needed(found),
        alphas=verdict.scores,
        calibration=_calibration(verdict),
    )


def _gain_of_both(found: Comparison, trial: Trial) -> float:
    """Returns the mean gain of judging images and a trial, weighted by precision."""
    intervals = [found.interval, (trial.low, trial.high)]
    weights = [1 / max(high - low, 1e-9) ** 2 for low, high in intervals]
    return float(np.average([found.gain, trial.gain], weights=weights))


def _figures(found: Comparison) -> str:
    """Formats the figures of a comparison, and what they would have to be."""
    level = (
        f"p = {found.p_value:.2g}; to be kept, it has to be better with p of at most "
        f"{found.level:.2g}"
    )
    if found.attempts > 1:
        level += f", as this is attempt {found.attempts}"
    if found.p_value <= found.level and found.informative < FEWEST_INFORMATIVE:
        level += (
            f"; the models differ for {found.informative} images or groups, and at "
            f"least {FEWEST_INFORMATIVE} are needed"
        )
    return f"{_change(found)} ({level})"


def _change(found: Comparison) -> str:
    return (
        f"{label(found.metric)} on {found.images:,} training images set aside to "
        f"decide {found.before:.3g} -> {found.after:.3g}"
    )


def _images_needed(found: Comparison) -> int | None:
    """Estimates how many images recognize 5 points; None for the log loss."""
    return None if found.metric == "log_loss" else images_needed(found, gain=0.05)


def _calibration(verdict: Verdict) -> Calibration:
    chosen, targets = verdict.chosen, verdict.images.targets
    pair = (chosen.uncalibrated, chosen.probabilities)
    losses = [-score("log_loss", targets, p) for p in pair]
    errors: list[float | None] = [None, None]
    if targets.ndim == 1:
        errors = [calibration_error(p.max(1), p.argmax(1) == targets) for p in pair]
    return Calibration(
        temperature=chosen.temperature,
        log_loss_before=losses[0],
        log_loss_after=losses[1],
        ece_before=errors[0],
        ece_after=errors[1],
    )


def note_few(comparison: Comparison, listener: Listener) -> None:
    """Notes if there are too few judging images to recognize a better model."""
    if comparison.images >= ENOUGH:
        return
    text = f"{comparison.images} images decide, of which a better model is rarely "
    if needed := _images_needed(comparison):
        text += f"recognized; about {needed:,} would recognize one that is 5 points "
        listener.note(f"{text}better in 4 of 5 cases")
    else:
        listener.note(f"{text}recognized; {ENOUGH} or more would do better")
