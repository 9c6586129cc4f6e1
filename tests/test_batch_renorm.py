"""Batch renormalization: the paper's algorithm, its state and schedules, and its two extremes."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batch_family_oracles import batch_renorm as oracle
from batch_family_oracles import moments as oracle_moments
from batch_family_oracles import renorm_state
from cases import CASES
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS, draw, draw_mask

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

LAYERS = {"linen": jaxnorm.linen.BatchRenorm, "nnx": jaxnorm.nnx.BatchRenorm}
BOTH = pytest.mark.parametrize("framework", LAYERS)
LIMITS = ((1.0, 0.0), (1.05, 0.1), (3.0, 5.0), (np.inf, np.inf))
WIDE = dict(rmax=np.inf, dmax=np.inf)


def layer(framework, x, **options):
    return FRAMEWORKS[framework](x, LAYERS[framework], **options)


def running_for(x, axis=(-1,)):
    shape = tuple(x.shape[a] for a in sorted(a % x.ndim for a in axis))
    rng = np.random.default_rng(9)
    return jaxnorm.Stats(
        jnp.asarray(rng.normal(size=shape), x.dtype), jnp.asarray(rng.random(shape) + 1, x.dtype)
    )


# The function


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_algorithm_1(x64, quick_compile, case):
    x, scale, bias, mask = case.arrays()
    running = running_for(jnp.asarray(x), case.axis)

    @jax.jit
    def run(x, running, limits):
        options = dict(axis=case.axis, where=mask)
        ours = functools.partial(jaxnorm.batch_renorm, scale=scale, bias=bias, **options)
        return jax.vmap(lambda r, d: ours(x, running, rmax=r, dmax=d)[0])(*limits)

    found = run(x, running, jnp.asarray(LIMITS).T)
    for y, (rmax, dmax) in zip(found, LIMITS, strict=True):
        limits = dict(rmax=rmax, dmax=dmax)
        stats = (np.asarray(running.mean), np.asarray(running.var))
        expected = oracle(x, stats, scale, bias, axis=case.axis, where=mask, **limits)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_room_it_is_batch_norm(dtype):
    """In value, moments and gradients, to the last places: XLA fuses the two differently."""
    x, mask = draw((16, 3), dtype), draw_mask((16, 1))
    scale, bias = draw((3,), dtype, 1), draw((3,), dtype, 2)
    running = running_for(x.astype(jnp.float32))
    renorm = functools.partial(jaxnorm.batch_renorm, rmax=1, dmax=0)

    def both(function, *first):
        def loss(x, scale, bias):
            y, seen = function(x, *first, scale, bias, where=mask)
            return jnp.sin(y.astype(jnp.float32)).sum(), (y, seen)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

    last_places = 8 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(
        both(renorm, running), both(jaxnorm.batch_norm), rtol=last_places, atol=last_places / 8
    )


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_with_room_training_is_inference(rows):
    """The paper's claim, which batch norm does not meet for small batches."""
    x, scale, bias = draw((rows, 3)), draw((3,), seed=1), draw((3,), seed=2)
    running = running_for(x)
    inference = jaxnorm.batch_norm_inference(x, running, scale, bias)
    renormed, _ = jaxnorm.batch_renorm(x, running, scale, bias, **WIDE)
    np.testing.assert_allclose(renormed, inference, rtol=1e-5, atol=1e-5)
    if rows < 8:
        normed, _ = jaxnorm.batch_norm(x, scale, bias)
        assert abs(normed - inference).max() > 0.3


def test_a_batch_without_evidence_is_normalized_by_the_running_statistics():
    x = draw((4, 3))
    running = running_for(x)
    y, seen = jaxnorm.batch_renorm(x, running, where=jnp.zeros((4, 1), bool), **WIDE)
    np.testing.assert_allclose(y, jaxnorm.batch_norm_inference(x, running), rtol=1e-5, atol=1e-6)
    assert not seen.count.any()


def plainly(x, running, scale, bias, rmax, dmax, where):
    """Algorithm 1 in jnp, to be differentiated."""
    weight = where / where.sum(0, keepdims=True)
    mean = (x * weight).sum(0, keepdims=True)
    var = ((x - mean) ** 2 * weight).sum(0, keepdims=True)
    sigma_batch, sigma = jnp.sqrt(var + 1e-5), jnp.sqrt(running.var[None] + 1e-5)
    r = jax.lax.stop_gradient(jnp.clip(sigma_batch / sigma, 1 / rmax, rmax))
    d = jax.lax.stop_gradient(jnp.clip((mean - running.mean[None]) / sigma, -dmax, dmax))
    return ((x - mean) / sigma_batch * r + d) * scale[None] + bias[None]


