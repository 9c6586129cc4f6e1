"""What the tests of whitening share: layouts, groups and masks, and derivatives by differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def data(*shape, seed=0, offset=1.0):
    """Correlated features along the last axis."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) @ rng.normal(size=(shape[-1], shape[-1])) + offset


def some_mask(*shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.6


def some_weights(*shape, seed=1):
    return some_mask(*shape, seed=seed) * np.random.default_rng(seed + 1).uniform(0.2, 3, shape)


CASES = {
    "matrix": dict(shape=(9, 4), axis=-1, groups=1),
    "groups": dict(shape=(9, 6), axis=1, groups=3),
    "features first": dict(shape=(4, 3, 5), axis=0, groups=2),
    "features between": dict(shape=(3, 4, 2, 5), axis=1, groups=2),
    "masked": dict(shape=(3, 5, 4), axis=-1, groups=2, mask=(3, 5, 1)),
    "weighted examples": dict(shape=(6, 4, 5), axis=1, groups=1, weights=(6, 1, 1)),
    "all masked": dict(shape=(3, 5, 4), axis=-1, groups=2, nothing=(1, 1, 1)),
}


def case_of(name):
    """The input, options that all functions take, and the number of groups."""
    given = CASES[name]
    where = some_mask(*given["mask"]) if "mask" in given else None
    where = some_weights(*given["weights"]) if "weights" in given else where
    where = np.zeros(given["nothing"], bool) if "nothing" in given else where
    return data(*given["shape"]), dict(axis=given["axis"], where=where), given["groups"]


def differences(function, x, step=1e-4):
    """Of a function, along each entry of `x`, by central differences."""
    steps = step * jnp.eye(x.size).reshape(x.size, *x.shape)
    change = jax.vmap(lambda s: function(x + s) - function(x - s))(steps) / (2 * step)
    return jnp.moveaxis(change, 0, -1).reshape(*change.shape[1:], *x.shape)


@partial(jax.jit, static_argnums=0)
def derivatives(function, x):
    """First and second, each by both modes and by differences."""
    first, second = jax.grad(function), jax.jacfwd(jax.grad(function))
    forward = jax.jacfwd(function)(x), jax.jacfwd(jax.jacfwd(function))(x)
    reverse = first(x), jax.jacrev(first)(x)
    return (
        (differences(function, x), differences(first, x)),
        forward,
        reverse,
        (first(x), second(x)),
    )


def check_derivatives(function, x):
    expected, *found = derivatives(function, x)
    for each in found:
        for order in range(2):
            np.testing.assert_allclose(each[order], expected[order], rtol=1e-5, atol=1e-6)
