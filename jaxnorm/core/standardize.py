"""Standardize, scale and shift: the plain composition, which is the specification.

    x --moments--> Moments --stats--> Stats --standardize--> --affine--> y

Every faster path of the library equals what stands here, in value and in every derivative.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import Devices
from jaxnorm.core.kernels.use import Use
from jaxnorm.core.masks import clean
from jaxnorm.core.moments import Moments, Stats, moments_keeping_axes


class Plan(NamedTuple):
    """What is static about one normalization. Hashable, so that traces are reused.

    Attributes:
        axes: canonical axes over which moments are taken.
        epsilon: added to the variance.
        over: mapped axes over which moments are pooled as well, or None.
        dtype: dtype of the result.
        use_mean: whether the mean is taken off; if not, the variance is about the origin.
        kernels: whether kernels may take the place of the specification, see `use_kernels`.
    """

    axes: tuple[int, ...]
    epsilon: float
    over: Devices | None
    dtype: Any
    use_mean: bool = True
    kernels: Use = "automatic"


def normalize_plainly(
    plan: Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    """The specification. All arrays have the axes of `x`, with size 1 where they are shared."""
    evidence = moments_keeping_axes(x, plan.axes, where, plan.over, plan.use_mean)
    y = apply_affine(apply_stats(clean(x, where), evidence.stats(), plan.epsilon), scale, bias)
    return y.astype(plan.dtype), evidence


def apply_stats(x: jax.Array, stats: Stats, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon), in float32 or wider."""
    mean = jnp.zeros((), jnp.float32) if stats.mean is None else stats.mean
    dtype = precision.promote(x.dtype, mean.dtype, jnp.float32)
    real = precision.real_dtype(dtype)
    x = x.astype(dtype)
    centred = x if stats.mean is None else x - mean.astype(dtype)
    return centred * lax.rsqrt(stats.var.astype(real) + epsilon)


def apply_affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """y * scale + bias, in the widest of their dtypes."""
    if scale is not None:
        dtype = precision.promote(y.dtype, scale.dtype)
        y = y.astype(dtype) * scale.astype(dtype)
    if bias is not None:
        dtype = precision.promote(y.dtype, bias.dtype)
        y = y.astype(dtype) + bias.astype(dtype)
    return y


def result_dtype(x: jax.Array, *params: jax.Array | None) -> Any:
    """The dtype of `x`, made complex if a parameter is."""
    if any(jnp.iscomplexobj(param) for param in params if param is not None):
        return precision.promote(x.dtype, jnp.complex64)
    return x.dtype


def standardize(
    x: ArrayLike, stats: Stats, axes: int | Sequence[int], *, epsilon: float = 1e-5
) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation of given statistics.

        y = (x - mean) / sqrt(var + epsilon)

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32.
        stats: mean and variance, of the shape of `x` without `axes`; a mean of None is 0.
        axes: the axes of `x` along which the statistics are shared: those that were reduced.
        epsilon: added to the variance, inside the root.

    Returns:
        Array of the shape and dtype of `x`, complex if the mean is.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, or `stats` are no `Stats`.
        ValueError: axes out of range or named twice, statistics of another shape.

    Numerics:
        Computes in float32 or wider and rounds once.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> jaxnorm.standardize(x, jaxnorm.moments(x, axes=0).stats(), axes=0).round(3)
        Array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
    """
    who = "standardize"
    x = checks.input_array(x, who)
    axes = ax.canonical_axes(axes, x.ndim, who, "axes")
    epsilon = checks.static_epsilon(epsilon, who)
    stats = stats_along(stats, x.shape, ax.other_axes(axes, x.ndim), who, "axes")
    return apply_stats(x, stats, epsilon).astype(result_dtype(x, stats.mean))


def affine(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
) -> jax.Array:
    """Scales and shifts each feature: `x * scale + bias`.

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        axis: the feature axis or axes of `x`; the shape of `scale` and `bias` is that of `x` along
            them, in increasing order.

    Returns:
        Array of the shape and dtype of `x`, complex if a parameter is.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits.
        ValueError: axis out of range or named twice, parameters of another shape.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> jaxnorm.affine(jnp.ones((1, 2)), scale=jnp.array([2.0, 3.0])).tolist()
        [[2.0, 3.0]]
    """
    who = "affine"
    x = checks.input_array(x, who)
    axis = ax.canonical_axes(axis, x.ndim, who)
    scale = feature_along(scale, x.shape, axis, who, "scale")
    bias = feature_along(bias, x.shape, axis, who, "bias")
    return apply_affine(x, scale, bias).astype(result_dtype(x, scale, bias))


def feature_along(
    value: ArrayLike | None,
    shape: tuple[int, ...],
    axis: tuple[int, ...],
    who: str,
    what: str,
    argument: str = "axis",
) -> jax.Array | None:
    """A checked array of features, laid along the feature `axis` of an input of `shape`."""
    checked = checks.feature_array(value, shape, axis, who, what, argument)
    return None if checked is None else ax.lay_along(checked, axis, len(shape))


def stats_along(
    stats: Stats, shape: tuple[int, ...], axis: tuple[int, ...], who: str, argument: str = "axis"
) -> Stats:
    """Checked statistics, laid along the feature `axis` of an input of `shape`."""
    fix = "Use jaxnorm.Stats(mean, var); of evidence, take the estimate: moments.stats()."
    checks.of_kind(Stats, stats, who, fix)
    mean = feature_along(stats.mean, shape, axis, who, "the mean", argument)
    var = feature_along(stats.var, shape, axis, who, "the variance", argument)
    assert var is not None
    return Stats(mean, var)
