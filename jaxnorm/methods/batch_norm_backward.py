"""The backward pass of batch normalization as the paper derives it, for reading and for checking.

The library itself does not call these functions: its gradient comes from the derivative rule in
`core/fused.py`. Here is the same mathematics in the paper's own steps, so that the two can be
compared, and so that a chain rule can be followed by someone who learns it.

Write w_i for the weight of x_i, 1 where it is valid and 0 elsewhere unless the mask says more,
m = sum w_i for how many values of a feature there are, and l for the loss. The mean is
mu = sum w_i x_i / m, the variance v = sum w_i (x_i - mu)^2 / m.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.masks import checked_mask, clean
from jaxnorm.core.standardize import feature_along


class BackwardSteps(NamedTuple):
    """The gradients of the loss in the six equations of Ioffe & Szegedy 2015, section 3.

    Attributes:
        dxhat: by the standardized values; shape of the input.
        dvar: by the variance; one per feature.
        dmean: by the mean; one per feature.
        dx: by the input; shape of the input.
        dscale: by the scale, gamma; one per feature.
        dbias: by the bias, beta; one per feature.
    """

    dxhat: jax.Array
    dvar: jax.Array
    dmean: jax.Array
    dx: jax.Array
    dscale: jax.Array
    dbias: jax.Array


class BackwardResult(NamedTuple):
    """The gradients of the loss by input, scale and bias."""

    dx: jax.Array
    dscale: jax.Array
    dbias: jax.Array


def batch_norm_backward_steps(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
) -> BackwardSteps:
    """The chain rule of batch normalization, equation by equation.

        dl/dxhat_i = dl/dy_i scale
        dl/dvar    = sum_i dl/dxhat_i (x_i - mean) (-1/2) (var + epsilon)^(-3/2)
        dl/dmean   = sum_i dl/dxhat_i (-1) (var + epsilon)^(-1/2)
                     + dl/dvar sum_i w_i (-2) (x_i - mean) / m
        dl/dx_i    = dl/dxhat_i (var + epsilon)^(-1/2)
                     + dl/dvar 2 w_i (x_i - mean) / m + dl/dmean w_i / m
        dl/dscale  = sum_i dl/dy_i xhat_i
        dl/dbias   = sum_i dl/dy_i

    Args:
        dy: gradient of the loss by the output; shape of `x`.
        x: the input of the batch normalization; real, any shape.
        scale: one factor per feature, or None for 1.
        axis: the feature axis or axes of `x`.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.

    Returns:
        `BackwardSteps`, in float32 or wider.

    Raises:
        TypeError: `x` or `dy` is complex, or holds floats of 8 bits.
        ValueError: `dy`, `scale` or the mask does not fit `x`; an axis out of range or named twice.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0], [2.0], [6.0]])
        >>> dy = jnp.array([[1.0], [0.0], [0.0]])
        >>> steps = jaxnorm.batch_norm_backward_steps(dy, x)
        >>> gradient = jax.grad(lambda x: jaxnorm.batch_norm(x)[0][0, 0])(x)
        >>> bool(jnp.allclose(steps.dx, gradient, atol=1e-6))
        True

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3, the six unnumbered equations after
        Algorithm 1; the weights w_i are ours.

    Differs:
        Circulating copies print the exponent of the variance's equation as -1/2, or leave epsilon
        out under the root of the mean's. Both are as the derivation gives them here.
    """
    who = "batch_norm_backward_steps"
    dy, x, scale, axis, valid = _checked(dy, x, scale, axis, where, who)
    epsilon = checks.static_epsilon(epsilon, who)
    over = ax.other_axes(axis, x.ndim)

    def sums(value: jax.Array) -> jax.Array:
        return value.sum(over, keepdims=True)

    m, mean, var = _statistics(x, valid, over)
    centred = x - mean
    power = var + epsilon
    xhat = centred * power**-0.5

    dxhat = dy * scale
    dvar = sums(dxhat * centred) * -0.5 * power**-1.5
    dmean = sums(-dxhat) * power**-0.5 + dvar * sums(valid * -2 * centred) / m
    dx = dxhat * power**-0.5 + dvar * 2 * valid * centred / m + dmean * valid / m
    dscale = sums(dy * xhat)
    dbias = sums(dy)
    per_feature = (leaf.squeeze(over) for leaf in (dvar, dmean, dscale, dbias))
    dvar, dmean, dscale, dbias = per_feature
    return BackwardSteps(dxhat, dvar, dmean, dx, dscale, dbias)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
) -> BackwardResult:
    """The backward pass of batch normalization in closed form.

        dbias  = sum_i dy_i
        dscale = sum_i dy_i xhat_i
        dx_i   = scale (var + epsilon)^(-1/2) (dy_i - w_i (dbias + xhat_i dscale) / m)

    It follows from `batch_norm_backward_steps`: the second summand of dl/dmean vanishes, since
    deviations from a mean sum to 0, and what remains is gathered by xhat.

    Args:
        dy: gradient of the loss by the output; shape of `x`.
        x: the input of the batch normalization; real, any shape.
        scale: one factor per feature, or None for 1.
        axis: the feature axis or axes of `x`.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.

    Returns:
        `dx` of the shape of `x`, `dscale` and `dbias` per feature, in float32 or wider.

    Raises:
        TypeError: `x` or `dy` is complex, or holds floats of 8 bits.
        ValueError: `dy`, `scale` or the mask does not fit `x`; an axis out of range or named twice.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0], [2.0], [6.0]])
        >>> dx, dscale, dbias = jaxnorm.batch_norm_backward(jnp.ones((3, 1)), x)
        >>> bool(jnp.allclose(dx, 0, atol=1e-6)), dbias.tolist()
        (True, [3.0])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3, simplified.
    """
    who = "batch_norm_backward"
    dy, x, scale, axis, valid = _checked(dy, x, scale, axis, where, who)
    epsilon = checks.static_epsilon(epsilon, who)
    over = ax.other_axes(axis, x.ndim)
    m, mean, var = _statistics(x, valid, over)
    rstd = (var + epsilon) ** -0.5
    xhat = (x - mean) * rstd

    dbias = dy.sum(over, keepdims=True)
    dscale = (dy * xhat).sum(over, keepdims=True)
    dx = scale * rstd * (dy - valid * (dbias + xhat * dscale) / m)
    return BackwardResult(dx, dscale.squeeze(over), dbias.squeeze(over))


def _statistics(
    x: jax.Array, valid: jax.Array, over: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m, mean and variance; without valid values 1, 0 and 1, since nothing then depends on x."""
    count = valid.sum(over, keepdims=True)
    m = jnp.where(count > 0, count, 1)
    mean = (valid * x).sum(over, keepdims=True) / m
    var = (valid * (x - mean) ** 2).sum(over, keepdims=True) / m
    return m, mean, jnp.where(count > 0, var, 1)


