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

from jaxnorm.core.kernels.blocks_cpu import block_size, in_blocks


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """y, mean and var of [rows, features]; arguments and results as in `rows_tpu.forward`."""
    share = 1 / x.shape[1]

    def of_rows(x, scale, bias):
        mean, centred = None, x.astype(jnp.float32)
        if use_mean:
            pivot = centred.sum(1, keepdims=True) * share
            offset = centred - pivot
            rest = offset.sum(1, keepdims=True) * share
            var = jnp.maximum((offset * offset).sum(1, keepdims=True) * share - rest * rest, 0)
            mean = pivot + rest
            centred = centred - mean
        else:
            var = (centred * centred).sum(1, keepdims=True) * share
        y = centred * lax.rsqrt(var + epsilon)
        if scale is not None:
            y = y * scale.astype(jnp.float32)[None]
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None]
        return y.astype(dtype), mean, var

    summed = False, False if use_mean else None, False
    return in_blocks(of_rows, x, scale, bias, summed=summed, block=block_size(x.shape))


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    rstd: jax.Array,
    dy: jax.Array,
    *,
    with_bias: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """dx, dscale and dbias; arguments and results as in `rows_tpu.backward`."""
    share = 1 / x.shape[1]
    weights = jnp.ones(x.shape[1:], jnp.float32) if scale is None else scale.astype(jnp.float32)

    def of_rows(rows, weights):
        x, mean, rstd, dy = rows
        centred, wide = x.astype(jnp.float32), dy.astype(jnp.float32)
        if mean is not None:
            centred = centred - mean
        products = wide * centred
        slope = _dot(products, weights)[:, None] * share * rstd * rstd
        dx = wide * weights[None] - centred * slope
        if mean is not None:
            dx = dx - _dot(wide, weights)[:, None] * share
        dscale = None if scale is None else _dot(rstd[:, 0], products)
        dbias = wide.sum(0) if with_bias else None
        return (dx * rstd).astype(x.dtype), dscale, dbias

    summed = False, None if scale is None else True, True if with_bias else None
    rows = x, mean, rstd, dy
    return in_blocks(of_rows, rows, weights, summed=summed, block=block_size(x.shape))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, precision=lax.Precision.HIGHEST)
