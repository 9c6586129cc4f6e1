"""Estimates of replicas that ran apart, as one estimate.

With replicas i of weight w_i, mean m_i and variance v_i,

    mean = sum w_i m_i / sum w_i
    var  = sum w_i (v_i + |m_i - mean|^2) / sum w_i

the second term being what an average of the variances forgets: how far the replicas' means lie
apart. It is the pooling formula of `moments.py`, and for covariances that of `covariance.py`, with
weights in the place of counts.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.covariance import Comoments, JointStats, pool_comoments
from jaxnorm.core.devices import AxisName, axis_names, devices
from jaxnorm.core.moments import Moments, Stats, pool

StatsT = TypeVar("StatsT", Stats, JointStats)


def pool_stats(
    stacked: StatsT,
    axes: int | Sequence[int] | None = None,
    *,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    who: str = "pool_stats",
) -> StatsT:
    """Pools the estimates of replicas that saw different data, with the spread of their means.

        mean = sum w_i mean_i / sum w_i,   var = sum w_i (var_i + |mean_i - mean|^2) / sum w_i

    and for covariances with (mean_i - mean)(mean_i - mean)^T. Of estimates that stand for disjoint
    data, weighted by how much, this is the estimate of all the data. Evidence needs no weights: use
    `pool`. For the variables of a whole model there is `jaxnorm.tools.merge_replicas`.

    Args:
        stacked: `Stats` or `JointStats` whose replicas lie along `axes`, on the devices of
            `axis_name`, or both; float, bfloat16, or complex.
        axes: axes of `stacked.var`, or of `stacked.cov` without its last two, to pool, which
            disappear; None for none of them.
        weights: how much each replica weighs: one number for each, of the sizes along `axes`, or
            one for each entry, of the shape of `var`, or of `cov` without its last two axes. Not
            negative; only ratios matter. None for all alike.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) along
            which replicas lie.
        axis_index_groups: groups of indices along `axis_name`; each pools on its own.
        who: the name that error messages give to the caller.

    Returns:
        What `stacked` was, without `axes`, in float32 or wider. Where all weights are 0, it is mean
        0 and variance 1, or covariance I, as of no evidence.

    Raises:
        TypeError: `stacked` is neither `Stats` nor `JointStats`, or holds integers; weights that
            are no real numbers.
        ValueError: mean and variance that do not fit; an axis out of range or named twice; weights
            of another shape, or, where their values are known, negative or all 0.
        NameError: `axis_name` is not bound.

    Numerics:
        As `pool`: right at means of many standard deviations.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> replicas = jaxnorm.Stats(mean=jnp.array([[0.0], [4.0]]), var=jnp.ones((2, 1)))
        >>> both = jaxnorm.pool_stats(replicas, axes=0)
        >>> both.mean.tolist(), both.var.tolist()
        ([2.0], [5.0])
        >>> jaxnorm.pool_stats(replicas, axes=0, weights=jnp.array([3, 1])).mean.tolist()
        [1.0]

    Source:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for the merge
        of two parts.

    Differs:
        From `jax.lax.pmean` of the running statistics, as in Flax's examples, which averages the
        variances and forgets how far the means lie apart.
    """
    mean, spread, joint = _checked(stacked, who)
    # What is counted: features, or groups of them.
    shape = spread.shape[:-2] if joint else spread.shape
    axes = () if axes is None else ax.canonical_axes(axes, len(shape), who, "axes")
    devices(axis_name, axis_index_groups, who)  # for what it refuses
    if weights is None:
        weights = jnp.ones(ax.sizes(shape, axes), spread.dtype)
    count = _counts(weights, shape, axes, who).astype(precision.real_dtype(spread.dtype))
    names = None if axis_name is None else axis_names(axis_name)
    groups = axis_index_groups and tuple(tuple(group) for group in axis_index_groups)
    pooled: Any = _pooled(mean, spread, count, joint, axes, names, groups)
    return pooled


@partial(jax.jit, static_argnums=(3, 4, 5, 6), inline=True)
def _pooled(
    mean: jax.Array | None,
    spread: jax.Array,
    count: jax.Array,
    joint: bool,
    axes: tuple[int, ...],
    names: tuple[str, ...] | None,
    groups: tuple[tuple[int, ...], ...] | None,
) -> Stats | JointStats:
    mapped: dict[str, Any] = dict(axis_name=names, axis_index_groups=groups)
    if joint:
        assert mean is not None
        return pool_comoments(Comoments(count, mean, spread), axes, **mapped).stats()
    return pool(Moments(count, mean, spread), axes, **mapped).stats()


def _checked(stacked: Stats | JointStats, who: str) -> tuple[jax.Array | None, jax.Array, bool]:
    """Mean, variance or covariance, both in float32 or wider, and whether it is a covariance."""
    if not isinstance(stacked, (Stats, JointStats)):
        raise TypeError(
            f"{who}: needs jaxnorm.Stats or jaxnorm.JointStats, found {type(stacked).__name__}. "
            f"Evidence has counts and needs no weights: jaxnorm.pool(moments, axes)."
        )
    joint = isinstance(stacked, JointStats)
    spread = checks.wide(stacked.cov if joint else stacked.var, who, "the input")
    mean = None if stacked.mean is None else checks.wide(stacked.mean, who, "the input")
    if mean is not None:
        fits = spread.shape == mean.shape
        if joint:
            fits = mean.ndim > 0 and spread.shape == (*mean.shape, mean.shape[-1])
        if not fits:
            raise ValueError(
                f"{who}: a mean of shape {mean.shape} and a {'co' * joint}variance of shape "
                f"{spread.shape} do not belong together. Stack both alike: "
                f"jax.tree.map(lambda *leaves: jnp.stack(leaves), *estimates)."
            )
    return mean, spread, joint


def _counts(
    weights: ArrayLike, shape: tuple[int, ...], axes: tuple[int, ...], who: str
) -> jax.Array:
    """The weights as counts of `shape`, in which replicas lie along `axes`.

    Raises:
        TypeError: they are no real numbers.
        ValueError: they have another shape; or their values are known, and one is negative or not
            finite, or none is positive.
    """
    given = None if isinstance(weights, str) else jnp.asarray(weights)
    if given is None or given.dtype == jnp.bool_ or jnp.iscomplexobj(given):
        found = repr(weights) if given is None else given.dtype
        raise TypeError(
            f"{who}: the weights are {found}, but say how much each replica counts. Use "
            f"numbers, 0 or more: weights.astype(jnp.float32)."
        )
    one_each = ax.sizes(shape, axes)
    if given.shape not in (one_each, shape):
        raise ValueError(
            f"{who}: weights of shape {given.shape} for estimates of shape {shape} whose replicas "
            f"lie along axes {axes}. Use one for each replica, of shape {one_each}, or one for "
            f"each entry, of shape {shape}."
        )
    known = _values(weights)
    if known is not None and not (
        np.isfinite(known).all() and (known >= 0).all() and (known > 0).any()
    ):
        raise ValueError(
            f"{who}: weights={known.tolist()} must be 0 or more, and some above 0. Use "
            f"weights=None for all replicas alike."
        )
    if given.shape != shape:
        given = ax.lay_along(given, axes, len(shape))
    return jnp.broadcast_to(given, shape)


def _values(weights: ArrayLike) -> np.ndarray | None:
    """The values of `weights`, where they are known: not while tracing, nor on other processes."""
    if isinstance(weights, Tracer):
        return None
    if isinstance(weights, jax.Array) and not weights.is_fully_addressable:
        return None
    return np.asarray(weights)
