"""keras_transfer: transfer learning on images with Keras 3.

    import keras_transfer

    run = keras_transfer.fit("photos/")
    keras_transfer.unfreeze_and_finetune(run)
    for prediction in keras_transfer.predict(run, ["new.jpg"]):
        ...

Where things are, each of which imports only those below it:

    cli, terminal   the command line, and what it shows
    workflows       one file for each command
    reporting       what people look at
    advice          measured numbers -> advice
    serving         what leaves the tool
    training        heads and tails
    evaluation      figures, with intervals
    features        the frozen part's outputs, computed once
    models, data    pretrained bases; images
    runs            the run directory
    runtime         TensorFlow's C API, OpenVINO
    config, events, errors
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "advise",
    "evaluate",
    "export",
    "fit",
    "open_run",
    "predict",
    "rank",
    "unfreeze_and_finetune",
]

if TYPE_CHECKING:
    from keras_transfer.runs.run import open_run
    from keras_transfer.workflows.advise import advise
    from keras_transfer.workflows.evaluate import evaluate_run as evaluate
    from keras_transfer.workflows.export import export
    from keras_transfer.workflows.finetune import unfreeze_and_finetune
    from keras_transfer.workflows.fit import fit
    from keras_transfer.workflows.predict import predict
    from keras_transfer.workflows.rank import rank

# TensorFlow, from Python or through its C API, would take all memory of a GPU at once.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

_LAZY = {
    "advise": ("keras_transfer.workflows.advise", "advise"),
    "evaluate": ("keras_transfer.workflows.evaluate", "evaluate_run"),
    "export": ("keras_transfer.workflows.export", "export"),
    "fit": ("keras_transfer.workflows.fit", "fit"),
    "open_run": ("keras_transfer.runs.run", "open_run"),
    "predict": ("keras_transfer.workflows.predict", "predict"),
    "rank": ("keras_transfer.workflows.rank", "rank"),
    "unfreeze_and_finetune": (
        "keras_transfer.workflows.finetune",
        "unfreeze_and_finetune",
    ),
}


def __getattr__(name: str) -> Any:
    """Imports a workflow, and with it TensorFlow, when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
