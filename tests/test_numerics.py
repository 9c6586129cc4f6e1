"""The numerics policy: large means, narrow dtypes, strict modes, and what a mask must keep out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxnorm


def offset_data(mean, std, shape=(4096, 3), dtype=np.float32, seed=0):
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


OFFSETS = [(0, 1), (1e3, 1), (1e4, 1), (-1e4, 1), (300, 1e-2), (1e6, 10), (0, 1e-4), (0, 1e6)]


@pytest.mark.parametrize(("mean", "std"), OFFSETS)
@pytest.mark.parametrize("shape", [(4096, 3), (16, 16, 16, 3)])
def test_right_at_large_means(mean, std, shape):
    """The output is off by no more than what rounding the mean itself to float32 costs."""
    x = offset_data(mean, std, shape)
    expected, _, true_mean, true_var = oracles.batch_norm(x, epsilon=0)
    y, seen = jaxnorm.batch_norm(x, epsilon=0)
    mean_rounding = np.spacing(np.float32(abs(mean)))
    np.testing.assert_allclose(seen.mean, true_mean, atol=0.51 * mean_rounding + 1e-6 * std)
    np.testing.assert_allclose(seen.var, true_var, rtol=2e-6)
    np.testing.assert_allclose(y, expected, atol=0.51 * mean_rounding / std + 2e-5)


def test_mean_keeps_its_digits_over_a_million_values():
    x = offset_data(1e4, 1, (1 << 20, 2))
    seen = jaxnorm.moments(x, 0)
    np.testing.assert_allclose(seen.mean, x.mean(0, dtype=np.float64), atol=6e-4)
    np.testing.assert_allclose(seen.var, x.var(0, dtype=np.float64), rtol=1e-5)


def test_gradient_is_right_at_large_means():
    x = offset_data(1e4, 1, (64, 3))
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    found = jax.grad(lambda x: (jaxnorm.batch_norm(x)[0] * dy).sum())(x)
    with jax.enable_x64(True):
        expected = jaxnorm.batch_norm_backward(dy.astype(np.float64), x.astype(np.float64)).dx
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (100, 5), (300, 1)])
def test_narrow_input_costs_one_rounding(dtype, mean, std):
    x = jnp.asarray(offset_data(mean, std, (512, 3)), dtype)
    expected, _, true_mean, true_var = oracles.batch_norm(np.asarray(x, np.float64))
    y, seen = jaxnorm.batch_norm(x)
    assert y.dtype == dtype
    chex.assert_type([seen.count, seen.mean, seen.var], jnp.float32)
    np.testing.assert_allclose(seen.mean, true_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(seen.var, true_var, rtol=1e-5)
    rounding = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1.01 * rounding, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradient_has_the_dtype_of_its_argument(dtype):
    x = jnp.asarray(offset_data(0, 1, (16, 3)), dtype)
    scale = jnp.ones(3, jnp.float32)
    dx, dscale = jax.grad(
        lambda x, s: jaxnorm.batch_norm(x, s)[0].astype(jnp.float32).sum(), (0, 1)
    )(x, scale)
    assert (dx.dtype, dscale.dtype) == (dtype, jnp.float32)


def test_constant_features_become_the_bias():
    x = jnp.full((8, 2), 1234.567)
    y, seen = jaxnorm.batch_norm(x, bias=jnp.array([1.0, -2.0]))
    assert seen.var.tolist() == [0, 0]
    np.testing.assert_array_equal(y, np.broadcast_to([1.0, -2.0], (8, 2)))
    dx = jax.grad(lambda x: (jaxnorm.batch_norm(x)[0] ** 2).sum())(x)
    np.testing.assert_array_equal(dx, 0)


def test_complex_input_is_normalized_by_its_modulus():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 3)) + 1j * rng.normal(size=(64, 3)) + (5 + 2j)).astype(np.complex64)
    expected, _, mean, var = oracles.batch_norm(x)
    y, seen = jaxnorm.batch_norm(x)
    assert (y.dtype, seen.mean.dtype, seen.var.dtype) == (jnp.complex64, jnp.complex64, jnp.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-4)
    np.testing.assert_allclose(seen.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(seen.var, var, rtol=1e-5)


# Masks.

MASK = np.array([True, True, False, True, False, True])[:, None]
HARMFUL = [np.nan, np.inf, -np.inf, 3e38]


@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_masked_reaches_neither_value_nor_gradient(harm, training):
    x = offset_data(2, 1, (6, 3))
    spoiled = np.where(MASK, x, np.float32(harm))
    stats = jaxnorm.Stats(jnp.ones(3), jnp.full(3, 2.0))
    scale = jnp.array([1.0, 2.0, 3.0])

    def loss(x, scale):
        if training:
            y, _ = jaxnorm.batch_norm(x, scale, where=MASK)
        else:
            y = jaxnorm.batch_norm_inference(x, stats, scale, where=MASK)
        return jnp.where(MASK, y**2, 0).sum() + (y**3 * 0).sum()

    def everything(x):
        value, (dx, dscale) = jax.value_and_grad(loss, (0, 1))(x, scale)
        curvature = jax.jvp(jax.grad(loss), (x, scale), (jnp.ones_like(x), scale))[1]
        return value, jnp.where(MASK, dx, 0), dscale, jnp.where(MASK, curvature, 0)

    chex.assert_trees_all_close(everything(jnp.asarray(spoiled)), everything(x), rtol=1e-6)
    dx = jax.grad(loss)(jnp.asarray(spoiled), scale)
    assert jnp.isfinite(dx).all()


@pytest.mark.parametrize("harm", [np.nan, np.inf])
def test_masked_complex_values_do_no_harm(harm):
    x = np.array([[1 + 1j], [2 - 1j], [complex(0, harm)]], np.complex64)
    where = np.array([[True], [True], [False]])
    y, seen = jaxnorm.batch_norm(x, where=where)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(seen.mean, [1.5])


def test_masked_values_are_normalized_like_the_others():
    x = offset_data(2, 1, (6, 3))
    y, _ = jaxnorm.batch_norm(x, where=MASK)
    np.testing.assert_allclose(y, oracles.batch_norm(x, where=MASK)[0], atol=1e-5)


def test_integers_count_where_they_are_not_0():
    x = offset_data(2, 1, (6, 3))
    chex.assert_trees_all_equal(
        jaxnorm.batch_norm(x, where=-2 * MASK.astype(np.int32)), jaxnorm.batch_norm(x, where=MASK)
    )


def test_weights_of_whole_numbers_repeat():
    """Also under Bessel's correction, and narrow ones, whose sums float16 would not hold."""
    x, times = offset_data(2, 1, (300, 3)), np.arange(300) % 5
    joint = jaxnorm.comoments(x, where=times[:, None].astype(np.float16))
    np.testing.assert_array_equal(joint.count, times.sum())
    expected = np.cov(x, rowvar=False, fweights=times)
    np.testing.assert_allclose(joint.stats(ddof=1).cov[0], expected, rtol=1e-5, atol=1e-6)
    each = jaxnorm.moments(x, 0, where=jnp.asarray(times[:, None], jnp.bfloat16))
    np.testing.assert_allclose(each.stats(ddof=1).var, np.diag(expected), rtol=1e-5)


