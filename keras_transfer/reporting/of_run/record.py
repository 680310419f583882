"""What a run's directory says, and what its report page needs besides."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.evaluation.crossvalidation import OUT_OF_FOLD
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.metrics import Evaluation
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.events import Listener
from keras_transfer.features.base import frozen_base_of
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    Storage,
    frozen_features,
)
from keras_transfer.features.image_table import changed_images, known_images
from keras_transfer.findings.finding import Audit, counted
from keras_transfer.reporting.predictions import (
    MOST_COLUMNS,
    KeptPredictions,
    read_predictions,
)
from keras_transfer.runs.manifest import Manifest, headline_split
from keras_transfer.runs.run import HISTORY, Run, phase_predictions

_WHAT = {
    "test": "test images",
    OUT_OF_FOLD: "training images, out of fold",
    "deciding": "images set aside to decide",
    "val": "validation images",
}


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The content of a run's files.

    Attributes:
        name: Name of the run.
        identity: See `Run.identity`.
        config: Its resolved config.
        manifest: Its manifest.
        evaluations: Evaluations of the run's model by split, the more telling first.
        class_names: Class names in the order of the probabilities.
        kept: A prediction of every image; None in a run of version 0.1.0.
        before: Those of the model before fine-tuning; None if it is the run's.
        history: Rows of history.csv.
        audit: The findings; None without an audit.
        is_grouped: Whether the data say which images belong together.
    """

    name: str
    identity: bytes
    config: Config
    manifest: Manifest
    evaluations: Mapping[str, Evaluation]
    class_names: Sequence[str]
    kept: KeptPredictions | None
    before: KeptPredictions | None
    history: Sequence[Mapping[str, str]]
    audit: Audit | None
    is_grouped: bool

    @classmethod
    def of(cls, run: Run) -> "RunRecord":
        """Reads the files of a run, which `read_together` keeps consistent.

        Raises:
            KerasTransferError: If a file is damaged.
        """
        manifest, names = run.manifest, run.class_names
        before = run.run_dir / phase_predictions("fit")
        has_before = manifest.phase == "finetune" and before.exists()
        multi = manifest.multi_label
        return cls(
            name=run.run_dir.resolve().name,
            identity=run.identity,
            config=run.config,
            manifest=manifest,
            evaluations=_evaluations(run, manifest),
            class_names=names,
            kept=read_predictions(run.predictions_path, names, multi)
            if run.predictions_path.exists()
            else None,
            before=read_predictions(before, names, multi) if has_before else None,
            history=_history(run),
            audit=_audit(run),
            is_grouped=_is_grouped(run),
        )

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of all images and of test images."""
        if self.kept is not None:
            return len(self.kept), int((self.kept.split == "test").sum())
        of = self.manifest.class_counts  # a run of version 0.1.0
        test = sum(of.get("test", {}).values())
        return sum(sum(counts.values()) for counts in of.values()), test

    @property
    def headline(self) -> str | None:
        """Name of the evaluation that comes first; None without any."""
        return next(iter(self.evaluations), None)

    @property
    def shown(self) -> KeptPredictions | None:
        """The predictions that the first evaluation is about."""
        if self.kept is None or self.headline is None:
            return None
        how = "test" if self.headline == "test" else "out of fold"
        found = self.kept.select(self.kept.how == how)
        return found if len(found) else None

    @property
    def honest(self) -> KeptPredictions | None:
        """Predictions of all images that the model did not learn from."""
        if self.kept is None:
            return None
        return self.kept.select(self.kept.how != "fitted")

    @property
    def thresholds(self) -> np.ndarray | None:
        """float32 `[num_classes]` for multi-label data; None for single-label data."""
        return DecisionRule.of(self.manifest, self.class_names).classes

    @property
    def has_all_probabilities(self) -> bool:
        """Whether predictions.csv has the probability of every class."""
        return len(self.class_names) <= MOST_COLUMNS

    def what(self, name: str) -> str:
        """Says what an evaluation was measured on, such as `648 test images`."""
        images, words = self.evaluations[name].images, _WHAT.get(name, name)
        if images == 1:
            words = words.replace("images", "image")
        return f"{images:,} {words}"


def _evaluations(run: Run, manifest: Manifest) -> dict[str, Evaluation]:
    """Reads the evaluations of a run's model, the more telling first."""
    values = run.metrics.get(manifest.phase, {})
    try:
        found = {name: Evaluation.model_validate(x) for name, x in values.items()}
    except ValueError as error:
        raise KerasTransferError(
            f"metrics.json of {run.run_dir} is damaged ({first_line(error)}). Train "
            "the run again."
        ) from None
    first = headline_split({name: one.images for name, one in found.items()})
    return {**({first: found[first]} if first else {}), **found}


