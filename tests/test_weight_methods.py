"""The functions of weights: weight norm, spectral norm, weight standardization plain and scaled.

Values against NumPy in float64, derivatives against finite differences, and against the plain
composition where constants must not be differentiated.
"""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_oracles as oracles
from jax import export
from jax.test_util import check_grads
from modules import draw, rounding

from jaxnorm.methods.spectral_norm import spectral_norm, spectral_norm_inference
from jaxnorm.methods.weight_norm import weight_norm
from jaxnorm.methods.weight_standardization import (
    ACTIVATION_GAINS,
    scaled_weight_standardization,
    weight_standardization,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


class Case(NamedTuple):
    """A function of a weight and, if `factor`, of one factor per output.

    `formula` is the plain composition: (w, its input axes, epsilon) -> the weight before `factor`.
    """

    function: Any
    oracle: Any
    formula: Any
    factor: bool


def _norm(w, inputs, epsilon):
    return w / jnp.sqrt((w * w).sum(inputs, keepdims=True) + epsilon)


def _plain(w, inputs, epsilon):
    w = w - w.mean(inputs, keepdims=True)
    return w / jnp.sqrt((w * w).mean(inputs, keepdims=True) + epsilon)


def _scaled(w, inputs, epsilon):
    w = w - w.mean(inputs, keepdims=True)
    return w / jnp.sqrt(jnp.maximum((w * w).sum(inputs, keepdims=True), epsilon))


CASES = {
    "weight norm": Case(weight_norm, oracles.weight_norm, _norm, True),
    "plain": Case(weight_standardization, oracles.weight_standardization, _plain, False),
    "scaled": Case(
        scaled_weight_standardization, oracles.scaled_weight_standardization, _scaled, True
    ),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SHAPES = {
    "dense": ((5, 4), -1),
    "conv": ((2, 2, 3, 4), -1),
    "outputs in front": ((4, 5), 0),
    "two output axes": ((3, 4, 2), (-1, 0)),
    "whole": ((3, 4), None),
    "whole, as no axes": ((3, 4), ()),
}


def outputs(axis):
    """The axes as the oracles take them."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def arguments(case, shape, axis, dtype=jnp.float32):
    w = draw(shape, dtype)
    if not case.factor:
        return (w,)
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in outputs(axis)))
    return w, draw(features, jnp.float32, seed=1)


def check_values(case, shape, axis, dtype, **options):
    given = arguments(case, shape, axis, dtype)
    function = jax.jit(partial(case.function, axis=axis, **options), static_argnames="dtype")
    with jax.numpy_dtype_promotion("strict"):
        found, wide = function(*given), function(*given, dtype=jnp.float64)
    assert (found.dtype, wide.dtype) == (dtype, jnp.float64)
    expected = case.oracle(*given, axis=outputs(axis), **options)
    np.testing.assert_allclose(found.astype(jnp.float64), expected, *[rounding(dtype)] * 2)
    # Only the result is rounded to `dtype`.
    limit = rounding(jnp.promote_types(dtype, jnp.float32))
    np.testing.assert_allclose(wide, expected, limit, limit)


@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
@ALL
def test_values_for_every_shape(case, shape, axis, x64):
    check_values(case, shape, axis, jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=jnp.dtype)
@ALL
def test_values_for_every_dtype(case, dtype, x64):
    check_values(case, (2, 2, 3, 4), -1, dtype, epsilon=0.5)


@ALL
def test_no_factor_is_a_factor_of_one(case):
    w, *factor = arguments(case, (5, 4), -1)
    np.testing.assert_allclose(case.function(w), case.oracle(w), 1e-6, 1e-6)
    if factor:
        chex.assert_trees_all_equal(case.function(w, jnp.ones(4)), case.function(w))


SECOND = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "forward over reverse": lambda f, by: jax.jacfwd(jax.grad(f, by), by),
    "reverse over reverse": lambda f, by: jax.jacrev(jax.grad(f, by), by),
    "forward over forward": lambda f, by: jax.jacfwd(jax.jacfwd(f, by), by),
}


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4), -1), ((2, 3, 2), (-1, 0))], ids=str)
@ALL
def test_derivatives(case, shape, axis, x64):
    given = [array.astype(jnp.float64) for array in arguments(case, shape, axis)]
    weights = draw(shape, jnp.float64, seed=2)
    inputs = tuple(a for a in range(3) if a - 3 not in outputs(axis) and a not in outputs(axis))

    def loss(*given):
        return (weights * jnp.sin(case.function(*given, axis=axis, epsilon=0.1))).sum()

    def plain(w, factor=None):
        y = case.formula(w, inputs, 0.1)
        factor = 1.0 if factor is None else jnp.expand_dims(factor, inputs)
        return (weights * jnp.sin(y * factor)).sum()

    by = tuple(range(len(given)))
    found, expected = (
        jax.jit(lambda *given, f=f: {name: d(f, by)(*given) for name, d in SECOND.items()})(*given)
        for f in (loss, plain)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)
    check_grads(jax.jit(loss), given, order=1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
def test_weights_normalized_one_by_one_keep_their_sign(epsilon):
    """What Flax makes of a bias."""
    bias = jnp.array([3.0, -0.5])
    assert weight_norm(bias, epsilon=epsilon).round(6).tolist() == [1.0, -1.0]


@ALL
def test_an_output_of_zeros_has_finite_derivatives(case):
    w = draw((3, 4)).at[:, 1].set(0)
    given = (w, jnp.ones(4))[: 1 + case.factor]

    def loss(*given):
        return (jnp.sin(case.function(*given)) * draw((3, 4), seed=1)).sum()

    with jax.debug_nans(True):
        assert case.function(*given)[:, 1].tolist() == [0, 0, 0]
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss, range(len(given))))(*given))
        chex.assert_tree_all_finite(jax.jit(jax.hessian(loss))(*given))


@pytest.mark.parametrize("case", [CASES["plain"], CASES["scaled"]], ids=["plain", "scaled"])
def test_a_mean_of_many_standard_deviations(case):
    """The rounding of the mean, 1e-3, reaches no result."""
    w = jnp.asarray(1e4 + np.random.default_rng(0).normal(size=(400, 3)), jnp.float32)
    expected = case.oracle(w)
    np.testing.assert_allclose(case.function(w), expected, atol=1e-6 * abs(expected).max())
    weights = draw(w.shape, seed=1)
    found = jax.grad(lambda w: (weights * case.function(w)).sum())(w)
    near = jax.grad(lambda w: (weights * case.function(w)).sum())(w - 1e4)
    np.testing.assert_allclose(found, near, atol=1e-5 * abs(near).max())


@ALL
def test_scaling_a_weight_changes_nothing(case):
    """The law that makes gradients orthogonal to weights."""
    w = draw((5, 4))
    options = dict(epsilon=0.0) if case.function is weight_standardization else {}
    chex.assert_trees_all_close(case.function(8 * w, **options), case.function(w, **options))
    step = jax.grad(lambda w: (case.function(w, **options) * draw((5, 4), seed=1)).sum())(w)
    np.testing.assert_allclose((step * w).sum(0), 0, atol=1e-5)


def test_scaled_weights_keep_the_variance_of_a_signal():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2000, 400)), jnp.float32)
    w = jnp.asarray(rng.uniform(size=(400, 300)), jnp.float32)
    gain = ACTIVATION_GAINS["relu"]
    y = gain * jax.nn.relu(x) @ scaled_weight_standardization(w)
    assert y.var() == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(
        scaled_weight_standardization(w, gain), gain * scaled_weight_standardization(w), rtol=1e-6
    )


@pytest.mark.parametrize("name", ACTIVATION_GAINS)
def test_gains_restore_the_variance_after_an_activation(name):
    """Against the exact variance; the published values are estimates from samples."""
    z = np.linspace(-12, 12, 100_001)
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    activation = {"identity": jnp.asarray}.get(name) or getattr(jax.nn, name)
    y = np.asarray(activation(jnp.asarray(z, jnp.float32)), np.float64)
    spread = np.sqrt(density @ y**2 - (density @ y) ** 2)
    assert ACTIVATION_GAINS[name] * spread == pytest.approx(1, abs=2e-3)


# Spectral norm


def matrix_and_u(shape=(2, 3, 4), dtype=jnp.float32):
    return draw(shape, dtype), draw(shape[-1:], jnp.float32, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=jnp.dtype)
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("shape", [(5, 4), (2, 2, 3, 4)], ids=str)
def test_spectral_values(shape, n_steps, dtype, x64):
    w, u = matrix_and_u(shape, dtype)
    for epsilon in (1e-12, 0.5):
        options = dict(n_steps=n_steps, epsilon=epsilon)
        with jax.numpy_dtype_promotion("strict"):
            found, new_u, sigma = jax.jit(partial(spectral_norm, **options))(w, u)
            wide = spectral_norm_inference(w, sigma, dtype=jnp.float64)
        expected, expected_u, expected_sigma, _ = oracles.spectral_norm(w, u, **options)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert (found.dtype, new_u.dtype, sigma.dtype) == (dtype, computed, computed)
        limit = rounding(dtype)
        np.testing.assert_allclose(found.astype(jnp.float64), expected, limit, limit)
        limit = rounding(computed)
        np.testing.assert_allclose(new_u, expected_u, limit, limit)
        np.testing.assert_allclose(sigma, expected_sigma, limit)
        np.testing.assert_allclose(wide, expected, limit, limit)


def test_power_iteration_finds_the_largest_singular_value():
    w, u = matrix_and_u((6, 5))
    step = jax.jit(spectral_norm)
    for _ in range(50):
        normalized, u, sigma = step(w, u)
    assert float(sigma) == pytest.approx(np.linalg.norm(w, 2), rel=1e-6)
    assert np.linalg.norm(normalized, 2) == pytest.approx(1, rel=1e-6)
    chex.assert_trees_all_close(spectral_norm_inference(w, sigma), normalized)


def test_neither_the_size_of_a_weight_nor_that_of_u_matters():
    w, u = matrix_and_u((6, 5))
    step = jax.jit(jax.value_and_grad(lambda w, u: spectral_norm(w, u)[2]))
    expected, gradient = step(w, u)
    for size, length in [(1, 1e-8), (1, 1e-37), (1, 1e19), (1e-35, 1), (1e-7, 1e-7), (1e35, 1e30)]:
        sigma, found = step(w * jnp.float32(size), u * jnp.float32(length))
        np.testing.assert_allclose(float(sigma) / size, expected, rtol=1e-5)
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)


def test_spectral_derivatives(x64):
    """Those of the composition in which u and v are constants, to second order."""
    w, u = matrix_and_u(dtype=jnp.float64)
    _, new_u, _, v = oracles.spectral_norm(w, u, n_steps=2)
    weights = draw(w.shape, jnp.float64, seed=2)

    def loss(w, u):
        normalized, _, sigma = spectral_norm(w, u, n_steps=2)
        return (weights * jnp.sin(normalized)).sum() + sigma**3

    def plain(w, u):
        sigma = v @ w.reshape(-1, w.shape[-1]) @ new_u
        return (weights * jnp.sin(w / sigma)).sum() + sigma**3

    found, expected = (
        jax.jit(lambda *given, f=f: {name: d(f, 0)(*given) for name, d in SECOND.items()})(w, u)
        for f in (loss, plain)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_equal(jax.grad(loss, 1)(w, u), jnp.zeros_like(u))


def test_a_matrix_of_zeros_leaves_u_alive():
    """Where Flax's u becomes 0, and stays 0 for good."""
    w, u = jnp.zeros((3, 4)), draw((4,))
    with jax.debug_nans(True):
        normalized, new_u, sigma = spectral_norm(w, u)
        gradient = jax.jit(jax.grad(lambda w: spectral_norm(w, u)[0].sum()))(w)
    assert (float(sigma), float(abs(normalized).max())) == (0, 0)
    chex.assert_trees_all_equal(new_u, u)
    chex.assert_trees_all_equal(gradient, jnp.ones_like(w))
    assert float(spectral_norm(jnp.eye(3, 4), new_u)[2]) == pytest.approx(1, rel=1e-6)


EXPORTED = {
    "weight norm": lambda w, s: weight_norm(w, s).sum(),
    "plain": lambda w, s: weight_standardization(w).sum(),
    "scaled": lambda w, s: scaled_weight_standardization(w, s).sum(),
    "spectral norm": lambda w, s: spectral_norm(w, s)[0].sum(),
}


@pytest.mark.parametrize("function", EXPORTED.values(), ids=EXPORTED)
def test_lowers_for_every_platform(function):
    shapes = (
        jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((16,), jnp.float32),
    )
    platforms = ["cpu", "cuda", "tpu"]
    step = jax.jit(jax.value_and_grad(lambda w, s: function(w, s).astype(jnp.float32)))
    assert export.export(step, platforms=platforms)(*shapes).platforms == tuple(platforms)