def test_weights_are_constants():
    x, weights = offset_data(2, 1, (6, 3)), np.linspace(0, 1, 6, dtype=np.float32)[:, None]

    def total(weights):
        y, seen = jaxnorm.batch_norm(x, where=weights)
        return (y**3).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(seen))

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(weights)), 0)


FITS = [((3, 2, 3), True), ((3,), False), ((2, 3), True), ((2, 1), True), ((1,), True), ((), True)]


@pytest.mark.parametrize(("mask", "fits"), FITS, ids=str)
def test_fewer_axes_are_the_last_ones_unless_they_fit_elsewhere(mask, fits):
    x = offset_data(2, 1, (3, 2, 3))
    where = np.arange(np.prod(mask, dtype=int)).reshape(mask) % 3 < 2
    if not fits:
        with pytest.raises(ValueError, match=r"in 2 ways.*mask\[\.\.\., None, None\] or "):
            jaxnorm.moments(x, 0, where=where)
        return
    whole = np.broadcast_to(where, x.shape)
    chex.assert_trees_all_equal(
        jaxnorm.moments(x, 0, where=where), jaxnorm.moments(x, 0, where=whole)
    )


def test_nothing_valid_is_normalized_by_the_unit_estimate():
    x = offset_data(2, 1, (6, 3))
    nothing = np.zeros((6, 1), bool)
    y, seen = jaxnorm.batch_norm(x, where=nothing, epsilon=0)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(seen.count, 0)
    dx = jax.grad(lambda x: jaxnorm.batch_norm(x, where=nothing, epsilon=0)[0].sum())(x)
    np.testing.assert_array_equal(dx, 1)


def test_an_empty_batch_has_an_empty_result():
    y, seen = jaxnorm.batch_norm(jnp.zeros((0, 3)))
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(seen.count, 0)


# JAX's strict modes. Rank promotion raises in the whole suite (conftest).


def training_step(x, scale, bias, where):
    def loss(x, scale, bias):
        y, seen = jaxnorm.batch_norm(x, scale, bias, where=where)
        return (y.astype(jnp.float32).real ** 2).sum(), seen

    value, seen = jax.jvp(lambda x: loss(x, scale, bias), (x,), (jnp.ones_like(x),))
    gradients, seen = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    start = jaxnorm.Stats(jnp.zeros(3), jnp.ones(3))
    running = [
        jaxnorm.update_running(start, seen, updates=jnp.zeros(3, jnp.int32), **options)
        for options in ({}, {"momentum": None}, {"debias": True}, {"ddof": 1})
    ]
    inference = jaxnorm.batch_norm_inference(x, running[0][0], scale, bias, where=where)
    return value, gradients, running, inference


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("mode", ["dtype promotion", "debug nans", "tracer leaks"])
def test_strict_modes(mode, dtype, masked, jit):
    contexts = {
        "dtype promotion": jax.numpy_dtype_promotion("strict"),
        "debug nans": jax.debug_nans(True),
        "tracer leaks": jax.checking_leaks(),
    }
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(offset_data(2, 1, (6, 3)), dtype)
        where = jnp.asarray(MASK) if masked else None
        if masked:
            x = jnp.where(where, x, jnp.full_like(x, jnp.nan))
        scale, bias = jnp.ones(3, jnp.float32), jnp.zeros(3, jnp.float32)
        step = jax.jit(training_step) if jit else training_step
        with contexts[mode]:
            result = step(x, scale, bias, where)
    assert all(
        np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(result[2:])
    )
