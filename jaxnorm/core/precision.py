"""Which dtype computes, and which real arithmetic stands behind complex numbers.

Policy: everything is accumulated in float32 or wider, statistics are float32 or wider, and only the
result is cast. Promotion is spelled out here once, so that it also holds where JAX is told to raise
on implicit promotion (`jax_numpy_dtype_promotion="strict"`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def promote(*dtypes: DTypeLike) -> Any:
    """The smallest dtype that holds all of `dtypes`, by NumPy's rules as JAX uses them."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jnp.dtype(dtype) for dtype in dtypes))


def promote_inexact(*dtypes: DTypeLike) -> Any:
    """The same as a floating point or complex dtype: float32 for integers alone."""
    promoted = promote(*dtypes)
    return promoted if jnp.issubdtype(promoted, jnp.inexact) else promote(promoted, jnp.float32)


def accumulation_dtype(dtype: DTypeLike) -> Any:
    """The dtype in which values of `dtype` are summed: itself, or float32 if it is narrower."""
    return promote(dtype, jnp.float32)


def real_dtype(dtype: DTypeLike) -> Any:
    """The dtype of the real part: complex64 -> float32, float32 -> float32."""
    return jnp.finfo(dtype).dtype


def is_complex(dtype: DTypeLike) -> bool:
    """Whether values of `dtype` are complex."""
    return jnp.issubdtype(dtype, jnp.complexfloating)


def abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, real also for complex `x`."""
    return real_product(x, x)


def real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Re(conj(x) y): the inner product under which complex numbers are pairs of real ones."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return x.real * y.real + x.imag * y.imag
    return x * y
