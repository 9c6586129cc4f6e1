"""Laws that every activation method obeys, on Linen and on NNX modules.

Values against oracles, compiled against eager, mapped against one by one, derivatives against
finite differences, masks, dtypes, large means, state that keeps its types. What holds for one
method alone stands in files of its own.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet, sparse
from modules import FRAMEWORKS
from subjects import BOTH, EACH, EACH_METHOD, SUBJECTS, drawn, in_turn

import jaxnorm

# The variables of another domain stay, and have themselves for derivative.
MOVING = ("mean", "var", "cov")
WIDE = pytest.mark.usefixtures("x64", "quick_compile")


MASKS = {
    "whole": lambda subject: None,
    "masked": lambda subject: subject.some_mask(),
    "weighted": lambda subject: subject.some_weights(),
}


def masks(*slow):
    """The kinds of masks, of which some only join a run with -m slow."""
    rows = [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in MASKS]
    return pytest.mark.parametrize("kind", rows)


def step_and_infer(layer):
    """(params, stats, x, mask) -> result of a training step, new state, result of inference."""

    def run(params, stats, x, mask=None):
        call = {} if mask is None else {"mask": mask}
        y, new = layer.train(params, stats, x, **call)
        return y, new, layer.infer(params, new, x, **call)

    return run


# Both frameworks are compared with each other: the default run takes one of them for each subject.
EACH_IN_TURN = pytest.mark.parametrize(("subject", "framework"), in_turn(SUBJECTS, FRAMEWORKS))


@WIDE
@masks("masked")
@EACH_IN_TURN
def test_training_is_what_the_paper_says(framework, subject, kind):
    x, mask = subject.input(jnp.float64), MASKS[kind](subject)
    layer = subject.layer(framework, x)
    params = {name: p.astype(jnp.float64) for name, p in drawn(layer.params).items()}
    y, _, _ = jax.jit(step_and_infer(layer))(params, layer.stats, x, mask)
    expected = subject.oracle(
        np.asarray(x), params, None if mask is None else np.asarray(mask), **subject.options
    )
    # Statistics that are stored in float32 may enter.
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert y.dtype == jnp.float64


@EACH_METHOD
def test_linen_is_nnx_and_booleans_are_weights_of_0_and_1(subject):
    x, mask = subject.input(), subject.some_mask()
    linen, nnx = (subject.layer(framework, x) for framework in ("linen", "nnx"))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        (linen.params, linen.stats), (nnx.params, nnx.stats)
    )
    found, expected = (
        jax.jit(step_and_infer(layer))(drawn(linen.params), linen.stats, x, where)
        for layer, where in ((linen, mask), (nnx, mask.astype(jnp.bfloat16)))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@EACH_IN_TURN
def test_compiled_is_eager_and_mapped_is_one_by_one(framework, subject):
    x = subject.input()
    layer = subject.layer(framework, x)
    run = step_and_infer(layer)
    params = drawn(layer.params)
    xs = jnp.stack([x, subject.input(seed=1)])
    eager = [run(params, layer.stats, x) for x in xs]
    eager = jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager)
    mapped = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))(params, layer.stats, xs)
    chex.assert_trees_all_close(mapped, eager, rtol=2e-5, atol=2e-5)


@WIDE
@masks("whole", "masked")
@EACH_METHOD
def test_derivatives_of_two_orders(subject, kind):
    """Along a line through input and parameters: forward, reverse, both orders of both, and finite
    differences, which trust none of them."""
    x, mask = subject.input(jnp.float64), MASKS[kind](subject)
    # Where a mask leaves one value, a small epsilon makes derivatives too large for differences.
    layer = subject.layer("linen", x, epsilon=0.1)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), drawn(layer.params))
    direction = jax.tree.map(jnp.cos, drawn(params, seed=4)), jnp.sin(3 * x)
    weights = subject.input(jnp.float64, seed=5)

    def along(t):
        moved = jax.tree.map(lambda a, d: a + t * d, (params, x), direction)
        call = {} if mask is None else {"mask": mask}
        y, _ = layer.train(moved[0], layer.stats, moved[1], **call)
        return (weights * jnp.sin(y)).sum()

    forward, reverse = jax.jacfwd(along), jax.grad(along)
    orders = {
        "first": (forward, reverse),
        "second": (jax.jacfwd(forward), jax.grad(forward), jax.jacfwd(reverse), jax.grad(reverse)),
    }
    zero = jnp.zeros(())
    found = jax.jit(lambda t: {n: [f(t) for f in fs] for n, fs in orders.items()})(zero)
    step = 1e-3
    values = jax.jit(jax.vmap(lambda t: jnp.stack([along(t), forward(t)])))(
        step * jnp.arange(-2.0, 3.0)
    )
    differences = np.array([1 / 12, -2 / 3, 0, 2 / 3, -1 / 12]) @ np.asarray(values) / step
    for order, expected in zip(("first", "second"), differences, strict=True):
        # Where parts are constants by definition, no difference is what the derivative says.
        expected = found[order][0] if subject.method == "BatchRenorm" else expected
        np.testing.assert_allclose(found[order], expected, rtol=1e-6, atol=1e-6)


# The root that decorrelated batch norm takes by eigenvectors has a rule, and is no plain operation.
READABLE = [subject for subject in SUBJECTS if subject.method != "DecorrelatedBatchNorm"]


@WIDE
@pytest.mark.parametrize(("subject", "way"), in_turn(READABLE, ("as it is", "plain operations")))
def test_taylor_mode_and_other_readers_of_programs(subject, way):
    """`jet` and `sparsify` take what JAX's own derivative rules and checkpoints keep from them."""
    x = subject.input(jnp.float64)
    layer, direction = subject.layer("linen", x), jnp.cos(3 * x)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), drawn(layer.params))

    def both(x):
        y, new = layer.train(params, layer.stats, x)
        return jnp.stack([y, layer.infer(params, layer.stats, x)]), new

    @jax.jit
    def run(x):
        def along(t):
            return both(x + t * direction)[0]

        with jaxnorm.plain() if way == "plain operations" else contextlib.nullcontext():
            y, terms = jet.jet(lambda x: both(x)[0], (x,), ([direction, jnp.zeros_like(x)],))
            dense = sparse.sparsify(both)(x)
        slope = jax.jacfwd(along)
        return (y, *terms, dense), (along(0.0), slope(0.0), jax.jacfwd(slope)(0.0), both(x))

    found, expected = run(x)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def test_plain_operations_are_traced_anew():
    compiled, x = jax.jit(jaxnorm.batch_norm), jnp.ones((4, 3))
    programs = [str(compiled.trace(x).jaxpr)]
    with jaxnorm.plain():
        programs += [str(compiled.trace(x).jaxpr), str(jax.make_jaxpr(jax.grad(loss_of))(x))]
    programs += [str(compiled.trace(x).jaxpr)]
    others = ("jaxnorm_", "custom_jvp", "checkpoint", "cond")
    assert [any(name in program for name in others) for program in programs] == [1, 0, 0, 1]


