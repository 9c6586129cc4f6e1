"""Joint evidence, matrix roots and their derivatives, PCA and ZCA whitening of data."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whitening_oracles as oracles
from jax import export
from whitening_cases import CASES, case_of, check_derivatives, data

import jaxnorm
from jaxnorm.core import matrix_roots
from jaxnorm.core.comoments import comoments
from jaxnorm.core.covariance import Comoments, JointStats, merge_comoments, pool_comoments
from jaxnorm.methods.whitening import color, coloring_matrix, whiten, whitening_matrix

pytestmark = pytest.mark.usefixtures("quick_compile")
CLOSE = dict(rtol=1e-11, atol=1e-11)


@pytest.fixture(params=CASES)
def case(request):
    return case_of(request.param)


# Evidence


def test_comoments_are_those_of_the_oracle(x64, case):
    x, options, groups = case
    seen = comoments(x, num_groups=groups, **options)
    expected = oracles.comoments(x, groups=groups, **options)
    chex.assert_trees_all_close((seen.count, seen.mean, seen.cov), expected, **CLOSE)
    sized = comoments(x, num_groups=None, group_size=seen.mean.shape[-1], **options)
    chex.assert_trees_all_equal(sized, seen)


def test_the_covariance_keeps_its_digits_far_from_zero():
    x = data(200, 4, offset=0).astype(np.float32) + np.float32(1e4)
    seen = comoments(x)
    _, mean, cov = oracles.comoments(x)
    np.testing.assert_allclose(seen.cov, cov, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.mean, mean, rtol=1e-7)
    np.testing.assert_array_equal(seen.cov, np.swapaxes(seen.cov, -1, -2))


def test_evidence_merges_exactly(x64):
    """With counts of 1, 0 and 4."""
    x = data(3, 4, 4)
    valid = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)[..., None]
    stacked = jax.jit(jax.vmap(lambda x, where: comoments(x, num_groups=2, where=where)))(x, valid)
    spoiled = np.where(np.array([0, 1, 0]), np.nan, 0.0)  # Without evidence, that does not matter.
    stacked = Comoments(
        stacked.count,
        stacked.mean + spoiled[:, None, None],
        stacked.cov + spoiled[:, None, None, None],
    )
    whole = comoments(x, num_groups=2, where=valid)
    assert whole.count.tolist() == [5, 5]
    chex.assert_trees_all_close(jax.jit(partial(pool_comoments, axes=0))(stacked), whole, **CLOSE)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)]
    chex.assert_trees_all_close(jax.jit(merge_comoments)(*parts), whole, **CLOSE)


def test_derivatives_of_merged_evidence_are_those_of_the_whole(x64):
    x = jnp.asarray(data(6, 2))

    def both_orders(evidence_of):
        def loss(x):
            evidence = evidence_of(x)
            return jnp.sin(evidence.cov).sum() + jnp.cos(evidence.mean).sum()

        return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),)))(x)

    merged = both_orders(lambda x: merge_comoments(comoments(x[:1]), comoments(x[1:])))
    chex.assert_trees_all_close(merged, both_orders(comoments), **CLOSE)


def test_estimates_of_evidence():
    x = data(5, 3).astype(np.float32)
    seen = comoments(x)
    np.testing.assert_allclose(seen.stats(ddof=1).cov[0], np.cov(x.T), rtol=1e-5)
    for unknown in (comoments(x[:0]).stats(), comoments(x[:1]).stats(ddof=1)):
        chex.assert_trees_all_equal(unknown, JointStats(jnp.zeros((1, 3)), jnp.eye(3)[None]))


# Roots


SPECTRA = {
    "distinct": [0.5, 1.0, 3.0],
    "equal": [2.0, 2.0, 2.0],
    "two equal": [1.0, 4.0, 4.0],
    "rank deficient": [0.0, 0.0, 2.0],
}
EPSILON = 0.1
square_roots = jax.jit(partial(matrix_roots.square_roots, epsilon=EPSILON))


@pytest.fixture(params=SPECTRA)
def cov(request):
    """Exactly diagonal, so that equal eigenvalues are equal."""
    return np.diag(SPECTRA[request.param])


def test_roots_are_roots(x64, cov):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    batch = np.stack([cov, turn @ cov @ turn.T])
    root, inverse = square_roots(jnp.asarray(batch))
    filled = batch + EPSILON * np.eye(3)
    np.testing.assert_allclose(root @ root, filled, **CLOSE)
    np.testing.assert_allclose(inverse @ filled @ inverse, np.stack([np.eye(3)] * 2), **CLOSE)
    mapped = jax.vmap(partial(matrix_roots.inverse_square_root, epsilon=EPSILON))
    np.testing.assert_allclose(mapped(jnp.asarray(batch)), inverse, **CLOSE)


@jax.jit
def roots_of_product(factor):
    """As a function of what differences cannot make indefinite."""
    root, inverse = square_roots(factor @ factor.T)
    return jnp.sin(root).sum() + jnp.cos(inverse[0]).sum()


def test_derivatives_of_roots_to_second_order(x64, cov):
    check_derivatives(roots_of_product, jnp.asarray(np.sqrt(cov)))


def test_derivatives_of_roots_solve_the_sylvester_equation(x64, cov):
    tangent = np.random.default_rng(2).normal(size=(3, 3))
    tangent = tangent + tangent.T
    (_, inverse), (droot, dinverse) = jax.jvp(
        square_roots, (jnp.asarray(cov),), (jnp.asarray(tangent),)
    )
    expected = oracles.root_derivative(cov + EPSILON * np.eye(3), tangent)
    np.testing.assert_allclose(droot, expected, **CLOSE)
    np.testing.assert_allclose(dinverse, -inverse @ expected @ inverse, **CLOSE)


@pytest.mark.parametrize("n_steps", [1, 3, 5])
def test_newton_takes_the_steps_of_the_paper(x64, cov, n_steps):
    found = matrix_roots.newton_inverse_square_root(jnp.asarray(cov), n_steps, EPSILON)
    np.testing.assert_allclose(found, oracles.newton(cov, EPSILON, n_steps), **CLOSE)


def test_newton_stays_where_it_converged():
    """The steps as they are printed would, in float32, come near this root and leave it again."""
    cov = np.diag([1.0, 0.3, 0.01])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    cov = (turn @ cov @ turn.T).astype(np.float32)
    expected = oracles.zca(cov.astype(np.float64), 0)
    for n_steps in (15, 60):
        found = matrix_roots.newton_inverse_square_root(cov, n_steps)
        np.testing.assert_allclose(found, expected, atol=1e-4)

    printed, trace, distances = np.eye(3, dtype=np.float32), np.trace(cov), []
    with np.errstate(all="ignore"):
        for _ in range(20):
            printed = (3 * printed - printed @ printed @ printed @ (cov / trace)) / 2
            distances.append(np.abs(printed / np.sqrt(trace) - expected).max())
    assert min(distances) < 0.1
    assert not distances[-1] < 1


# Whitening of data


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_whitening_of_data(x64, case, kind):
    x, options, groups = case
    axis, where = options["axis"], options["where"]
    stats = comoments(x, num_groups=groups, **options).stats()
    y = whiten(x, stats, kind=kind, axis=axis)
    np.testing.assert_allclose(color(y, stats, kind=kind, axis=axis), x, rtol=1e-9, atol=1e-9)
    if kind == "pca" and not np.any(True if where is None else where):
        return  # without evidence the covariance is I, and any order of its axes is right
    matrix_of = partial(getattr(oracles, kind), epsilon=1e-5)
    expected = oracles.whiten(x, matrix_of, axis=axis, groups=groups, where=where)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_whitened_data_are_white(x64, kind):
    x = jnp.asarray(data(40, 6))
    stats = comoments(x, num_groups=2).stats()
    after = comoments(whiten(x, stats, kind=kind, epsilon=0), num_groups=2)
    np.testing.assert_allclose(after.cov, np.stack([np.eye(3)] * 2), atol=1e-10)
    np.testing.assert_allclose(after.mean, 0, atol=1e-10)
    white = jnp.asarray(np.random.default_rng(3).normal(size=(40, 6)))
    white = whiten(white, comoments(white, num_groups=2).stats(), epsilon=0)
    colored = comoments(color(white, stats, kind=kind, epsilon=0), num_groups=2)
    np.testing.assert_allclose(colored.cov, stats.cov, rtol=1e-9, atol=1e-9)


def test_matrices_are_inverse_to_each_other(x64):
    stats = comoments(data(40, 6), num_groups=2).stats()
    for kind in ("zca", "pca"):
        product = whitening_matrix(stats, kind=kind) @ coloring_matrix(stats, kind=kind)
        np.testing.assert_allclose(product, np.stack([np.eye(3)] * 2), atol=1e-9)


def test_pca_does_not_depend_on_the_signs_eigh_chose(x64):
    """Features in reverse order turn the eigenvectors, not the choice of sign."""
    x = data(40, 4)
    components = [
        whiten(a, comoments(a).stats(), kind="pca") for a in (x, np.ascontiguousarray(x[:, ::-1]))
    ]
    np.testing.assert_allclose(*components, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_features_of_very_different_scale(kind):
    """What float32 cannot tell from rounding is left small, not blown up."""
    x = (data(500, 6) * np.logspace(0, 6, 6)).astype(np.float32)
    y = jaxnorm.whiten(x, jaxnorm.comoments(x).stats(), kind=kind, epsilon=0)
    variances = np.linalg.eigvalsh(np.cov(np.float64(y).T, bias=True))
    assert variances[-1] < 1.1
    assert (np.abs(variances - 1) < 0.02).sum() >= 3


@pytest.mark.parametrize("masked", [False, True])
def test_lowers_for_a_batch_of_unknown_size(masked):
    def whitened(x):
        where = x[:, :1] > 0 if masked else None
        return jaxnorm.iter_norm(x, where=where)[0], jaxnorm.comoments(x, where=where).stats()

    (size,) = export.symbolic_shape("b")
    exported = export.export(jax.jit(whitened))(jax.ShapeDtypeStruct((size, 4), jnp.float32))
    x = jnp.asarray(data(7, 4), jnp.float32)
    for found, expected in zip(
        jax.tree.leaves(exported.call(x)), jax.tree.leaves(whitened(x)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
