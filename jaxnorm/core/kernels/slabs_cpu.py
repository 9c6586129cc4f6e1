"""Group and instance norm on CPUs, in the order of operations that XLA compiles best.

Sums over positions come first and give one number for each feature, whose memory lies side by side;
the few features of a group are added up after that. The sums that the gradients of scale and bias
need are then the only ones over all of x, forward and backward alike.
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
    groups: int,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """y, mean and var of [examples, positions, features]; as in `slabs_tpu.forward`."""

    def of_example(x, scale, bias):
        def averages(values):
            return _averages(values.sum(0), groups, x.shape)

        mean, centred = None, x.astype(jnp.float32)
        if use_mean:
            pivot = averages(centred)
            offset = centred - _spread(pivot, x.shape)
            rest = averages(offset)
            var = jnp.maximum(averages(offset * offset) - rest * rest, 0)
            mean = pivot + rest
            centred = centred - _spread(mean, x.shape)
        else:
            var = averages(centred * centred)
        y = centred * _spread(lax.rsqrt(var + epsilon), x.shape)
        if scale is not None:
            y = y * scale.astype(jnp.float32)[None]
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None]
        return y.astype(dtype), mean, var

    summed = False, False if use_mean else None, False
    of_block = _each(of_example, summed)
    return in_blocks(of_block, x, scale, bias, summed=summed, block=block_size(x.shape))


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
    groups = rstd.shape[1]
    weights = jnp.ones(x.shape[2:], jnp.float32) if scale is None else scale.astype(jnp.float32)

    def of_example(example, weights):
        x, mean, rstd, dy = example
        centred, wide = x.astype(jnp.float32), dy.astype(jnp.float32)
        if mean is not None:
            centred = centred - _spread(mean, x.shape)
        total, along = wide.sum(0), (wide * centred).sum(0)
        slope = _averages(along * weights, groups, x.shape) * rstd * rstd
        dx = wide * weights[None] - centred * _spread(slope, x.shape)
        if mean is not None:
            dx = dx - _spread(_averages(total * weights, groups, x.shape), x.shape)
        dx = (dx * _spread(rstd, x.shape)).astype(x.dtype)
        dscale = None if scale is None else along * _spread(rstd, x.shape)[0]
        return dx, dscale, total if with_bias else None

    summed = False, None if scale is None else True, True if with_bias else None
    of_block = _each(of_example, summed)
    examples = x, mean, rstd, dy
    return in_blocks(of_block, examples, weights, summed=summed, block=block_size(x.shape))


def _each(function, summed):
    """`function` of one example for several: for one alone without the axis, which costs time."""

    def of_block(examples, *shared):
        if jax.tree.leaves(examples)[0].shape[0] > 1:
            mapped = jax.vmap(function, in_axes=(0, *[None] * len(shared)))(examples, *shared)
            return jax.tree.map(lambda one, is_sum: one.sum(0) if is_sum else one, mapped, summed)
        result = function(jax.tree.map(lambda one: one[0], examples), *shared)
        return jax.tree.map(lambda one, is_sum: one if is_sum else one[None], result, summed)

    return of_block


def _averages(sums: jax.Array, groups: int, shape: tuple[int, ...]) -> jax.Array:
    """From sums over positions, [features], to averages, [groups]."""
    positions, features = shape
    size = features // groups
    grouped = sums if size == 1 else sums.reshape(groups, size).sum(1)
    return grouped * (1 / (positions * size))


def _spread(stats: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [groups] to [1, features]."""
    return jnp.repeat(stats, shape[1] // stats.shape[0])[None]