@pytest.mark.parametrize("limits", LIMITS[1:], ids=str)
def test_derivatives_of_two_orders(x64, quick_compile, limits):
    x, scale, bias = (draw(s, jnp.float64, i) for i, s in enumerate([(7, 3), (3,), (3,)]))
    running, where = running_for(x), draw_mask((7, 3))

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

    rmax, dmax = limits
    ours = functools.partial(jaxnorm.batch_renorm, rmax=rmax, dmax=dmax, where=where)
    found = jax.jit(lambda: losses(lambda *a: ours(*a)[0]))()
    expected = jax.jit(lambda: losses(lambda *a: plainly(*a, rmax, dmax, where)))()
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found[1][1])), "by running statistics"


def test_complex_numbers_limit_the_magnitude(x64):
    x = draw((5, 2), jnp.complex128)
    running = jaxnorm.Stats(jnp.array([3 + 4j, 0.5]), jnp.ones(2))
    free, _ = jaxnorm.batch_renorm(x, running, **WIDE)
    np.testing.assert_allclose(free, jaxnorm.batch_norm_inference(x, running), rtol=1e-10)
    limited, _ = jaxnorm.batch_renorm(x, running, rmax=np.inf, dmax=0.5)
    shift = (x.mean(0) - running.mean) / np.sqrt(1 + 1e-5)
    clipped = shift * np.minimum(1, 0.5 / np.abs(shift))
    np.testing.assert_allclose(limited.mean(0), clipped, rtol=1e-10)


def test_right_at_large_means():
    x = draw((64, 3)) + 1.5e4
    exact = np.asarray(x, np.float64)
    running = jaxnorm.Stats(jnp.full(3, 1.5e4), jnp.full(3, 2.0))
    y, _ = jaxnorm.batch_renorm(x, running, **WIDE)
    expected = oracle(exact, (np.full(3, 1.5e4), np.full(3, 2.0)), **WIDE)
    np.testing.assert_allclose(y, expected, atol=2e-3)


# What it costs


