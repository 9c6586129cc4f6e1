"""Group and instance norm on CPUs, in the order of operations that XLA compiles best.

Sums over positions come first and give one number for each feature, whose memory lies side by side;
the few features of a group are added up after that. The sums that the gradients of scale and bias
need are then the only ones over all of x, forward and backward alike:

    total = sum of dy,  along = sum of dy (x - mean) rstd              over positions
    dx    = rstd (dy scale - xhat <along scale> - <total scale>)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxnorm.core.kernels.sample import of_sample


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    groups: int,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """y, mean and var of [examples, positions, features]; as in `slabs_tpu.forward`."""

    def averages(values):
        return _averages(values.sum(1), groups, x.shape[1])

    mean, centred = None, x.astype(jnp.float32)
    if use_mean:
        shift = _averages(of_sample(x, 1)[:, 0], groups, 1)
        offset = centred - _spread(shift, x.shape)
        rest = averages(offset)
        var = jnp.maximum(averages(offset * offset) - rest * rest, 0)
        mean = shift + rest
        centred = centred - _spread(mean, x.shape)
    else:
        var = averages(centred * centred)
    slope = _spread(lax.rsqrt(var + epsilon), x.shape)
    if scale is not None:
        slope = slope * scale.astype(jnp.float32)[None, None]
    y = centred * slope
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, None]
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
    """dx, dscale and dbias; as in `slabs_tpu.backward`."""
    groups, positions = rstd.shape[1], x.shape[1]
    weights = jnp.ones(x.shape[2:], jnp.float32) if scale is None else scale.astype(jnp.float32)
    weights = weights[None]
    centred, wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    if mean is not None:
        centred = centred - _spread(mean, x.shape)
    rstds = _spread(rstd, x.shape)
    # The factor rstd comes after the sum: it is one for each feature then. It comes before others,
    # since the square of a large or a small number may be none any more.
    total, along = wide.sum(1), (wide * centred).sum(1) * rstds[:, 0]
    slope = _averages(along * weights, groups, positions) * rstd
    dx = wide * weights[None] - centred * _spread(slope, x.shape)
    if mean is not None:
        dx = dx - _spread(_averages(total * weights, groups, positions), x.shape)
    dx = (dx * rstds).astype(x.dtype)
    return dx, None if scale is None else along.sum(0), total.sum(0) if with_bias else None


def _averages(sums: jax.Array, groups: int, positions: int) -> jax.Array:
    """From sums over positions, [examples, features], to averages, [examples, groups]."""
    examples, features = sums.shape
    size = features // groups
    grouped = sums if size == 1 else sums.reshape(examples, groups, size).sum(2)
    return grouped * (1 / (positions * size))


def _spread(stats: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [examples, groups] to [examples, 1, features]."""
    return jnp.repeat(stats, shape[2] // stats.shape[1], axis=1)[:, None]