def test_a_rule_keeps_what_jax_knows_of_a_function():
    """What is not mapped stays so, and what is linear can be transposed."""
    x, scale = SUBJECTS[0].input(), jnp.ones((3, 8))
    y, seen = jax.vmap(jaxnorm.batch_norm, (None, 0), (0, None))(x, scale)
    assert (y.shape, seen.mean.shape) == ((3, *x.shape), (8,))

    def infer(x):
        return jaxnorm.batch_norm_inference(x, jaxnorm.Stats(jnp.zeros(8), jnp.full(8, 2.0)))

    chex.assert_trees_all_close(
        jax.linear_transpose(infer, x)(x), jax.vjp(infer, x)[1](x), rtol=1e-6, atol=1e-6
    )


def loss_of(x):
    y, seen = jaxnorm.batch_norm(x)
    again = jaxnorm.batch_norm_inference(x, jaxnorm.pool(seen, shift=0.0).stats())
    return (y**3).sum() + (again**3).sum()


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (np.nan, "weighted"),
        pytest.param(np.inf, "masked", marks=pytest.mark.slow),
        (3e38, "masked"),
    ],
)
@EACH_METHOD
def test_what_is_masked_reaches_nothing(subject, harm, kind):
    x, mask, given = subject.input(), subject.some_mask(), MASKS[kind](subject)
    layer = subject.layer("linen", x)

    @jax.jit
    def run(x):
        def loss(params, x):
            y, new = layer.train(params, layer.stats, x, mask=given)
            valid = jnp.where(mask, y, 0)
            # Also what is masked later has to have a finite gradient.
            return (valid**3).sum() + 0 * (y**2).sum(), (valid, new)

        (gradients, dx), (valid, new) = jax.grad(loss, (0, 1), has_aux=True)(drawn(layer.params), x)
        z = layer.infer(layer.params, new, x, mask=given)
        return valid, new, gradients, jnp.where(mask, dx, 0), jnp.where(mask, z, 0), dx

    clean, spoiled = run(x), run(jnp.where(mask, x, harm))
    chex.assert_trees_all_close(spoiled[:-1], clean[:-1], rtol=1e-4, atol=1e-5)
    assert np.isfinite(spoiled[-1]).all()


@EACH_METHOD
def test_nothing_valid_moves_nothing(subject):
    x = jnp.full(subject.shape, jnp.nan)
    layer = subject.layer("linen", x)

    def loss(x):
        y, new = layer.train(layer.params, layer.stats, x, mask=jnp.zeros(subject.mask, bool))
        return (y**2).sum(), (y, new)

    dx, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    moved = {name for name in new if not np.array_equal(new[name], layer.stats[name])}
    assert moved == set()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@EACH_METHOD
