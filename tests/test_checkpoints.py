"""Checkpoints of Flax's BatchNorm serve ours and the other way round, by msgpack and by Orbax.

A model is trained by one library, saved, restored into the other, and trained on. It must go on as
if it had been trained by one library throughout.
"""

import functools

import chex
import jax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.core import freeze, unfreeze
from modules import FLAX, IMAGES, OURS, LinenNet, NNXNet, X
from tool_models import drawn

import jaxnorm.linen

pytestmark = pytest.mark.usefixtures("quick_compile")
DIRECTIONS = {
    "Flax's into ours": ("flax", "ours"),
    "ours into Flax's": ("ours", "flax"),
    "ours into ours": ("ours", "ours"),
}


def through_msgpack(tree, target, path):
    file = path / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(target, file.read_bytes())


def through_orbax(tree, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.eval_shape(lambda: target))


@functools.cache
def linen_functions(norm):
    """A first tree of variables from a seed, and a training step with the inference after it."""
    model = LinenNet(norm)

    @jax.jit
    def create(seed):
        return model.init(jax.random.key(seed), IMAGES, train=False)

    @jax.jit
    def step(variables, x):
        _, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
        variables = {**variables, **changed}
        return variables, model.apply(variables, x, train=False)

    return create, step


@functools.cache
def nnx_functions(norm):
    """As `linen_functions`, for the state of a model."""

    def create(seed):
        return nnx.state(NNXNet(norm, nnx.Rngs(seed)))

    def model_of(state):
        model = NNXNet(norm, nnx.Rngs(0))
        nnx.update(model, state)
        return model

    @jax.jit
    def step(state, x):
        model = model_of(state)
        model.train()
        model(x)
        state = nnx.state(model)
        model.eval()
        return state, model(x)

    return create, step


FUNCTIONS = {"linen": linen_functions, "nnx": nnx_functions}
LIBRARIES = {"flax": FLAX, "ours": OURS}
TRAVELS = {
    "linen, msgpack": ("linen", through_msgpack),
    "linen, Orbax": ("linen", through_orbax),
    "nnx, Orbax": ("nnx", through_orbax),
}


@pytest.mark.parametrize(("source", "target"), DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize(("framework", "travel"), TRAVELS.values(), ids=TRAVELS)
def test_training_goes_on_from_a_checkpoint(framework, travel, source, target, tmp_path):
    create, step = FUNCTIONS[framework](LIBRARIES[source][framework])
    new_create, new_step = FUNCTIONS[framework](LIBRARIES[target][framework])

    saved, _ = step(create(seed=1), IMAGES)
    empty = new_create(seed=2)
    restored = travel(saved, empty, tmp_path)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, empty)
    chex.assert_trees_all_equal(restored, saved)

    for x in (IMAGES, IMAGES + 1):
        (saved, y), (restored, new_y) = step(saved, x), new_step(restored, x)
        chex.assert_trees_all_close(restored, saved, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(new_y, y, rtol=1e-5, atol=1e-5)


def test_frozen_dictionaries():
    """Trees of variables that older Flax saved come back as FrozenDict."""
    create, step = linen_functions(jaxnorm.linen.BatchNorm)
    variables = create(seed=1)
    (new, y), (expected_new, expected) = (step(v, IMAGES) for v in (freeze(variables), variables))
    chex.assert_trees_all_equal((unfreeze(new), y), (expected_new, expected))


COUNTED = pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)


@COUNTED
def test_count_of_updates_is_saved(options, tmp_path):
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, **options)

    @jax.jit
    def step(variables, x):
        _, changed = layer.apply(variables, x, mutable=["batch_stats"])
        return {**variables, **changed}

    variables = jax.jit(layer.init)(jax.random.key(0), X)
    halfway = step(step(variables, X), X + 1)
    restored = through_orbax(halfway, variables, tmp_path)
    assert restored["batch_stats"]["updates"].tolist() == [2] * X.shape[-1]
    chex.assert_trees_all_equal(step(restored, X + 2), step(halfway, X + 2))


@COUNTED
def test_inference_needs_no_count_of_updates(options):
    """Flax's checkpoints have none."""
    variables = drawn(nn.BatchNorm(use_running_average=True), X).variables

    def infer(**options):
        return jaxnorm.linen.BatchNorm(use_running_average=True, **options).apply(variables, X)

    chex.assert_trees_all_equal(*jax.jit(lambda: (infer(**options), infer()))())
