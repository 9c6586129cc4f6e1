"""Masks: which elements count, and how much.

A mask is boolean, or holds weights: then the count is their sum, n = sum w_i, the mean is
sum w_i x_i / n, and so on. True is a weight of 1, False one of 0. Weights are constants: no
derivative is taken by them.

What does not count may hold anything. Where it is NaN, infinite or huge, 0 stands in its place
(`clean`), in the value and in the derivative.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision


def checked_mask(where: ArrayLike | None, shape: tuple[int, ...], who: str) -> jax.Array | None:
    """`where` as booleans or weights, with as many axes as the input, each of its size or 1.

    Integers count where they are not 0. Fewer axes are laid along the last ones of the input, as
    NumPy does, unless they also fit elsewhere: a mask [batch, time] for an input
    [batch, time, features] would be read as [time, features] whenever the sizes happen to agree.

    Raises:
        TypeError: the mask is no array of booleans or real numbers.
        ValueError: its shape does not fit, or fits in several ways.
    """
    if where is None:
        return None
    where = checks.any_array(where, who, "the mask")
    if jnp.issubdtype(where.dtype, jnp.floating):
        where = lax.stop_gradient(where)
    elif where.dtype == jnp.bool_ or jnp.issubdtype(where.dtype, jnp.integer):
        where = where.astype(jnp.bool_)
    else:
        raise TypeError(
            f"{who}: the mask is {where.dtype}{list(where.shape)}, but says of each element "
            f"whether it counts, or how much. Use booleans, or real weights: mask.real."
        )
    missing = len(shape) - where.ndim
    placements = _placements(where.shape, shape)
    if placements != [missing]:
        raise ValueError(f"{who}: {_misfit(where.shape, shape, placements)}")
    return ax.lay_along(where, range(missing, len(shape)), len(shape)) if missing else where


def _placements(mask: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """The axes of the input at which a mask can begin; of those that come to the same, the last."""
    missing = len(shape) - len(mask)
    laid = {(1,) * i + mask + (1,) * (missing - i): i for i in range(missing + 1)}
    return [
        i
        for along, i in laid.items()
        if all(size in (1, full) for size, full in zip(along, shape, strict=True))
    ]


def _misfit(mask: tuple[int, ...], shape: tuple[int, ...], placements: list[int]) -> str:
    missing = len(shape) - len(mask)
    fixes = [
        f"mask[{', '.join(['None'] * i + ['...'] + ['None'] * (missing - i))}]" for i in placements
    ]
    if len(fixes) > 1:
        return (
            f"a mask of shape {mask} fits an input of shape {shape} in {len(fixes)} ways. Say "
            f"which axes are meant: {' or '.join(fixes)}."
        )
    one_each = (*shape[:1], *(1 for _ in shape[1:]))
    fix = (
        f"Add the missing axes: {fixes[0]}."
        if fixes
        else f"For one value per example: mask of shape {one_each}."
    )
    return (
        f"a mask of shape {mask} does not fit an input of shape {shape}: it needs as many axes, "
        f"each of the input's size or 1. {fix}"
    )


def counting(where: jax.Array) -> jax.Array:
    """Which elements count: those of another weight than 0."""
    return where if where.dtype == jnp.bool_ else where != 0


def weighted(value: jax.Array, where: jax.Array | None) -> jax.Array:
    """`value` times the weights, and 0 where they are 0, whatever `value` is there."""
    if where is None:
        return value
    if where.dtype != jnp.bool_:
        value = value * where.astype(precision.real_dtype(value.dtype))
    return jnp.where(counting(where), value, jnp.zeros_like(value))


def harmless(x: jax.Array, where: jax.Array | None) -> jax.Array | None:
    """Which elements of `x` may take part; None for all, which is the case without a mask.

    Among those that do not count, NaN, infinities and huge numbers may not. Huge is what could
    overflow when it is normalized and multiplied with itself: 0 times the resulting infinity would
    be NaN. Others may, since a layer normalizes them as well.
    """
    if where is None:
        return None
    limit = float(jnp.finfo(precision.accumulation_dtype(x.dtype)).max) ** 0.25

    def moderate(part: jax.Array) -> jax.Array:
        largest = min(limit, float(jnp.finfo(part.dtype).max))
        return (part >= -largest) & (part <= largest)

    may = moderate(x.real) & moderate(x.imag) if jnp.iscomplexobj(x) else moderate(x)
    return counting(where) | may


def clean(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """`x` with 0 in place of the elements that are not `harmless`."""
    selected = harmless(x, where)
    return x if selected is None else jnp.where(selected, x, jnp.zeros_like(x))
