"""One feature axis, seen as groups of features: how many, and how an array is laid out by them."""

import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxnorm.core import axes as ax


def feature_axis(axis: Any, ndim: int, who: str) -> int:
    """The one feature axis, counted from the front.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range, or there are several.
    """
    canonical = ax.canonical_axes(axis, ndim, who)
    if len(canonical) != 1:
        raise ValueError(
            f"{who}: axis={axis} names {len(canonical)} feature axes, but features are taken in "
            f"groups along one. Put them into one axis: x.reshape((*x.shape[:-2], -1)), axis=-1."
        )
    return canonical[0]


def group_shape(
    features: int, num_groups: int | None, group_size: int | None, who: str
) -> tuple[int, int]:
    """(number of groups, features in a group), from whichever of the two is given.

    Raises:
        ValueError: both or none are given, or they do not divide the features.
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"{who}: num_groups={num_groups} and group_size={group_size} are given, but one of "
            f"them must be, and the other None. Use num_groups=1, or num_groups=None, "
            f"group_size=16."
        )
    what, parts = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if not isinstance(parts, numbers.Integral) or parts < 1 or features % parts:
        if isinstance(features, int):
            divisors = [n for n in range(1, features + 1) if features % n == 0]
            fix = f"Use a divisor of {features}: one of {divisors}."
        else:
            fix = f"A symbolic size must be a multiple of it by its form: '{parts}*f'."
        raise ValueError(f"{who}: {features} features cannot be split with {what}={parts}. {fix}")
    parts = int(parts)
    return (parts, features // parts) if group_size is None else (features // parts, parts)


def split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """`x` as [..., groups, group size], with its feature `axis` last and split."""
    last = jnp.moveaxis(x, axis, -1)
    size = last.shape[-1] // groups
    return last.reshape((*last.shape[:-1], groups, size))


def join(grouped: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split`."""
    last = grouped.reshape((*grouped.shape[:-2], grouped.shape[-2] * grouped.shape[-1]))
    return jnp.moveaxis(last, -1, axis)


def placed_by_compiler(
    function: Callable[..., Any],
    x: jax.Array,
    axis: int,
    *,
    result: Literal["like x", "summary", "both"] = "like x",
) -> Callable[..., Any]:
    """`function`, which may divide features of `x` that lie on several devices.

    Where mesh axes are explicit, a type says which devices hold which features. Once eight devices'
    features are seen as four groups there is no such type, though for a norm of groups no feature
    has to move: sums over half a group are added to those of the other half. The compiler does just
    that where it may place arrays as it likes, so that is where `function` then runs. Whitening
    multiplies features of a group with each other: there they travel between its devices.

    Args:
        function: of `x` and other arrays.
        x: what it is called with.
        axis: the feature axis.
        result: what the function returns: an array of the shape of `x`, which will lie as `x` does,
            a summary, which all devices will hold, or both.
    """
    lies = jax.typeof(x).sharding
    names = lies.spec[axis]
    if names is None:
        return function
    held_by_all = PartitionSpec()
    places = {"like x": lies, "summary": held_by_all, "both": (lies, held_by_all)}
    return jax.sharding.auto_axes(function, axes=names, out_sharding=places[result])
