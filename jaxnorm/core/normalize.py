"""`normalize`: the whole chain from evidence to result, for any choice of axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, devices, placement
from jaxnorm.core.fused import Hint, normalize_by, normalize_fused
from jaxnorm.core.kernels.use import current_use
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.moments import Moments, Stats, shift_along
from jaxnorm.core.standardize import Plan, feature_along, result_dtype, stats_along


def normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axes: int | Sequence[int],
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    use_mean: bool = True,
    shift: ArrayLike | None = None,
    evidence: Moments | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "normalize",
) -> tuple[jax.Array, Moments]:
    """Standardizes `x` by its own moments along `axes`, then scales and shifts each feature.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Batch, layer, group and instance norm are this function with different `axes`, RMS norm with
    `use_mean=False`.

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        axes: the axes along which mean and variance are taken.
        axis: the feature axis or axes of `x`: `scale` and `bias` have its shape along them, in
            increasing order.
        where: which elements count for the moments, by booleans or weights, or None for all; of
            the shape of `x`, or of size 1 along some axes. Fewer axes are the last ones, unless
            they fit elsewhere too; integers count where they are not 0. Weights are floating point
            numbers, 0 or more, of which a negative one or NaN makes the result wrong: the count is
            their sum, and no derivative is taken by them. What does not count is normalized like
            the others, but NaN, infinities and huge numbers (above 4e9 in float32) there are taken
            for 0.
        epsilon: added to the variance, inside the root; 0 or more.
        use_mean: False takes no mean off and the variance about the origin, as RMS norm does.
        shift: an estimate of the mean, such as a running mean: a number, or an array of the shape
            of `x` without `axes`. It decides what the moments cost, not what they are: where it is
            within 8 standard deviations of the mean, one pass over the data and one collective
            suffice, otherwise three. None takes two passes, and so do fewer than 32768 numbers on
            one device; where elements are known to lie on several devices, over mapped axes and
            along explicit mesh axes, None stands for 0.
        evidence: the moments themselves, if they are known already: those of `x` along `axes` and
            over the mapped axes. Derivatives are as if they were taken here.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the moments are pooled, weighted by the count of each device.
        axis_index_groups: groups of indices along `axis_name`; each pools on its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and its `Moments`, of the shape of `x` without `axes`, in
        float32 or wider. Where nothing is valid, the mean is taken for 0 and the variance for 1.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: axes out of range or named twice; a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider and rounds once. All derivatives of every order agree with
        those of the plain composition, while only `x` and statistics are kept for the backward
        pass.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> y, seen = jaxnorm.normalize(jnp.array([[1.0, 3.0], [2.0, 6.0]]), axes=-1)
        >>> y.round(3).tolist(), seen.mean.tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [2.0, 4.0])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 1, for any axes.
    """
    x = checks.input_array(x, who)
    axes = ax.canonical_axes(axes, x.ndim, who, "axes")
    axis = ax.canonical_axes(axis, x.ndim, who)
    where = checked_mask(where, x.shape, who)
    scale = feature_along(scale, x.shape, axis, who, "scale")
    bias = feature_along(bias, x.shape, axis, who, "bias")
    over = devices(axis_name, axis_index_groups, who)
    dtype = output_dtype(dtype, result_dtype(x, scale, bias), who)
    plan = Plan(axes, checks.static_epsilon(epsilon, who), over, dtype, use_mean, current_use())
    if shift is None and (over is not None or _on_several_devices(x, axes)):
        shift = 0.0
    hint = _hint(x, axes, shift, evidence, who)
    y, evidence = normalize_fused(plan, x, scale, bias, where, hint)
    return y, jax.tree.map(lambda leaf: leaf.squeeze(axes), evidence)


def _on_several_devices(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether the type of `x` says so, which it does on meshes with explicit axes."""
    return any(placement(x)[axis] is not None for axis in axes)


def _hint(
    x: jax.Array,
    axes: tuple[int, ...],
    shift: ArrayLike | None,
    evidence: Moments | None,
    who: str,
) -> Hint:
    """What is known of the moments, checked and laid along `x`."""
    if evidence is not None:
        checks.of_kind(Moments, evidence, who, "Take it from jaxnorm.moments(x, axes).")
        kept = ax.other_axes(axes, x.ndim)
        return jax.tree.map(
            lambda leaf: feature_along(leaf, x.shape, kept, who, "evidence", "axes"), evidence
        )
    return shift_along(shift, x, axes, who)


def normalize_with_stats(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    axis: int | Sequence[int],
    where: ArrayLike | None,
    epsilon: float,
    dtype: DTypeLike | None,
    who: str,
) -> jax.Array:
    """Standardizes by given statistics of each feature; the door of every inference function."""
    x = checks.input_array(x, who)
    axis = ax.canonical_axes(axis, x.ndim, who)
    where = checked_mask(where, x.shape, who)
    stats = stats_along(stats, x.shape, axis, who)
    scale = feature_along(scale, x.shape, axis, who, "scale")
    bias = feature_along(bias, x.shape, axis, who, "bias")
    dtype = output_dtype(dtype, result_dtype(x, stats.mean, scale, bias), who)
    plan = Plan(ax.other_axes(axis, x.ndim), checks.static_epsilon(epsilon, who), None, dtype)
    return normalize_by(plan, x, stats, scale, bias, where)


def output_dtype(dtype: DTypeLike | None, computed: Any, who: str) -> Any:
    """The dtype of the result, which is `computed` unless `dtype` asks for another."""
    if dtype is None:
        return computed
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{who}: dtype={jnp.dtype(dtype)} cannot hold normalized values. "
            f"Use a floating point dtype, such as jnp.float32."
        )
    if precision.is_complex(computed) and not precision.is_complex(dtype):
        raise TypeError(
            f"{who}: dtype={jnp.dtype(dtype)} would drop the imaginary part of a {computed} "
            f"result. Use dtype=jnp.{computed}, or dtype=None."
        )
    return jnp.dtype(dtype)
