"""Layer and RMS norm on GPUs: each row of features is read once, forward and backward.

A program holds a few rows in registers while their moments are taken and used, so that of the size
of x only x is read and y written, and backward x and dy are read and dx written: five times x,
where XLA's programs, that read rows anew for each reduction, move eight or nine.

With xhat = (x - mean) rstd, a = scale rstd and averages over a row:

    y  = xhat scale + bias
    dx = rstd (dy scale - <dy scale> - xhat <dy scale xhat>)
    dscale = sum of dy xhat over all rows,  dbias = sum of dy

The backward pass has as many programs as run at once. Each walks over many rows, loads the next
while it works on one, and adds up its own part of dscale and dbias; XLA adds the parts.

Written for Pallas' Triton backend: it is what all of JAX 0.10 to 0.12 share, and serves every size
by masks. From JAX 0.11 on it warns, when lowered, that it will be removed. Its successor, Mosaic
GPU, serves GPUs from Hopper on, has no masks, and changes with each release.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike

KEEPS_AXES = False
"""Rows have one axis."""

SERVED = (jnp.float32, jnp.bfloat16, jnp.float16)

LARGEST_FEATURES = 8192
"""Of wider rows, what the backward pass holds does not fit the registers."""

IN_FORWARD, IN_BACKWARD = 2048, 512
"""How many numbers of an array a program works on at a time, or one row if that is more.

Forward, a program should have enough work to be worth its start. Backward, where it goes on from
row to row, sums within few threads are the quickest, and need no barrier within one warp of them.
"""

EACH_THREAD = 16
"""How many of these numbers each thread has: two loads of 16 bytes, in bfloat16."""

AT_ONCE = 132 * 8192
"""How many numbers all programs of the backward pass work on: so many does an H100 or H200 hold
in the registers of its 132 multiprocessors, with all that is computed from them."""

LEAST_STEPS = 8
"""How many times each goes on at least, since it writes sums of the size of a row at the end."""


def fit(shape: tuple[int, int], dtype: DTypeLike, result: DTypeLike | None = None) -> str | None:
    """Why these kernels do not serve an array of `shape`; None if they do.

    `result` is the dtype of what is computed, if it is not that of the array.
    """
    rows, features = shape
    for one in (dtype, result or dtype):
        if jnp.dtype(one) not in SERVED:
            names = ", ".join(jnp.dtype(served).name for served in SERVED)
            return f"{jnp.dtype(one).name} is none of {names}"
    if not rows or not features:
        return f"the shape {tuple(shape)} holds nothing"
    if features > LARGEST_FEATURES:
        return f"{features} features are more than the {LARGEST_FEATURES} that registers hold"
    return None


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
        x: [rows, features], of a shape and dtype with which `fit` finds no fault.
        scale: [features], or None for 1.
        bias: [features], or None for 0.
        epsilon: added to the variance, inside the root.
        use_mean: False takes no mean off and the variance about the origin.
        dtype: dtype of the result.
        interpret: runs on any device, slowly.

    Returns:
        The result, and mean and biased variance, float32 [rows, 1]; no mean without `use_mean`.
    """
    tile = _Tile.of(x.shape, IN_FORWARD)
    matrix = pl.BlockSpec((tile.rows, tile.features), lambda i: (i, 0))
    column = pl.BlockSpec((tile.rows, 1), lambda i: (i, 0))
    stats = jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)
    return pl.pallas_call(
        partial(_forward, tile=tile, shape=x.shape, epsilon=epsilon),
        name="normalize_rows",
        grid=(pl.cdiv(x.shape[0], tile.rows),),
        in_specs=(matrix, tile.features_of(scale), tile.features_of(bias)),
        out_specs=(matrix, column if use_mean else None, column),
        out_shape=(jax.ShapeDtypeStruct(x.shape, dtype), stats if use_mean else None, stats),
        compiler_params=tile.params,
        interpret=interpret,
    )(x, _as_row(scale), _as_row(bias))


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
    tile = _Tile.of(x.shape, IN_BACKWARD)
    tiles = pl.cdiv(rows, tile.rows)
    most = min(AT_ONCE // (tile.rows * tile.features), pl.cdiv(tiles, LEAST_STEPS))
    steps = pl.cdiv(tiles, most)
    programs = pl.cdiv(tiles, steps)
    # The arrays as a whole, since a program moves on by itself, and looks one step ahead.
    reached = (steps + 1) * programs * tile.rows
    matrix = pl.BlockSpec((reached, tile.features), lambda i: (0, 0))
    column = pl.BlockSpec((reached, 1), lambda i: (0, 0))
    part = pl.BlockSpec((1, tile.features), lambda i: (i, 0))
    parts = jax.ShapeDtypeStruct((programs, features), jnp.float32)
    absent = (scale is None, not with_bias)
    dx, dscale, dbias = pl.pallas_call(
        partial(_backward, tile=tile, shape=x.shape, steps=steps),
        name="normalize_rows_backward",
        grid=(programs,),
        in_specs=(
            matrix,
            tile.features_of(scale),
            None if mean is None else column,
            column,
            matrix,
        ),
        out_specs=(matrix, *(None if a else part for a in absent)),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), *(None if a else parts for a in absent)),
        compiler_params=tile.params,
        interpret=interpret,
    )(x, _as_row(scale), mean, rstd, dy)
    return dx, _total(dscale), _total(dbias)