def share_of_input(function, x):
    _, vjp = jax.vjp(function, x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) / x.nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_the_input_is_kept(dtype):
    x = jnp.ones((64, 8, 8, 32), dtype)
    running = jaxnorm.Stats(jnp.zeros(32), jnp.ones(32))
    assert (
        1
        <= share_of_input(lambda x: jaxnorm.batch_renorm(x, running, rmax=3, dmax=5)[0], x)
        <= 1.01
    )


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_computed_once(masked):
    """r and d need them before the derivative rule does: both use the same."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = draw((32, 4))
    running = running_for(x)
    where = jnp.ones((32, 1), bool)

    def renorm(x, where, **options):
        options |= {"where": where} if masked else {}
        return jaxnorm.batch_renorm(x, running, rmax=3, dmax=5, **options)[0]

    def norm(x, where, **options):
        options |= {"where": where} if masked else {}
        return jaxnorm.batch_norm(x, **options)[0]

    def counts(function):
        mapped = jax.shard_map(
            functools.partial(function, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P("d")
        )
        for forward in (function, mapped):
            backward = jax.grad(lambda x, where, f=forward: jnp.sin(f(x, where)).sum())
            for compiled in (forward, backward):
                text = jax.jit(compiled).lower(x, where).compile().as_text()
                yield len(re.findall(r" reduce\(", text)), len(re.findall(r" all-reduce\(", text))

    assert list(counts(renorm)) == list(counts(norm))


# The state


def average(momentum, start, values):
    return functools.reduce(lambda old, new: momentum * old + (1 - momentum) * new, values, start)


RULES = {
    "ema": ({"momentum": 0.8}, functools.partial(average, 0.8)),
    "debiased": (
        {"momentum": 0.8, "debias": True},
        lambda start, values: average(0.8, 0 * start, values) / (1 - 0.8 ** len(values)),
    ),
    "cumulative": ({"momentum": None}, lambda start, values: np.mean(values, 0)),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
@BOTH
def test_sigma_is_averaged(framework, options, rule, masked):
    batches = jnp.stack([(1 + seed) * draw((6, 3), seed=seed) for seed in range(4)])
    masks = draw_mask(batches.shape) if masked else jnp.ones(batches.shape, bool)
    made = layer(framework, batches[0], epsilon=0.1, **options)

    @jax.jit
    def train(stats, batches, masks):
        def step(stats, inputs):
            return made.train(made.params, stats, inputs[0], mask=inputs[1])[::-1]

        return jax.lax.scan(step, stats, (batches, masks))[0]

    found = train(made.stats, batches, masks)
    seen = [
        tuple(np.squeeze(leaf, 0) for leaf in oracle_moments(np.float64(x), (0,), mask)[1:])
        for x, mask in zip(batches, np.asarray(masks), strict=True)
    ]
    mean, var = renorm_state((np.zeros(3), np.ones(3)), seen, rule, epsilon=0.1)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5, atol=1e-6)
    assert found["step"] == 4
    chex.assert_trees_all_equal_shapes_and_dtypes(found, made.stats)


def test_function_and_layer_move_alike():
    x = draw((6, 3))
    made = layer("linen", x, momentum=0.7)
    _, found = made.train(made.params, made.stats, x)
    start = jaxnorm.Stats(made.stats["mean"], made.stats["var"])
    batch = jaxnorm.moments(x, 0, shift=start.mean)
    expected, _ = jaxnorm.update_renorm(start, batch, momentum=0.7)
    np.testing.assert_array_equal(found["mean"], expected.mean)
    np.testing.assert_array_equal(found["var"], expected.var)


def test_variance_stays_above_zero_and_exact():
    """Constant features, for long: sigma goes to sqrt(epsilon), where var + epsilon cancels."""
    start = jaxnorm.Stats(jnp.zeros(2), jnp.array([1.0, 1e6]))
    constant = jaxnorm.moments(jnp.ones((4, 2)), 0)
    step = lambda stats, _: (jaxnorm.update_renorm(stats, constant, momentum=0.9)[0], None)  # noqa: E731
    end = jax.jit(lambda: jax.lax.scan(step, start, None, 400)[0])()
    assert (end.var >= 0).all()
    np.testing.assert_allclose(np.sqrt(np.float64(end.var) + 1e-5), np.sqrt(1e-5), rtol=1e-5)


@BOTH
def test_what_has_no_evidence_does_not_move(framework):
    x = draw((6, 3))
    made = layer(framework, x, skip_nonfinite=True)
    stats = made.stats | {"var": jnp.array([0.1, 0.7, 123.4567]), "step": jnp.int32(7)}
    train = jax.jit(made.train)
    second = jnp.array([[True, False, True]])
    _, new = train(made.params, stats, x, mask=jnp.broadcast_to(second, x.shape))
    assert ((new["var"] == stats["var"]) == ~second[0]).all()
    assert new["step"] == 8
    for batch, mask in ((x.at[0, 0].set(jnp.nan), ~second | second), (x, jnp.zeros((1, 1), bool))):
        _, new = train(made.params, stats, batch, mask=jnp.broadcast_to(mask, x.shape))
        chex.assert_trees_all_equal(new, stats)
    y, new = made.train(made.params, stats, x, update_stats=False)
    assert jnp.isfinite(y).all()
    chex.assert_trees_all_equal(new, stats)


def test_state_on_devices_is_that_of_one():
    x, mask = draw((8, 3)), draw_mask((8, 3)).at[2:4].set(False)
    alone = layer("linen", x, momentum=0.5, rmax=3.0, dmax=5.0)
    spread = layer("linen", x, momentum=0.5, rmax=3.0, dmax=5.0, axis_name="d")
    chex.assert_trees_all_equal(alone.stats, spread.stats)
    y, expected = alone.train(alone.params, alone.stats, x, mask=mask)
    parts, found = jax.vmap(
        lambda x, mask: spread.train(spread.params, spread.stats, x, mask=mask), axis_name="d"
    )(x.reshape(4, 2, 3), mask.reshape(4, 2, 3))
    np.testing.assert_allclose(parts.reshape(8, 3), y, rtol=1e-5, atol=1e-6)
    for device in range(4):
        part = jax.tree.map(lambda leaf, device=device: leaf[device], found)
        chex.assert_trees_all_close(part, expected, rtol=1e-5)


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


def test_variables():
    x = draw((6, 3))
    for framework in LAYERS:
        made = layer(framework, x)
        assert {name: str(jax.typeof(leaf)) for name, leaf in made.stats.items()} == {
            "mean": "float32[3]",
            "var": "float32[3]",
            "step": "float32[]",
        }
        assert set(made.params) == {"scale", "bias"}


@pytest.mark.parametrize("mode", ["strict promotion", "debug nans"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_modes(dtype, mode):
    contexts = {
        "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "debug nans": lambda: jax.debug_nans(True),
    }
    x, mask = draw((6, 3), dtype), draw_mask((6, 1))
    made = layer("linen", x, dtype=dtype)
    with contexts[mode]():
        y, _ = jax.jit(made.train)(made.params, made.stats, x, mask=mask)
    assert y.dtype == dtype
