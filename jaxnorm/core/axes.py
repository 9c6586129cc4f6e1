"""Axes of an array: one canonical form, and how an array of features is laid along them."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def canonical_axes(
    axes: int | Iterable[int], ndim: int, who: str, what: str = "axis"
) -> tuple[int, ...]:
    """`axes` as sorted, distinct, non-negative numbers; `who` and `what` name them in errors.

    Raises:
        ValueError: an axis is out of range for `ndim` axes, or named twice.
        TypeError: an axis is not an integer.
    """
    several = isinstance(axes, Iterable) and not isinstance(axes, str)
    listed: Any = axes if several else (axes,)
    try:
        given = tuple(operator.index(axis) for axis in listed)
    except TypeError:
        raise TypeError(
            f"{who}: {what} must be an integer or several, found {axes!r}. "
            f"Count axes from the front or, with a minus, from the back: {what}=-1."
        ) from None
    for axis in given:
        if not -ndim <= axis < ndim:
            fix = f"Use a value from {-ndim} to {ndim - 1}." if ndim else "Add an axis: x[None]."
            raise ValueError(f"{who}: {what}={axis} is out of range for {ndim} axes. {fix}")
    positive = sorted(axis % ndim for axis in given)
    if len(set(positive)) != len(positive):
        raise ValueError(
            f"{who}: {what}={given} names an axis twice, in an input with {ndim} axes they are "
            f"{tuple(positive)}. Name each once: {what}={tuple(sorted(set(positive)))}."
        )
    return tuple(positive)


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of an array with `ndim` axes that are not among the canonical `axes`."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def lay_along(value: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """`value`, whose axes belong to the canonical `axes`, with size 1 along all `ndim` others."""
    return jnp.expand_dims(value, other_axes(axes, ndim))


def sizes(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of an array of `shape` along `axes`."""
    return tuple(shape[axis] for axis in axes)


def extent(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many elements lie along `axes` of an array of `shape`."""
    return math.prod(sizes(shape, axes))


def surely(holds: Callable[[], bool]) -> bool:
    """Whether sizes fulfil something; False where symbolic sizes (`jax.export`) leave it open."""
    try:
        return bool(holds())
    except jax.errors.InconclusiveDimensionOperation:
        return False
