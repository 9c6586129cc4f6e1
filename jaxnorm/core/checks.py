"""Errors at the door: what a public function refuses, said at trace time from static facts.

Each message says who found what, with numbers, and gives the fix as code.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.axes import sizes


def any_array(x: ArrayLike, who: str, what: str = "the input") -> jax.Array:
    """`x` as an array, of whatever it holds.

    Raises:
        TypeError: `x` is no array.
    """
    try:
        return as_array(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{who}: {what} is {type(x).__name__}, which is no array. Pass an array of JAX or "
            f"NumPy, or nested lists of numbers of equal length."
        ) from error


def input_array(x: ArrayLike, who: str) -> jax.Array:
    """`x` as an array of floating point or complex numbers; integers and booleans become float32.

    Raises:
        TypeError: `x` is no array, or holds floating point numbers of 8 bits.
    """
    x = any_array(x, who)
    whole = x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)
    return inexact_array(x.astype(jnp.float32) if whole else x, who)


def inexact_array(x: ArrayLike, who: str) -> jax.Array:
    """`x` as an array of floating point or complex numbers, which it must hold as it is.

    Raises:
        TypeError: `x` is no array, or holds integers or booleans, which would be stored as another
            dtype, or floating point numbers of 8 bits, which JAX does not promote.
    """
    x = any_array(x, who)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{who}: the input is {x.dtype}{list(x.shape)}, but must hold floating point or "
            f"complex numbers. Convert it first: x.astype(jnp.float32)."
        )
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 16:
        raise TypeError(
            f"{who}: the input is {x.dtype}{list(x.shape)}, too narrow to compute with. "
            f"Widen it first: x.astype(jnp.bfloat16)."
        )
    return x


def as_array(value: ArrayLike) -> jax.Array:
    """`value` as a JAX array; one that is is left alone.

    A conversion to itself takes as long as a small operation, and under `jax_debug_nans` raises on
    NaN.
    """
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def static_epsilon(epsilon: float, who: str) -> float:
    """`epsilon` as a Python number.

    Raises:
        TypeError: it is no number, or is traced, so that its value is not known.
        ValueError: it is negative or NaN.
    """
    message = (
        f"{who}: epsilon={epsilon!r} must be a number that is known when the function is traced. "
        f"Use epsilon=1e-5, or add what varies to the variance yourself."
    )
    if isinstance(epsilon, str):
        raise TypeError(message)
    try:
        epsilon = float(epsilon)
    except (TypeError, ValueError) as error:  # what JAX raises on tracers is a TypeError
        raise TypeError(message) from error
    if not epsilon >= 0:
        raise ValueError(
            f"{who}: epsilon={epsilon} is added to a variance and must be 0 or more. "
            f"Use epsilon=1e-5."
        )
    return epsilon


def of_kind(kind: type, value: object, who: str, fix: str) -> None:
    """Raises TypeError unless `value` is of `kind`: evidence and estimates are easily confused."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{who}: needs jaxnorm.{kind.__name__}, found {type(value).__name__}. {fix}"
        )


def feature_array(
    value: ArrayLike | None,
    shape: Sequence[int],
    axes: Sequence[int],
    who: str,
    what: str,
    argument: str = "axis",
) -> jax.Array | None:
    """`value` as an array with one entry per feature of an input of `shape` with feature `axes`.

    `argument` is the name under which the caller takes the axes.

    Raises:
        ValueError: its shape is another.
    """
    if value is None:
        return None
    value = as_array(value)
    expected = sizes(shape, axes)
    if value.shape != expected:
        raise ValueError(
            f"{who}: {what} has shape {value.shape}, but the input of shape {tuple(shape)} has "
            f"{describe_features(shape, axes)}. Use {what} of shape {expected}, or say where the "
            f"features are: {argument}=..."
        )
    return value


def describe_features(shape: Sequence[int], axes: Sequence[int]) -> str:
    """For messages: `6 features along axis 3`, `(4, 6) features along axes (1, 3)`."""
    if len(axes) == 1:
        return f"{shape[axes[0]]} features along axis {axes[0]}"
    return f"{sizes(shape, axes)} features along axes {tuple(axes)}"


def integer(value: Any) -> int | None:
    """`value` as an integer, or None if it is none; a boolean is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
