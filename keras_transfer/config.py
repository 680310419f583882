"""The user's configuration, and the only place where defaults are defined.

A `Config` is built from three layers, each overriding the one before: the defaults
below, a YAML file, and the options given on the command line. Unknown keys are errors.
The resolved config is saved in the run as `config.yaml` and can be reused as is.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticUndefined
from yaml.composer import ComposerError

from keras_transfer.errors import UsageError, first_line

Precision = Literal["auto", "f32", "bf16"]
TrainingPrecision = Literal["auto", "f32", "bf16", "f16"]
FeatureKind = Literal["last", "stages", "auto"]
HeadKind = Literal["linear", "mlp"]
Balance = Literal["balanced", "none"]
ClassWeight = Balance | dict[str, Annotated[float, Field(ge=0)]]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc"]
AugmentPolicy = Literal["standard", "randaugment"]
Mixing = Literal["none", "mixup", "cutmix"]
Format = Literal["litert", "onnx", "openvino", "keras"]
Quantization = Literal["dynamic", "int8"]

FLAGS = {
    "base": "--base",
    "weights": "--weights",
    "image_size": "--image-size",
    "features": "--features",
    "head.kind": "--head",
    "head.epochs": "--epochs",
    "head.class_weight": "--class-weight",
    "head.logit_adjustment": "--logit-adjustment",
    "augment": "--augment",
    "augment_policy": "--augment-policy",
    "folds": "--folds",
    "metric": "--metric",
    "abstain_at_accuracy": "--abstain-at-accuracy",
    "precision": "--precision",
    "path_column": "--path-column",
    "label_column": "--label-column",
    "split_column": "--split-column",
    "group_column": "--group-column",
    "group_regex": "--group-regex",
    "splits.file": "--splits",
    "max_skipped": "--max-skipped",
    "name": "--name",
    "runs_dir": "--runs-dir",
    "seed": "--seed",
    "data_dir": "--data-dir",
    "cache_dir": "--cache-dir",
}
"""Config keys that have their own option in `kt fit`; `--set` accepts every key."""

_BY_NAME = ("head.class_weight",)  # keys that may hold a mapping of names

# Characters. A complete config has about 2,000; parsing much more takes seconds.
_MOST_YAML = 100_000


class _ShortRepr(reprlib.Repr):
    """Abbreviates rejected values, however large or deeply nested they are."""

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # by default, Python does not format more than 4,300 digits
            return f"a number of {x.bit_length():,} bits"


_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = 200

_Strengths = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
_SEVERAL = BeforeValidator(
    lambda x: (x,) if isinstance(x, float | str) or type(x) is int else x
)
"""Accepts a single value in place of a list with one element."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SplitsConfig(_Section):
    """How images are split where the data do not define the splits."""

    test: Fraction = 0.15
    """Fraction of the images that are held out for the final metrics."""
    file: Path | None = None
    """A `splits.csv` whose assignments are kept; only images not in it are assigned."""


class HeadConfig(_Section):
    """The new classifier on top of the base."""

    kind: HeadKind = "linear"
    """`linear` (a single dense layer) or `mlp` (with hidden layers)."""
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), _SEVERAL
    ] = (256,)
    """Number of units in each hidden layer (`mlp` only)."""
    dropout: Fraction = 0.3
    """Dropout rate after each hidden layer (`mlp` only)."""
    epochs: Annotated[int, Field(ge=1)] = 300
    """Maximum number of L-BFGS iterations (`linear`) or epochs (`mlp`) per L2 strength;
    usually far fewer are needed."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Number of epochs without a lower out-of-fold loss before an `mlp` stops."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Adam's learning rate (`mlp` only; the linear head needs none)."""
    l2: Annotated[
        Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
        | None,
        _SEVERAL,
    ] = None
    """L2 strengths to choose from; None selects the head's own grid."""
    class_weight: ClassWeight = "none"
    """`balanced` gives every class the same total weight in the loss; `none` gives
    every image the same weight. Or weights by class name, and 1 for other classes."""
    logit_adjustment: Annotated[float, Field(ge=0, le=10)] = 0.0
    """How far class frequencies are evened out: 0 keeps those of the training images, 1
    predicts as if all classes were equally frequent (Menon et al. 2021)."""


