"""What a run is made from, checked before TensorFlow is imported: that takes seconds.

Mistakes in the config, a name that is taken, a directory that cannot be written and
data that are not there are found here, at once.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from keras_transfer.config import Config
from keras_transfer.data.loading import load
from keras_transfer.data.reading import is_on_disk
from keras_transfer.data.tables import Splits
from keras_transfer.errors import UsageError
from keras_transfer.features.cache import FeatureCache
from keras_transfer.models.bases import get_base
from keras_transfer.runs.files import is_writable
from keras_transfer.runs.run import NewRun, new_run


@dataclass(frozen=True)
class Inputs:
    """A config with nothing left open, and the images that it names.

    Attributes:
        config: Resolved; all paths are absolute.
        run: Where a run of it will be.
    """

    config: Config
    run: NewRun

    @functools.cached_property
    def splits(self) -> Splits:
        """The images; `digits` and `tfds:` need TensorFlow to list them."""
        config = self.config
        return load(config.data, config.splits, config.seed, config.data_dir)

    @property
    def need_tensorflow(self) -> bool:
        """Whether TensorFlow is needed to list the images."""
        return not is_on_disk(self.config.data)


def prepare(config: Config, makes_run: bool = True) -> Inputs:
    """Fills in what a config leaves open, and checks where results will be written.

    Args:
        config: What the user chose.
        makes_run: Whether a run directory will be written.

    Raises:
        UsageError: If the run's name is not usable or taken, or the runs directory or
            the cache cannot be used.
    """
    runs_dir = config.runs_dir.expanduser()  # shown as it was given
    config = _resolve(config)
    assert config.name is not None
    run = NewRun(runs_dir / config.name)
    if makes_run:
        run = new_run(runs_dir, config.name, config.overwrite)
        if not is_writable(runs_dir):
            raise UsageError(
                f"The runs directory cannot be written. Received: {runs_dir}. Choose "
                "another with --runs-dir."
            )
    FeatureCache(config.cache_dir).check_usable()
    return Inputs(config, run)


def _resolve(config: Config) -> Config:
    """The config with every None that depends on others filled in, paths absolute."""
    base = get_base(config.base)
    if is_on_disk(config.data):
        path = _absolute(Path(config.data))
        data, stem = str(path), path.name if path.is_dir() else path.stem
    else:
        data, stem = config.data, config.data.removeprefix("tfds:").replace(":", "-")
    plain_stem = "".join(c if c.isalnum() or c in "_.-" else "_" for c in stem)
    weights = config.weights
    if weights not in ("imagenet", "none"):
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
            "base": base.name,
            "image_size": config.image_size or base.image_size,
            "name": config.name or f"{plain_stem.strip('.-') or 'run'}-{base.name}",
        }
    )


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()
