"""Options of the command line that several commands share, and types of values."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from keras_transfer.config import (
    FLAGS,
    USUAL_NAMES,
    AugmentPolicy,
    Balance,
    FeatureKind,
    HeadKind,
    ListingConfig,
    Metric,
    Mixing,
    Precision,
    TrainingPrecision,
    choices,
    default_of,
)


class ClassWeights(click.ParamType[Any]):
    """Accepts `balanced`, `none`, or weights by class name such as `cat=2,dog=1`."""

    name = "class weight"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Returns the word, or a dict of weights."""
        if value in choices(Balance):
            return value
        weights: dict[str, float] = {}
        for part in str(value).split(","):
            name, _, number = part.rpartition("=")
            name = name.strip()
            try:
                weight = float(number)
            except ValueError:
                name = ""
            if not name or name in weights:
                self.fail(
                    f"{value!r} is not balanced, none or NAME=WEIGHT,..., with each "
                    "name once, such as cat=2,dog=1.",
                    param,
                    ctx,
                )
            weights[name] = weight
        return weights


class Minutes(click.ParamType[Any]):
    """Converts a duration such as 30m, 2h or 90s to minutes."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Returns the number of minutes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if not found:
            self.fail(f"{value!r} is no duration such as 30m, 2h or 90s.", param, ctx)
        return float(found[1]) * {"s": 1 / 60, "m": 1, "h": 60}[found[2]]


class Bytes(click.ParamType[Any]):
    """Converts a size such as 20GB, 1.5TB or 500000000 to bytes."""

    name = "size"
    _units = {unit: 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))}

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Returns the number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(value).strip(), re.I)
        if not found:
            self.fail(f"{value!r} is not a size such as 20GB, 500MB or 0.", param, ctx)
        return int(float(found[1]) * self._units[found[2].upper()])


def _column(role: str, holds: str) -> dict[str, Any]:
    """Returns the option for a column of a table, with the names it is found by."""
    *names, last = USUAL_NAMES[role]
    usual = f"{', '.join(names)} or {last}"
    return {
        "metavar": "NAME",
        "help": f"Column of a table with {holds}.  [default: {usual}]",
    }


PATH = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS: dict[str, dict[str, Any]] = {
    "base": {
        "help": "Pretrained base, or several as A+B; `kt bases` lists all.",
        "metavar": "NAME",
    },
    "weights": {
        "help": "Weights of the base: imagenet, none (random) or a file.",
        "metavar": "WEIGHTS",
    },
    "image_size": {
        "type": int,
        "metavar": "PIXELS",
        "help": "Side of the square input images.  [default: the base's own size]",
    },
    "features": {
        "type": click.Choice(choices(FeatureKind)),
        "help": "What the head reads: the output of the base's last stage, also of the "
        "two below, or what is better out of fold.",
    },
    "head.kind": {"type": click.Choice(choices(HeadKind)), "help": "Kind of head."},
    "head.epochs": {
        "type": int,
        "metavar": "N",
        "help": "Maximum number of training iterations of the head.",
    },
    "head.class_weight": {
        "type": ClassWeights(),
        "metavar": "balanced|none|NAME=WEIGHT,...",
        "help": "Class weights in the loss; 1 for classes that are not named.",
    },
    "head.logit_adjustment": {
        "type": float,
        "metavar": "TAU",
        "help": "Even out class frequencies: 0 keeps them, 1 predicts as if all were "
        "equal.",
    },
    "metric": {
        "type": click.Choice(choices(Metric)),
        "help": "Metric that decides which model is better.  [default: accuracy, or "
        "mean average precision for multi-label data]",
    },
    "augment": {
        "type": int,
        "metavar": "N",
        "help": "Number of augmented views cached per training image.",
    },
    "augment_policy": {
        "type": click.Choice(choices(AugmentPolicy)),
        "help": "How augmented views are made.",
    },
    "folds": {
        "type": int,
        "metavar": "K",
        "help": "Choose the L2 strength by K-fold cross-validation.  [default: 5]",
    },
    "abstain_at_accuracy": {
        "type": float,
        "metavar": "SHARE",
        "help": "Mark predictions as sure so that this share of them is correct, with "
        "95% confidence, such as 0.95.  [default: mark none]",
    },
    "precision": {
        "type": click.Choice(choices(Precision)),
        "help": "Arithmetic precision of the frozen base.",
    },
    "path_column": _column("path", "the paths"),
    "label_column": _column("label", "the labels"),
    "split_column": _column("split", "train, val or test"),
    "group_column": _column("group", "what keeps images together, such as patients"),
    "group_regex": {
        "metavar": "REGEX",
        "help": "Keep images together whose file names agree in the first parentheses "
        r"of this, such as '^(\d{8})_'.  [default: none]",
    },
    "splits.file": {
        "type": PATH,
        "metavar": "FILE",
        "help": "splits.csv of an earlier run, to keep its splits.  [default: none]",
    },
    "max_skipped": {
        "type": float,
        "metavar": "SHARE",
        "help": "Largest fraction of unusable images that is tolerated.",
    },
    "name": {
        "metavar": "NAME",
        "help": "Name of the run.  [default: DATA-BASE]",
    },
    "runs_dir": {
        "type": PATH,
        "metavar": "DIR",
        "help": "Directory that contains the runs.",
    },
    "seed": {"type": int, "metavar": "N", "help": "Random seed."},
    "data_dir": {
        "type": PATH,
        "metavar": "DIR",
        "help": "Directory where tensorflow-datasets keeps prepared data sets.  "
        "[default: tensorflow-datasets' own]",
    },
    "cache_dir": {
        "type": PATH,
        "metavar": "DIR",
        "help": "Directory where features are cached.  [default: keras_transfer in the "
        "user's cache directory]",
    },
}


def config_options(*keys: str) -> Callable[[_Command], _Command]:
    """Adds options for config keys; an omitted option keeps the config's value."""

    def decorate(command: _Command) -> _Command:
        for key in reversed(keys):
            given = dict(_OPTIONS[key])
            _add_default(given, key)
            name = key.replace(".", "__")
            command = click.option(FLAGS[key], name, **given)(command)
        return command

    return decorate


