"""jax.grad of batch norm against the paper's backward pass: six equations, and the closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import jaxnorm

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")


def gradients(case):
    """dy, and the gradients that JAX finds by x, scale and bias."""
    x, scale, bias, mask = case.arrays()
    dy = np.random.default_rng(3).normal(size=case.shape)

    def loss(x, scale, bias):
        y, _ = jaxnorm.batch_norm(x, scale, bias, axis=case.axis, where=mask, epsilon=1e-3)
        return (y * dy).sum()

    features = tuple(case.shape[a] for a in sorted(a % len(case.shape) for a in case.axis))
    scale, bias = (np.full(features, v) if p is None else p for p, v in ((scale, 1.0), (bias, 0.0)))
    return dy, jax.grad(loss, (0, 1, 2))(x, scale, bias)


def options(case):
    _, scale, _, mask = case.arrays()
    return dict(scale=scale, axis=case.axis, where=mask, epsilon=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_is_the_papers(case):
    x = case.arrays()[0]
    dy, (dx, dscale, dbias) = gradients(case)
    steps = jaxnorm.batch_norm_backward_steps(dy, x, **options(case))
    closed = jaxnorm.batch_norm_backward(dy, x, **options(case))
    for found in (steps, closed):
        np.testing.assert_allclose(found.dx, dx, atol=1e-10)
        np.testing.assert_allclose(found.dscale, dscale, atol=1e-10)
        np.testing.assert_allclose(found.dbias, dbias, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_step_is_a_partial_derivative(case):
    """dl/dxhat, dl/dvar and dl/dmean are derivatives of parts of the forward pass."""
    x, scale, _, mask = case.arrays()
    dy, _ = gradients(case)
    steps = jaxnorm.batch_norm_backward_steps(dy, x, **options(case))
    others = tuple(a for a in range(x.ndim) if a not in [b % x.ndim for b in case.axis])
    factor = 1 if scale is None else np.expand_dims(scale, others)
    valid = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape)
    m = valid.sum(others, keepdims=True)
    mean = (valid * x).sum(others, keepdims=True) / m
    var = (valid * (x - mean) ** 2).sum(others, keepdims=True) / m

    def from_xhat(xhat):
        return (xhat * factor * dy).sum()

    def from_var(var):
        return from_xhat((x - mean) / jnp.sqrt(var + 1e-3))

    def from_mean(mean):
        var = (valid * (x - mean) ** 2).sum(others, keepdims=True) / m
        return from_xhat((x - mean) / jnp.sqrt(var + 1e-3))

    xhat = (x - mean) / np.sqrt(var + 1e-3)
    close = dict(rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(steps.dxhat, jax.grad(from_xhat)(xhat), **close)
    chex.assert_trees_all_close(steps.dvar, jax.grad(from_var)(var).squeeze(others), **close)
    chex.assert_trees_all_close(steps.dmean, jax.grad(from_mean)(mean).squeeze(others), **close)


def test_nothing_valid_leaves_the_elementwise_gradient():
    x, dy, nothing = np.ones((4, 2)), np.arange(8.0).reshape(4, 2), np.zeros((4, 1), bool)
    expected = jax.grad(lambda x: (jaxnorm.batch_norm(x, where=nothing)[0] * dy).sum())(x)
    closed = jaxnorm.batch_norm_backward(dy, x, where=nothing)
    steps = jaxnorm.batch_norm_backward_steps(dy, x, where=nothing)
    for found in (closed, steps):
        np.testing.assert_allclose(found.dx, expected, atol=1e-12)


def test_the_misprints_are_told_apart():
    """The exponent -1/2 for the variance, or a root without epsilon, would fail here."""
    case = CASES[0]
    x = case.arrays()[0]
    dy, (dx, *_) = gradients(case)
    steps = jaxnorm.batch_norm_backward_steps(dy, x, **options(case))
    steps, dx = jax.tree.map(np.asarray, (steps, dx))
    mean, var = x.mean(0), x.var(0)
    good = steps.dxhat / np.sqrt(var + 1e-3) + (steps.dvar * 2 * (x - mean) + steps.dmean) / len(x)
    np.testing.assert_allclose(good, dx, atol=1e-10)
    half = (steps.dxhat * (x - mean)).sum(0) * -0.5 * (var + 1e-3) ** -0.5
    bare = -(steps.dxhat / np.sqrt(var)).sum(0)
    assert np.abs(half - steps.dvar).max() > 1e-3
    assert np.abs(bare - steps.dmean).max() > 1e-5
