"""Saturated units: those through which next to no gradient comes."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.core.axes import canonical_axes
from jaxnorm.diagnose.real import real_array

SEARCHED = (-8.0, 8.0, 3201)
"""Where the largest slope is looked for: from, to, points."""


def saturated_share(
    inputs: ArrayLike,
    activation: Callable[[jax.Array], jax.Array],
    *,
    threshold: float = 0.1,
    axes: int | Sequence[int] | None = None,
) -> jax.Array:
    """The share of inputs at which an activation is all but flat.

        |f'(x)| < threshold * max |f'|

    For a sigmoid and the default these are |x| > 3.6, for tanh |x| > 1.8, for ReLU all x that are
    not positive.

    Args:
        inputs: floating point array of any shape: what goes into the activation.
        activation: a function that acts on each element, such as `jax.nn.sigmoid`.
        threshold: between 0 and 1, the slope that counts as flat, relative to the largest one.
        axes: the axes over which the share is taken, for example 0 for a share of each unit over
            a batch `[batch, units]`; None takes all.

    Returns:
        Numbers from 0 to 1, float32: a scalar, or of the shape of `inputs` without `axes`.

    Raises:
        TypeError: `inputs` is not floating point.
        ValueError: `threshold` is out of range, there are no inputs, or the activation does not
            turn one number into one, or has no finite slope that is the largest, or axes are out of
            range.

    Numerics: the largest slope is that between -8 and 8, in steps of 0.005. NaN counts as not
        saturated.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.diagnose import saturated_share
        >>> x = jnp.array([[-9.0, 0.5], [7.0, -0.5]])
        >>> float(saturated_share(x, jax.nn.sigmoid))
        0.5
        >>> saturated_share(x, jax.nn.sigmoid, axes=0).tolist()  # of each unit
        [1.0, 0.0]

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 2, for saturation as what normalization
        prevents; the threshold is a choice.
    """
    who = "saturated_share"
    x = real_array(inputs, who)
    if not x.size:
        raise ValueError(
            f"{who}: inputs of shape {x.shape} hold nothing. Give what goes into the activation: "
            f"inputs=x @ kernel."
        )
    if not 0 < threshold < 1:
        raise ValueError(
            f"{who}: threshold={threshold} is not between 0 and 1. Give the slope that counts as "
            f"flat, relative to the largest one: threshold=0.1."
        )
    axes = None if axes is None else canonical_axes(axes, x.ndim, who, "axes")

    def elementwise(each: jax.Array) -> jax.Array:
        return activation(each)  # JAX keeps no weak reference to functions of NumPy

    result = jax.eval_shape(elementwise, jax.ShapeDtypeStruct((), x.dtype))
    if getattr(result, "shape", None) != ():
        raise ValueError(
            f"{who}: the activation turns one number into {result}. Give a function that acts on "
            f"each element: activation=jax.nn.sigmoid."
        )

    def slopes(at: jax.Array) -> jax.Array:
        return jnp.abs(jax.vmap(jax.grad(elementwise))(at.ravel())).reshape(at.shape)

    with jax.ensure_compile_time_eval():
        steepest = slopes(jnp.linspace(*SEARCHED, dtype=x.dtype)).max()
    # Not known beforehand if the activation has parameters that are traced.
    if not isinstance(steepest, Tracer) and not 0 < float(steepest) < float("inf"):
        raise ValueError(
            f"{who}: the largest slope of the activation between -8 and 8 is {float(steepest)}, to "
            f"which no other compares. Give one with a slope everywhere: activation=jax.nn.sigmoid."
        )
    return jnp.mean(slopes(x) < threshold * steepest, axis=axes, dtype=jnp.float32)
