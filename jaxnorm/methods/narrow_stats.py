"""Running statistics stored in less than float32: computed in float32, stored as they are found.

A layer's own are float32 or wider. A whole model cast to bfloat16 brings narrow ones, which Flax's
layers train with, and so do these. What a number of few digits cannot take up is lost, though, and
that is most of what a moving average adds: hence a warning.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.core import precision


def widened_stat(leaf: jax.Array, name: str, who: str) -> jax.Array:
    """A stored mean, variance or covariance in float32 or wider.

    Raises:
        TypeError: it is stored as integers, or in 8 bits.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) or jnp.finfo(leaf.dtype).bits < 16:
        raise TypeError(
            f"{who}: the running {name} is stored as {leaf.dtype}, which holds no statistics. "
            f"Store it in float32: {name}.astype(jnp.float32)."
        )
    return leaf.astype(precision.accumulation_dtype(leaf.dtype)) if _is_narrow(leaf.dtype) else leaf


def widened(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Variables, of which those in half precision become float32."""
    return {
        name: leaf.astype(jnp.float32) if _is_narrow(leaf.dtype) else leaf
        for name, leaf in values.items()
    }


def rounded(leaf: jax.Array, dtype: Any) -> jax.Array:
    """`leaf` in the dtype in which it is stored.

    A finite value beyond the ends of a narrow dtype becomes the last one, since from infinity no
    average returns. The count of a few images alone is beyond the 65504 of float16.
    """
    if _is_narrow(dtype):
        info = jnp.finfo(dtype)
        ends = (jnp.asarray(end, leaf.dtype) for end in (info.min, info.max))
        leaf = jnp.where(jnp.isfinite(leaf), jnp.clip(leaf, *ends), leaf)
    return leaf.astype(dtype)


def counts_to(dtype: Any) -> int:
    """Up to which number `dtype` holds every whole one."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).max)
    return 2 ** (jnp.finfo(dtype).nmant + 1)


def warn_of_rounding(found: Mapping[str, jax.Array], momentum: Any, layer: str) -> None:
    """Warns if some of the variables that training moves are narrow.

    The text names the kind of layer and no path, so that a model of many layers warns once.
    """
    narrow = {name: leaf.dtype for name, leaf in found.items() if _is_narrow(leaf.dtype)}
    if not narrow:
        return
    dtype = next(iter(narrow.values()))
    lost = "steps smaller than half its last digit are lost"
    if isinstance(momentum, int | float) and momentum < 1:
        share = min(float(jnp.finfo(dtype).eps) / 2 / (1 - momentum), 1)
        lost = f"with momentum={momentum}, an average stops within {share:.0%} of what batches have"
    warnings.warn(
        f"{layer}: trains with {', '.join(narrow)} stored as {dtype}. They are computed in float32 "
        f"and rounded to {dtype} at each step: {lost}, and a count stops at {counts_to(dtype)}. "
        f"Keep them in float32: cast the parameters alone, variables['params'] in Linen, "
        f"nnx.state(model, nnx.Param) in NNX.",
        stacklevel=2,
    )


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 16
