"""Joint evidence of features: `Comoments` merge exactly, `JointStats` are what whitening uses.

As `Moments` of single features in `moments.py`, with a covariance in place of the variance. With
parts i of count n_i, mean m_i and covariance C_i,

    n    = sum n_i
    mean = sum n_i m_i / n
    cov  = sum n_i (C_i + (m_i - mean)(m_i - mean)^T) / n

Features are taken in groups: a covariance is kept for each group, not between groups.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks
from jaxnorm.core.devices import AxisName, Devices, decide_alike, devices
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.matrix_roots import symmetric
from jaxnorm.core.moments import shift_along
from jaxnorm.core.plain import is_plain
from jaxnorm.core.pooling import Parts, near_enough, reciprocal, usable_shift, weighted_sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class JointStats:
    """An estimate of mean and covariance: what whitening uses, and what a layer stores.

    Attributes:
        mean: `[groups, group size]`, float32 or wider.
        cov: `[groups, group size, group size]`, symmetric, float32 or wider.
    """

    mean: jax.Array
    cov: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Comoments:
    """Evidence about features together: how many examples were seen, their mean and covariance.

    Comoments of disjoint data merge exactly, with `merge_comoments` and `pool_comoments`, however
    unequal their counts; a count of 0 is allowed and changes nothing.

    Attributes:
        count: number of examples, or the sum of their weights, `[groups]`, float32 or wider.
        mean: their mean, `[groups, group size]`.
        cov: their biased covariance, `[groups, group size, group size]`, symmetric.
    """

    count: jax.Array
    mean: jax.Array
    cov: jax.Array

    def stats(self, ddof: int = 0) -> JointStats:
        """The estimate that this evidence supports.

        Args:
            ddof: degrees of freedom taken off the count in the covariance's denominator: 0 for the
                biased covariance, by which a batch is whitened, 1 for Bessel's correction. Weights
                are taken for how often an example was seen.

        Returns:
            `JointStats`, with mean 0 and covariance I wherever the count does not exceed `ddof`.

        Example:
            >>> import jax.numpy as jnp, jaxnorm
            >>> seen = jaxnorm.comoments(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
            >>> seen.stats().cov.tolist(), seen.stats(ddof=1).cov.tolist()
            ([[[1.0, 1.0], [1.0, 1.0]]], [[[2.0, 2.0], [2.0, 2.0]]])
        """
        known = self.count > ddof
        correction = self.count * reciprocal(self.count - ddof) if ddof else jnp.ones_like(known)
        correction = correction.astype(self.cov.dtype)[..., None, None]
        identity = jnp.broadcast_to(
            jnp.eye(self.cov.shape[-1], dtype=self.cov.dtype), self.cov.shape
        )
        return JointStats(
            mean=jnp.where(known[..., None], self.mean, jnp.zeros_like(self.mean)),
            cov=jnp.where(known[..., None, None], self.cov * correction, identity),
        )


NEAR_JOINTLY = 2.0
"""How many standard deviations a shift may be off. Less than for single features: the error, up to
1 + 4 roundings of the variances, must stay small beside the smallest eigenvalue."""

JointLook = Callable[[], tuple[jax.Array | float, jax.Array, jax.Array | None]]
"""Gives count, mean and covariance of each part."""


def pooled_jointly(
    look: JointLook,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    over: Devices | None,
    shift: jax.Array | None = None,
) -> Comoments:
    """The pooling formula (see the top of this file), along `axes` and over devices.

    Args:
        look: gives the evidence of each part, as in `pooling.pooled`: its count, `[..., 1]`, with
            size 1 where parts are alike, or one number for all; its mean, `[..., k]`; its
            covariance, `[..., k, k]`, or None for parts that are single elements.
        shape: of the means.
        axes: the axes of the means along which the parts lie; not the last.
        over: mapped axes over which parts lie as well, or None.
        shift: an estimate of the mean, of size 1 along `axes`, or None.

    Numerics: as `pooling.pooled`, from which this differs in that products are summed by a matrix
    product. By two passes, the second about the mean that the first one found, or by one about a
    shift that is near enough.
    """
    parts = Parts(shape, axes, over)

    def sums_about(pivot: jax.Array, count, means, cov) -> tuple[jax.Array, jax.Array]:
        """On this device, of the deviations and of their products."""
        offset = means - pivot
        weighted = count * offset
        batch = tuple(axis for axis in range(means.ndim - 1) if axis not in axes)
        second = lax.dot_general(
            weighted,
            offset,
            ((axes, axes), (batch, batch)),
            precision=lax.Precision.HIGHEST,
            out_sharding=sharding_along(batch, offset),
        )
        if cov is not None:
            second = second + (_per_matrix(count) * cov).sum(axes)
        return weighted.sum(axes), second

    def put_together(total, pivot, first, second) -> Comoments:
        share = reciprocal(total)
        first, second = first * share, second * _per_matrix(share)
        cov = symmetric(second - first[..., :, None] * first[..., None, :])
        # Added to zeros of the mean, the count has its shape.
        return Comoments((jnp.zeros_like(first) + total)[..., 0], pivot + first, cov)

    def squeezed(value: jax.Array | float) -> jax.Array | float:
        return value.squeeze(axes) if isinstance(value, jax.Array) and value.ndim else value

    def two_passes() -> Comoments:
        count, means, cov = look()
        total, weighted = weighted_sums(count, lax.stop_gradient(means), parts)
        pivot = weighted * reciprocal(total)
        sums = sums_about(pivot, count, means, cov)
        sums = sums if over is None else over.sum(*sums)
        return put_together(squeezed(total), squeezed(pivot), *sums)

    if shift is None or is_plain():
        return two_passes()
    count, means, cov = look()
    if not decide_alike(means, over):
        return two_passes()
    shift = usable_shift(shift, means, over)
    sums = sums_about(shift, count, means, cov)
    if isinstance(count, float) and parts.number is not None:
        total, rows = count * parts.number, parts.rows_of_local(*sums)
    else:
        ones = jnp.ones((1,) * means.ndim, means.dtype)
        (local,) = Parts(means.shape, axes).sum(count * ones)
        total, *rows = parts.rows_of_local(local.squeeze(axes), *sums)
    pivot = jnp.expand_dims(squeezed(shift), 0)
    evidence = put_together(total, pivot, *rows)
    var = jnp.diagonal(evidence.cov, axis1=-2, axis2=-1)
    near = near_enough(evidence.mean - pivot, pivot, var, NEAR_JOINTLY)
    return lax.cond(near, lambda: jax.tree.map(parts.own, evidence), two_passes)


def sharding_along(batch: tuple[int, ...], offset: jax.Array) -> NamedSharding | None:
    """How products summed over all but the `batch` axes lie: explicit meshes must be told."""
    sharding = jax.typeof(offset).sharding
    if all(name is None for name in sharding.spec):
        return None
    kept = (sharding.spec[axis] for axis in batch)
    return NamedSharding(sharding.mesh, PartitionSpec(*kept, None, None))


def _per_matrix(weight: jax.Array | float) -> jax.Array | float:
    """A weight of vectors [..., k], for matrices [..., k, k]."""
    return weight[..., None] if isinstance(weight, jax.Array) and weight.ndim else weight


def joint_input(x: ArrayLike, who: str) -> jax.Array:
    """`x` as an array of real floating point numbers; integers become float32.

    Raises:
        TypeError: it holds 8 bits, or complex numbers.
    """
    x = checks.input_array(x, who)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{who}: the input is {x.dtype}{list(x.shape)}, but covariances are taken of real "
            f"numbers. Make features of the two parts: jnp.concatenate([x.real, x.imag], axis)."
        )
    return x


def joint_mask(
    where: ArrayLike | None, shape: tuple[int, ...], axis: int, who: str
) -> jax.Array | None:
    """`where` as booleans or weights of size 1 along the feature `axis`.

    Raises:
        TypeError: the mask is complex.
        ValueError: it does not fit, or could differ between the features of an example.
    """
    where = checked_mask(where, shape, who)
    if where is not None and where.shape[axis] != 1:
        raise ValueError(
            f"{who}: a mask of shape {where.shape} says for each of {shape[axis]} features along "
            f"axis {axis} whether it counts, but a covariance needs all features of an example. "
            f"Use one value for all: mask.all({axis}, keepdims=True)."
        )
    return where


def joint_stats(stats: JointStats, who: str) -> JointStats:
    """Checked statistics, in float32 or wider.

    Raises:
        TypeError: they are no `JointStats`, or hold integers or 8 bits.
        ValueError: mean and covariance do not fit each other.
    """
    fix = "Of evidence, take the estimate: comoments.stats()."
    checks.of_kind(JointStats, stats, who, fix)
    mean, cov = (
        checks.wide(leaf, who, what)
        for leaf, what in ((stats.mean, "the mean"), (stats.cov, "the covariance"))
    )
    if mean.ndim != 2 or cov.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(
            f"{who}: a mean of shape {mean.shape} and a covariance of shape {cov.shape} do not "
            f"belong together. Use shapes (groups, k) and (groups, k, k); for one group of all "
            f"features JointStats(mean[None], cov[None])."
        )
    return JointStats(mean, cov)


def joint_stats_along(stats: JointStats, shape: tuple[int, ...], axis: int, who: str) -> JointStats:
    """Checked statistics for the features along `axis` of an input of `shape`.

    Raises:
        TypeError: they are no `JointStats`.
        ValueError: they do not fit each other, or belong to another number of features.
    """
    stats = joint_stats(stats, who)
    if stats.mean.size != shape[axis]:
        groups, size = stats.mean.shape
        raise ValueError(
            f"{who}: the statistics are of {groups} groups of {size} features, but the input of "
            f"shape {shape} has {checks.describe_features(shape, (axis,))}. Use "
            f"statistics of {shape[axis]} features, or name the feature axis: axis=..."
        )
    return stats


def pool_comoments(
    stacked: Comoments,
    axes: int | Sequence[int] | None = None,
    *,
    shift: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Comoments:
    """Pools `Comoments` along axes of their arrays, over devices, or both.

    Args:
        stacked: evidence whose parts lie along `axes`, on the devices of `axis_name`, or both.
        axes: axes of `stacked.count` to pool, which disappear; None for none of them.
        shift: an estimate of the mean, a number or of its shape, as in `moments`.
        axis_name, axis_index_groups: as in `comoments`.

    Returns:
        `Comoments` of everything together.

    Raises:
        TypeError: `stacked` is no `Comoments`, or holds integers.
        ValueError: an axis out of range or named twice.
        NameError: `axis_name` is not bound.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> batches = jnp.arange(8.0).reshape(2, 2, 2)
        >>> each = jax.vmap(jaxnorm.comoments)(batches)
        >>> jaxnorm.pool_comoments(each, axes=0).cov.tolist()
        [[[5.0, 5.0], [5.0, 5.0]]]
    """
    who = "pool_comoments"
    _check_evidence(stacked, who)
    mean, cov = (
        checks.wide(stacked.mean, who, "the mean"),
        checks.wide(stacked.cov, who, "the covariance"),
    )
    count = jnp.asarray(stacked.count, mean.dtype)
    axes = () if axes is None else ax.canonical_axes(axes, count.ndim, who, "axes")
    over = devices(axis_name, axis_index_groups, who)
    # Without evidence there is nothing to know: 0 times NaN would be NaN.
    unknown = (count == 0)[..., None]
    mean = jnp.where(unknown, jnp.zeros_like(mean), mean)
    cov = jnp.where(unknown[..., None], jnp.zeros_like(cov), cov)
    shift = shift_along(shift, mean, axes, who)
    return pooled_jointly(lambda: (count[..., None], mean, cov), mean.shape, axes, over, shift)


def merge_comoments(*parts: Comoments) -> Comoments:
    """`Comoments` of several disjoint sets of data together, exactly.

    Args:
        *parts: evidence of the same groups of features, at least one.

    Returns:
        `Comoments` of that shape. The order of `parts` matters only by rounding.

    Raises:
        TypeError: a part is no `Comoments`.
        ValueError: no evidence, or of different shapes.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> first = jaxnorm.comoments(jnp.array([[0.0, 0.0]]))
        >>> second = jaxnorm.comoments(jnp.array([[3.0, 1.0], [3.0, 1.0], [6.0, 2.0]]))
        >>> together = jaxnorm.merge_comoments(first, second)
        >>> together.count.tolist(), together.mean.tolist(), together.cov.tolist()
        ([4.0], [[3.0, 1.0]], [[[4.5, 1.5], [1.5, 0.5]]])
    """
    who = "merge_comoments"
    for part in parts:
        _check_evidence(part, who)
    shapes = {jnp.shape(part.cov) for part in parts}
    if len(shapes) != 1:
        found = f"found covariances of the shapes {sorted(shapes)}" if parts else "found none"
        raise ValueError(
            f"{who}: needs evidence of the same groups of features, {found}. Each part must come "
            f"from comoments(x) with the same features, num_groups and group_size."
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return pool_comoments(stacked, axes=0)


def _check_evidence(evidence: object, who: str) -> None:
    fix = "Evidence comes from comoments(x); JointStats have no count."
    checks.of_kind(Comoments, evidence, who, fix)
