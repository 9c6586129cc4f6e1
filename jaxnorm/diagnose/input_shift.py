"""How far the distribution of a layer's inputs moves in a step.

This is internal covariate shift in the first sense of the word: what a layer sees changes because
the layers before it have learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.moments import moments
from jaxnorm.diagnose.real import real_array


class InputShift(NamedTuple):
    """The change of each feature's distribution, in standard deviations of what it was.

    Where a feature was constant before, a change is infinite, and none is 0.

    Attributes:
        mean_change: `[features]`, (mean after - mean before) / std before.
        std_ratio: `[features]`, std after / std before; 1 where both are 0.
        wasserstein: `[features]`, the least mean distance by which the values must be moved to turn
            one distribution into the other, / std before. It sees all changes.
    """

    mean_change: jax.Array
    std_ratio: jax.Array
    wasserstein: jax.Array


def input_shift(before: ArrayLike, after: ArrayLike) -> InputShift:
    """The distance between a layer's input distributions before and after a step, by feature.

        wasserstein = integral of |F_before(t) - F_after(t)| dt / std_before

    with F the share of values up to t, over all axes but the last.

    Args:
        before: `[..., features]`, floating point: the inputs on some data before the step.
        after: `[..., features]`: on the same data, or on other data, after the step. The number of
            values may differ.

    Returns:
        An `InputShift` with one number for each feature, in float32 or wider.

    Raises:
        TypeError: an array is not floating point.
        ValueError: the features differ in number, or there is no value.

    Numerics: sorts the values of both arrays together; memory is a few times that of both. NaN
        where a feature holds NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm.diagnose import input_shift
        >>> x = jnp.array([[-1.0, 0.0], [1.0, 4.0]])
        >>> found = input_shift(x, jnp.array([[0.0, 0.0], [2.0, 8.0]]))
        >>> found.mean_change.tolist(), found.std_ratio.tolist(), found.wasserstein.tolist()
        ([1.0, 1.0], [1.0, 2.0], [1.0, 1.0])

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 2, for what is meant; Vallender 1974,
        "Calculation of the Wasserstein distance between probability distributions on the line", for
        the integral.
    """
    who = "input_shift"
    first, second = (_rows(x, who) for x in (before, after))
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"{who}: before has {first.shape[-1]} features along its last axis, after "
            f"{second.shape[-1]}. Give the inputs of the same layer, features last: "
            f"jnp.moveaxis(x, 1, -1)."
        )
    # About the first value, so that a constant feature has a std of exactly 0.
    old, new = (moments(x - x[:1], 0).stats() for x in (first, second))
    assert old.mean is not None
    assert new.mean is not None
    std, new_std = jnp.sqrt(old.var), jnp.sqrt(new.var)
    ratio = jnp.where((std == 0) & (new_std == 0), 1, new_std / std)
    change = (second[0] - first[0]) + (new.mean - old.mean)
    moved = jax.vmap(_wasserstein, in_axes=1)(first, second)
    return InputShift(_in_stds(change, std), ratio, _in_stds(moved, std))


def _rows(x: ArrayLike, who: str) -> jax.Array:
    x = real_array(x, who)
    if not x.ndim or not x.size:
        raise ValueError(
            f"{who}: found shape {x.shape}, which holds no value of a feature. Give arrays "
            f"[..., features]: x[:, None] for a single feature."
        )
    return x.reshape(-1, x.shape[-1]).astype(jnp.promote_types(x.dtype, jnp.float32))


def _in_stds(change: jax.Array, std: jax.Array) -> jax.Array:
    return jnp.where(change == 0, 0, change / std)


def _wasserstein(first: jax.Array, second: jax.Array) -> jax.Array:
    """Between two lists of numbers: the area between their distribution functions."""
    places = jnp.sort(jnp.concatenate([first, second]))

    def share_up_to(values: jax.Array) -> jax.Array:
        count = jnp.searchsorted(jnp.sort(values), places[:-1], side="right")
        return count.astype(values.dtype) / len(values)

    return jnp.sum(jnp.abs(share_up_to(first) - share_up_to(second)) * jnp.diff(places))
