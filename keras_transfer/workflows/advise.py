"""The workflow of `kt advise`: measures what the rules in advice/ need.

The features are the same as those of `kt fit`, which finds them in the cache later.
"""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from sklearn.neighbors import KNeighborsClassifier

from keras_transfer.advice.costs import UNFREEZE, Costs, method_costs
from keras_transfer.advice.evidence import METHODS, Advice, Evidence, Method
from keras_transfer.advice.logme import logme
from keras_transfer.advice.probe import (
    SHARES,
    Probed,
    images_per_second,
    learning_curve,
    probe,
)
from keras_transfer.advice.rules import (
    feasible,
    is_imbalanced,
    is_nearly_right,
    recommend,
)
from keras_transfer.advice.trial import (
    SECONDS,
    SHARE,
    TrialPlan,
    plan_trial,
    try_fine_tuning,
)
from keras_transfer.config import FLAGS, Config, FinetuneConfig
from keras_transfer.data.in_memory.forms import NOT_KEPT
from keras_transfer.data.tables import Splits, count_classes
from keras_transfer.errors import KerasTransferError, first_line
from keras_transfer.evaluation.crossvalidation import FOLDS, estimate, fold_numbers
from keras_transfer.evaluation.metrics import deciding_metric
from keras_transfer.events import Listener, duration
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    FrozenPart,
    Storage,
    frozen_features,
)
from keras_transfer.features.usable import usable_splits
from keras_transfer.markup import html_table
from keras_transfer.runs.files import numbered
from keras_transfer.runs.manifest import Estimate
from keras_transfer.workflows.audit import quick_audit
from keras_transfer.workflows.inputs import Inputs

NEIGHBOURS = 5


class Recommendation(BaseModel):
    """The result of `kt advise`."""

    method: Method
    """The recommended method."""
    reason: str
    """What decided."""
    advice: list[Advice]
    """The conclusion of each rule, with its evidence."""
    evidence: Evidence
    """The measurements."""
    command: str
    """Shell command to run; for images in memory, a Python expression."""

    def _repr_html_(self) -> str:
        """What notebooks show: the advice, and the command to run."""
        rows = [(one.rule, one.message) for one in self.advice]
        caption = f"Recommended: {METHODS[self.method]}, because {self.reason}"
        return html_table(caption, (), [*rows, ("command", self.command)])


def measure(
    inputs: Inputs,
    options: Mapping[str, Any],
    budget: float | None,
    listener: Listener,
) -> Recommendation:
    """Implements `api.advise`.

    Args:
        inputs: Checked inputs.
        options: Config keys that the user gave, to repeat in the recommended command.
        budget: Maximum number of minutes that the method may take; None for no limit.
        listener: Receives notes and progress.

    Raises:
        UsageError: If no method fits the budget, or there are too few images for
            cross-validation.
        KerasTransferError: If the data or the weights cannot be used.
    """
    config = inputs.config
    for warning in inputs.splits.warnings:
        listener.note(warning)
    train, classes = inputs.splits.train, len(inputs.splits.class_names)
    fold_numbers(train, classes, FOLDS, config.seed)

    # Compute the features that `fit` would train its head on.
    started = time.perf_counter()
    part = frozen_base(config)
    loading = time.perf_counter() - started
    storage = Storage(config.precision, quality=True)
    features = frozen_features(part, inputs.splits, 0, storage, listener)
    splits = usable_splits(config, inputs.splits, features.extraction)
    quick_audit(config.data, inputs.splits, splits, features, (), config.seed, listener)
    probed = probe(config, splits, features)

    # Probe the features, and measure what each method costs on this machine.
    listener.note(f"probing the features of {len(probed.table):,} training images")
    curve, head_seconds = learning_curve(config, splits, probed)
    listener.note("measuring what methods take on this machine")
    costs = method_costs(config, splits, part, loading, head_seconds)
    speed = images_per_second(part, splits, features)
    evidence = _evidence(config, splits, probed, curve, costs, speed)

    # Try fine-tuning where that can change the advice, and time and disk allow it.
    plan = _planned_trial(config, evidence, costs, budget)
    if isinstance(plan, str):
        evidence = replace(evidence, not_tried=plan)
    else:
        evidence = _tried(evidence, config, splits, part, features, plan, listener)
    method, why, advice = recommend(evidence, budget)
    balanced = is_imbalanced(evidence.class_counts)
    return Recommendation(
        method=method,
        reason=why,
        advice=list(advice),
        evidence=evidence,
        command=command_line(inputs, method, options, balanced),
    )


def _planned_trial(
    config: Config, evidence: Evidence, costs: Costs, budget: float | None
) -> TrialPlan | str:
    """Plans a trial of fine-tuning, or says why there will be none."""
    possible = feasible(evidence.minutes, evidence.gigabytes, budget, evidence.disk)
    if "finetune-top" not in possible:
        return "there is not enough time or disk for it"
    if is_nearly_right(evidence.accuracy, evidence.majority):
        return "little is left to win"
    most = SECONDS if budget is None else SHARE * 60 * budget
    epochs = config.finetune.epochs
    plan, fits = plan_trial(evidence.images, epochs, costs.top, costs.head, most)
    if fits:
        return plan
    return (
        f"a trial takes about {duration(plan.seconds)}, more than {duration(most)}, "
        f"which is {SHARE:.0%} of the budget"
        if budget
        else f"a trial takes about {duration(plan.seconds)}, more than "
        f"{duration(most)}; a budget of {duration(plan.seconds / SHARE)} allows it"
    )