_FINETUNE_OPTIONS: dict[str, dict[str, Any]] = {
    "--unfreeze": {
        "metavar": "WHAT",
        "help": "Layers to train: top (the last stage), stages:N (the last N), all or "
        "from:LAYER.",
    },
    "--lr": {
        "key": "learning_rate",
        "type": float,
        "metavar": "RATE",
        "help": "Peak learning rate of the head.",
    },
    "--base-lr": {
        "type": float,
        "metavar": "RATE",
        "help": "Peak learning rate of the base's last stage.  [default: --lr times "
        "--layer-decay]",
    },
    "--layer-decay": {
        "type": float,
        "metavar": "RATIO",
        "help": "Ratio of a stage's learning rate to that of the stage above.  "
        "[default: 0.3, or 1 with --base-lr]",
    },
    "--epochs": {"type": int, "metavar": "N", "help": "Maximum number of epochs."},
    "--batch-size": {
        "type": int,
        "metavar": "N",
        "help": "Number of images per training step.",
    },
    "--augment": {
        "metavar": "N|online",
        "help": "Number of augmented views cached per training image, or online for a "
        "new view in every epoch.",
    },
    "--augment-policy": {
        "type": click.Choice(choices(AugmentPolicy)),
        "help": "How augmented views are made.",
    },
    "--mix": {
        "type": click.Choice(choices(Mixing)),
        "help": "Mix pairs of images and their labels; with --augment online.",
    },
    "--label-smoothing": {
        "type": float,
        "metavar": "SHARE",
        "help": "Fraction of each label that is spread over all classes in the loss.",
    },
    "--precision": {
        "type": click.Choice(choices(TrainingPrecision)),
        "help": "Arithmetic precision of training.",
    },
    "--train-bn/--no-train-bn": {"help": "Train BatchNormalization layers too."},
    "--from-scratch-head/--trained-head": {
        "help": "Start from a random head, to measure what the trained one is worth.",
    },
    "--disk-budget": {
        "key": "disk_budget_gb",
        "type": float,
        "metavar": "GB",
        "help": "Maximum disk space for cached activations.",
    },
    "--force/--keep-best": {
        "help": "Keep the fine-tuned model even if it is not better."
    },
}


def finetune_section_options() -> Callable[[_Command], _Command]:
    """Adds options for the keys of the config's `finetune` section."""

    def decorate(command: _Command) -> _Command:
        for flag, given in reversed(_FINETUNE_OPTIONS.items()):
            given = dict(given)
            first = flag.partition("/")[0].removeprefix("--")
            name = given.pop("key", first.replace("-", "_"))
            _add_default(given, f"finetune.{name}")
            command = click.option(flag, name, default=None, **given)(command)
        return command

    return decorate


def _add_default(given: dict[str, Any], key: str) -> None:
    """Appends the config's default to the help of an option."""
    default = default_of(key)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if default is not None:
        given["help"] += f"  [default: {default}]"


LISTING = tuple(ListingConfig.model_fields)
MEASURED = ("image_size", *LISTING, "seed", "max_skipped", "cache_dir")
AUDITED = ("image_size", *LISTING, "seed", "cache_dir")  # of any number of files
SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any config key to a value in YAML syntax; may be repeated.",
)
CONFIG_FILE = click.option(
    "--config",
    "file",
    type=PATH,
    metavar="FILE",
    help="YAML file of config keys.  [default: none]",
)
LOG_TO = click.option(
    "--log-to",
    multiple=True,
    metavar="tensorboard[:DIR]|mlflow[:URI]",
    help="Log parameters, epochs, metrics and files; may be repeated.  [default: "
    "nowhere; DIR tensorboard; URI MLFLOW_TRACKING_URI, or the folder mlruns]",
)
FLIP_TTA = click.option(
    "--flip-tta",
    is_flag=True,
    help="Average over each image and its mirror image (test-time augmentation); takes "
    "twice as long.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