def test_narrow_input_is_rounded_once(subject, dtype):
    """The same as of float32 input with the same values, rounded; the state is the same."""
    x = subject.input(dtype)
    layer = subject.layer("linen", x, dtype=dtype)
    wide = subject.layer("linen", x, dtype=jnp.float32)
    params = drawn(layer.params)
    y, new, z = jax.jit(step_and_infer(layer))(params, layer.stats, x)
    arguments = params, layer.stats, x.astype(jnp.float32)
    expected, expected_new, expected_z = jax.jit(step_and_infer(wide))(*arguments)
    chex.assert_type([y, z], dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, layer.stats)
    chex.assert_trees_all_close(new, expected_new, rtol=1e-5, atol=1e-6)
    limit = 0.51 * float(jnp.finfo(dtype).eps)
    for found, exact in ((y, expected), (z, expected_z)):
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=limit, atol=1e-4)


@EACH
def test_right_at_large_means(subject):
    """At a mean of 1e4 standard deviations, in float32."""
    exact = np.asarray(subject.input(seed=7), np.float64) + 1.5e4
    x = jnp.asarray(exact, jnp.float32)
    layer = subject.layer("linen", x)
    y, _ = jax.jit(layer.train)(drawn(layer.params), layer.stats, x)
    expected = subject.oracle(np.asarray(x, np.float64), drawn(layer.params), **subject.options)
    # The mean itself is rounded to float32.
    allowed = 2 * np.spacing(np.float32(1.5e4))
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=4 * allowed)


@EACH_METHOD
@BOTH
def test_state_keeps_its_types_and_steps_are_traced_once(framework, subject):
    x = subject.input(jnp.bfloat16)
    layer = subject.layer(framework, x)

    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(n=1)
    def step(params, stats, x):
        return layer.train(params, stats, x)[1]

    chex.clear_trace_counter()
    stats = jax.tree.map(jnp.copy, layer.stats)
    for _ in range(3):
        stats = step(layer.params, stats, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, layer.stats)
    floats = [leaf for leaf in stats.values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    assert all(np.isfinite(leaf).all() for leaf in stats.values())


@EACH_METHOD
def test_no_gradient_passes_through_the_state(subject):
    x = subject.input()
    layer = subject.layer("linen", x)
    counts, floats = {}, {}
    for name, leaf in layer.stats.items():
        (floats if jnp.issubdtype(leaf.dtype, jnp.floating) else counts)[name] = leaf

    @jax.jit
    def gradients(floats, x):
        def loss(floats, x):
            y, new = layer.train(layer.params, counts | floats, x)
            z = layer.infer(layer.params, counts | floats, x)
            moved = sum((new[name].sum() for name in floats if name in MOVING), jnp.zeros(()))
            return moved, (y**3).sum() + (z**3).sum() + moved

        of_new = jax.grad(lambda *a: loss(*a)[0], (0, 1))(floats, x)
        return of_new, jax.grad(lambda *a: loss(*a)[1])(floats, x)

    of_new, by_state = gradients(floats, x)
    for gradient in (of_new, by_state):
        chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


@EACH_METHOD
@BOTH
def test_initialization_needs_no_mapped_axis(framework, subject):
    layer = subject.layer(framework, subject.input(), axis_name="unbound")
    assert layer.params


@EACH
def test_input_and_statistics_are_all_that_is_kept(subject):
    """For the backward pass; with enough of each feature that statistics weigh little."""
    shape = (4, 32, 32, 256) if len(subject.shape) == 4 else (4, 64, 256)
    x = jnp.zeros(shape, jnp.bfloat16)
    groups = {"group_size": 64} if subject.name == "GroupNorm of some axes" else {}
    layer = subject.layer("linen", x, dtype=jnp.bfloat16, **groups)
    _, pull = jax.vjp(lambda x: layer.train(layer.params, layer.stats, x)[0], x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert 0.99 <= kept / x.nbytes <= 1.05


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("dtype promotion", jnp.bfloat16),
        ("debug nans", jnp.float32),
        ("tracer leaks", jnp.float32),
    ],
)
@EACH_METHOD
def test_strict_modes(subject, dtype, mode):
    contexts = {
        "dtype promotion": jax.numpy_dtype_promotion("strict"),
        "debug nans": jax.debug_nans(True),
        "tracer leaks": jax.checking_leaks(),
    }
    x, mask = subject.input(dtype), subject.some_weights()
    layer = subject.layer("linen", x)

    def loss(params, x):
        y, new = layer.train(params, layer.stats, x, mask=mask)
        z = layer.infer(params, new, x)
        return (y.astype(jnp.float32) ** 2).sum() + (z.astype(jnp.float32) ** 2).sum()

    with contexts[mode]:
        gradients = jax.jit(jax.grad(loss, (0, 1)))(layer.params, x)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))