def _checked(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None,
    axis: int | Sequence[int],
    where: ArrayLike | None,
    who: str,
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[int, ...], jax.Array]:
    """Arrays of one dtype and rank: dy, clean x, scale, canonical axis, weights."""
    x, dy = checks.input_array(x, who), checks.input_array(dy, who)
    if precision.is_complex(x.dtype) or precision.is_complex(dy.dtype):
        raise TypeError(
            f"{who}: the paper's equations are for real numbers, found x {x.dtype} and dy "
            f"{dy.dtype}. Use jax.vjp of jaxnorm.batch_norm for complex ones."
        )
    if dy.shape != x.shape:
        raise ValueError(
            f"{who}: dy has shape {dy.shape}, x has shape {x.shape}, but each output has one "
            f"input. Pass the gradient of the loss by the output of batch_norm(x)."
        )
    axis = ax.canonical_axes(axis, x.ndim, who)
    mask = checked_mask(where, x.shape, who)
    dtype = precision.promote(x.dtype, dy.dtype, jnp.float32)
    scale = jnp.ones(ax.sizes(x.shape, axis), dtype) if scale is None else jnp.asarray(scale)
    scale = feature_along(scale.astype(dtype), x.shape, axis, who, "scale")
    assert scale is not None
    valid = jnp.ones(x.shape, dtype) if mask is None else jnp.broadcast_to(mask, x.shape)
    return dy.astype(dtype), clean(x, mask).astype(dtype), scale, axis, valid.astype(dtype)
