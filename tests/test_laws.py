"""Laws that every activation method obeys, on Linen and on NNX modules.

Values against oracles, compiled against eager, mapped against one by one, derivatives against
finite differences, masks, dtypes, large means, state that keeps its types. What holds for one
method alone stands in files of its own. Compiling takes most of the time, so several laws read
the results of one program, `step_of`.
"""

import contextlib
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_along_a_line
from jax.experimental import jet, sparse
from modules import FRAMEWORKS
from subjects import BOTH, EACH, EACH_METHOD, LATER, SUBJECTS, drawn, in_turn

import jaxnorm

# The variables of another domain stay, and have themselves for derivative.
MOVING = ("mean", "var", "cov")
QUICK = pytest.mark.usefixtures("quick_compile")
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


class Step(NamedTuple):
    """A training step, inference by the same statistics, and what is pulled back through them.

    Attributes:
        y, new, z: result and new state of training, result of inference.
        trained: gradients of (params, stats, x) from the valid elements of `y`.
        inferred: the same from the valid elements of `z`.
        moved: the same from the new statistics.
    """

    y: jax.Array
    new: dict[str, jax.Array]
    z: jax.Array
    trained: Any
    inferred: Any
    moved: Any


@cache
def step_of(name, dtype=jnp.float32):
    """(params, stats, x, weights) -> Step, for the subject of this name, compiled once."""
    (subject,) = (subject for subject in SUBJECTS if subject.name == name)
    layer = subject.layer("linen", subject.input(dtype), dtype=dtype)

    @jax.jit
    def run(params, stats, x, weights):
        floats = {n: leaf for n, leaf in stats.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}

        def both(params, floats, x):
            y, new = layer.train(params, stats | floats, x, mask=weights)
            z = layer.infer(params, stats | floats, x, mask=weights)
            return (y, z, {n: leaf for n, leaf in new.items() if n in MOVING}), new

        (y, z, moving), pull, new = jax.vjp(both, params, floats, x, has_aux=True)

        def slope(result):
            """Also what is masked later has to have a finite gradient."""
            return 3 * jnp.where(weights > 0, result, 0) ** 2 + 0 * result

        no_y, still = jnp.zeros_like(y), jax.tree.map(jnp.zeros_like, moving)
        return Step(
            y,
            new,
            z,
            trained=pull((slope(y), no_y, still)),
            inferred=pull((no_y, slope(z), still)),
            moved=pull((no_y, no_y, jax.tree.map(jnp.ones_like, moving))),
        )

    return run


def first_step(subject, weights, x=None):
    """A step from the first statistics, with parameters near the first ones."""
    x = subject.input() if x is None else x
    layer = subject.layer("linen", x)
    return step_of(subject.name)(drawn(layer.params), layer.stats, x, weights)


# Both frameworks are compared with each other: the default run takes one of them for each subject.
EACH_IN_TURN = pytest.mark.parametrize(("subject", "framework"), in_turn(SUBJECTS, FRAMEWORKS))


@WIDE
@masks("masked")
@EACH_IN_TURN
def test_training_is_what_the_paper_says(framework, subject, kind):
    x, mask = subject.input(jnp.float64), MASKS[kind](subject)
    layer = subject.layer(framework, x)
    params = {name: p.astype(jnp.float64) for name, p in drawn(layer.params).items()}
    call = {} if mask is None else {"mask": mask}
    y, new = jax.jit(layer.train)(params, layer.stats, x, **call)
    expected = subject.oracle(
        np.asarray(x), params, None if mask is None else np.asarray(mask), **subject.options
    )
    # Statistics that are stored in float32 may enter.
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert y.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(new, layer.stats)


@QUICK
@EACH_METHOD
def test_linen_is_nnx_and_booleans_are_weights_of_0_and_1(subject):
    x, mask = subject.input(), subject.some_mask()
    linen, nnx = (subject.layer(framework, x) for framework in ("linen", "nnx"))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        (linen.params, linen.stats), (nnx.params, nnx.stats)
    )

    @jax.jit
    def of_nnx(params, stats, x):
        y, new = nnx.train(params, stats, x, mask=mask)
        return y, new, nnx.infer(params, stats, x, mask=mask)

    expected = first_step(subject, mask.astype(jnp.float32))
    found = of_nnx(drawn(linen.params), linen.stats, x)
    chex.assert_trees_all_close(found, expected[:3], rtol=1e-6, atol=1e-6)


@QUICK
@pytest.mark.parametrize(("subject", "framework"), in_turn(SUBJECTS, FRAMEWORKS))
def test_compiled_is_eager_and_mapped_is_one_by_one(framework, subject):
    x = subject.input()
    layer = subject.layer(framework, x)
    params = drawn(layer.params)

    def run(x):
        y, new = layer.train(params, layer.stats, x)
        return y, new, layer.infer(params, new, x)

    mapped = jax.jit(jax.vmap(run))(jnp.stack([subject.input(seed=1), x]))
    found = jax.tree.map(lambda leaf: leaf[1], mapped)
    chex.assert_trees_all_close(found, run(x), rtol=2e-5, atol=2e-5)


# The second derivative; after the quickest, the default run takes one of the others in turn.
WAYS = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over forward": lambda f: jax.grad(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
}


