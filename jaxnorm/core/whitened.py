"""The chain of whitening: evidence of groups of features, a matrix for each, the result.

    x --comoments--> Comoments --stats--> JointStats --root--> W,   y = W (x - mean) * scale + bias

What is kept for the backward pass is `x` in its own dtype, and matrices of the size of a group.
"""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.comoments import JointView, comoments_in_groups
from jaxnorm.core.covariance import (
    Comoments,
    JointStats,
    joint_input,
    joint_mask,
    joint_stats_along,
)
from jaxnorm.core.devices import AxisName, Devices, devices, placed
from jaxnorm.core.feature_groups import (
    feature_axis,
    group_shape,
    join,
    placed_by_compiler,
    split,
)
from jaxnorm.core.masks import clean
from jaxnorm.core.matrix_roots import inverse_square_root, newton_inverse_square_root
from jaxnorm.core.moments import shift_along
from jaxnorm.core.normalize import output_dtype
from jaxnorm.core.rules import recomputed
from jaxnorm.core.standardize import apply_affine, feature_along, result_dtype


class JointPlan(NamedTuple):
    """What is static about whitening one input. Hashable, so that traces are reused.

    Attributes:
        axis: the feature axis, counted from the front.
        epsilon: added to the diagonal of the covariance.
        n_steps: steps of Newton's iteration towards the root, or None for the root itself.
        dtype: dtype of the result.
    """

    axis: int
    epsilon: float
    n_steps: int | None
    dtype: Any


@partial(jax.jit, static_argnums=(0, 6, 7), inline=True)
def whiten_by_batch(
    plan: JointPlan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    shift: jax.Array | None,
    groups: int,
    over: Devices | None,
) -> tuple[jax.Array, Comoments]:
    """Whitens `x` by its own covariance; also the evidence."""
    view = JointView(plan.axis, groups, over)
    evidence = comoments_in_groups(view, x, where, shift)
    return whiten_by_stats(plan, x, evidence.stats(), scale, bias, where), evidence


@partial(jax.jit, static_argnums=0, inline=True)
def whiten_by_stats(
    plan: JointPlan,
    x: jax.Array,
    stats: JointStats,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
) -> jax.Array:
    """Whitens `x` by a given covariance, scales and shifts each feature."""
    if plan.n_steps is None:
        matrix = inverse_square_root(stats.cov, plan.epsilon)
    else:
        matrix = newton_inverse_square_root(stats.cov, plan.n_steps, plan.epsilon)

    return recomputed(partial(_whiten_by, plan), x, stats.mean, matrix, scale, bias, where)


def _whiten_by(plan: JointPlan, x, mean, matrix, scale, bias, where) -> jax.Array:
    y = apply_matrix(clean(x, where), mean, matrix, plan.axis)
    return apply_affine(y, scale, bias).astype(plan.dtype)


def apply_matrix(x: jax.Array, mean: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """matrix (x - mean) in each group of features along `axis`, in float32 or wider."""
    dtype = precision.promote(x.dtype, mean.dtype, jnp.float32)

    def by_group(x: jax.Array, mean: jax.Array, matrix: jax.Array) -> jax.Array:
        grouped = split(x.astype(dtype), axis, len(mean))
        centred = grouped - lax.expand_dims(mean.astype(dtype), range(x.ndim - 1))
        exact = lax.Precision.HIGHEST
        y = jnp.einsum("...gj,gij->...gi", centred, matrix.astype(dtype), precision=exact)
        return join(y, axis)

    return placed_by_compiler(by_group, x, axis)(x, mean, matrix)


def step_count(n_steps: int, who: str) -> int:
    """`n_steps` as a number.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    try:
        steps = operator.index(n_steps)
    except TypeError:
        raise TypeError(f"{who}: n_steps={n_steps!r} must be an integer. Use n_steps=5.") from None
    if steps < 1:
        raise ValueError(
            f"{who}: n_steps={steps} steps do not get nearer to a root. Use n_steps=5."
        )
    return steps


def normalize_jointly(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    n_steps: int | None,
    axis: int,
    num_groups: int | None,
    group_size: int | None,
    where: ArrayLike | None,
    epsilon: float,
    shift: ArrayLike | None,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: DTypeLike | None,
    who: str,
) -> tuple[jax.Array, Comoments]:
    """Whitens by the batch; the door of every training function."""
    x = joint_input(x, who)
    axis = feature_axis(axis, x.ndim, who)
    groups, _ = group_shape(x.shape[axis], num_groups, group_size, who)
    where = joint_mask(where, x.shape, axis, who)
    scale = feature_along(scale, x.shape, (axis,), who, "scale")
    bias = feature_along(bias, x.shape, (axis,), who, "bias")
    over = devices(axis_name, axis_index_groups, who)
    plan = _plan(axis, epsilon, n_steps, dtype, result_dtype(x, scale, bias), who)
    along = _shift_of_groups(shift, x, axis, groups, who)
    return whiten_by_batch(plan, x, scale, bias, where, along, groups, over)


def _shift_of_groups(
    shift: ArrayLike | None, x: jax.Array, axis: int, groups: int, who: str
) -> jax.Array | None:
    """A checked estimate of the mean, `[groups, group size]`."""
    along = shift_along(shift, x, ax.other_axes((axis,), x.ndim), who)
    if along is None:
        return None
    along = placed(along, (None,) * x.ndim)  # Groups may lie on other devices than features.
    return jnp.broadcast_to(along.reshape(-1), (x.shape[axis],)).reshape(groups, -1)


def normalize_jointly_with_stats(
    x: ArrayLike,
    stats: JointStats,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    n_steps: int | None,
    axis: int,
    where: ArrayLike | None,
    epsilon: float,
    dtype: DTypeLike | None,
    who: str,
) -> jax.Array:
    """Whitens by given statistics; the door of every inference function."""
    x = joint_input(x, who)
    axis = feature_axis(axis, x.ndim, who)
    stats = joint_stats_along(stats, x.shape, axis, who)
    where = joint_mask(where, x.shape, axis, who)
    scale = feature_along(scale, x.shape, (axis,), who, "scale")
    bias = feature_along(bias, x.shape, (axis,), who, "bias")
    plan = _plan(axis, epsilon, n_steps, dtype, result_dtype(x, scale, bias), who)
    return whiten_by_stats(plan, x, stats, scale, bias, where)


def _plan(
    axis: int, epsilon: float, n_steps: int | None, dtype: DTypeLike | None, computed: Any, who: str
) -> JointPlan:
    epsilon = checks.static_epsilon(epsilon, who)
    n_steps = None if n_steps is None else step_count(n_steps, who)
    return JointPlan(axis, epsilon, n_steps, output_dtype(dtype, computed, who))
