"""keras_transfer: transfer learning on images with Keras 3.

    import keras_transfer

    run = keras_transfer.fit("photos/")
    keras_transfer.unfreeze_and_finetune(run)
    for prediction in keras_transfer.predict(run, ["new.jpg"]):
        ...

Reading order of the modules, each of which imports only those before it: errors,
config, run, data, c_api, serving, decode, augment, bases, efficientnet_lite, alexnet,
torch_checkpoint, weights, model, fold, features, inputs, extract, head, evaluation,
crossvalidation, transferability, prediction, bundle, warmup, savedmodel, formats,
feature_extraction, unfreeze, activations, optim, tail, finetune, advice, evidence,
ranking, terminal, cli.
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
    from keras_transfer.evidence import advise
    from keras_transfer.feature_extraction import fit
    from keras_transfer.finetune import unfreeze_and_finetune
    from keras_transfer.prediction import evaluate_run as evaluate
    from keras_transfer.prediction import predict
    from keras_transfer.ranking import rank
    from keras_transfer.run import open_run
    from keras_transfer.savedmodel import export

# TensorFlow, from Python or through its C API, would take all memory of a GPU at once.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

_LAZY = {
    "advise": ("keras_transfer.evidence", "advise"),
    "evaluate": ("keras_transfer.prediction", "evaluate_run"),
    "export": ("keras_transfer.savedmodel", "export"),
    "fit": ("keras_transfer.feature_extraction", "fit"),
    "open_run": ("keras_transfer.run", "open_run"),
    "predict": ("keras_transfer.prediction", "predict"),
    "rank": ("keras_transfer.ranking", "rank"),
    "unfreeze_and_finetune": ("keras_transfer.finetune", "unfreeze_and_finetune"),
}


def __getattr__(name: str) -> Any:
    """Imports a workflow, and with it TensorFlow, when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
