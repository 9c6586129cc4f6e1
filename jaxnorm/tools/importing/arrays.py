"""The arrays of a source by key, and what several frameworks do to kernels."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np


def flat_arrays(
    trees: Mapping[str, Any], who: str, fix: str, separator: str = "/"
) -> dict[str, np.ndarray]:
    """The arrays of mappings, and of mappings in them, by the names on the way to them.

    Args:
        trees: mappings, by what an error calls them.
        who, fix: of errors: the tool, and what to give, as code.
        separator: between names.

    Raises:
        TypeError: no mapping, one that contains itself, or a value that is no array.
        ValueError: two arrays of the same name.
    """
    named = []
    for called, tree in trees.items():
        if not isinstance(tree, Mapping):
            raise TypeError(
                f"{who}: found {type(tree).__name__}, but needs arrays by name. Use {fix}."
            )
        for path, leaf in _leaves(tree, (), (), who):
            origin = called + "".join(f"[{name!r}]" for name in path)
            named.append(
                (separator.join(map(str, path)), origin, as_array(leaf, path[-1], who, fix))
            )
    return by_name(named, who)


def _leaves(
    tree: Mapping[Any, Any], path: tuple[Any, ...], around: tuple[int, ...], who: str
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if id(tree) in around:
        raise TypeError(
            f"{who}: the mapping at {list(path)} contains itself. Give one that does not."
        )
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, (*path, name), (*around, id(tree)), who)
        else:
            yield (*path, name), leaf


def by_name(named: Iterable[tuple[str, str, np.ndarray]], who: str) -> dict[str, np.ndarray]:
    """Arrays by name, from names, where each was found, and the arrays.

    Raises:
        ValueError: two arrays of the same name.
    """
    arrays: dict[str, np.ndarray] = {}
    origins: dict[str, str] = {}
    for name, origin, leaf in named:
        if name in arrays:
            raise ValueError(
                f"{who}: {name!r} is the name of two arrays, {origins[name]} {arrays[name].shape} "
                f"and {origin} {leaf.shape}. Rename one: each layer needs a name of its own."
            )
        arrays[name], origins[name] = leaf, origin
    return arrays


def as_array(leaf: Any, name: Any, who: str, fix: str) -> np.ndarray:
    """An array of the source in NumPy, in the byte order of this machine.

    Raises:
        TypeError: no array of numbers, or one of which some are masked.
    """
    if np.ma.is_masked(leaf):
        raise TypeError(
            f"{who}: {np.ma.count_masked(leaf)} of {leaf.size} values of {name!r} are masked, and "
            f"a layer has no mask. Say what they are, such as 0: arrays[{name!r}].filled(0)."
        )
    try:
        # Not every tensor is an array: one of lists of different lengths, or that was deleted.
        array = np.asarray(_of_tensor(leaf))
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.type is np.void:
        raise TypeError(
            f"{who}: {name!r} has the dtype {array.dtype}, which is bytes. If they are bfloat16, "
            f"whose name np.savez does not keep: arrays[{name!r}].view(ml_dtypes.bfloat16)."
        )
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise TypeError(f"{who}: {name!r} is {type(leaf).__name__}, which is no array. Use {fix}.")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _of_tensor(leaf: Any) -> Any:
    """A tensor of PyTorch as NumPy takes it: without its gradient, from any device, any dtype."""
    if not hasattr(leaf, "detach"):
        return leaf
    tensor = leaf.detach().cpu()
    dtype = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    return tensor if dtype is None else tensor.float().numpy().astype(dtype)


def without_ones(leaf: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array in `shape`, if the two differ by axes of size 1 only; otherwise as it is."""

    def others(sizes: tuple[int, ...]) -> list[int]:
        return [size for size in sizes if size != 1]

    return leaf if shape is None or others(leaf.shape) != others(shape) else leaf.reshape(shape)


def repeated(count: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """A count of batches for each feature, if it is one number; otherwise as it is."""
    return count if shape is None or count.ndim else np.broadcast_to(count, shape)


def mirrored(kernel: np.ndarray) -> np.ndarray:
    """A kernel [..., inputs, outputs] of a transposed convolution as that of the convolution.

    The convolution is the one whose transpose it is: its kernel lies the other way along every
    spatial axis, and has inputs and outputs exchanged. The same function takes it back.
    """
    spatial = tuple(range(kernel.ndim - 2))
    return np.flip(kernel, spatial).swapaxes(-1, -2)
