"""Reads tensors from safetensors files, as Hugging Face and timm publish them."""

from pathlib import Path

import numpy as np

from keras_transfer.errors import WeightsError, first_line


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a safetensors file.

    The library checks the header: its size, that the tensors cover the data exactly,
    and that none reaches outside.

    Returns:
        float32 arrays by name, such as `blocks.0.norm1.weight`.

    Raises:
        WeightsError: If the `safetensors` package is not installed, or the file cannot
            be read or is damaged.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise WeightsError(
            "Safetensors files need a package that is not installed. Received: "
            f"{path}. Install it: pip install 'keras-transfer[bases]'."
        ) from None
    try:
        with safe_open(path, framework="numpy") as file:
            return {
                name: np.asarray(file.get_tensor(name), np.float32)
                for name in file.keys()
            }
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # SafetensorError, or a type that NumPy does not have
        raise WeightsError(
            f"{path} is no safetensors file, or a damaged one "
            f"({type(error).__name__}: {first_line(error)})."
        ) from None