class FinetuneConfig(_Section):
    """Options of `kt unfreeze-and-finetune`.

    The defaults come from the measurements in tests/benchmarks/RESULTS.md.
    """

    unfreeze: Annotated[
        str,
        Field(
            pattern=r"^(top|all|stages:[1-9][0-9]*|from:.+)$",
            examples=["top", "all", "stages:N", "from:LAYER"],
        ),
    ] = "top"
    """Layers to train: `top` (the base's last stage), `stages:N` (its last N stages),
    `all`, or `from:LAYER` (that layer and all layers that it does not depend on)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the head (AdamW with warm-up, then cosine decay to 0)."""
    base_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the base's last stage; None means
    `learning_rate * layer_decay`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratio of each layer group's learning rate to that of the group above it. None
    means 0.3, or 1 if `base_lr` is given."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's weight decay; one-dimensional weights such as biases are exempt."""
    warmup: Fraction = 0.1
    """Fraction of the steps over which the learning rate rises to its peak."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Number of epochs; with `patience`, their maximum."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Number of epochs without a lower loss on further images set aside before training
    stops, to return to the epoch with the lowest loss. None trains for all epochs and
    takes the mean of the weights after the last ones."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Number of images per training step."""
    augment: Annotated[int, Field(ge=0, le=100)] | Literal["online"] = 0
    """Number of augmented views cached per training image in addition to the plain
    image, or `online` for a new view in every epoch."""
    augment_policy: AugmentPolicy = "standard"
    """How views are made: `standard` mirrors, rotates, crops and changes colors a
    little; `randaugment` mirrors and crops, and then applies 2 of 14 operations drawn
    at random (Cubuk et al. 2020)."""
    mix: Mixing = "none"
    """Whether each image is mixed with another of its batch, and their labels in the
    same proportion: `mixup` blends both (Zhang et al. 2018), `cutmix` pastes a
    rectangle (Yun et al. 2019). Only with `augment: online`."""
    label_smoothing: Fraction = 0.0
    """Fraction of each label that is spread evenly over all classes in the loss
    (Szegedy et al. 2016); for multi-label data, over presence and absence."""
    precision: TrainingPrecision = "auto"
    """Arithmetic used for training; `auto` times a few steps in each precision that may
    be faster."""
    train_bn: bool = False
    """Whether BatchNormalization is trained, including its moving statistics."""
    from_scratch_head: bool = False
    """Whether to start from a random head, to measure what the trained one is worth."""
    disk_budget_gb: Annotated[float, Field(gt=0)] = 10.0
    """Maximum disk space for activations of the frozen part, in units of 10^9 bytes."""
    force: bool = False
    """Whether the fine-tuned model becomes the run's model even if it is not better."""

    @model_validator(mode="after")
    def _check_mix(self) -> "FinetuneConfig":
        """Refuses mixing where images are not augmented in every epoch."""
        if self.mix != "none" and self.augment != "online":
            raise UsageError(
                "Images are mixed anew in every epoch, so that nothing of the mixtures "
                f"can be cached. Received: mix={self.mix} and augment={self.augment}. "
                "Use augment=online, or leave mix out."
            )
        return self

    @property
    def decay(self) -> float:
        """`layer_decay`, with None replaced by its default."""
        if self.layer_decay is not None:
            return self.layer_decay
        return 0.3 if self.base_lr is None else 1.0


