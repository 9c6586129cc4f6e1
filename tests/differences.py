"""Derivatives against finite differences, which trust none of JAX's ways to differentiate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

FOURTH_ORDER = np.array([1 / 12, -2 / 3, 0, 2 / 3, -1 / 12])
"""A first derivative from five values, with an error of the fourth power of the step."""


def check_along_a_line(orders, constants=False, step=1e-3):
    """`orders` is compiled: number -> value, first derivatives, second ones, each found some ways.

    Where parts are `constants` by definition, no difference is what the derivative says, and the
    ways are compared with each other.
    """
    at = [orders(np.float64(step * i)) for i in range(-2, 3)]
    _, *found = at[2]
    lower = np.array([[value, firsts[0]] for value, firsts, _ in at])
    expected = [ways[0] for ways in found] if constants else FOURTH_ORDER @ lower / step
    for ways, derivative in zip(found, expected, strict=True):
        np.testing.assert_allclose(ways, [derivative] * len(ways), rtol=1e-6, atol=1e-6)


def differences(function, x, step=1e-4):
    """Of a function, along each entry of `x`, by central differences."""
    steps = step * jnp.eye(x.size).reshape(x.size, *x.shape)
    change = jax.vmap(lambda s: function(x + s) - function(x - s))(steps) / (2 * step)
    return jnp.moveaxis(change, 0, -1).reshape(*change.shape[1:], *x.shape)


@partial(jax.jit, static_argnums=0)
def derivatives(function, x):
    """First and second, each by differences and by both modes."""
    first, second = jax.grad(function), jax.jacfwd(jax.grad(function))
    forward = jax.jacfwd(function)(x), jax.jacfwd(jax.jacfwd(function))(x)
    reverse = first(x), jax.jacrev(first)(x)
    return (
        (differences(function, x), differences(first, x)),
        forward,
        reverse,
        (first(x), second(x)),
    )


def check_by_every_entry(function, x):
    expected, *found = derivatives(function, x)
    for each in found:
        for order in range(2):
            np.testing.assert_allclose(each[order], expected[order], rtol=1e-5, atol=1e-6)
