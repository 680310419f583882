"""keras_transfer: transfer learning on images with Keras 3.

    import keras_transfer

    run = keras_transfer.fit("photos/")
    keras_transfer.unfreeze_and_finetune(run)
    for prediction in keras_transfer.predict(run, ["new.jpg"]):
        ...

The subpackages and modules, from top to bottom; each imports only those below it:

    cli             the commands
    options         options that commands share
    terminal        what is printed
    api             the public functions and `Run`
    workflows       one module per command
    reporting       report pages, charts
    advice          advice derived from measurements
    findings        what an audit finds
    serving         exported models and TensorFlow Serving
    training        training of heads and tails
    evaluation      metrics with confidence intervals
    features        outputs of the frozen part, computed once
    models, data    pretrained bases; images
    runs            the run directory
    runtime         TensorFlow's C API, OpenVINO
    config, events, errors
    markup          untrusted text; HTML of results in notebooks
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Config",
    "KerasTransferError",
    "Listener",
    "MlflowListener",
    "Run",
    "TensorBoardListener",
    "UsageError",
    "advise",
    "audit",
    "compare_runs",
    "drift",
    "evaluate",
    "export",
    "extract_features",
    "fit",
    "list_runs",
    "open_run",
    "predict",
    "rank",
    "report",
    "search",
    "to_png",
    "unfreeze_and_finetune",
]

if TYPE_CHECKING:
    from keras_transfer.api import (
        Run,
        advise,
        audit,
        compare_runs,
        drift,
        evaluate,
        export,
        extract_features,
        fit,
        list_runs,
        open_run,
        predict,
        rank,
        report,
        search,
        unfreeze_and_finetune,
    )
    from keras_transfer.config import Config
    from keras_transfer.data.formats.convert import to_png
    from keras_transfer.errors import KerasTransferError, UsageError
    from keras_transfer.events import Listener
    from keras_transfer.reporting.tracking import MlflowListener, TensorBoardListener

# Otherwise TensorFlow, from Python or through its C API, reserves all GPU memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

_MODULES = {
    "Config": "keras_transfer.config",
    "KerasTransferError": "keras_transfer.errors",
    "Listener": "keras_transfer.events",
    "MlflowListener": "keras_transfer.reporting.tracking",
    "TensorBoardListener": "keras_transfer.reporting.tracking",
    "UsageError": "keras_transfer.errors",
    "to_png": "keras_transfer.data.formats.convert",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used.

    The process that verifies an export imports this package, but none of them.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES.get(name, "keras_transfer.api"))
    return getattr(module, name)


def __dir__() -> list[str]:
    """Lists the public names only, not the modules that happen to be imported."""
    return [*__all__, "__version__"]
