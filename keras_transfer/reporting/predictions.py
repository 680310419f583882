"""Predictions as rows: those of `kt predict`, and a run's predictions.csv."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_transfer.data.tables import LABEL_SEPARATOR, Prediction, Table
from keras_transfer.errors import UsageError, first_line
from keras_transfer.evaluation.decisions import DecisionRule, names_of
from keras_transfer.runs.files import csv_line, csv_text

RowFormat = Literal["csv", "jsonl"]
How = Literal["out of fold", "fitted", "test"]

MOST_COLUMNS = 100
"""With more classes than this, predictions.csv has only the `TOP` most likely ones."""

TOP = 5

_FLAGS = {True: "true", False: "false", None: ""}
_VALUES = {"true": 1, "false": 0, "": -1}


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


@dataclass(frozen=True, eq=False)
class KeptPredictions:
    """The content of a run's predictions.csv: one row per usable image.

    Attributes:
        sources: str `[N]` identifiers of the images.
        split: str `[N]` names of their splits.
        how: str `[N]`, each a `How`.
        targets: int64 `[N]` class indices; for multi-label data, uint8
            `[N, num_classes]`.
        is_predicted: bool `[N, num_classes]`.
        probabilities: float32 `[N, num_classes]`. Of more than 100 classes only the
            most likely ones were kept; those of the others are 0.
        sure: int8 `[N]`: 1 for sure, 0 for not, -1 for unknown.
        far: int8 `[N]`: 1 for far from the training images, 0 for not, -1 for unknown.
    """

    sources: np.ndarray
    split: np.ndarray
    how: np.ndarray
    targets: np.ndarray
    is_predicted: np.ndarray
    probabilities: np.ndarray
    sure: np.ndarray
    far: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, rows: np.ndarray) -> "KeptPredictions":
        """Returns those of the images with the given indices or mask, in order."""
        return KeptPredictions(*(value[rows] for value in vars(self).values()))

    @property
    def is_right(self) -> np.ndarray:
        """Whether the predicted classes are exactly the labels, bool `[N]`."""
        if self.targets.ndim == 2:
            return (self.is_predicted == (self.targets > 0)).all(1)
        return self.is_predicted[np.arange(len(self)), self.targets]


def changes(
    before: KeptPredictions, after: KeptPredictions
) -> tuple[list[str], list[str]]:
    """Compares predictions of the same images by two models.

    Returns:
        (sources that only the second predicts correctly, those that only the first
        does), each with the surest prediction of the second first.
    """
    right = dict(zip(before.sources.tolist(), before.is_right.tolist(), strict=True))
    gained: list[str] = []
    lost: list[str] = []
    for row in np.argsort(-after.probabilities.max(1), kind="stable"):
        source, is_right = str(after.sources[row]), bool(after.is_right[row])
        if source in right and right[source] != is_right:
            (gained if is_right else lost).append(source)
    return gained, lost


def read_predictions(
    path: Path, class_names: Sequence[str], multi_label: bool
) -> KeptPredictions:
    """Reads what `predictions_csv` wrote.

    Raises:
        UsageError: If the file is missing or damaged.
    """
    rows = _read_rows(path, len(class_names))
    position = {name: index for index, name in enumerate(class_names)}

    def column(index: int) -> np.ndarray:
        return np.array([row[index] for row in rows], dtype=np.str_)

    def indicators(index: int) -> np.ndarray:
        found = np.zeros((len(rows), len(class_names)), bool)
        for number, row in enumerate(rows):
            names = row[index].split(LABEL_SEPARATOR) if multi_label else [row[index]]
            found[number, [position[name] for name in names if name]] = True
        return found

    def flags(index: int) -> np.ndarray:
        return np.array([_VALUES[row[index]] for row in rows], np.int8)

    try:
        labels = indicators(3)
        return KeptPredictions(
            sources=column(0),
            split=column(1),
            how=column(2),
            targets=labels.astype(np.uint8) if multi_label else labels.argmax(1),
            is_predicted=indicators(4),
            probabilities=_probabilities([row[5:-2] for row in rows], position),
            sure=flags(-2),
            far=flags(-1),
        )
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}).") from None


def _read_rows(path: Path, num_classes: int) -> list[list[str]]:
    """Reads the cells of each line after the first.

    Cells are told by their place: names of classes may differ in case only.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            _, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}).") from None
    scores = num_classes if num_classes <= MOST_COLUMNS else 2 * TOP
    for row in rows:
        if len(row) != 7 + scores:
            raise UsageError(f"{path} is damaged: a line has {len(row)} cells.")
    return rows


def _probabilities(
    rows: Sequence[Sequence[str]], position: Mapping[str, int]
) -> np.ndarray:
    """Reads float32 `[N, num_classes]` from one cell per class, or pairs of the `TOP`.

    A pair is the name of a class and its probability.
    """
    if len(position) <= MOST_COLUMNS:
        return np.array(rows, np.float32).reshape(len(rows), len(position))
    found = np.zeros((len(rows), len(position)), np.float32)
    for number, row in enumerate(rows):
        for name, score in zip(row[::2], row[1::2], strict=True):
            if name:
                found[number, position[name]] = score
    return found


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
