"""Pictures of a run, for notebooks: the methods of `api.Run` that draw."""

import csv
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.reading import Reader
from keras_transfer.data.tables import label_text
from keras_transfer.errors import DecodeError, KerasTransferError, UsageError
from keras_transfer.evaluation.metrics import Evaluation, log_losses
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.reporting import charts
from keras_transfer.reporting.explain import heat_maps
from keras_transfer.reporting.predictions import KeptPredictions, read_predictions
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import HISTORY, Run, read_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_batch(run: Run, n: int, seed: int) -> "Figure":
    """Implements `api.Run.show_batch`."""
    splits, size = run_splits(run), run.manifest.image_size
    order = np.random.default_rng(seed).permutation(len(splits.train))
    sources = [splits.train.sources[index] for index in order]
    rows, pixels = _decoded(splits.read, sources, size, n)
    targets = splits.train.targets[order[rows]]
    titles = [_label(target, splits.class_names) for target in targets]
    return charts.image_grid(pixels, titles)


def draw_confusion(run: Run) -> "Figure":
    """Implements `api.Run.plot_confusion`."""
    metrics, phase = read_together(run, lambda: (run.metrics, run.manifest.phase))
    if not metrics.get(phase):
        raise UsageError(
            f"The run has no figures, because no image was held out. Received: "
            f"{run.run_dir}. Evaluate it on labeled images: evaluate(run, data)."
        )
    figures = Evaluation.model_validate(next(iter(metrics[phase].values())))
    if figures.confusion is None:
        raise UsageError(
            "There is no confusion matrix where an image may show several classes. "
            f"Received: {run.run_dir}. Look at run.metrics instead."
        )
    return charts.confusion_matrix(figures.confusion, list(figures.classes))


def draw_top_losses(run: Run, n: int) -> "Figure":
    """Implements `api.Run.plot_top_losses`."""
    kept, names, model = read_together(
        run,
        lambda: (
            read_predictions(
                run.predictions_path, run.class_names, run.manifest.multi_label
            ),
            run.class_names,
            load_model(run),
        ),
    )
    kept = kept.select(kept.how != "fitted")
    losses = log_losses(kept.targets, kept.probabilities)
    kept = kept.select(np.argsort(-losses, kind="stable"))
    size = run.manifest.image_size
    rows, pixels = _decoded(run_splits(run).read, kept.sources.tolist(), size, n)
    kept = kept.select(rows)
    classes = _explained(kept)
    titles = [_title(kept, row, classes[row], names) for row in range(len(kept))]
    heat = heat_maps(model, pixels, classes)
    return charts.image_grid(pixels, titles, heat.maps if heat.is_meaningful else None)


def draw_curves(run: Run, phase: Phase | None) -> "Figure":
    """Implements `api.Run.plot_curves`."""

    def read() -> tuple[list[dict[str, str]], float]:
        with (run.run_dir / HISTORY).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file)), run.manifest.l2

    rows, l2 = read_together(run, read)
    by_phase = {
        name: [row for row in rows if row["phase"] == name]
        for name in ("fit", "finetune")
    }
    name = phase or ("finetune" if by_phase["finetune"] else "fit")
    if not by_phase[name] and name == "fit":
        raise UsageError(
            f"{HISTORY} has no rows of this phase. Received: phase={name} and "
            f"{run.run_dir}. Train the run again."
        )
    if not by_phase[name]:
        raise UsageError(
            f"The run was not fine-tuned. Received: phase={phase} and {run.run_dir}. "
            f"Run: kt unfreeze-and-finetune {shlex.quote(str(run.run_dir))}"
        )
    if name == "fit":
        return charts.l2_path(by_phase[name], l2)
    return charts.epoch_curves(by_phase[name])


def _decoded(
    read: Reader, sources: Sequence[str], image_size: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the first images that can still be read.

    Returns:
        (int64 indices of at most `count` sources, uint8 `[n, image_size, image_size,
        3]` pixels).

    Raises:
        UsageError: If `count` is less than 1.
        KerasTransferError: If there are no such images.
    """
    if count < 1:
        raise UsageError(
            f"At least one image is shown. Received: n={count}. Use a larger n."
        )
    decode = make_decoder(image_size)
    rows: list[int] = []
    pixels: list[np.ndarray] = []
    for start in range(0, len(sources), count):
        some = list(sources[start : start + count])
        for row, (_, encoded) in enumerate(read(some), start=start):
            if len(rows) < count and not isinstance(encoded, OSError):
                try:
                    pixels.append(decode(encoded))
                except DecodeError:
                    continue
                rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise KerasTransferError(
            f"There is nothing to show. Received: {len(sources)} images, none of which "
            "can be read. Check that the data are still where they were."
        )
    return np.array(rows), np.stack(pixels)


def _explained(kept: KeptPredictions) -> np.ndarray:
    """Returns the class to explain: the predicted one, or the one that costs most."""
    if kept.targets.ndim == 1:
        return kept.probabilities.argmax(1)
    return np.abs(kept.probabilities - kept.targets).argmax(1)


def _title(
    kept: KeptPredictions, row: int, explained: int, names: Sequence[str]
) -> str:
    shown = _label(kept.targets[row], names)
    score = kept.probabilities[row, explained]
    return f"true: {shown}\n{score:.0%} {names[explained]}"


def _label(target: np.ndarray, names: Sequence[str]) -> str:
    return label_text(target, names, ", ") or "(none)"
