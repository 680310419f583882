"""Checks the inputs of a run before TensorFlow is imported, which takes seconds.

Mistakes in the config, a name that is taken, directories that cannot be written and
missing data are therefore reported immediately.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from keras_transfer.config import Config
from keras_transfer.data.loading import load
from keras_transfer.data.reading import is_on_disk
from keras_transfer.data.tables import Splits
from keras_transfer.errors import UsageError
from keras_transfer.features.cache import FeatureCache
from keras_transfer.models.bases import get_bases, own_image_size
from keras_transfer.runs.files import is_writable
from keras_transfer.runs.run import MANIFEST, SPLITS, NewRun, new_run


@dataclass(frozen=True)
class Inputs:
    """A resolved config and the images that it names.

    Attributes:
        config: The resolved config; all paths are absolute.
        run: The run that will be created.
        makes_run: Whether it will be; else nothing is written.
        in_memory: The images if they are given in Python; None if `config.data` says
            where they are.
        fewest_classes: As in `loading.load`.
    """

    config: Config
    run: NewRun
    makes_run: bool = True
    in_memory: object | None = None
    fewest_classes: int = 2

    @property
    def data(self) -> object:
        """The images, as `loading.load` takes them."""
        return self.config.data if self.in_memory is None else self.in_memory

    @functools.cached_property
    def splits(self) -> Splits:
        """The images in their splits, listed on first access.

        Raises:
            UsageError: If a run will be created and options do not fit the images.
        """
        config = self.config
        splits = load(
            self.data,
            config.splits,
            config.seed,
            config,
            fewest_classes=self.fewest_classes,
        )
        if self.makes_run:
            _check_fit(config, splits)
        return splits

    def with_config(self, config: Config) -> "Inputs":
        """Returns the same images, as they were listed, with another config."""
        found = replace(self, config=config)
        vars(found)["splits"] = self.splits
        return found

    @property
    def need_tensorflow(self) -> bool:
        """Whether TensorFlow is needed to list the images (`digits` and `tfds:`)."""
        return self.config.data == "digits" or self.config.data.startswith("tfds:")


def prepare(
    config: Config,
    makes_run: bool = True,
    in_memory: object | None = None,
    fewest_classes: int = 2,
    ending: str = "",
) -> Inputs:
    """Resolves a config and checks that results can be written.

    Args:
        config: The user's config.
        makes_run: Whether a run directory will be created.
        in_memory: The images if they are given in Python.
        fewest_classes: As in `loading.load`.
        ending: What the run's name ends with if none is given; "" for the base.

    Raises:
        UsageError: If the base is unknown, DATA is a run, the run's name is not valid
            or is taken, or the runs directory or the cache cannot be used.
        KerasTransferError: If another process is changing the run to be overwritten.
    """
    runs_dir = config.runs_dir.expanduser()  # messages show it as it was given
    config = _resolve(config, ending)
    assert config.name is not None
    run = NewRun(runs_dir / config.name)
    if makes_run:
        run = new_run(runs_dir, config.name, config.overwrite)
        if not is_writable(runs_dir):
            raise UsageError(
                f"The runs directory cannot be written. Received: {runs_dir}. Choose "
                "another runs_dir."
            )
    FeatureCache(config.cache_dir).check_usable()
    return Inputs(config, run, makes_run, in_memory, fewest_classes)


def _check_fit(config: Config, splits: Splits) -> None:
    """Checks that options fit the classes and the number of images.

    Raises:
        UsageError: If a class weight is for an unknown class, the metric does not exist
            for the data, there cannot be as many folds, or there are too few images for
            the accuracy of sure predictions.
    """
    # SciPy and scikit-learn take a second; mistakes in the data are found before.
    from keras_transfer.evaluation.crossvalidation import head_folds
    from keras_transfer.evaluation.metrics import deciding_metric
    from keras_transfer.evaluation.thresholds import check_reachable
    from keras_transfer.training.labelled import class_weighting

    table, names, head = splits.train, splits.class_names, config.head
    deciding_metric(table.targets, config.metric)
    class_weighting(table.targets, names, head.class_weight, head.logit_adjustment)
    if config.abstain_at_accuracy:
        check_reachable(config.abstain_at_accuracy, table.targets, table.groups)
    head_folds(table, len(names), config.folds, config.seed)


def _resolve(config: Config, ending: str) -> Config:
    """Fills in defaults that depend on other keys and makes all paths absolute."""
    base = "+".join(row.name for row in get_bases(config.base))
    if is_on_disk(config.data):
        path = _absolute(Path(config.data))
        if (path / MANIFEST).is_file() and (path / SPLITS).is_file():
            raise UsageError(
                f"DATA names images. Received: {config.data}, which is a run. Name the "
                "data that it was made from."
            )
        data, stem = str(path), path.name if path.is_dir() else path.stem
    else:
        data, stem = config.data, config.data
        for prefix in ("tfds:", "memory:"):
            stem = stem.removeprefix(prefix)
        stem = stem.replace(":", "-")
    plain_stem = "".join(c if c.isalnum() or c in "_.-" else "_" for c in stem)
    weights = config.weights
    if weights not in ("imagenet", "none"):
        if "+" in base:
            raise UsageError(
                "A file holds the weights of one base. Received: "
                f"weights={weights} for {base}. Use weights=imagenet."
            )
        weights = str(_absolute(Path(weights)))
    file = config.splits.file
    splits = config.splits.model_copy(update={"file": file and _absolute(file)})
    return config.model_copy(
        update={
            "data": data,
            "data_dir": config.data_dir and _absolute(config.data_dir),
            "runs_dir": _absolute(config.runs_dir),
            "cache_dir": config.cache_dir and _absolute(config.cache_dir),
            "splits": splits,
            "weights": weights,
            "base": base,
            "image_size": config.image_size or own_image_size(base),
            "name": config.name
            or f"{plain_stem.strip('.-') or 'run'}-{ending or base}",
        }
    )


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()
