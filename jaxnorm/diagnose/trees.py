"""Pytrees of parameters as points of a space: their distance, and what a loss must be there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
"""A pytree of floating point arrays."""


def check_loss(loss_of: Callable[[Params], jax.Array], params: Params, who: str) -> None:
    """Refuses parameters that have no gradient, and a loss that is not one number."""
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{who}: params holds an array of dtype {jnp.result_type(leaf)}, which has no "
                f"gradient. Give such arrays to the loss apart: "
                f"{who}(lambda params: loss_of(params, rest), ...)."
            )
    loss = jax.eval_shape(loss_of, params)
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape:
        found = f"shape {loss.shape}" if isinstance(loss, jax.ShapeDtypeStruct) else f"{loss}"
        raise ValueError(
            f"{who}: loss_of returns {found}, which is not one number. Reduce it to the mean, and "
            f"leave auxiliary results out: lambda params: losses_of(params)[0].mean()."
        )


def wide(leaf: Any) -> jax.Array:
    """In float32 or wider."""
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def dot(first: Params, second: Params) -> jax.Array:
    """The scalar product of two pytrees of the same structure."""
    products = jax.tree.map(lambda a, b: jnp.vdot(wide(a), wide(b)), first, second)
    return jax.tree.reduce(jnp.add, products, jnp.zeros(()))


def norm(tree: Params) -> jax.Array:
    """The length of a pytree as one vector."""
    return jnp.sqrt(dot(tree, tree))


def distance(first: Params, second: Params) -> jax.Array:
    """The length of the difference of two pytrees."""
    return norm(jax.tree.map(lambda a, b: wide(a) - wide(b), first, second))
