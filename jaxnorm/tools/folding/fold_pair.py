"""Folding one batch norm into the layer before it (Ioffe & Szegedy 2015, arXiv:1502.03167).

    s = scale / sqrt(var + epsilon)
    norm(x * K + b) = x * (K s) + ((b - mean) s + offset)

In inference batch norm is a fixed scale and shift of each feature. A convolution or dense layer
that makes these features can do both by itself, with other weights, and the norm costs nothing.

When to use: inference with a trained network. `jaxnorm.tools.fold` does it for a whole model. Not
for training, in which mean and variance are those of each batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.moments import Stats


def fold_pair(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    stats: Stats,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    output_axes: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a layer that does what a layer and a batch norm after it did.

        s = scale / sqrt(var + epsilon)
        kernel' = kernel * s,   bias' = (bias - mean) * s + offset

    Args:
        kernel: array of any shape, of which some axes are axes of the layer's output; float,
            bfloat16, or complex. In Flax a dense layer has `[inputs, outputs]`, a convolution
            `[..., inputs / groups, outputs]`, also a depthwise one.
        bias: array of the shape of `kernel` along `output_axes`, or None for 0.
        stats: mean and variance of the norm, as many axes as `output_axes`, each of the kernel's
            size or 1; a mean of None is 0.
        scale: factors of the norm (gamma), of the shape of the variance, or None for 1.
        offset: summands of the norm (beta), of the shape of the variance, or None for 0.
        epsilon: the norm's, added to the variance inside the root.
        output_axes: the axes of `kernel` that the output has too, in the order in which `bias` has
            them: -1 for dense layers and convolutions, -2 for a transposed convolution of Flax with
            `transpose_kernel=True`, several for layers with several feature axes. Axes of a stack
            of layers, such as the first of `nn.scan`, are among them.

    Returns:
        The new kernel and the new bias, of the shapes and dtypes that these have; a bias that was
        None gets the dtype of the kernel.

    Raises:
        TypeError: integers; `stats` that are none; complex statistics or parameters for a real
            kernel.
        ValueError: axes out of range or named twice; statistics or parameters that do not fit.

    Numerics:
        Computes in float32 or wider and rounds once. A mean of many standard deviations goes into
        the bias, which then takes it off what the kernel made of the input: this loses the digits
        that the layer lost before, when it made that mean, and no more.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> from jaxnorm.tools import fold_pair
        >>> stats = jaxnorm.Stats(mean=jnp.array([3.0]), var=jnp.array([0.25]))
        >>> kernel, bias = fold_pair(jnp.array([[5.0], [1.0]]), None, stats, epsilon=0.0)
        >>> kernel.tolist(), bias.tolist()
        ([[10.0], [2.0]], [-6.0])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 2, step 11, and section 3.2.
    """
    who = "fold_pair"
    kernel = checks.inexact_array(kernel, who)
    given = output_axes if isinstance(output_axes, Sequence) else [output_axes]
    in_order = ax.canonical_axes(given, kernel.ndim, who, "output_axes")
    features = ax.sizes(kernel.shape, [axis % kernel.ndim for axis in given])
    checks.of_kind(Stats, stats, who, "Use jaxnorm.Stats(mean, var).")
    found = {
        "the bias": bias,
        "the mean": stats.mean,
        "the variance": stats.var,
        "the scale": scale,
        "the offset": offset,
    }
    arrays = {
        what: _fitting(jnp.asarray(value), features, what, who)
        for what, value in found.items()
        if value is not None
    }
    dtype = precision.promote(kernel.dtype, jnp.float32, *(a.dtype for a in arrays.values()))
    if precision.is_complex(dtype) and not precision.is_complex(kernel.dtype):
        raise TypeError(
            f"{who}: a {kernel.dtype} kernel cannot hold what statistics or parameters in {dtype} "
            f"make of it. Convert it first: kernel.astype(jnp.{dtype})."
        )

    def wide(what: str, absent: float) -> jax.Array:
        full = jnp.full((), absent, dtype) if what not in arrays else arrays[what].astype(dtype)
        return jnp.broadcast_to(full, features)

    var = wide("the variance", 1).real + checks.static_epsilon(epsilon, who)
    s = wide("the scale", 1) * lax.rsqrt(var).astype(dtype)
    new_bias = (wide("the bias", 0) - wide("the mean", 0)) * s + wide("the offset", 0)
    # The axes of `s` in the order in which the kernel has them.
    s = jnp.transpose(s, [[axis % kernel.ndim for axis in given].index(axis) for axis in in_order])
    new_kernel = kernel.astype(dtype) * ax.lay_along(s, in_order, kernel.ndim)
    bias_dtype = kernel.dtype if "the bias" not in arrays else arrays["the bias"].dtype
    return new_kernel.astype(kernel.dtype), new_bias.astype(bias_dtype)


def _fitting(value: jax.Array, features: tuple[int, ...], what: str, who: str) -> jax.Array:
    """`value` if it has as many axes as there are feature axes, each of their size or 1."""
    sizes = zip(value.shape, features, strict=False)
    if value.ndim != len(features) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"{who}: {what} has shape {value.shape}, but the kernel has {features} along its "
            f"output_axes. Use {what} of this shape, with 1 where it is shared, or say where the "
            f"features are: output_axes=..."
        )
    return value