def _tried(
    evidence: Evidence,
    config: Config,
    splits: Splits,
    part: FrozenPart,
    features: FrozenFeatures,
    plan: TrialPlan,
    listener: Listener,
) -> Evidence:
    """Adds to the evidence what a trial shows, or why it failed."""
    listener.note(
        f"trying {plan.epochs} epochs of fine-tuning the top stage on {plan.images:,} "
        f"training images, which takes about {duration(plan.seconds)}"
    )
    try:
        trial = try_fine_tuning(config, splits, part, features, plan, listener)
    except KerasTransferError as error:
        return replace(evidence, not_tried=first_line(error))
    return replace(evidence, trial=trial)


def _evidence(
    config: Config,
    splits: Splits,
    probed: Probed,
    curve: Mapping[float, Estimate],
    costs: Costs,
    speed: float,
) -> Evidence:
    targets, classes = splits.train.targets, len(splits.class_names)
    counts = count_classes(targets, classes)
    full = curve[SHARES[-1]]
    halves = zip(full.values, curve[0.5].values, strict=True)
    gains = [all_ - half for all_, half in halves]
    return Evidence(
        images=len(targets),
        class_counts=dict(zip(splits.class_names, counts.tolist(), strict=True)),
        metric=deciding_metric(targets),
        accuracy=full,
        curve=curve,
        gain=estimate(gains, 1 / FOLDS, (-1.0, 1.0)),
        # Score of a constant prediction: its accuracy or mean average precision.
        majority=float(counts.mean() if splits.multi_label else counts.max())
        / len(targets),
        neighbours=_neighbours(probed),
        logme=logme(probed.rows, probed.table.targets, classes, config.seed),
        images_per_second=speed,
        minutes={method: value / 60 for method, value in costs.seconds.items()},
        gigabytes={method: value / 1e9 for method, value in costs.nbytes.items()},
        disk=costs.disk_gigabytes,
    )


def _neighbours(probed: Probed) -> float | None:
    """Cross-validates the accuracy of the nearest neighbors by cosine similarity."""
    targets, rows = probed.table.targets, probed.rows
    if targets.ndim == 2:
        return None
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    right = 0
    for fold in range(FOLDS):
        inside, held_out = probed.folds != fold, probed.folds == fold
        classifier = KNeighborsClassifier(min(NEIGHBOURS, int(inside.sum())))
        classifier.fit(rows[inside], targets[inside])
        right += int((classifier.predict(rows[held_out]) == targets[held_out]).sum())
    return right / len(targets)


def command_line(
    inputs: Inputs, method: Method, options: Mapping[str, Any], balanced: bool
) -> str:
    """Builds the shell command for a method, or the Python call for images in memory.

    Args:
        inputs: The inputs that the advice is for.
        method: The recommended method.
        options: Config keys that the user gave; None means not given.
        balanced: Whether to balance class weights.

    Returns:
        One line. It keeps an existing run unless overwriting was requested.
    """
    config, run = inputs.config, inputs.run.run_dir
    added: dict[str, Any] = {}
    if balanced and config.head.class_weight != "balanced":
        added["head.class_weight"] = "balanced"
    if run.exists() and not config.overwrite:
        run = next(path for path in numbered(run) if not path.exists())
        added["name"] = run.name
    given = {**options, **added}
    if inputs.in_memory is not None:
        return _python_call(method, given, config.data not in NOT_KEPT)
    flags = [
        f"{FLAGS[key]} {shlex.quote(str(value))}"
        if key in FLAGS
        else f"--set {shlex.quote(f'{key}={json.dumps(value)}')}"
        for key, value in given.items()
        if value is not None
    ]
    command = " ".join(["kt fit", shlex.quote(config.data), *flags])
    if method in UNFREEZE:
        command += f" && kt unfreeze-and-finetune {shlex.quote(str(run))}"
        if UNFREEZE[method] != FinetuneConfig().unfreeze:
            command += f" --unfreeze {UNFREEZE[method]}"
    return command


def _python_call(method: Method, options: Mapping[str, Any], is_kept: bool) -> str:
    """Builds the Python expression for a method on images that are in memory.

    Args:
        method: The recommended method.
        options: Config keys that were given or are recommended.
        is_kept: Whether fine-tuning can find the images again.
    """
    given: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, _, name = key.rpartition(".")
            plain = str(value) if isinstance(value, Path) else value
            if section:
                given[section] = {**given.get(section, {}), name: plain}
            elif isinstance(value, Mapping):
                given[name] = {**given.get(name, {}), **value}
            else:
                given[name] = plain
    arguments = ["data", *(f"{key}={value!r}" for key, value in given.items())]
    call = f"keras_transfer.fit({', '.join(arguments)})"
    if method not in UNFREEZE:
        return call
    arguments = [call, f"unfreeze={UNFREEZE[method]!r}"]
    arguments += [] if is_kept else ["data=data"]
    return f"keras_transfer.unfreeze_and_finetune({', '.join(arguments)})"