@WIDE
@masks("whole", "masked")
@pytest.mark.parametrize(("subject", "way"), in_turn(SUBJECTS, [*WAYS][1:], later=LATER))
def test_derivatives_of_two_orders(subject, way, kind):
    """Along a line through input and parameters: forward, reverse, second ones, and finite
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

    @jax.jit
    def orders(t):
        first = jax.jacfwd(along)(t), jax.grad(along)(t)
        return along(t), first, [WAYS[each](along)(t) for each in ("forward over reverse", way)]

    check_along_a_line(orders, constants=subject.method == "BatchRenorm")


# The root that decorrelated batch norm takes by eigenvectors has a rule, and is no plain operation.
READABLE = [subject for subject in SUBJECTS if subject.method != "DecorrelatedBatchNorm"]


@WIDE
@pytest.mark.parametrize(
    ("subject", "way"), in_turn(READABLE, ("as it is", "plain operations"), later=LATER)
)
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


@QUICK
@EACH_METHOD
def test_what_is_masked_reaches_nothing(subject):
    x, weights = subject.input(), subject.some_weights()
    kept = np.broadcast_to(weights > 0, x.shape)

    def valid(step):
        """All but gradients of, and results for, what is masked."""
        trained, inferred = (
            (*rest, jnp.where(kept, dx, 0)) for *rest, dx in (step.trained, step.inferred)
        )
        y, z = (jnp.where(kept, result, 0) for result in (step.y, step.z))
        return step._replace(y=y, z=z, trained=trained, inferred=inferred)

    clean = valid(first_step(subject, weights))
    for harm in (np.nan, np.inf, 3e38):
        spoiled = first_step(subject, weights, jnp.where(weights > 0, x, harm))
        chex.assert_trees_all_close(valid(spoiled), clean, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(spoiled.trained[-1][~kept], 0)


@QUICK
@EACH_METHOD
def test_nothing_valid_moves_nothing(subject):
    x = jnp.full(subject.shape, jnp.nan, jnp.float32)
    step = first_step(subject, jnp.zeros(subject.mask), x)
    assert np.isfinite(step.y).all()
    assert np.isfinite(step.trained[-1]).all()
    chex.assert_trees_all_equal(step.new, subject.layer("linen", x).stats)


@QUICK
@EACH_METHOD
def test_no_gradient_passes_through_the_state(subject):
    """Not out of new statistics, and not into old ones, in training nor in inference."""
    step = first_step(subject, subject.some_weights())
    for zero in (step.moved, step.trained[1], step.inferred[1]):
        chex.assert_trees_all_equal(zero, jax.tree.map(jnp.zeros_like, zero))
    # An inference by given statistics has no use for the weights of a batch's own.
    for by_params, _, by_x in (step.trained, step.inferred):
        assert all(np.abs(leaf).max() > 1e-4 for leaf in (by_params["scale"], by_x))


@QUICK
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@EACH_METHOD
def test_narrow_input_is_rounded_once_in_strict_modes(subject, dtype):
    """The same as of float32 input with the same values, rounded; the state is the same."""
    x, weights = subject.input(dtype), subject.some_weights()
    layer = subject.layer("linen", x)
    arguments = drawn(layer.params), layer.stats
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        found = step_of(subject.name, dtype)(*arguments, x, weights)
    exact = step_of(subject.name)(*arguments, x.astype(jnp.float32), weights)
    chex.assert_type([found.y, found.z, found.trained[-1]], dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.new, layer.stats)
    chex.assert_trees_all_close(found.new, exact.new, rtol=1e-5, atol=1e-6)
    limit = 0.51 * float(jnp.finfo(dtype).eps)
    for narrow, wide in ((found.y, exact.y), (found.z, exact.z)):
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=limit, atol=1e-4)
    gradients = jax.tree.leaves((found.trained, found.inferred))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in gradients)


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


@EACH
@BOTH
def test_state_starts_unknown_and_keeps_its_types(framework, subject):
    """Also weak ones, by which JAX traces a step anew; and where no axis is mapped yet."""
    x = subject.input(jnp.bfloat16)
    layer = subject.layer(framework, x, axis_name="unbound")
    assert layer.params
    for name, leaf in layer.stats.items():
        ones = name.partition("_")[0] == "var"
        expected = np.eye(leaf.shape[-1])[None] if name == "cov" else np.full(leaf.shape, ones)
        np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))
    layer = subject.layer(framework, x)
    _, new = jax.eval_shape(layer.train, layer.params, layer.stats, x)
    types = {name: (leaf.shape, leaf.dtype, leaf.weak_type) for name, leaf in new.items()}
    first = {name: jax.typeof(leaf) for name, leaf in layer.stats.items()}
    assert types == {name: (t.shape, t.dtype, t.weak_type) for name, t in first.items()}
    assert {t.dtype for t in first.values()} <= {jnp.dtype(jnp.float32)}


@EACH
def test_input_and_statistics_are_all_that_is_kept(subject):
    """For the backward pass; with enough of each feature that statistics weigh little."""
    shape = (4, 32, 32, 256) if len(subject.shape) == 4 else (4, 64, 256)
    x = jnp.zeros(shape, jnp.bfloat16)
    groups = {"group_size": 64} if subject.name == "GroupNorm of some axes" else {}
    layer = subject.layer("linen", x, dtype=jnp.bfloat16, **groups)

    def kept(run):
        pull = jax.eval_shape(lambda x: jax.vjp(partial(run, layer.params, layer.stats), x)[1], x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull)) / x.nbytes

    assert 0.99 <= kept(lambda *a: layer.train(*a)[0]) <= 1.05
    assert kept(layer.infer) <= 1.05


@EACH_METHOD
def test_no_tracer_leaks(subject):
    x, mask = subject.input(), subject.some_weights()
    layer = subject.layer("linen", x)

    def loss(params, x):
        y, new = layer.train(params, layer.stats, x, mask=mask)
        return (y**2).sum() + (layer.infer(params, new, x) ** 2).sum()

    with jax.checking_leaks():
        jax.eval_shape(jax.grad(loss, (0, 1)), layer.params, x)
