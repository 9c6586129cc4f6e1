"""Files of arrays by name (safetensors), read and written without PyTorch."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np


def load_safetensors(path: str | os.PathLike[str], who: str) -> dict[str, np.ndarray]:
    """The arrays of a file, bfloat16 included.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, or holds a dtype that NumPy has not.
    """
    library = _library(who)
    try:
        return library.numpy.load_file(os.fspath(path))
    except (library.SafetensorError, KeyError) as error:
        raise ValueError(
            f"{who}: safetensors cannot read {os.fspath(path)!r} into NumPy: {error}. Fetch it "
            f"anew if it is damaged; of a dtype that NumPy has not, write float32 with PyTorch."
        ) from error


def save_safetensors(state_dict: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Writes arrays by name to a file, which PyTorch reads with `safetensors.torch.load_file`.

    Args:
        state_dict: NumPy arrays by key, as `export_torch` returns them.
        path: of the file, `"model.safetensors"`.

    Raises:
        ImportError: safetensors is not installed.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from jaxnorm.tools import save_safetensors
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> save_safetensors({"bn1.weight": np.ones(4, np.float32)}, path)
        >>> os.path.getsize(path) > 16
        True
    """
    # A transposed array would be written in the order of its memory.
    arrays = {key: np.array(leaf, order="C") for key, leaf in state_dict.items()}
    _library("save_safetensors").numpy.save_file(arrays, os.path.expanduser(path))


def _library(who: str) -> Any:
    try:
        import safetensors.numpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{who}: reading and writing .safetensors files needs safetensors, which is not "
            f"installed. Run pip install safetensors, or give arrays by name."
        ) from error
    return safetensors
