"""Predictions as rows: those of `kt predict`, and a run's predictions.csv."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keras_transfer.data.tables import LABEL_SEPARATOR, Prediction, Table
from keras_transfer.evaluation.decisions import DecisionRule, names_of
from keras_transfer.runs.files import csv_line, csv_text

RowFormat = Literal["csv", "jsonl"]
How = Literal["out of fold", "fitted", "test"]

MOST_COLUMNS = 100
"""With more classes than this, predictions.csv has only the `TOP` most likely ones."""

TOP = 5

_FLAGS = {True: "true", False: "false", None: ""}


@dataclass(frozen=True)
class Rows:
    """Formats predictions of new images, one line per image.

    Attributes:
        class_names: Class names in the order of the probabilities.
        columns: Attributes of a `Prediction` that are shown besides, such as `sure`.
        form: `csv`, or `jsonl` for one JSON object per line.
        top: Number of most likely classes to show, at least 1.
    """

    class_names: Sequence[str]
    columns: Sequence[str]
    form: RowFormat = "csv"
    top: int = 1

    def header(self) -> Iterator[str]:
        """Yields the lines before the first image: one for CSV, none for JSON."""
        if self.form == "csv":
            yield csv_line(["path", "error", *self._ranks(), *self.columns])

    def line(self, prediction: Prediction) -> str:
        """Formats a prediction, without the line terminator."""
        best = _best(prediction.probabilities, self.class_names, self.top)
        shown = {name: getattr(prediction, name) for name in self.columns}
        if self.form == "csv":
            cells = [cell for name, score in best for cell in (name, f"{score:.6f}")]
            cells += [""] * (len(self._ranks()) - len(cells))
            more = [_cell(value) for value in shown.values()]
            return csv_line([prediction.source, prediction.error, *cells, *more])
        row: dict[str, Any] = {"path": prediction.source}
        if prediction.error:
            row["error"] = prediction.error
        else:
            row["predictions"] = [
                {"class": name, "score": round(score, 6)} for name, score in best
            ]
            row |= shown
        return json.dumps(row, ensure_ascii=False)

    def _ranks(self) -> list[str]:
        return _ranks(min(self.top, len(self.class_names)))


@dataclass(frozen=True)
class PredictedTable:
    """Predictions of labeled images.

    Attributes:
        table: The images.
        split: Name of their split.
        how: `out of fold` (by a head that was not trained on the image), `fitted` (by
            one that was) or `test`.
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        far: bool `[N]`, whether an image is far from the training images; None if
            unknown.
    """

    table: Table
    split: str
    how: How
    probabilities: np.ndarray
    far: np.ndarray | None = None


def predictions_csv(
    parts: Iterable[PredictedTable], class_names: Sequence[str], rule: DecisionRule
) -> str:
    """Formats predictions.csv: one line per image, with its label and probabilities.

    The columns are path, split, how, label, predicted, the probabilities, sure and far.
    There is a column p_CLASS for each of up to 100 classes; of more classes there are
    the 5 most likely ones, in columns class_1, score_1, ..., score_5. Several labels
    or predicted classes of an image are joined by `|`. `sure` and `far` are true or
    false, or empty if unknown.

    Args:
        parts: The images with their predictions, part by part.
        class_names: Class names in the order of the columns.
        rule: How the run decides.
    """
    is_wide = len(class_names) <= MOST_COLUMNS
    scores = [f"p_{name}" for name in class_names] if is_wide else _ranks(TOP)
    header = ("path", "split", "how", "label", "predicted", *scores, "sure", "far")
    rows = (row for part in parts for row in _rows(part, class_names, rule, is_wide))
    return csv_text(header, rows)


def _rows(
    part: PredictedTable,
    class_names: Sequence[str],
    rule: DecisionRule,
    is_wide: bool,
) -> Iterator[Sequence[str]]:
    table, probabilities = part.table, part.probabilities
    predicted, sure = rule.predicted(probabilities), rule.is_sure(probabilities)
    is_multi_label = table.targets.ndim == 2
    for i, (source, row) in enumerate(zip(table.sources, probabilities, strict=True)):
        if is_wide:
            scores = [f"{value:.6f}" for value in row]
        else:
            best = _best(row, class_names, TOP)
            scores = [cell for name, p in best for cell in (name, f"{p:.6f}")]
        target = table.targets[i]
        labels = np.flatnonzero(target) if is_multi_label else [target]
        yield [
            *(source, part.split, part.how),
            _cell([class_names[int(label)] for label in labels]),
            _cell(names_of(predicted[i], row, class_names)),
            *scores,
            _cell(None if sure is None else bool(sure[i])),
            _cell(None if part.far is None else bool(part.far[i])),
        ]


def _cell(value: bool | Sequence[str] | None) -> str:
    """Formats a flag, or class names as in a data file."""
    if value is None or isinstance(value, bool):
        return _FLAGS[value]
    return LABEL_SEPARATOR.join(value)


def _ranks(top: int) -> list[str]:
    return [f"{part}_{k}" for k in range(1, top + 1) for part in ("class", "score")]


def _best(
    probabilities: np.ndarray | None, class_names: Sequence[str], top: int
) -> list[tuple[str, float]]:
    """Returns the `top` most likely classes with their probabilities."""
    if probabilities is None:
        return []
    order = probabilities.argsort()[::-1][:top]
    return [(class_names[index], float(probabilities[index])) for index in order]
