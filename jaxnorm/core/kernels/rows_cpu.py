"""Layer and RMS norm on CPUs, in the order of operations that XLA compiles best.

What several reductions share, XLA writes out for CPUs, in float32 and with statistics and scale
spread to the size of x: up to six such arrays for one backward pass. A product with a vector it
computes from whatever elementwise function it is given. So one product of x and dy is enough:

    products = dy (x - mean)
    dx       = rstd (dy scale - <dy scale> - (x - mean) rstd^2 <products scale>)
    dscale   = rstd . products,  dbias = sum of dy
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

KEEPS_AXES = True
"""XLA fuses less across a reshape, so rows keep the axes that they have, forward. Backward, the
products with vectors want them flat."""

LARGE = 1 << 17
"""How many numbers make it worth while that a product with a vector takes longer to compile."""


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """y, mean and var of [..., features]; else as `rows_tpu.forward`."""

    def average(values):
        return values.sum(-1, keepdims=True) * (1 / x.shape[-1])

    def of_features(param):
        return lax.broadcast_to_rank(param.astype(jnp.float32), x.ndim)

    mean, centred = None, x.astype(jnp.float32)
    if use_mean:
        pivot = average(centred)
        offset = centred - pivot
        rest = average(offset)
        var = jnp.maximum(average(offset * offset) - rest * rest, 0)
        mean = pivot + rest
        centred = centred - mean
    else:
        var = average(centred * centred)
    slope = lax.rsqrt(var + epsilon)
    if scale is not None:
        slope = slope * of_features(scale)
    y = centred * slope
    if bias is not None:
        y = y + of_features(bias)
    return y.astype(dtype), mean, var


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    rstd: jax.Array,
    dy: jax.Array,
    *,
    with_bias: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """dx, dscale and dbias; arguments and results else as in `rows_tpu.backward`."""
    features, share = x.shape[-1], 1 / x.shape[-1]
    weights = jnp.ones(features, jnp.float32) if scale is None else scale.astype(jnp.float32)
    centred, wide = (each.reshape(-1, features).astype(jnp.float32) for each in (x, dy))
    if mean is not None:
        centred = centred - mean
    products = wide * centred
    dx = wide * weights[None] - centred * (_along_rows(products, weights) * share * rstd * rstd)
    if mean is not None:
        dx = dx - _along_rows(wide, weights) * share
    dscale = None if scale is None else _over_rows(products, rstd)
    dbias = wide.sum(0) if with_bias else None
    return (dx * rstd).astype(x.dtype).reshape(x.shape), dscale, dbias


def _along_rows(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of each row by weights of the features, [rows, 1]."""
    if values.size < LARGE:
        return (values * weights[None]).sum(1, keepdims=True)
    return jnp.dot(values, weights, precision=lax.Precision.HIGHEST)[:, None]


def _over_rows(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum over rows by weights of the rows, [rows, 1]: [features]."""
    if values.size < LARGE:
        return (values * weights).sum(0)
    return jnp.dot(weights[:, 0], values, precision=lax.Precision.HIGHEST)
