"""Layer and RMS norm on TPUs: each row of features is read once, forward and backward.

A block of rows is held next to the arithmetic units (VMEM) while its moments are taken and used, so
that of the size of x only x is read and y written, and backward x and dy are read and dx written:
five times x, where a program that cannot hold the row between its reductions moves seven.

With xhat = (x - mean) rstd, a = scale rstd and averages over a row:

    y  = xhat scale + bias
    dx = rstd (dy scale - <dy scale> - xhat <dy scale xhat>)
    dscale = sum of dy xhat over all rows,  dbias = sum of dy

One number per row is a column, of which the memory of a TPU would keep 128 lanes. It therefore
lies along the lanes there, and is turned while it is in registers.
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
"""Rows have one axis."""


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    use_mean: bool,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes each row by its own moments, then scales and shifts each feature.

    Args:
        x: [rows, features], of a shape and dtype with which `fits.rows_fit` finds no fault.
        scale: [features], or None for 1.
        bias: [features], or None for 0.
        epsilon: added to the variance, inside the root.
        use_mean: False takes no mean off and the variance about the origin.
        dtype: dtype of the result.
        interpret: runs on any device, slowly.

    Returns:
        The result, and mean and biased variance, float32 [rows, 1]; no mean without `use_mean`.
    """
    rows, features = x.shape
    tiles = _Tiles.of(rows, features, x.dtype, dtype)
    stats = jax.ShapeDtypeStruct(tiles.stats_shape, jnp.float32)
    y, mean, var = pl.pallas_call(
        partial(_forward, tiles=tiles, epsilon=epsilon),
        name="normalize_rows",
        grid=(tiles.blocks,),
        in_specs=(tiles.matrix, tiles.features(scale), tiles.features(bias)),
        out_specs=(tiles.matrix, tiles.stats if use_mean else None, tiles.stats),
        out_shape=(jax.ShapeDtypeStruct(x.shape, dtype), stats if use_mean else None, stats),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost(x, 9, x.nbytes + x.size * jnp.dtype(dtype).itemsize),
        interpret=interpret,
    )(x, along_lanes(scale), along_lanes(bias))
    return y, None if mean is None else tiles.column(mean), tiles.column(var)


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
        x: [rows, features].
        scale: [features], or None.
        mean: float32 [rows, 1], or None where the variance is about the origin.
        rstd: 1 / sqrt(var + epsilon), float32 [rows, 1].
        dy: [rows, features], of any of the dtypes of `x`.
        with_bias: whether there is a bias.
        interpret: runs on any device, slowly.

    Returns:
        dx, of the dtype of `x`, and float32 [features] for scale and bias, None where absent.
    """
    rows, features = x.shape
    tiles = _Tiles.of(rows, features, x.dtype, dy.dtype, x.dtype)
    sums = jax.ShapeDtypeStruct((fits.PARTIAL_SUMS, features), jnp.float32)
    dscale, dbias = (sums if given else None for given in (scale is not None, with_bias))
    dx, dscale, dbias = pl.pallas_call(
        partial(_backward, tiles=tiles),
        name="normalize_rows_backward",
        grid=(tiles.blocks,),
        in_specs=(
            tiles.matrix,
            tiles.features(scale),
            tiles.stats if mean is not None else None,
            tiles.stats,
            tiles.matrix,
        ),
        out_specs=(tiles.matrix, tiles.features(dscale), tiles.features(dbias)),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), dscale, dbias),
        # One block after the other, since all add to the same sums.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(x, 14, 2 * x.nbytes + dy.nbytes),
        interpret=interpret,
    )(x, along_lanes(scale), tiles.row(mean), tiles.row(rstd), dy)
    return dx, _added_up(dscale), _added_up(dbias)


class _Tiles:
    """How [rows, features] is divided: into blocks, those into stripes, and those into pieces.

    A stripe has as many rows as there are lanes, a piece as many as are worked on at a time.
    """

    def __init__(self, rows: int, features: int, block: int):
        self.rows, self.width = rows, features
        self.block = block
        self.blocks = pl.cdiv(rows, block)
        self.stripe = min(block, fits.LANES)
        self.piece = min(self.stripe, max(fits.SUBLANES, fits.PIECE // features // 16 * 16))
        while self.stripe % self.piece:
            self.piece -= fits.SUBLANES
        self.stats_shape = (self.blocks, block // self.stripe, self.stripe)
        self.matrix = pl.BlockSpec((block, features), lambda i: (i, 0))
        self.stats = pl.BlockSpec((1, *self.stats_shape[1:]), lambda i: (i, 0, 0))

    @classmethod
    def of(cls, rows: int, features: int, *dtypes: DTypeLike) -> "_Tiles":
        return cls(rows, features, fits.rows_block(rows, features, *dtypes))

    def features(self, value: Any) -> pl.BlockSpec | None:
        """For scale, bias and sums over rows: the same block at every step."""
        if value is None:
            return None
        return pl.BlockSpec(
            (fits.PARTIAL_SUMS if value.ndim == 2 else 1, self.width), lambda i: (0, 0)
        )

    def column(self, stats: jax.Array) -> jax.Array:
        """Statistics as the kernels write them, as [rows, 1]."""
        return stats.reshape(-1)[: self.rows, None]

    def row(self, column: jax.Array | None) -> jax.Array | None:
        """[rows, 1], as the kernels read it."""
        if column is None:
            return None
        missing = self.blocks * self.block - self.rows
        return jnp.pad(column[:, 0], (0, missing)).reshape(self.stats_shape)

    def each_piece(self, work: Callable[..., Any], start: Any, done: Callable[..., None]) -> None:
        """Calls `work(rows, stripe, offset, carry)` for each piece, `done` after each stripe.

        `rows` says where the piece is in the block, `offset` where it begins in its stripe.
        """
        pieces = self.stripe // self.piece

        def stripe(s, _):
            def piece(p, carry):
                first = pl.multiple_of(s * self.stripe + p * self.piece, self.piece)
                return work(pl.ds(first, self.piece), pl.ds(s, 1), p * self.piece, carry)

            done(pl.ds(s, 1), lax.fori_loop(0, pieces, piece, start))

        lax.fori_loop(0, self.block // self.stripe, stripe, None)


def _forward(x_ref, scale_ref, bias_ref, y_ref, mean_ref, var_ref, *, tiles: _Tiles, epsilon):
    start = jnp.zeros((1, tiles.stripe), jnp.float32)

    def work(rows, _, offset, stats):
        means, variances = stats
        x = x_ref[rows, :].astype(jnp.float32)
        if mean_ref is not None:
            mean = _average(x)
            x -= mean
            # The mean was rounded: what is left of it is taken off as well.
            rest = _average(x)
            x -= rest
            means += _turned_down(mean + rest, offset, tiles.stripe)
        var = _average(x * x)
        y = x * lax.rsqrt(var + epsilon)
        if scale_ref is not None:
            y *= scale_ref[:]
        if bias_ref is not None:
            y += bias_ref[:]
        y_ref[rows, :] = y.astype(y_ref.dtype)
        return means, variances + _turned_down(var, offset, tiles.stripe)

    def done(stripe, stats):
        for ref, value in zip((mean_ref, var_ref), stats, strict=True):
            if ref is not None:
                ref[0, stripe, :] = value

    tiles.each_piece(work, (start, start), done)


def _backward(
    x_ref, scale_ref, mean_ref, rstd_ref, dy_ref, dx_ref, dscale_ref, dbias_ref, *, tiles: _Tiles
):
    sums = [ref for ref in (dscale_ref, dbias_ref) if ref is not None]

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in sums:
            ref[:] = jnp.zeros_like(ref)

    first = pl.program_id(0) * tiles.block
    ragged = tiles.rows % tiles.block

    def add(ref, value, rows):
        if ragged:  # behind the end lies anything
            index = first + rows.start + lax.broadcasted_iota(jnp.int32, value.shape, 0)
            value = jnp.where(index < tiles.rows, value, 0.0)
        ref[:] += value.reshape(-1, fits.PARTIAL_SUMS, value.shape[1]).sum(0)

    def work(rows, stripe, offset, _):
        rstd = _turned_up(rstd_ref[0, stripe, :], offset, tiles.piece)
        xhat = x_ref[rows, :].astype(jnp.float32)
        if mean_ref is not None:
            xhat -= _turned_up(mean_ref[0, stripe, :], offset, tiles.piece)
        xhat *= rstd
        dy = dy_ref[rows, :].astype(jnp.float32)
        if dbias_ref is not None:
            add(dbias_ref, dy, rows)
        products = dy * xhat
        if dscale_ref is not None:
            add(dscale_ref, products, rows)
        if scale_ref is not None:
            dy *= scale_ref[:]
            products *= scale_ref[:]
        dx = dy - xhat * _average(products)
        if mean_ref is not None:
            dx -= _average(dy)
        dx_ref[rows, :] = (dx * rstd).astype(dx_ref.dtype)

    tiles.each_piece(work, None, lambda stripe, carry: None)


def _average(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True) * (1 / x.shape[1])


def _turned_down(column: jax.Array, offset: Any, lanes: int) -> jax.Array:
    """[n, 1] as [1, lanes], its first number at `offset`, with zeros around it."""
    shape = (column.shape[0], lanes)
    return jnp.sum(jnp.where(_diagonal(shape, offset), column, 0.0), axis=0, keepdims=True)


def _turned_up(row: jax.Array, offset: Any, sublanes: int) -> jax.Array:
    """[1, lanes] as [sublanes, 1], from the number at `offset`."""
    shape = (sublanes, row.shape[1])
    return jnp.sum(jnp.where(_diagonal(shape, offset), row, 0.0), axis=1, keepdims=True)


def _diagonal(shape: tuple[int, int], offset: Any) -> jax.Array:
    sublane, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return lane == sublane + offset


def _added_up(partial_sums: jax.Array | None) -> jax.Array | None:
    return None if partial_sums is None else partial_sums.sum(0)
