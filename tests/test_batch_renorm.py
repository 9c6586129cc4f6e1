"""Batch renormalization beyond the laws: what is a constant, complex numbers, state, schedules."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batch_family_oracles import batch_renorm as oracle
from flax import nnx
from modules import FRAMEWORKS, draw, draw_mask

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

LAYERS = {"linen": jaxnorm.linen.BatchRenorm, "nnx": jaxnorm.nnx.BatchRenorm}
BOTH = pytest.mark.parametrize("framework", LAYERS)
QUICK = pytest.mark.usefixtures("quick_compile")
LIMITS = ((1.0, 0.0), (1.05, 0.1), (3.0, 5.0), (np.inf, np.inf))
WIDE = dict(rmax=np.inf, dmax=np.inf)
WHERE = draw_mask((7, 3))


def layer(framework, x, **options):
    return FRAMEWORKS[framework](x, LAYERS[framework], **options)


def running_for(x):
    rng = np.random.default_rng(9)
    mean, var = rng.normal(size=x.shape[-1]), rng.random(x.shape[-1]) + 1
    return jaxnorm.Stats(jnp.asarray(mean, x.dtype), jnp.asarray(var, x.dtype))


def plainly(x, running, scale, bias, *, rmax, dmax):
    """Algorithm 1 in jnp, to be differentiated."""
    weight = WHERE / WHERE.sum(0, keepdims=True)
    mean = (x * weight).sum(0, keepdims=True)
    var = ((x - mean) ** 2 * weight).sum(0, keepdims=True)
    sigma_batch, sigma = jnp.sqrt(var + 1e-5), jnp.sqrt(running.var[None] + 1e-5)
    r = jax.lax.stop_gradient(jnp.clip(sigma_batch / sigma, 1 / rmax, rmax))
    d = jax.lax.stop_gradient(jnp.clip((mean - running.mean[None]) / sigma, -dmax, dmax))
    return ((x - mean) / sigma_batch * r + d) * scale[None] + bias[None]


@QUICK
def test_derivatives_of_two_orders(x64):
    x, scale, bias = (draw(s, jnp.float64, i) for i, s in enumerate([(7, 3), (3,), (3,)]))
    running = running_for(x)

    def losses(function):
        def loss(x, running, scale, bias):
            return jnp.sin(function(x, running, scale, bias)).sum()

        every = (0, 1, 2, 3)
        gradient = jax.grad(loss, every)
        hessian = jax.jacfwd(gradient, (0, 2, 3))
        pushed = jax.jvp(lambda x: function(x, running, scale, bias), (x,), (jnp.cos(x),))
        arguments = x, running, scale, bias
        again = jax.jacrev(lambda x: gradient(x, *arguments[1:])[0])(x)
        return pushed, gradient(*arguments), hessian(*arguments), again

    def ours(*arrays, rmax, dmax):
        return jaxnorm.batch_renorm(*arrays, rmax=rmax, dmax=dmax, where=WHERE)[0]

    @jax.jit
    def both(rmax, dmax):
        limits = dict(rmax=rmax, dmax=dmax)
        return [losses(functools.partial(f, **limits)) for f in (ours, plainly)]

    for limits in LIMITS:
        found, expected = both(*limits)
        chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
        assert not any(leaf.any() for leaf in jax.tree.leaves(found[1][1])), "by running statistics"


@QUICK
def test_complex_numbers_limit_the_magnitude(x64):
    x = draw((5, 2), jnp.complex128)
    running = jaxnorm.Stats(jnp.array([3 + 4j, 0.5]), jnp.ones(2))
    free, _ = jaxnorm.batch_renorm(x, running, **WIDE)
    np.testing.assert_allclose(free, jaxnorm.batch_norm_inference(x, running), rtol=1e-10)
    limited, _ = jaxnorm.batch_renorm(x, running, rmax=np.inf, dmax=0.5)
    shift = (x.mean(0) - running.mean) / np.sqrt(1 + 1e-5)
    clipped = shift * np.minimum(1, 0.5 / np.abs(shift))
    np.testing.assert_allclose(limited.mean(0), clipped, rtol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_computed_once(masked):
    """r and d need them before the derivative rule does: both use the same."""
    x = draw((32, 4))
    running = running_for(x)

    def renorm(x, **options):
        return jaxnorm.batch_renorm(x, running, rmax=3, dmax=5, **options)[0]

    def norm(x, **options):
        return jaxnorm.batch_norm(x, **options)[0]

    def reductions(function):
        def forward(x, where):
            return function(x, where=where if masked else None)

        backward = jax.grad(lambda x, where: jnp.sin(forward(x, where)).sum())
        for each in (forward, backward):
            text = jax.jit(each).lower(x, jnp.ones((32, 1), bool)).compile().as_text()
            yield len(re.findall(r" reduce\(", text))

    assert list(reductions(renorm)) == list(reductions(norm))


@QUICK
def test_variance_stays_above_zero_and_exact():
    """Constant features, for long: sigma goes to sqrt(epsilon), where var + epsilon cancels."""
    start = jaxnorm.Stats(jnp.zeros(2), jnp.array([1.0, 1e6]))
    constant = jaxnorm.moments(jnp.ones((4, 2)), 0)
    step = lambda stats, _: (jaxnorm.update_renorm(stats, constant, momentum=0.9)[0], None)  # noqa: E731
    end = jax.jit(lambda: jax.lax.scan(step, start, None, 400)[0])()
    assert (end.var >= 0).all()
    np.testing.assert_allclose(np.sqrt(np.float64(end.var) + 1e-5), np.sqrt(1e-5), rtol=1e-5)


@QUICK
def test_features_without_evidence_do_not_move():
    """Not by the rounding of a root and its square either."""
    x = draw((6, 3))
    made = layer("linen", x, skip_nonfinite=True)
    stats = made.stats | {"var": jnp.array([0.1, 0.7, 123.4567]), "step": jnp.float32(7)}
    train = jax.jit(lambda x, mask: made.train(made.params, stats, x, mask=mask)[1])
    moved = jnp.array([True, False, True])
    new = train(x, jnp.broadcast_to(moved, x.shape))
    assert ((new["var"] != stats["var"]) == moved).all()
    assert new["step"] == 8
    for batch, mask in ((x.at[0, 0].set(jnp.nan), True), (x, False)):
        chex.assert_trees_all_equal(train(batch, jnp.full(x.shape, mask)), stats)


# Schedules and checkpoints


def test_the_papers_schedules():
    steps = np.array([0, 4_999, 5_000, 12_345, 25_000, 39_999, 40_000, 1_000_000])
    for ours, (first, last, begin, end) in (
        (jaxnorm.paper_rmax, (1.0, 3.0, 5_000, 40_000)),
        (jaxnorm.paper_dmax, (0.0, 5.0, 5_000, 25_000)),
    ):
        expected = np.interp(steps, [begin, end], [first, last])
        np.testing.assert_allclose(jax.vmap(ours)(steps), expected, rtol=1e-6)
        schedule = optax.linear_schedule(first, last, end - begin, begin)
        np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(steps)), expected, rtol=1e-6)


@QUICK
@BOTH
def test_limits_follow_the_step(framework):
    """By the paper's schedules, by default, and by Optax's."""
    x = draw((6, 3))
    ramp = optax.linear_schedule(1.0, 2.0, transition_steps=10)
    table = jnp.linspace(1.0, 2.0, 11)
    for options, step, limits in (
        ({}, 0, (1.0, 0.0)),
        ({}, 22_500, (2.0, 4.375)),
        ({"rmax": ramp, "dmax": 0.25}, 5, (1.5, 0.25)),
        # Between the steps that states had before they were averaged.
        ({"rmax": lambda step: table[step], "dmax": 0.25}, 5.25, (1.5, 0.25)),
    ):
        made = layer(framework, x, **options)
        stats = made.stats | {"var": jnp.full(3, 0.2), "step": jnp.float32(step)}
        y, new = jax.jit(made.train)(made.params, stats, x)
        running = (np.zeros(3), np.full(3, 0.2))
        expected = oracle(np.float64(x), running, rmax=limits[0], dmax=limits[1])
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
        assert new["step"] == step + 1


@QUICK
def test_a_checkpoint_of_batch_norm_loads():
    x = draw((6, 3))
    variables = jaxnorm.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    module = jaxnorm.linen.BatchRenorm()
    y = module.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    _, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert new["batch_stats"]["step"] == 1
    ours, theirs = (
        jaxnorm.nnx.BatchRenorm(3, rngs=nnx.Rngs(0)),
        jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    )
    theirs(x)
    nnx.update(ours, nnx.state(theirs))
    np.testing.assert_array_equal(ours.mean[...], theirs.mean[...])
