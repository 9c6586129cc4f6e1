"""Checkpoints of Flax's BatchNorm serve ours and the other way round, by msgpack and by Orbax.

What is restored equals what was saved, in the form that the other library trains on. That both
train alike from equal variables is shown in `test_flax_dropin.py` and `test_dropin_models.py`.
"""

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.core import freeze, unfreeze
from modules import FLAX, IMAGES, OURS, LinenNet, NNXNet, X
from tool_models import drawn, drawn_nnx

import jaxnorm.linen

pytestmark = pytest.mark.usefixtures("quick_compile")
DIRECTIONS = {"Flax's into ours": (FLAX, OURS), "ours into Flax's": (OURS, FLAX)}


def through_msgpack(tree, target, path):
    file = path / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(target, file.read_bytes())


def through_orbax(tree, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.eval_shape(lambda: target))


TRAVELS = {
    "linen, msgpack": ("linen", through_msgpack),
    "linen, Orbax": ("linen", through_orbax),
    "nnx, Orbax": ("nnx", through_orbax),
}


def tree_of(framework, library):
    """The variables of a model, as after training."""
    norm = library[framework]
    if framework == "linen":
        return drawn(LinenNet(norm), IMAGES, train=False).variables
    return nnx.state(drawn_nnx(lambda rngs: NNXNet(norm, rngs)))


@pytest.mark.parametrize(("source", "target"), DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize(("framework", "travel"), TRAVELS.values(), ids=TRAVELS)
def test_what_one_library_saves_the_other_restores(framework, travel, source, target, tmp_path):
    saved = tree_of(framework, source)
    empty = jax.tree.map(jnp.zeros_like, tree_of(framework, target))
    restored = travel(saved, empty, tmp_path)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, empty)
    chex.assert_trees_all_equal(restored, saved)


COUNTED = pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)


@COUNTED
def test_count_of_updates_is_saved(options, tmp_path):
    """And trees of variables that older Flax saved, which come back as FrozenDict, go on alike."""
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, **options)

    @jax.jit
    def step(variables, x):
        _, changed = layer.apply(variables, x, mutable=["batch_stats"])
        return {**variables, **changed}

    variables = jax.jit(layer.init)(jax.random.key(0), X)
    halfway = step(step(variables, X), X + 1)
    restored = through_orbax(halfway, variables, tmp_path)
    assert restored["batch_stats"]["updates"].tolist() == [2] * X.shape[-1]
    expected = step(halfway, X + 2)
    chex.assert_trees_all_equal(step(restored, X + 2), expected)
    chex.assert_trees_all_equal(unfreeze(step(freeze(restored), X + 2)), expected)


@COUNTED
def test_inference_needs_no_count_of_updates(options):
    """Flax's checkpoints have none."""
    variables = drawn(nn.BatchNorm(use_running_average=True), X).variables

    def infer(**options):
        return jaxnorm.linen.BatchNorm(use_running_average=True, **options).apply(variables, X)

    chex.assert_trees_all_equal(*jax.jit(lambda: (infer(**options), infer()))())
