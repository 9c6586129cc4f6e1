"""Functions of weights beyond the laws: zeros, far means, gains, and the state of spectral norm."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_oracles as oracles
from jax import export
from modules import draw, rounding

from jaxnorm.methods.spectral_norm import spectral_norm, spectral_norm_inference
from jaxnorm.methods.weight_norm import weight_norm
from jaxnorm.methods.weight_standardization import (
    ACTIVATION_GAINS,
    scaled_weight_standardization,
    weight_standardization,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
CASES = {
    "weight norm": (weight_norm, oracles.weight_norm),
    "plain": (weight_standardization, oracles.weight_standardization),
    "scaled": (scaled_weight_standardization, oracles.scaled_weight_standardization),
}
ALL = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
def test_weights_normalized_one_by_one_keep_their_sign(epsilon):
    """What Flax makes of a bias."""
    bias = jnp.array([3.0, -0.5])
    assert weight_norm(bias, epsilon=epsilon).round(6).tolist() == [1.0, -1.0]


@ALL
def test_an_output_of_zeros_has_finite_derivatives(name):
    w = draw((3, 4)).at[:, 1].set(0)
    given = (w,) if name == "plain" else (w, jnp.ones(4))
    function, _ = CASES[name]

    def loss(*given):
        y = function(*given)
        return (jnp.sin(y) * draw((3, 4), seed=1)).sum(), y

    every = tuple(range(len(given)))
    gradient = jax.grad(loss, every, has_aux=True)
    second = jax.jacfwd(lambda *given: gradient(*given)[0])
    with jax.debug_nans(True):
        first, y = jax.jit(gradient)(*given)
        assert y[:, 1].tolist() == [0, 0, 0]
        chex.assert_tree_all_finite((first, jax.jit(second)(*given)))


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_a_mean_of_many_standard_deviations(name):
    """The rounding of the mean, 1e-3, reaches no result."""
    function, oracle = CASES[name]
    w = jnp.asarray(1e4 + np.random.default_rng(0).normal(size=(400, 3)), jnp.float32)
    expected, weights = oracle(w), draw(w.shape, seed=1)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(w):
        y = function(w)
        return (weights * y).sum(), y

    (found, y), (near, _) = gradient(w), gradient(w - 1e4)
    np.testing.assert_allclose(y, expected, atol=1e-6 * abs(expected).max())
    np.testing.assert_allclose(found, near, atol=1e-5 * abs(near).max())


@ALL
def test_scaling_a_weight_changes_nothing(name):
    """The law that makes gradients orthogonal to weights."""
    w = draw((5, 4))
    function = partial(CASES[name][0], **({"epsilon": 0.0} if name == "plain" else {}))
    chex.assert_trees_all_close(function(8 * w), function(w))
    step = jax.jit(jax.grad(lambda w: (function(w) * draw((5, 4), seed=1)).sum()))(w)
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


@pytest.mark.parametrize(
    ("dtype", "n_steps", "shape"),
    [
        (jnp.float32, 1, (5, 4)),
        (jnp.bfloat16, 3, (5, 4)),
        (jnp.float16, 1, (2, 2, 3, 4)),
        (jnp.float64, 3, (2, 2, 3, 4)),
    ],
    ids=str,
)
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

    ways = {
        "grad": jax.grad,
        "jacfwd": jax.jacfwd,
        "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
        "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
        "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    }
    by_u, *both = jax.jit(
        lambda w, u: [
            jax.grad(loss, 1)(w, u),
            *({name: way(f)(w, u) for name, way in ways.items()} for f in (loss, plain)),
        ]
    )(w, u)
    chex.assert_trees_all_close(*both, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_equal(by_u, jnp.zeros_like(u))


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
