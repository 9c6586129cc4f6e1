"""What the study functions take as an array of real numbers."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core import checks


def real_array(x: ArrayLike, who: str) -> jax.Array:
    """`x` as a floating point array; integers and booleans become float32.

    Raises:
        TypeError: it is no array, complex, or narrower than 16 bits.
    """
    x = checks.input_array(x, who)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{who}: found {x.dtype}{list(x.shape)}, which is not defined for complex numbers. "
            f"Take one part at a time: x.real, then x.imag."
        )
    return x