def _history(run: Run) -> list[dict[str, str]]:
    try:
        with (run.run_dir / HISTORY).open(newline="", encoding="utf-8") as file:
            return [*csv.DictReader(file)]
    except (OSError, ValueError, csv.Error):
        return []


def _is_grouped(run: Run) -> bool:
    try:
        return any(row.get("group") for _, row in read_table(run.splits_path))
    except UsageError:  # it is damaged: `load_run` says that there are no pictures
        return False


def _audit(run: Run) -> Audit | None:
    try:
        return Audit.from_json(run.audit_path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise KerasTransferError(
            f"{run.audit_path} is damaged ({first_line(error)}). Train the run again."
        ) from None


@dataclass(eq=False)
class Loaded:
    """Images, features and model of a run, as far as there are any.

    Attributes:
        splits: Its images.
        features: Features of the frozen base.
        model: Its model.
        notes: What could not be loaded, and why.
        changed: Sources whose images have changed since the run was made.
    """

    splits: Splits | None = None
    features: FrozenFeatures | None = None
    model: keras.Model | None = None
    notes: list[str] = field(default_factory=list)
    changed: frozenset[str] = frozenset()


def load_run(
    run: Run,
    record: RunRecord,
    listener: Listener,
    images_only: bool = False,
    known: Loaded | None = None,
) -> Loaded:
    """Loads images, features and model of a run.

    Args:
        run: The run.
        record: What its files say.
        listener: Receives progress if features are computed again.
        images_only: Whether neither features nor model are needed.
        known: What is in memory and need not be loaded; it is completed.

    Returns:
        What could be loaded; notes say what could not.
    """
    found = known or Loaded()
    try:
        found.splits = found.splits or run_splits(run)
    except UsageError:  # they were given in Python
        found.notes.append(
            "There are no pictures: the images were given in Python and are not kept."
        )
        return found
    except (KerasTransferError, OSError) as error:
        found.notes.append(f"There are no pictures: {error}")
        return found
    if images_only:
        return found
    try:
        found.model = found.model or load_model(run)
        if found.features is None:
            found.features = _features(run, record, found.splits, found.model, listener)
    except (KerasTransferError, OSError) as error:
        found.notes.append(f"There is no feature map: {error}")
        return found
    digests = found.features.extraction.digests
    changed = changed_images(known_images(run.images_path, listener), digests)
    found.changed = frozenset(changed)
    if changed:
        is_one = len(changed) == 1
        found.notes.append(
            f"{counted(len(changed), 'image')} {'has' if is_one else 'have'} changed "
            f"since the run was made and {'is' if is_one else 'are'} left out of "
            f"pictures, such as {changed[0]}."
        )
    return found


def _features(
    run: Run,
    record: RunRecord,
    splits: Splits,
    model: keras.Model,
    listener: Listener,
) -> FrozenFeatures:
    """Returns the features that the run's head was first trained on."""
    config, manifest = record.config, record.manifest
    first = model if manifest.phase == "fit" else load_model(run, "fit")
    part = frozen_base_of(first, config, manifest.weights_digest)
    # The quality measures tell copies apart, which must not be in different folds.
    storage = Storage("bf16" if manifest.precision == "bf16" else "f32", quality=True)
    return frozen_features(part, splits, 0, storage, listener)
