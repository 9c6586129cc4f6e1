"""Decorrelated batch normalization and IterNorm where the laws do not look: degenerate input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_by_every_entry
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS
from subjects import BOTH
from whitening_cases import data

import jaxnorm

pytestmark = pytest.mark.usefixtures("quick_compile")
FUNCTIONS = {"dbn": jaxnorm.decorrelated_batch_norm, "iter_norm": jaxnorm.iter_norm}
each_method = pytest.mark.parametrize("method", FUNCTIONS)


# Derivatives

DEGENERATE = {
    "equal eigenvalues": np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]]),
    "duplicated features": np.repeat(data(4, 1), 3, 1),
    "constant features": np.ones((4, 3)),
    "fewer examples than features": np.repeat(data(2, 3), 2, 0),
}
WEIGHTS = np.random.default_rng(4).normal(size=(4, 3))


def loss_by(method, x):
    return (jnp.sin(FUNCTIONS[method](x, epsilon=0.3)[0]) * WEIGHTS).sum()


# Each is compiled once, whatever the input.
LOSSES = {method: partial(loss_by, method) for method in FUNCTIONS}


@each_method
@pytest.mark.parametrize("name", DEGENERATE)
def test_derivatives_where_eigenvalues_are_equal(x64, name, method):
    check_by_every_entry(LOSSES[method], jnp.asarray(DEGENERATE[name]))


@each_method
def test_derivatives_in_float32_are_those_in_float64(method):
    """With two features alike, so that one eigenvalue is epsilon."""
    x = data(20, 3, offset=0)
    x = np.concatenate([x, x[:, :1]], 1).astype(np.float32)

    def derivatives(x):
        def loss(x):
            return (FUNCTIONS[method](x, epsilon=1e-3)[0] ** 3).sum()

        gradient = jax.grad(loss)
        return jax.jit(lambda x: jax.jvp(gradient, (x,), (jnp.cos(x),)))(x)

    found = derivatives(jnp.asarray(x))
    with jax.enable_x64(True):
        expected = derivatives(jnp.asarray(x, jnp.float64))
        expected = jax.tree.map(np.asarray, expected)
    for order, (value, exact) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(value, exact, atol=(1e-3, 1e-1)[order] * np.abs(exact).max())


def test_groups_of_features_on_several_devices():
    """Of a mesh with explicit axes, under `jit`."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(data(16, 4), jnp.float32)

    def step(x):
        return jax.grad(lambda x: (jaxnorm.decorrelated_batch_norm(x, num_groups=2)[0] ** 3).sum())(
            x
        )

    expected = jax.jit(step)(x)
    with jax.set_mesh(mesh):
        found = jax.jit(step)(jax.device_put(x, jax.NamedSharding(mesh, P("a", "b"))))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_too_few_examples_warn(framework):
    x = jnp.asarray(data(12, 6), jnp.float32)
    layer = FRAMEWORKS[framework](x, getattr(jaxnorm, framework).DecorrelatedBatchNorm)
    with pytest.warns(UserWarning, match=r"6 examples for groups of 6 features.*rank 5 at most"):
        jax.eval_shape(layer.train, layer.params, layer.stats, x[:6])
    jax.eval_shape(layer.train, layer.params, layer.stats, x[:7])