class _Tile(NamedTuple):
    """The rows that a program works on at a time; powers of two, as Triton wants them."""

    rows: int
    features: int
    warps: int

    @classmethod
    def of(cls, shape: tuple[int, ...], numbers: int) -> "_Tile":
        """For a matrix of `shape`, of about so many `numbers`, but of whole rows."""
        features = pl.next_power_of_2(shape[1])
        rows = max(1, min(numbers // features, pl.next_power_of_2(shape[0])))
        threads = rows * features // EACH_THREAD
        return cls(rows, features, min(max(threads // 32, 1), 32))

    @property
    def params(self) -> pltriton.CompilerParams:
        return pltriton.CompilerParams(num_warps=self.warps)

    def features_of(self, value: jax.Array | None) -> pl.BlockSpec | None:
        """For scale and bias: the same row for every program."""
        return None if value is None else pl.BlockSpec((1, self.features), lambda i: (0, 0))

    def inside(self, first: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Which of the rows from `first` on, and which features, the matrix has."""
        rows = first + lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
        features = lax.broadcasted_iota(jnp.int32, (1, self.features), 1)
        return rows < shape[0], features < shape[1]


def _forward(x_ref, scale_ref, bias_ref, y_ref, mean_ref, var_ref, *, tile, shape, epsilon):
    in_rows, in_features = tile.inside(pl.program_id(0) * tile.rows, shape)
    inside = in_rows & in_features
    x = _load(x_ref, inside).astype(jnp.float32)
    if mean_ref is not None:
        mean = _average(x, shape)
        x = jnp.where(inside, x - mean, 0.0)
        # The mean was rounded: what is left of it is taken off as well.
        rest = _average(x, shape)
        x = jnp.where(inside, x - rest, 0.0)
        pltriton.store(mean_ref, mean + rest, mask=in_rows)
    var = _average(x * x, shape)
    pltriton.store(var_ref, var, mask=in_rows)
    y = x * lax.rsqrt(var + epsilon)
    if scale_ref is not None:
        y *= _load(scale_ref, in_features).astype(jnp.float32)
    if bias_ref is not None:
        y += _load(bias_ref, in_features).astype(jnp.float32)
    pltriton.store(y_ref, y.astype(y_ref.dtype), mask=inside)


def _backward(
    x_ref, scale_ref, mean_ref, rstd_ref, dy_ref, dx_ref, dscale_ref, dbias_ref,
    *, tile, shape, steps,
):  # fmt: skip
    program, programs = pl.program_id(0), pl.num_programs(0)
    _, in_features = tile.inside(0, shape)
    scale = None if scale_ref is None else _load(scale_ref, in_features).astype(jnp.float32)

    def place(k):
        # Programs that run at the same time work on neighbouring rows.
        first = (k * programs + program) * tile.rows
        in_rows, _ = tile.inside(first, shape)
        return pl.ds(first, tile.rows), in_rows, in_rows & in_features

    def load(k):
        rows, in_rows, inside = place(k)
        masks = ((mean_ref, in_rows), (rstd_ref, in_rows), (x_ref, inside), (dy_ref, inside))
        return [None if ref is None else _load(ref.at[rows, :], mask) for ref, mask in masks]

    def step(k, carry):
        (mean, rstd, x, dy), (dscale, dbias) = carry
        # On its way while this step computes. Behind the last row nothing is loaded.
        following = load(k + 1)
        xhat = x.astype(jnp.float32)
        xhat = (xhat if mean is None else xhat - mean) * rstd
        dy = dy.astype(jnp.float32)  # 0 outside of the matrix, and so are all summands
        products = dy * xhat
        dscale = None if dscale is None else dscale + products
        dbias = None if dbias is None else dbias + dy
        if scale is not None:
            dy *= scale
            products *= scale
        dx = dy - xhat * _average(products, shape)
        if mean is not None:
            dx -= _average(dy, shape)
        rows, _, inside = place(k)
        pltriton.store(dx_ref.at[rows, :], (dx * rstd).astype(dx_ref.dtype), mask=inside)
        return following, (dscale, dbias)

    sums = dscale_ref, dbias_ref
    zeros = jnp.zeros((tile.rows, tile.features), jnp.float32)
    start = load(0), tuple(None if ref is None else zeros for ref in sums)
    _, totals = lax.fori_loop(0, steps, step, start)
    for ref, total in zip(sums, totals, strict=True):
        if ref is not None:
            pltriton.store(ref, jnp.sum(total, axis=0, keepdims=True), mask=in_features)


def _load(ref: Any, mask: jax.Array) -> jax.Array:
    """What is there, and 0 outside of the mask."""
    return pltriton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0.0)


def _average(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True) * (1 / shape[1])


def _total(parts: jax.Array | None) -> jax.Array | None:
    return None if parts is None else parts.sum(0)


def _as_row(value: jax.Array | None) -> jax.Array | None:
    return None if value is None else value[None, :]
