"""`comoments`: the features of an input taken together, in groups, and its derivative rule."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import precision
from jaxnorm.core.covariance import (
    Comoments,
    joint_input,
    joint_mask,
    pooled_jointly,
    sharding_along,
)
from jaxnorm.core.devices import AxisName, Devices, devices
from jaxnorm.core.feature_groups import feature_axis, group_shape, placed_by_compiler, split
from jaxnorm.core.masks import clean, weighted
from jaxnorm.core.matrix_roots import symmetric
from jaxnorm.core.pooling import reciprocal
from jaxnorm.core.rules import with_tangent


class JointView(NamedTuple):
    """How features of an input are taken together. Static and hashable.

    Attributes:
        axis: the feature axis, counted from the front.
        groups: how many groups of features there are.
        over: mapped axes over which evidence is pooled, or None.
    """

    axis: int
    groups: int
    over: Devices | None

    def grouped(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        """`x` as `[..., groups, group size]`, wide, with 0 for what may not take part."""
        wide = clean(x, where).astype(precision.accumulation_dtype(x.dtype))
        return split(wide, self.axis, self.groups)

    def shape_of_groups(self, x: jax.Array) -> tuple[int, ...]:
        """The shape of `grouped`."""
        examples = ax.sizes(x.shape, ax.other_axes((self.axis,), x.ndim))
        return *examples, self.groups, x.shape[self.axis] // self.groups

    def weights(self, x: jax.Array, where: jax.Array | None) -> jax.Array | float:
        """How much each example counts, `[..., 1, 1]`, or 1 for all."""
        if where is None:
            return 1.0
        return split(where, self.axis, 1).astype(precision.accumulation_dtype(x.dtype))


def _comoments(
    view: JointView, x: jax.Array, where: jax.Array | None, shift: jax.Array | None
) -> Comoments:
    def by_group(x, where, shift) -> Comoments:
        examples = tuple(range(x.ndim - 1))
        if shift is not None:
            shift = lax.expand_dims(shift, examples)

        def look():
            return view.weights(x, where), view.grouped(x, where), None

        shape = view.shape_of_groups(x)
        return pooled_jointly(look, shape, examples, view.over, shift)

    placed = placed_by_compiler(by_group, x, view.axis, result="summary")
    return placed(x, where, shift)


def _tangent_of_comoments(view: JointView, primals, tangents):
    """dmean = <dx>,   dcov = <(x - mean) dx^T> + its transpose.

    Given as a rule, so that only `x` and the evidence are kept, and so that it does not matter
    for derivatives which way the evidence was taken.
    """
    x, where, shift = primals
    evidence = _comoments_in_groups(view, x, where, shift)
    if tangents[0] is None:
        return evidence, jax.tree.map(jnp.zeros_like, evidence)

    def by_group(x, dx, where, mean, count) -> tuple[jax.Array, jax.Array]:
        examples = tuple(range(x.ndim - 1))
        groups = (len(examples),)
        offset = view.grouped(x, where) - lax.expand_dims(mean, examples)
        change = weighted(dx.astype(precision.accumulation_dtype(dx.dtype)), where)
        change = view.grouped(change, None)
        products = lax.dot_general(
            offset,
            change,
            ((examples, examples), (groups, groups)),
            precision=lax.Precision.HIGHEST,
            out_sharding=sharding_along(groups, offset),
        )
        first, second = change.sum(examples), products
        if view.over is not None:
            first, second = view.over.sum(first, second)
        share = jnp.asarray(reciprocal(count))[..., None]
        return first * share, 2 * symmetric(second * share[..., None])

    placed = placed_by_compiler(by_group, x, view.axis, result="summary")
    tangent = jax.checkpoint(placed, prevent_cse=False)
    dmean, dcov = tangent(x, tangents[0], where, evidence.mean, evidence.count)
    return evidence, Comoments(jnp.zeros_like(evidence.count), dmean, dcov)


def _comoments_by_two_passes(view: JointView, x, where, shift) -> Comoments:
    del shift
    return _comoments(view, x, where, None)


_comoments_in_groups = with_tangent(_comoments, _comoments_by_two_passes, _tangent_of_comoments)
comoments_in_groups = jax.jit(_comoments_in_groups, static_argnums=0, inline=True)
"""`comoments` after the door."""


def comoments(
    x: ArrayLike,
    *,
    axis: int = -1,
    num_groups: int | None = 1,
    group_size: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Comoments:
    """Count, mean and biased covariance of the features of `x`, in groups, over devices if asked.

        cov = sum (x - mean)(x - mean)^T / n

    Args:
        x: array of any shape; float or bfloat16; integers become float32. All axes but `axis` are
            examples.
        axis: the feature axis.
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        where: which examples count, by booleans or weights, or None for all; of the shape of `x`,
            but of size 1 along `axis`. See `normalize`.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the evidence is pooled, weighted by the count of each device.
        axis_index_groups: groups of indices along `axis_name`; each pools on its own.

    Returns:
        `Comoments`, in float32 or wider; 0 where nothing is valid. The covariance is exactly
        symmetric.

    Raises:
        TypeError: `x` is complex, holds no numbers, or floats of 8 bits, or the mask is complex.
        ValueError: an axis out of range, a mask that does not fit or differs between features,
            groups that do not divide the features.
        NameError: `axis_name` is not bound.

    Numerics:
        Accumulates in float32 or wider, matrix products included, which no accelerator rounds to
        fewer bits. The covariance keeps its digits at means of many standard deviations. For the
        backward pass `x` and results are kept.
        In float32 it is right for values up to 1e12 and standard deviations from 1e-12.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [5.0, jnp.nan]])
        >>> seen = jaxnorm.comoments(x, where=jnp.array([[True], [True], [False]]))
        >>> seen.count.tolist(), seen.mean.tolist(), seen.cov.tolist()
        ([2.0], [[2.0, 20.0]], [[[1.0, 10.0], [10.0, 100.0]]])

    Source:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for the merge
        of two parts.
    """
    who = "comoments"
    x = joint_input(x, who)
    axis = feature_axis(axis, x.ndim, who)
    groups, _ = group_shape(x.shape[axis], num_groups, group_size, who)
    where = joint_mask(where, x.shape, axis, who)
    over = devices(axis_name, axis_index_groups, who)
    return comoments_in_groups(JointView(axis, groups, over), x, where, None)
