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
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, Devices, devices
from jaxnorm.core.feature_groups import feature_axis, group_shape, split
from jaxnorm.core.matrix_roots import symmetric
from jaxnorm.core.moments import clean, elements, reciprocal, weighted_sums


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
        count: number of examples, `[groups]`, float32 or wider.
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
                biased covariance, by which a batch is whitened, 1 for Bessel's correction.

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


def pooled_jointly(
    count: jax.Array | float,
    source: jax.Array,
    cov: jax.Array | None,
    axes: tuple[int, ...],
    over: Devices | None,
    view: Callable[[jax.Array], jax.Array] = lambda means: means,
) -> Comoments:
    """The pooling formula (see the top of this file), along `axes` and over devices.

    Args:
        count: of each part, `[..., 1]`, with size 1 where parts are alike, or one number for all.
        source: what holds the means of the parts.
        cov: their covariances, `[..., k, k]`, or None for parts that are single elements.
        axes: the axes of the means along which the parts lie; not the last.
        over: mapped axes over which parts lie as well, or None.
        view: takes the means, `[..., k]`, out of `source`. For the backward pass it is done again:
            `source` is what is kept, together with results of this function.

    Numerics: as `moments.pooled`, from which this differs in that products are summed by a matrix
    product: the deviations are taken from a first estimate of the mean, and what they miss of the
    true mean is put right afterwards.
    """
    means = lax.stop_gradient(view(source))
    parts = elements(means.shape, axes, over)
    total, weighted_means = weighted_sums(count, means, parts)
    share = reciprocal(total)
    pivot = weighted_means * share
    batch = tuple(axis for axis in range(means.ndim - 1) if axis not in axes)

    def local_sums(source: jax.Array, cov: jax.Array | None):
        offset = view(source) - pivot
        weighted = count * offset
        second = lax.dot_general(
            weighted,
            offset,
            ((axes, axes), (batch, batch)),
            precision=lax.Precision.HIGHEST,
            out_sharding=_sharding_along(batch, offset),
        )
        if cov is not None:
            second = second + (_per_matrix(count) * cov).sum(axes)
        return weighted.sum(axes), second

    first, second = jax.checkpoint(local_sums, prevent_cse=False)(source, cov)
    if over is not None:
        first, second = over.sum(first, second)
    total, share, pivot = (
        value.squeeze(axes) if isinstance(value, jax.Array) and value.ndim else value
        for value in (total, share, pivot)
    )
    first = first * share
    second = second * _per_matrix(share)
    cov = symmetric(second - first[..., :, None] * first[..., None, :])
    # Added to zeros of the mean, the count has its shape.
    count = (jnp.zeros_like(first) + total)[..., 0]
    return Comoments(count, pivot + first, cov)


def _sharding_along(batch: tuple[int, ...], offset: jax.Array) -> NamedSharding | None:
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
    """`x` as an array of real floating point numbers.

    Raises:
        TypeError: it holds integers, 8 bits, or complex numbers.
    """
    x = checks.inexact_array(x, who)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{who}: the input is {x.dtype}{list(x.shape)}, but covariances are taken of real "
            f"numbers. Make features of the two parts: jnp.concatenate([x.real, x.imag], axis)."
        )
    return x


def joint_mask(
    where: ArrayLike | None, shape: tuple[int, ...], axis: int, who: str
) -> jax.Array | None:
    """`where` as a boolean array of size 1 along the feature `axis`.

    Raises:
        TypeError: the mask holds floating point numbers.
        ValueError: it does not fit, or could differ between the features of an example.
    """
    where = checks.boolean_mask(where, shape, who)
    if where is not None and where.shape[axis] != 1:
        raise ValueError(
            f"{who}: a mask of shape {where.shape} says for each of {shape[axis]} features along "
            f"axis {axis} whether it counts, but a covariance needs all features of an example. "
            f"Use one value for all: mask.all({axis}, keepdims=True)."
        )
    return where


def joint_stats(stats: JointStats, who: str) -> JointStats:
    """Checked statistics.

    Raises:
        TypeError: they are no `JointStats`.
        ValueError: mean and covariance do not fit each other.
    """
    fix = "Of evidence, take the estimate: comoments.stats()."
    checks.of_kind(JointStats, stats, who, fix)
    mean, cov = jnp.asarray(stats.mean), jnp.asarray(stats.cov)
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


def comoments_in_groups(
    x: jax.Array, axis: int, groups: int, where: jax.Array | None, over: Devices | None
) -> Comoments:
    """`comoments` after the door."""

    def grouped(x: jax.Array) -> jax.Array:
        wide = clean(x, where).astype(precision.accumulation_dtype(x.dtype))
        return split(wide, axis, groups)

    count = 1.0
    if where is not None:
        count = split(where, axis, 1).astype(precision.accumulation_dtype(x.dtype))
    return pooled_jointly(count, x, None, tuple(range(x.ndim - 1)), over, grouped)


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
        x: array of any shape; float or bfloat16. All axes but `axis` are examples.
        axis: the feature axis.
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        where: boolean mask with as many axes as `x`, of size 1 along `axis` and of the size of `x`
            or 1 along the others; True counts. NaN and infinities under the mask reach neither the
            result nor its derivatives.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the evidence is pooled, weighted by the number of valid examples on each device.
        axis_index_groups: groups of indices along `axis_name`; each pools on its own.

    Returns:
        `Comoments`, in float32 or wider; 0 where nothing is valid. The covariance is exactly
        symmetric.

    Raises:
        TypeError: `x` is no real floating point array, or the mask is floating point.
        ValueError: an axis out of range, a mask that does not fit or differs between features,
            groups that do not divide the features.
        NameError: `axis_name` is not bound.

    Numerics:
        Accumulates in float32 or wider, matrix products included, which no accelerator rounds to
        fewer bits. The covariance keeps its digits at means of many standard deviations. For the
        backward pass `x` and results are kept.

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
    return _jitted_comoments(x, axis, groups, where, over)


_jitted_comoments = jax.jit(comoments_in_groups, static_argnums=(1, 2, 4), inline=True)


def pool_comoments(
    stacked: Comoments,
    axes: int | Sequence[int] | None = None,
    *,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Comoments:
    """Pools `Comoments` along axes of their arrays, over devices, or both.

    Args:
        stacked: evidence whose parts lie along `axes`, on the devices of `axis_name`, or both.
        axes: axes of `stacked.count` to pool, which disappear; None for none of them.
        axis_name, axis_index_groups: as in `comoments`.

    Returns:
        `Comoments` of everything together.

    Raises:
        TypeError: `stacked` is no `Comoments`.
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
    count = jnp.asarray(stacked.count)
    axes = () if axes is None else ax.canonical_axes(axes, count.ndim, who, "axes")
    over = devices(axis_name, axis_index_groups, who)
    mean, cov = jnp.asarray(stacked.mean), jnp.asarray(stacked.cov)
    return pooled_jointly(count[..., None], mean, cov, axes, over)


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
