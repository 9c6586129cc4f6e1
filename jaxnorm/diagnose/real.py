"""What the study functions take as an array of real numbers."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def real_array(x: ArrayLike, who: str) -> jax.Array:
    """`x` as a floating point array.

    Raises:
        TypeError: it is none.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{who}: found {x.dtype}{list(x.shape)}, which is not floating point. Convert it: "
            f"x.astype(jnp.float32)."
        )
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{who}: found {x.dtype}{list(x.shape)}, which is not defined for complex numbers. "
            f"Take one part at a time: x.real, then x.imag."
        )
    return x
