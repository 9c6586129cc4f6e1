"""Group and instance norm on CPUs, in the order of operations that XLA compiles best.

Sums over positions come first and give one number for each feature, whose memory lies side by side;
the few features of a group are added up after that. The sums that the gradients of scale and bias
need are then the only ones over all of x, forward and backward alike:

    total = sum of dy,  along = sum of dy (x - mean) rstd              over positions
    dx    = rstd (dy scale - xhat <along scale> - <total scale>)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxnorm.core.kernels.sample import first_part

KEEPS_AXES = True
"""XLA fuses less across a reshape, so positions keep the axes that they have."""


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
    """y, mean and var of [examples, ..., features]; else as in `slabs_tpu.forward`."""

    def averages(values):
        return _averages(_over_positions(values), groups, math.prod(values.shape[1:-1]))

    mean, centred = None, x.astype(jnp.float32)
    if use_mean:
        shift = averages(first_part(x, 1).astype(jnp.float32))
        offset = centred - _spread(shift, x.shape)
        rest = averages(offset)
        var = jnp.maximum(averages(offset * offset) - rest * rest, 0)
        mean = shift + rest
        centred = centred - _spread(mean, x.shape)
    else:
        var = averages(centred * centred)
    slope = _spread(lax.rsqrt(var + epsilon), x.shape)
    if scale is not None:
        slope = slope * _of_features(scale, x.shape)
    y = centred * slope
    if bias is not None:
        y = y + _of_features(bias, x.shape)
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
    groups, positions = rstd.shape[1], math.prod(x.shape[1:-1])
    weights = _of_features(jnp.ones(x.shape[-1:]) if scale is None else scale, (1, 1))
    centred, wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    if mean is not None:
        centred = centred - _spread(mean, x.shape)
    # The factor rstd comes after the sum: it is one for each feature then. It comes before others,
    # since the square of a large or a small number may be none any more.
    total = _over_positions(wide)
    along = _over_positions(wide * centred) * _of_each_feature(rstd, x.shape[-1])
    slope = _averages(along * weights, groups, positions) * rstd
    dx = wide * _of_features(weights, x.shape) - centred * _spread(slope, x.shape)
    if mean is not None:
        dx = dx - _spread(_averages(total * weights, groups, positions), x.shape)
    dx = (dx * _spread(rstd, x.shape)).astype(x.dtype)
    return dx, None if scale is None else along.sum(0), total.sum(0) if with_bias else None


def _over_positions(values: jax.Array) -> jax.Array:
    """Sums, [examples, features]."""
    return values.sum(tuple(range(1, values.ndim - 1)))


def _averages(sums: jax.Array, groups: int, positions: int) -> jax.Array:
    """From sums over positions, [examples, features], to averages, [examples, groups]."""
    examples, features = sums.shape
    size = features // groups
    grouped = sums if size == 1 else sums.reshape(examples, groups, size).sum(2)
    return grouped * (1 / (positions * size))


def _of_each_feature(stats: jax.Array, features: int) -> jax.Array:
    """From [examples, groups] to [examples, features]."""
    return jnp.repeat(stats, features // stats.shape[1], axis=1)


def _spread(stats: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [examples, groups] to [examples, 1, ..., features], with as many axes as `shape`."""
    each = _of_each_feature(stats, shape[-1])
    return lax.expand_dims(each, range(1, len(shape) - 1))


def _of_features(param: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [features] to float32 with as many axes as `shape`."""
    return lax.broadcast_to_rank(param.astype(jnp.float32), len(shape))
