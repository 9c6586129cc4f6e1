"""The arrays of a source by key, and what several frameworks do to kernels."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def flat_arrays(tree: Any, who: str, fix: str, separator: str = "/") -> dict[str, np.ndarray]:
    """The arrays of a mapping, or of mappings in it, by the names on the way to them.

    Raises:
        TypeError: no mapping, or a value that is no array; with `fix` as code.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{who}: found {type(tree).__name__}, but needs arrays by name. Use {fix}.")
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            below = flat_arrays(leaf, who, fix, separator)
            arrays |= {f"{name}{separator}{key}": value for key, value in below.items()}
            continue
        try:
            value = np.asarray(leaf)
        except ValueError:  # lists of different lengths
            value = np.asarray(None)
        if value.dtype.kind in "OUS":
            raise TypeError(
                f"{who}: {name!r} is {type(leaf).__name__}, which is no array. Use {fix}."
            )
        arrays[str(name)] = value
    return arrays


def reshaped(leaf: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array in `shape`, if that has as many elements; otherwise as it is."""
    return leaf if shape is None or math.prod(shape) != leaf.size else leaf.reshape(shape)


def without_ones(leaf: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array in `shape`, if the two differ by axes of size 1 only; otherwise as it is."""

    def others(sizes: tuple[int, ...]) -> list[int]:
        return [size for size in sizes if size != 1]

    return leaf if shape is None or others(leaf.shape) != others(shape) else leaf.reshape(shape)


def mirrored(kernel: np.ndarray) -> np.ndarray:
    """A kernel [..., inputs, outputs] of a transposed convolution as that of the convolution.

    The convolution is the one whose transpose it is: its kernel lies the other way along every
    spatial axis, and has inputs and outputs exchanged. The same function takes it back.
    """
    spatial = tuple(range(kernel.ndim - 2))
    return np.flip(kernel, spatial).swapaxes(-1, -2)
