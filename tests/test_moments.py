"""Evidence: moments are what the oracle says, and pool exactly in any order and grouping."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import CASES

import jaxnorm


def others(case):
    return tuple(
        a for a in range(len(case.shape)) if a not in [b % len(case.shape) for b in case.axis]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_moments_are_the_oracles(x64, case, dtype):
    x, _, _, mask = case.arrays(dtype=dtype)
    _, count, mean, var = oracles.batch_norm(x, axis=case.axis, where=mask)
    found = jaxnorm.moments(x, others(case), where=mask)
    np.testing.assert_allclose(found.count, count, rtol=1e-15)
    np.testing.assert_allclose(found.mean, mean, atol=1e-14)
    np.testing.assert_allclose(found.var, var, atol=1e-14)
    assert found.var.dtype == np.float64


def test_keepdims_keeps_reduced_axes():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for axes, keepdims, shape in (
        ((0, 2), True, (1, 3, 1)),
        ((0, 2), False, (3,)),
        ((), 0, x.shape),
    ):
        found = jaxnorm.moments(x, axes, keepdims=keepdims)
        chex.assert_shape(jax.tree.leaves(found), shape)


def test_derivatives_of_moments_are_those_of_mean_and_variance(x64):
    x = jax.random.normal(jax.random.key(0), (6,)) + 3

    def ours(x):
        found = jaxnorm.moments(x, 0)
        return found.mean**3 + jnp.sin(found.var)

    def plain(x):
        return x.mean() ** 3 + jnp.sin(x.var())

    for transform in (jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.hessian(f))):
        chex.assert_trees_all_close(transform(ours)(x), transform(plain)(x), atol=1e-12)


def test_no_values_are_no_evidence():
    for x in (jnp.zeros((0, 2)), jnp.full((3, 2), jnp.nan)):
        found = jaxnorm.moments(x, 0, where=jnp.zeros((x.shape[0], 1), bool))
        chex.assert_trees_all_equal(found, jaxnorm.Moments(*(jnp.zeros(2),) * 3))
        chex.assert_trees_all_equal(found.stats(), jaxnorm.Stats(jnp.zeros(2), jnp.ones(2)))


def test_one_value_has_no_unbiased_variance():
    found = jaxnorm.moments(jnp.array([[5.0]]), 0)
    assert found.stats().mean == 5
    assert found.stats().var == 0
    chex.assert_trees_all_equal(found.stats(ddof=1), jaxnorm.Stats(jnp.zeros(1), jnp.ones(1)))


# The algebra of pooling. Data are cut at random places, empty parts included, so that the law is
# not tried only on parts of one size.

data = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)


@st.composite
def cut_data(draw):
    values = np.array(draw(data), np.float64)
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=4)))
    return values, np.split(values, cuts)


def plain_moments(values):
    """Without the library's door, whose traces for each length would take the time."""
    if len(values) == 0:
        return jaxnorm.Moments(*(jnp.zeros(()),) * 3)
    count = jnp.asarray(float(len(values)))
    return jaxnorm.Moments(count, jnp.asarray(values.mean()), jnp.asarray(values.var()))


merge_two = jax.jit(jaxnorm.merge)


def merged(parts):
    total = plain_moments(np.array([]))
    for part in parts:
        total = merge_two(total, part)
    return total


settings = hypothesis.settings(deadline=None, max_examples=40)


@settings
@hypothesis.given(cut_data())
def test_merge_of_parts_is_the_whole(cut):
    with jax.enable_x64(True):
        values, parts = cut
        whole, pieces = plain_moments(values), [plain_moments(part) for part in parts]
        chex.assert_trees_all_close(merged(pieces), whole, atol=1e-9, rtol=1e-9)
        chex.assert_trees_all_close(merged(pieces[::-1]), whole, atol=1e-9, rtol=1e-9)


@settings
@hypothesis.given(cut_data())
def test_grouping_of_merges_does_not_matter(cut):
    with jax.enable_x64(True):
        first, second, third, *_ = [*(plain_moments(part) for part in cut[1]), *[merged([])] * 2]
        left = merge_two(merge_two(first, second), third)
        right = merge_two(first, merge_two(second, third))
        chex.assert_trees_all_close(left, right, atol=1e-9, rtol=1e-9)


@settings
@hypothesis.given(cut_data())
def test_nothing_changes_nothing(cut):
    with jax.enable_x64(True):
        evidence = plain_moments(cut[0])
        together = merge_two(evidence, plain_moments(np.array([])))
        chex.assert_trees_all_close(together, evidence, rtol=1e-15, atol=0)


def test_merge_and_pool_agree_on_stacked_evidence():
    x = jax.random.normal(jax.random.key(1), (3, 5, 4))
    mask = jnp.arange(5)[None, :, None] < jnp.array([0, 2, 5])[:, None, None]
    parts = [jaxnorm.moments(part, 0, where=where) for part, where in zip(x, mask, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    whole = jaxnorm.moments(x, (0, 1), where=mask)
    chex.assert_trees_all_close(jaxnorm.merge(*parts), whole, rtol=1e-5)
    chex.assert_trees_all_close(jaxnorm.pool(stacked, axes=0), whole, rtol=1e-5)


@pytest.mark.parametrize("features", [2, 3])
def test_a_count_given_by_hand_may_be_one_number(features):
    """Two parts with two features: the count must not be taken for one of the features."""
    parts = [
        jaxnorm.Moments(count, jnp.full(features, mean), jnp.zeros(features))
        for count, mean in ((1.0, 0.0), (jnp.float32(3), 4.0))
    ]
    together = jaxnorm.merge(*parts)
    chex.assert_trees_all_equal(
        together, jaxnorm.Moments(*(jnp.full(features, value) for value in (4.0, 3.0, 3.0)))
    )


def test_an_average_of_estimates_is_not_a_merge():
    apart = [jaxnorm.Moments(*(jnp.array(v) for v in (1.0, mean, 1.0))) for mean in (0.0, 2.0)]
    assert jaxnorm.merge(*apart).var == 2
    old, new = (part.stats() for part in apart)
    assert jaxnorm.ema(old, new, 0.5).var == 1


def test_evidence_gathered_in_a_scan_keeps_its_structure():
    batches = jax.random.normal(jax.random.key(2), (6, 4, 3)) + 2
    start = jaxnorm.Moments(*(jnp.zeros(3),) * 3)

    def step(seen, batch):
        return jaxnorm.merge(seen, jaxnorm.moments(batch, 0)), None

    seen, _ = jax.lax.scan(step, start, batches)
    chex.assert_trees_all_close(seen, jaxnorm.moments(batches, (0, 1)), rtol=1e-5)
