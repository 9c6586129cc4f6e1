"""Group and instance norm on TPUs: each example is read once, forward and backward.

An example's slab [positions, features] is held next to the arithmetic units (VMEM) while its
moments are taken and used, so that forward and backward move five times the bytes of x. Of each
group of features there is one mean and variance; `groups` is the number of features for instance
norm, and 1 for layer norm over space.

With xhat = (x - mean) rstd, and averages over the positions and features of a group:

    y  = xhat scale + bias
    dx = rstd (dy scale - <dy scale> - xhat <dy scale xhat>)
    dscale = sum of dy xhat over examples and positions,  dbias = sum of dy

Sums over positions come first. What is left, [examples, features], is summed over the features of
each group by a product with a matrix of zeros and ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxnorm.core.kernels import fits
from jaxnorm.core.kernels.shared_tpu import along_lanes, cost

KEEPS_AXES = False
"""Positions have one axis."""


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    groups: int,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes each group of each example by its moments, then scales and shifts each feature.

    Args:
        x: [examples, positions, features], with whose shape and dtype `fits.slabs_fit` finds no
            fault.
        scale: [features], or None for 1.
        bias: [features], or None for 0.
        groups: how many groups the features are divided into, in their order.
        epsilon: added to the variance, inside the root.
        use_mean: False takes no mean off and the variance about the origin.
        dtype: dtype of the result.
        interpret: runs on any device, slowly.

    Returns:
        The result, and mean and biased variance, float32 [examples, groups]; no mean without
        `use_mean`.
    """
    slabs = _Slabs(x.shape, groups, x.dtype, dtype)
    stats = jax.ShapeDtypeStruct(slabs.stats_shape, jnp.float32)
    parameters = along_lanes(scale), along_lanes(bias), slabs.membership()
    y, mean, var = pl.pallas_call(
        partial(_forward, slabs=slabs, epsilon=epsilon),
        name="normalize_slabs",
        grid=(slabs.blocks,),
        in_specs=(slabs.block, *map(slabs.shared, parameters)),
        out_specs=(slabs.block, slabs.stats if use_mean else None, slabs.stats),
        out_shape=(jax.ShapeDtypeStruct(x.shape, dtype), stats if use_mean else None, stats),
        scratch_shapes=slabs.scratch,
        compiler_params=slabs.params("parallel"),
        cost_estimate=cost(x, 9, x.nbytes + x.size * jnp.dtype(dtype).itemsize),
        interpret=interpret,
    )(x, *parameters)
    return y, _reshaped(mean, (-1, groups)), var.reshape(-1, groups)


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    rstd: jax.Array,
    dy: jax.Array,
    *,
    with_bias: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients of `forward`'s result, by the closed form.

    Args:
        x: [examples, positions, features].
        scale: [features], or None.
        mean: float32 [examples, groups], or None where the variance is about the origin.
        rstd: 1 / sqrt(var + epsilon), float32 [examples, groups].
        dy: of the shape of `x` and any of its dtypes.
        with_bias: whether there is a bias.
        interpret: runs on any device, slowly.

    Returns:
        dx, of the dtype of `x`, and float32 [features] for scale and bias, None where absent.
    """
    slabs = _Slabs(x.shape, rstd.shape[1], x.dtype, dy.dtype, x.dtype)
    sums = jax.ShapeDtypeStruct((1, x.shape[2]), jnp.float32)
    dscale, dbias = (sums if given else None for given in (scale is not None, with_bias))
    scale, membership = along_lanes(scale), slabs.membership()
    mean, rstd = _reshaped(mean, slabs.stats_shape), rstd.reshape(slabs.stats_shape)
    dx, dscale, dbias = pl.pallas_call(
        partial(_backward, slabs=slabs),
        name="normalize_slabs_backward",
        grid=(slabs.blocks,),
        in_specs=(
            slabs.block,
            slabs.shared(scale),
            slabs.stats if mean is not None else None,
            slabs.stats,
            slabs.block,
            slabs.shared(membership),
        ),
        out_specs=(slabs.block, slabs.shared(dscale), slabs.shared(dbias)),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), dscale, dbias),
        scratch_shapes=slabs.scratch,
        # One block after the other, since all add to the same sums.
        compiler_params=slabs.params("arbitrary"),
        cost_estimate=cost(x, 14, 2 * x.nbytes + dy.nbytes),
        interpret=interpret,
    )(x, scale, mean, rstd, dy, membership)
    features = x.shape[2:]
    return dx, _reshaped(dscale, features), _reshaped(dbias, features)


class _Slabs:
    """How [examples, positions, features] is divided: into blocks of examples, slabs into pieces.

    A piece has as many positions of one example as are worked on at a time.
    """

    def __init__(self, shape: tuple[int, ...], groups: int, *dtypes: DTypeLike):
        examples, self.positions, self.width = shape
        slabs = (examples, self.positions, self.width)
        self.groups = groups
        self.count = self.positions * self.width // groups
        self.examples = fits.slabs_block(slabs, *dtypes)
        self.blocks = examples // self.examples
        self.piece = max(fits.SUBLANES, fits.PIECE // 2 // self.width // 16 * 16)
        self.stats_shape = (self.blocks, self.examples, groups)
        self.block = pl.BlockSpec((self.examples, *shape[1:]), lambda i: (i, 0, 0))
        self.stats = pl.BlockSpec((1, *self.stats_shape[1:]), lambda i: (i, 0, 0))
        # Two sums and two coefficients for each example and feature.
        self.scratch = [pltpu.VMEM((self.examples, self.width), jnp.float32)] * 4
        self.vmem = fits.slabs_vmem(self.examples, slabs, *dtypes)

    def params(self, order: Any) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(dimension_semantics=(order,), vmem_limit_bytes=self.vmem)

    def shared(self, value: Any) -> pl.BlockSpec | None:
        """For what is not divided: the same block at every step."""
        return None if value is None else pl.BlockSpec(value.shape, lambda i: (0, 0))

    def membership(self) -> jax.Array | None:
        """1 where a feature is in a group, [features, groups]; None where no product is needed."""
        if self.groups in (1, self.width):
            return None
        group = jnp.arange(self.width) // (self.width // self.groups)
        return (group[:, None] == jnp.arange(self.groups)[None, :]).astype(jnp.float32)

    def averaged(self, sums: jax.Array, membership_ref: Any) -> jax.Array:
        """Sums over positions, [examples, features], as averages, [examples, groups]."""
        if self.groups == 1:
            sums = jnp.sum(sums, axis=1, keepdims=True)
        elif membership_ref is not None:
            sums = _product(sums, membership_ref[:], 0)
        return sums * (1 / self.count)

    def spread(self, stats: jax.Array, membership_ref: Any) -> jax.Array:
        """[examples, groups] as [examples, features]."""
        if membership_ref is not None:
            return _product(stats, membership_ref[:], 1)
        return jnp.broadcast_to(stats, (self.examples, self.width))

    def each_example(self, work: Callable[[Any], None]) -> None:
        """Calls `work(example)`."""
        lax.fori_loop(0, self.examples, lambda example, _: work(example), None)

    def each_piece(self, work: Callable[[Any, Any], Any], start: Any) -> Any:
        """Calls `work(positions, carry)` for each piece of a slab."""
        whole = self.positions // self.piece

        def piece(p, carry):
            return work(pl.ds(pl.multiple_of(p * self.piece, self.piece), self.piece), carry)

        carry = lax.fori_loop(0, whole, piece, start) if whole else start
        if rest := self.positions - whole * self.piece:
            carry = work(pl.ds(whole * self.piece, rest), carry)
        return carry

    def sums(self, values: Callable[[Any, Any], tuple], *refs: Any) -> list[jax.Array]:
        """Sums of `values(example, positions)` over positions, [examples, features] each."""
        zero = jnp.zeros((1, self.width), jnp.float32)

        def of_example(example):
            def add(positions, totals):
                found = values(example, positions)
                return tuple(
                    total + jnp.sum(value, axis=0, keepdims=True)
                    for total, value in zip(totals, found, strict=True)
                )

            totals = self.each_piece(add, (zero,) * len(refs))
            for ref, total in zip(refs, totals, strict=True):
                ref[pl.ds(example, 1), :] = total

        self.each_example(of_example)
        return [ref[:] for ref in refs]


def _forward(
    x_ref,
    scale_ref,
    bias_ref,
    membership_ref,
    y_ref,
    mean_ref,
    var_ref,
    first_ref,
    second_ref,
    mean_of_feature,
    factor_ref,
    *,
    slabs: _Slabs,
    epsilon: float,
):
    def wide(example, positions):
        return x_ref[example, positions, :].astype(jnp.float32)

    def centred(example, positions):
        x = wide(example, positions)
        return x if mean_ref is None else x - mean_of_feature[pl.ds(example, 1), :]

    if mean_ref is None:
        (squares,) = slabs.sums(lambda *at: (jnp.square(wide(*at)),), first_ref)
        var = slabs.averaged(squares, membership_ref)
    else:
        (total,) = slabs.sums(lambda *at: (wide(*at),), first_ref)
        mean = slabs.averaged(total, membership_ref)
        mean_of_feature[:] = slabs.spread(mean, membership_ref)

        def deviations(*at):
            x = centred(*at)
            return x, jnp.square(x)

        # The mean was rounded: what is left of it is taken off as well.
        both = slabs.sums(deviations, first_ref, second_ref)
        rest, squares = (slabs.averaged(one, membership_ref) for one in both)
        mean += rest
        mean_ref[0] = mean
        mean_of_feature[:] = slabs.spread(mean, membership_ref)
        var = jnp.maximum(squares - rest * rest, 0.0)
    var_ref[0] = var
    factor_ref[:] = slabs.spread(lax.rsqrt(var + epsilon), membership_ref)
    if scale_ref is not None:
        factor_ref[:] *= scale_ref[:]

    def write(example):
        def piece(positions, _):
            y = centred(example, positions) * factor_ref[pl.ds(example, 1), :]
            if bias_ref is not None:
                y += bias_ref[:]
            y_ref[example, positions, :] = y.astype(y_ref.dtype)

        slabs.each_piece(piece, None)

    slabs.each_example(write)


def _backward(
    x_ref,
    scale_ref,
    mean_ref,
    rstd_ref,
    dy_ref,
    membership_ref,
    dx_ref,
    dscale_ref,
    dbias_ref,
    along_ref,
    total_ref,
    mean_of_feature,
    rstd_of_feature,
    *,
    slabs: _Slabs,
):
    rstd_of_feature[:] = slabs.spread(rstd_ref[0], membership_ref)
    if mean_ref is not None:
        mean_of_feature[:] = slabs.spread(mean_ref[0], membership_ref)

    def read(example, positions):
        row = pl.ds(example, 1)
        xhat = x_ref[example, positions, :].astype(jnp.float32)
        if mean_ref is not None:
            xhat -= mean_of_feature[row, :]
        dy = dy_ref[example, positions, :].astype(jnp.float32)
        return xhat * rstd_of_feature[row, :], dy

    def products(*at):
        xhat, dy = read(*at)
        return xhat * dy, dy

    both = slabs.sums(products, along_ref, total_ref)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in (dscale_ref, dbias_ref):
            if ref is not None:
                ref[:] = jnp.zeros_like(ref)

    for ref, sums in zip((dscale_ref, dbias_ref), both, strict=True):
        if ref is not None:
            ref[:] += jnp.sum(sums, axis=0, keepdims=True)
    for ref, sums in zip((along_ref, total_ref), both, strict=True):
        scaled = sums if scale_ref is None else sums * scale_ref[:]
        ref[:] = slabs.spread(slabs.averaged(scaled, membership_ref), membership_ref)

    def write(example):
        row = pl.ds(example, 1)

        def piece(positions, _):
            xhat, dy = read(example, positions)
            if scale_ref is not None:
                dy *= scale_ref[:]
            dx = dy - xhat * along_ref[row, :]
            if mean_ref is not None:
                dx -= total_ref[row, :]
            dx_ref[example, positions, :] = (dx * rstd_of_feature[row, :]).astype(dx_ref.dtype)

        slabs.each_piece(piece, None)

    slabs.each_example(write)


def _product(x: jax.Array, membership: jax.Array, contracted: int) -> jax.Array:
    """A product in float32, which would otherwise round its factors to bfloat16."""
    return lax.dot_general(
        x,
        membership,
        (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _reshaped(value: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    return None if value is None else value.reshape(shape)
