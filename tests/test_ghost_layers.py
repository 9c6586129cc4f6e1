"""Layers with ghost batches: each group by the papers, running statistics of the whole batch."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS, draw
from subjects import SUBJECTS, drawn, in_turn

import jaxnorm.linen
import jaxnorm.nnx

GHOSTS = [
    subject
    for subject in SUBJECTS
    if hasattr(subject.cls("linen"), "ghost_batch_size") and subject.method != "InstanceNorm"
]
EACH = pytest.mark.parametrize("subject", GHOSTS, ids=lambda subject: subject.name)
K = 2

pytestmark = pytest.mark.usefixtures("quick_compile")


def both(subject, framework, x, **options):
    """The layer with ghost batches, and the one without."""
    plain = subject.layer(framework, x, **options)
    return subject.layer(framework, x, ghost_batch_size=K, **options), plain


@pytest.mark.parametrize(
    ("framework", "dtype"),
    [("linen", jnp.float32), ("nnx", jnp.float32), ("linen", jnp.bfloat16)],
    ids=["linen", "nnx", "narrow"],
)
@EACH
def test_groups_by_the_papers(framework, subject, dtype):
    """And the state after a step is that of a layer that normalizes the whole batch."""
    x, mask = subject.input(dtype), subject.some_mask()
    ghost, plain = both(subject, framework, x, dtype=dtype)
    params = drawn(plain.params)

    @jax.jit
    def steps(params, x):
        y, stats = ghost.train(params, ghost.stats, x, mask=mask)
        return y, stats, plain.train(params, plain.stats, x, mask=mask)[1]

    y, stats, whole = steps(params, x)
    wide, rows = np.asarray(x, np.float64), [slice(i, i + K) for i in range(0, len(x), K)]
    expected = [subject.oracle(wide[r], params, mask[r], **subject.options) for r in rows]
    limit = max(float(jnp.finfo(dtype).eps), 2e-4)
    np.testing.assert_allclose(np.float64(y), np.concatenate(expected), rtol=limit, atol=limit)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, whole)
    chex.assert_trees_all_close(stats, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("subject", "framework"), in_turn(GHOSTS, FRAMEWORKS))
def test_only_training_needs_whole_groups(framework, subject):
    """Any batch serves as an example for initializing, and for inference."""
    x = subject.input()
    ghost, plain = both(subject, framework, x[:-1])
    chex.assert_trees_all_equal((ghost.params, ghost.stats), (plain.params, plain.stats))
    y, expected = (
        jax.jit(layer.infer)(layer.params, layer.stats, x[:-1]) for layer in (ghost, plain)
    )
    np.testing.assert_array_equal(y, expected)
    with pytest.raises(ValueError, match=r"3 examples do not make ghost batches of 2.*Use 3"):
        jax.eval_shape(partial(ghost.train, ghost.params, ghost.stats), x[:-1])


@EACH
def test_statistics_that_stay(subject):
    """With `update_stats=False`; the groups are normalized all the same."""
    x = subject.input()
    ghost, _ = both(subject, "linen", x)

    @jax.jit
    def steps(x):
        moved, _ = ghost.train(ghost.params, ghost.stats, x)
        return moved, *ghost.train(ghost.params, ghost.stats, x, update_stats=False)

    expected, y, stats = steps(x)
    chex.assert_trees_all_equal(stats, ghost.stats)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@EACH
def test_steps_of_several_batches(subject):
    """In a loop whose state is donated: after two calls the state is that without ghost batches."""
    x = jnp.stack([subject.input(), subject.input(seed=1) + 3])
    mask = jnp.stack([subject.some_mask(), subject.some_mask(seed=1)])

    def train(layer):
        def step(stats, inputs):
            return layer.train(layer.params, stats, inputs[0], mask=inputs[1])[1], None

        loop = jax.jit(lambda stats: jax.lax.scan(step, stats, (x, mask))[0], donate_argnums=0)
        return loop(jax.tree.map(jnp.copy, layer.stats))

    found, expected = map(train, both(subject, "linen", x[0], update_every=2))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "subject", [s for s in GHOSTS if s.name in ("BatchNorm", "IterNorm")], ids=lambda s: s.name
)
def test_inside_transformations(subject):
    """Many models at once, recomputed in the backward pass."""
    x = jnp.stack([subject.input(), subject.input(seed=1)])
    ghost, _ = both(subject, "linen", x[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(drawn, [ghost.params] * 2))
    params["scale"] = params["scale"].at[1].multiply(2)

    def gradient(train, params, x):
        def loss(params):
            y, stats = train(params, ghost.stats, x)
            return jnp.sin(y).sum(), stats

        return jax.value_and_grad(loss, has_aux=True)(params)

    found = jax.jit(jax.vmap(partial(gradient, jax.checkpoint(ghost.train))))(params, x)
    expected = jax.lax.map(lambda given: gradient(ghost.train, *given), (params, x))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@EACH
def test_explicit_mesh_axes(subject):
    """The state that a step is given has types of its own there."""
    x = subject.input()
    ghost, _ = both(subject, "linen", x)
    expected, stats = jax.jit(ghost.train)(ghost.params, ghost.stats, x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        everywhere, lying = (jax.NamedSharding(mesh, spec) for spec in (P(), P("d")))
        given = jax.device_put((ghost.params, ghost.stats), everywhere)
        found = jax.jit(ghost.train)(*given, jax.device_put(x, lying))
    found = jax.tree.map(np.asarray, found)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, (expected, stats)), atol=1e-4)


# Mapped axes that may be there.


@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_unbound_axes(mapped):
    """Groups are made of what there is: of the examples of one device, of some, of all."""
    x = draw((2, 2, 4, 3))[(0,) * (2 - mapped)]
    options = dict(use_running_average=False, momentum=0.5)
    plain = jaxnorm.linen.BatchNorm(**options)
    ghost = jaxnorm.linen.BatchNorm(
        axis_name=("a", "b"), unbound_axis="local", ghost_batch_size=4, **options
    )
    variables = ghost.init(jax.random.key(0), x[(0,) * mapped])

    def train(layer, x):
        y, changed = layer.apply(variables, x, mutable=["batch_stats"])
        return y, changed["batch_stats"]["var"]

    together, alone = partial(train, ghost), partial(train, plain)
    for name in ("b", "a")[:mapped]:
        together, alone = jax.vmap(together, axis_name=name), jax.vmap(alone)
    y, var = jax.jit(together)(x)
    np.testing.assert_allclose(y, jax.jit(alone)(x)[0], rtol=1e-5, atol=1e-5)
    whole = train(plain, x.reshape(-1, 3))[1]
    np.testing.assert_allclose(var, jnp.broadcast_to(whole, var.shape), rtol=1e-5)


# Warnings count what is normalized together.


def trains(method, shape, **options):
    def step(x):
        getattr(jaxnorm.nnx, method)(shape[-1], rngs=nnx.Rngs(0), **options)(x)

    jax.eval_shape(step, draw(shape))


def test_groups_of_single_values_warn():
    with pytest.warns(UserWarning, match="one value per feature"):
        trains("BatchNorm", (4, 3), ghost_batch_size=1)
    trains("BatchNorm", (4, 2, 3), ghost_batch_size=1)
    trains("BatchNorm", (4, 3), ghost_batch_size=2)


def test_groups_of_few_examples_warn():
    with pytest.warns(UserWarning, match="2 examples for groups of 3"):
        trains("IterNorm", (8, 3), ghost_batch_size=2)
    trains("IterNorm", (8, 3), ghost_batch_size=4)


def test_groups_of_several_devices_hold_enough():
    """One example on each device, two in each group."""
    options = dict(use_running_average=False, axis_name="d", ghost_batch_size=2)
    layer, x = jaxnorm.linen.BatchNorm(**options), draw((4, 1, 3))
    variables = layer.init(jax.random.key(0), x[0])
    step = jax.vmap(partial(layer.apply, variables, mutable=["batch_stats"]), axis_name="d")
    assert jax.eval_shape(step, x)[0].shape == x.shape