def _check_regex(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    if not groups:
        raise ValueError(
            "it needs parentheses around the part of the name that is the group, such "
            r"as '^(\d{8})_'"
        )
    return pattern


USUAL_NAMES = {
    "path": ("path", "filename", "file", "image", "image_path"),
    "label": ("label", "class", "target", "category"),
    "split": ("split", "fold", "subset"),
    "group": ("group", "patient", "patient_id", "subject"),
}
"""Names that a table's columns are found by, in any case, by what the columns are for.
The option for each is called like the key, with `_column`."""


class ListingConfig(_Section):
    """How the images of DATA are found, with their labels, splits and groups."""

    path_column: str | None = None
    """Column of a table with the paths of the images; None looks for a usual name."""
    label_column: str | None = None
    """Column of a table with the labels; None looks for a usual name."""
    split_column: str | None = None
    """Column of a table with train, val or test; None looks for a usual name."""
    group_column: str | None = None
    """Column of a table with the groups; None looks for a usual name."""
    group_regex: Annotated[str, AfterValidator(_check_regex)] | None = None
    """Regular expression that is searched for in each file name; what its first group
    matches is the image's group. A name without a match is a group of its own."""
    data_dir: Path | None = None
    """Directory where tensorflow-datasets keeps prepared data sets."""


class Config(ListingConfig):
    """The complete configuration of `kt fit` and the commands that follow it."""

    data: str
    """A folder, a CSV, TSV or Parquet file, `tfds:NAME[:VERSION]` or `digits`; for
    images that were given in Python, `memory:arrays`, `memory:dataset` or
    `memory:paths`."""
    name: str | None = None
    """Name of the run; None derives it from the data and the base."""
    runs_dir: Path = Path("saved_models")
    """Directory that contains the runs."""
    overwrite: bool = False
    """Whether to replace an existing run of this name."""
    export: bool = False
    """Whether to also publish a SavedModel version directory in the run."""
    report: bool = True
    """Whether to make the report page."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random choices."""
    base: str = "efficientnet_lite0"
    """Name of the pretrained base; case, `_` and `-` do not matter. Several, joined by
    `+`, are used as one: the head reads the features of all."""
    features: FeatureKind = "auto"
    """What the head reads: the pooled output of the base (`last`), also those of the
    two stages below its top (`stages`), or what is better out of fold (`auto`)."""
    weights: str = "imagenet"
    """`imagenet`, `none` (random, seeded) or the path of a weights file."""
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Side of the square input images in pixels; None is the base's own size, or the
    largest of several bases."""
    precision: Precision = "auto"
    """Arithmetic of the frozen base while features are computed."""
    augment: Annotated[int, Field(ge=0, le=100)] = 0
    """Number of augmented views cached per training image, in addition to the plain
    image."""
    augment_policy: AugmentPolicy = "standard"
    """How views are made: `standard` mirrors, rotates, crops and changes colors a
    little; `randaugment` mirrors and crops, and then applies 2 of 14 operations drawn
    at random (Cubuk et al. 2020)."""
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    """Number of folds of the cross-validation that chooses the L2 strength. None means
    5, or fewer if a class or group needs it, or a held-out tenth if there are very many
    images."""
    metric: Metric | None = None
    """Metric that decides which of several models is better. None means the accuracy,
    or the mean average precision of multi-label data; L2 strengths are then chosen by
    the loss."""
    abstain_at_accuracy: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Accuracy that sure predictions must have; others are marked as not sure. None
    marks none."""
    max_skipped: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Largest fraction of unusable images that is tolerated; more is an error."""
    cache_dir: Path | None = None
    """Directory where features are cached; None is the user's cache directory."""
    reread: bool = False
    """Whether to read every image again instead of trusting file sizes and times."""
    splits: SplitsConfig = SplitsConfig()
    head: HeadConfig = HeadConfig()
    finetune: FinetuneConfig = FinetuneConfig()


def load_config(
    source: Path | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> Config:
    """Builds a config from a YAML file, given values and `key=value` strings.

    Args:
        source: A YAML file of config keys, or a config.
        overrides: Values by dotted key. None means "not given"; a dict replaces only
            those keys of a section that it contains.
        assignments: `key=value` strings with values in YAML syntax.

    Raises:
        UsageError: If the file cannot be read, a key is unknown (the message suggests
            the nearest valid key) or a value is not allowed.
    """
    values: dict[str, Any] = {}
    if source is not None:
        if isinstance(source, Config):
            values = source.model_dump()
        else:
            values = _read_yaml(source)
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(values, key, value)
    for key, value in parse_assignments(assignments).items():
        _assign(values, key, value)
    return _validated(values)


def listing_config(values: Mapping[str, Any]) -> ListingConfig:
    """Builds the options of a listing alone, such as that of other images.

    Raises:
        UsageError: If a key is unknown or a value is not allowed.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return ListingConfig.model_validate(given)
    except ValidationError as error:
        raise UsageError(_explain(error, ListingConfig)) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parses `key=value` strings with values in YAML syntax.

    Raises:
        UsageError: If a string does not have this form.
    """
    values = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise UsageError(
                f"--set needs key=value. Received: {assignment!r}. "
                "Example: --set head.dropout=0.5"
            )
        values[key.strip()] = _parse_yaml(
            text, f"The value of --set {key}", _SHORT.repr(text)
        )
    return values


def finetune_options(file: Path | None, assignments: Iterable[str]) -> dict[str, Any]:
    """Reads keys of the `finetune` section from a config file and `key=value` strings.

    In the strings, the section's name is optional: `finetune.epochs=3` and `epochs=3`
    are equivalent.

    Raises:
        UsageError: If the file cannot be read, or a string does not have this form.
    """
    values = dict(_read_yaml(file).get("finetune") or {}) if file else {}
    for key, value in parse_assignments(assignments).items():
        values[key.removeprefix("finetune.")] = value
    return values


def default_of(key: str) -> Any:
    """Returns the default of a config key such as `head.epochs`; None without one."""
    section: type[BaseModel] = Config
    *sections, name = key.split(".")
    for part in sections:
        section = type(section.model_fields[part].default)
    default = section.model_fields[name].default
    return None if default is PydanticUndefined else default


def with_finetune(config: Config, options: Mapping[str, Any]) -> Config:
    """Returns a copy of the config with some keys of its `finetune` section replaced.

    Raises:
        UsageError: If a key is unknown or a value is not allowed.
    """
    values = config.model_dump(mode="json")
    for key, value in options.items():
        _assign(values, f"finetune.{key}", value)
    return _validated(values)


def to_yaml(config: Config) -> str:
    """Formats a config as YAML that `load_config` reads back as an equal config."""
    values = {"data": config.data, **config.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _validated(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(error, Config)) from None


class _YamlLoader(yaml.SafeLoader):
    """Loads plain data. Aliases are refused: they let a short text expand hugely."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, "aliases (*name) are not read", mark)
        return super().compose_node(parent, index)


def _parse_yaml(text: str, name: str, received: str) -> Any:
    if len(text) > _MOST_YAML:
        raise UsageError(
            f"{name} is longer than {_MOST_YAML:,} characters. Received: {received}."
        )
    where = ""
    try:
        return yaml.load(text, _YamlLoader)
    except RecursionError:
        problem = "it is nested too deeply"
    except yaml.MarkedYAMLError as error:
        problem = str(error.problem)
        if error.problem_mark:
            where = f" near line {error.problem_mark.line + 1}"
    except Exception as error:  # raised by int() and the like for malformed scalars
        problem = first_line(error)
    raise UsageError(
        f"{name} is not valid YAML{where}: {problem}. Received: {received}."
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_YAML + 1)
    except OSError as error:
        raise UsageError(
            f"The config file cannot be read. Received: {file} ({error.strerror})."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"The config file is not text in UTF-8. Received: {file}."
        ) from None
    values = _parse_yaml(text, "The config file", str(file))
    if isinstance(values, dict) and isinstance(values.get("splits"), dict):
        values["splits"].pop("val", None)  # of earlier versions, which held images out
    if not isinstance(values, dict):
        raise UsageError(
            f"A config file holds `key: value` lines. Received: {file}, which does not."
        )
    keys: dict[str, Any] = {}
    for key, value in values.items():
        _assign(keys, key, value)
    return keys


def _assign(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    if not isinstance(dotted_key, str):  # as YAML reads `1:` or `null:`
        raise UsageError(f"A config key is text. Received: {dotted_key!r}.")
    if isinstance(value, Mapping) and dotted_key not in _BY_NAME:
        for key, inner in value.items():
            _assign(values, f"{dotted_key}.{key}", inner)
        return
    *sections, key = dotted_key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"{section!r} is a value, not a section: {dotted_key}.")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):  # as YAML reads `1:` or `no:`
                raise UsageError(
                    f"A class name is text. Received: {_SHORT.repr(name)} in "
                    f"{dotted_key!r}. Write it in quotes."
                )
        value = dict(value)  # further assignments do not change the caller's
    values[key] = value


def _explain(error: ValidationError, model: type[ListingConfig]) -> str:
    """Describes one of pydantic's errors in one line, preferring unknown keys."""
    problems = error.errors()
    problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(map(str, problem["loc"]))
    known = list(_dotted_keys(model))
    if problem["type"] == "extra_forbidden":
        return f"Unknown config key. Received: {key!r}. {_nearest(key, known)}"
    if problem["type"] == "missing":
        return "No data given. Name a folder, a table of images, tfds:NAME or digits."
    # The location may end in a list index or the name of a union member; drop those.
    named = [x for x in known if f"{key}.".startswith(f"{x}.")]
    key = max(named, key=len, default=key)
    received = f"Received: {_SHORT.repr(problem['input'])}."
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"Config key {key!r}: {message}. {received}"
    return f"Config key {key!r} must be {_allowed(key)}. {received}"


def _nearest(key: str, known: Sequence[str]) -> str:
    """Suggests the key that was probably meant, or lists the valid keys."""
    section, _, name = key.rpartition(".")
    siblings = [x for x in known if x.rpartition(".")[0] == section]
    # In a section that exists, only its keys can be meant.
    by_name: dict[str, str] = {}
    for candidate in siblings if section in known else (*siblings, *known):
        by_name.setdefault(candidate.rpartition(".")[2], candidate)
    near = difflib.get_close_matches(name.lower(), by_name, n=1)
    if near:
        return f"Did you mean {by_name[near[0]]!r}?"
    return f"Keys are {', '.join(siblings or [x for x in known if '.' not in x])}."


def _allowed(key: str) -> str:
    """Describes in words which values a config key accepts, based on its type."""
    schema = Config.model_json_schema()
    found = schema
    for part in key.split("."):
        found = found["properties"][part]
        if "$ref" in found:
            found = schema["$defs"][found["$ref"].rpartition("/")[2]]
    return _in_words(found)


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        choices = [_in_words(x) for x in schema["anyOf"] if x.get("type") != "null"]
        return ", or ".join(choices)
    if "const" in schema:
        return str(schema["const"])
    if listed := schema.get("enum") or schema.get("examples"):
        return f"{', '.join(listed[:-1])} or {listed[-1]}"
    kind = schema.get("type")
    if kind == "array":
        return f"{_in_words(schema['items'])}, or a list of several"
    if (
        "additionalProperties" in schema
        and kind == "object"
        and schema["additionalProperties"]
    ):
        return f"{_in_words(schema['additionalProperties'])} by class name"
    if kind not in ("integer", "number"):
        return {"boolean": "true or false", "object": "a section of keys"}.get(
            str(kind), "text"
        )
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    form = "," if kind == "integer" else "g"
    limits = [f"{x} {schema[k]:{form}}" for k, x in bounds.items() if k in schema]
    number = "a whole number" if kind == "integer" else "a number"
    return ", ".join([number, " and ".join(limits)]) if limits else number


def _dotted_keys(section: type[_Section], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(
            field.annotation, _Section
        ):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def check_export(
    form: Format | Literal["savedmodel"],
    quantize: Quantization | None = None,
    keep: int | None = None,
) -> None:
    """Rejects incompatible export options.

    Raises:
        UsageError: If `quantize` is given without `litert`, `keep` without
            `savedmodel`, or `keep` is less than 1.
    """
    if quantize and form != "litert":
        raise UsageError(
            f"Only litert is quantized. Received: quantize={quantize} and "
            f"format={form}. Leave one of them out."
        )
    if keep is not None and form != "savedmodel":
        raise UsageError(
            f"Only a SavedModel has versions. Received: keep={keep} and format={form}. "
            "Leave one of them out."
        )
    if keep is not None and keep < 1:
        raise UsageError(f"At least one version is kept. Received: keep={keep}.")


def choices(literal: Any) -> tuple[str, ...]:
    """Returns the values of a `Literal` type, for the choices of an option."""
    return get_args(literal)
