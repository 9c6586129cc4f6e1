"""Running averages, as pure functions, against their closed forms in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

MOMENTUM = 0.9
START = jaxnorm.Stats(jnp.zeros(2), jnp.ones(2))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [rng.normal(3, 2, size=(size, 2)).astype(np.float32) for size in (4, 9, 2, 6, 5)]


def run(batches, **options):
    running, updates = START, jnp.zeros(2, jnp.int32)
    for batch in batches:
        evidence = jaxnorm.moments(batch, 0)
        running, updates = jaxnorm.update_running(running, evidence, updates=updates, **options)
    np.testing.assert_array_equal(updates, len(batches))
    return running


def stacked(batches, ddof=0):
    return np.stack([b.mean(0) for b in batches]), np.stack([b.var(0, ddof=ddof) for b in batches])


@pytest.mark.parametrize("ddof", [0, 1])
def test_ema_weighs_by_age_and_remembers_its_start(batches, ddof):
    age = np.arange(len(batches))[::-1, None]
    weights = (1 - MOMENTUM) * MOMENTUM**age
    means, variances = stacked(batches, ddof)
    running = run(batches, momentum=MOMENTUM, ddof=ddof)
    np.testing.assert_allclose(running.mean, (weights * means).sum(0), rtol=1e-5)
    start = MOMENTUM ** len(batches)
    np.testing.assert_allclose(running.var, start + (weights * variances).sum(0), rtol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.5, MOMENTUM, 0.9999, 1 - 1e-8])
def test_debiased_average_weighs_by_age_alone(batches, momentum, ddof):
    age = np.arange(len(batches))[::-1, None]
    weights = float(momentum) ** age / (float(momentum) ** age).sum()
    means, variances = stacked(batches, ddof)
    running = run(batches, momentum=momentum, debias=True, ddof=ddof)
    np.testing.assert_allclose(running.mean, (weights * means).sum(0), rtol=1e-4)
    np.testing.assert_allclose(running.var, (weights * variances).sum(0), rtol=1e-4)


def test_debiased_average_is_the_corrected_zero_started_one(batches):
    zero = jaxnorm.Stats(jnp.zeros(2), jnp.zeros(2))
    for batch in batches:
        zero = jaxnorm.ema(zero, jaxnorm.moments(batch, 0).stats(), MOMENTUM)
    corrected = jax.tree.map(lambda leaf: leaf / (1 - MOMENTUM ** len(batches)), zero)
    running = run(batches, momentum=MOMENTUM, debias=True)
    chex.assert_trees_all_close(running, corrected, rtol=1e-5)


def test_cumulative_average_weighs_all_batches_the_same(batches):
    means, variances = stacked(batches)
    running = run(batches, momentum=None)
    np.testing.assert_allclose(running.mean, means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running.var, variances.mean(0), rtol=1e-5)


@pytest.mark.parametrize("start", [np.nan, np.inf])
def test_what_weighs_nothing_may_be_anything(start):
    anything, new = (jaxnorm.Stats(jnp.full(1, v), jnp.full(1, v)) for v in (start, 3.0))
    averages = (
        jaxnorm.ema(anything, new, 0.0),
        jaxnorm.ema(new, anything, 1.0),
        jaxnorm.debiased_ema(anything, new, 0.9, 0),
        jaxnorm.cumulative_average(anything, new, 0),
    )
    chex.assert_trees_all_equal(averages, (new,) * 4)


def test_bessel_is_the_unbiased_variance():
    x = jax.random.normal(jax.random.key(0), (7, 3))
    biased = jaxnorm.moments(x, 0)
    corrected = jaxnorm.bessel(biased.stats(), biased.count)
    np.testing.assert_allclose(corrected.var, np.var(x, 0, ddof=1), rtol=1e-6)
    chex.assert_trees_all_close(corrected, biased.stats(ddof=1), rtol=1e-7)
    assert jaxnorm.bessel(START, 1).var.tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}, {"ddof": 1}])
def test_entries_without_evidence_do_not_move(options):
    batch = jaxnorm.moments(
        jnp.array([[3.0, 5.0], [4.0, 6.0]]), 0, where=jnp.array([[True, False], [True, False]])
    )
    running, updates = jaxnorm.update_running(
        START, batch, updates=jnp.zeros(2, jnp.int32), **options
    )
    assert running.mean[0] != 0
    assert running.mean[1] == 0
    assert running.var[1] == 1
    assert updates.tolist() == [1, 0]


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_newest_batch_weighs_by_the_count_whole_or_not(momentum):
    """As integers, as floats, between them in an average of states, and below 0 as at 0."""
    batch = jaxnorm.Moments(jnp.ones(1), jnp.ones(1), jnp.ones(1))
    nothing = jaxnorm.Stats(jnp.zeros(1), jnp.zeros(1))

    def weight(updates):
        options = {"momentum": momentum, "debias": momentum is not None}
        new, after = jaxnorm.update_running(nothing, batch, updates=updates, **options)
        np.testing.assert_allclose(after, updates + 1, rtol=1e-6)
        assert after.dtype == updates.dtype
        return float(new.mean[0])

    counts = jnp.array([-0.5, 0.0, 2.4, 3.0, 2.0**24 - 1])
    expected = np.maximum(counts, 0) + 1.0
    expected = 1 / expected if momentum is None else 0.1 / (1 - 0.9**expected)
    np.testing.assert_allclose([weight(n[None]) for n in counts], expected, rtol=1e-5)
    assert weight(jnp.array([3])) == weight(jnp.array([3.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}])
def test_a_spoiled_batch_is_skipped_as_a_whole(bad, options):
    counts = jnp.array([3, 3], jnp.int32)
    batch = jaxnorm.moments(jnp.array([[1.0, 2.0], [bad, 4.0]]), 0)
    running, updates = jaxnorm.update_running(
        START, batch, updates=counts, skip_nonfinite=True, **options
    )
    chex.assert_trees_all_equal((running, updates), (START, counts))
    spoiled, _ = jaxnorm.update_running(START, batch, updates=counts, **options)
    assert not jnp.isfinite(spoiled.mean[0])


def test_running_statistics_are_differentiable_and_keep_their_dtype(x64):
    start = jaxnorm.Stats(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32))

    def stored(x):
        running, _ = jaxnorm.update_running(start, jaxnorm.moments(x, 0), momentum=0.5)
        assert running.mean.dtype == jnp.float32
        return running.mean.sum()

    np.testing.assert_allclose(jax.grad(stored)(jnp.ones((4, 2))), np.full((4, 2), 0.125))
