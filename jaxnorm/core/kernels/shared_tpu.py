"""What the kernels for rows and for slabs on TPUs have in common."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def along_lanes(value: jax.Array | None) -> jax.Array | None:
    """Numbers of features, as [1, features] in float32."""
    return None if value is None else value.astype(jnp.float32)[None, :]


def cost(x: jax.Array, flops: int, bytes_accessed: int) -> pl.CostEstimate:
    """What the compiler is told of a kernel, which it cannot read; `flops` of each number."""
    return pl.CostEstimate(
        flops=flops * x.size, transcendentals=x.shape[0], bytes_accessed=bytes_accessed
    )
