"""Mapped axes that are not there: an error by default, local statistics if one says so.

While initializing no axis need be there, and no collective runs where one is.
"""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS, draw
from subjects import BOTH, SUBJECTS, in_turn

import jaxnorm

pytestmark = pytest.mark.usefixtures("quick_compile")
PAIRS = [[0, 1], [2, 3]]
EACH_IN_TURN = pytest.mark.parametrize(("subject", "framework"), in_turn(SUBJECTS, FRAMEWORKS))


def one_step(layer, x, mask):
    return layer.train(layer.params, layer.stats, x, mask=mask)


@EACH_IN_TURN
def test_nothing_is_pooled_where_nothing_is_mapped(subject, framework):
    x, mask = subject.input(), subject.some_mask()
    options = dict(axis_name=("a", "b"), axis_index_groups=PAIRS)
    layer = subject.layer(framework, x, **options, unbound_axis="local")
    alone = subject.layer(framework, x)
    steps = (partial(one_step, each) for each in (layer, alone))
    found, expected = (jax.jit(step)(x, mask) for step in steps)
    chex.assert_trees_all_equal(found, expected)
    with pytest.raises(NameError, match=r"axis_name='a' is not bound.*unbound_axis='local'"):
        jax.eval_shape(lambda: one_step(subject.layer(framework, x, **options), x, mask))


@pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS if subject.name in ("BatchNorm", "LayerNorm", "IterNorm")],
    ids=lambda subject: subject.name,
)
@BOTH
def test_what_is_mapped_is_pooled(subject, framework):
    """Also over one of two axes, and in groups where all are there."""
    x, mask = subject.input(), subject.some_mask()
    x, mask = jnp.stack([x, 2 * x]), jnp.stack([mask, ~mask])
    both = dict(axis_name=("a", "b"), unbound_axis="local")

    def run(**options):
        layer = subject.layer(framework, x[0], **options)
        return jax.jit(jax.vmap(lambda x, m: one_step(layer, x, m), axis_name="b"))(x, mask)

    chex.assert_trees_all_equal(run(**both), run(axis_name="b"))
    groups = dict(axis_index_groups=[[1], [0]])
    found = run(axis_name="b", unbound_axis="local", **groups)
    chex.assert_trees_all_equal(found, run(axis_name="b", **groups))


@EACH_IN_TURN
def test_no_collective_while_initializing(subject, framework):
    """Neither where the axis is mapped nor where it is not."""
    x = subject.input()

    def init(x):
        layer = subject.layer(framework, x, axis_name="d")
        return layer.params, layer.stats

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    for function in (init, inside):
        assert not collectives(function, x)


def collectives(function, x):
    """Those that stand in a program, also in branches that are not taken."""
    return re.findall("psum|pmax|all_gather|ppermute|all_to_all", str(jax.make_jaxpr(function)(x)))


def test_collectives_are_found_where_they_are():
    layer = SUBJECTS[0].layer("linen", SUBJECTS[0].input(), axis_name="d")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    step = partial(layer.train, layer.params, layer.stats)
    train = jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()))
    assert collectives(train, SUBJECTS[0].input())


def test_one_value_for_each_feature_still_warns():
    """What counts is how many devices pool, not how many are named."""
    options = dict(axis_name="d", unbound_axis="local")
    layer = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    with pytest.warns(UserWarning, match="one value per feature"):
        layer(draw((1, 3)))
    jax.vmap(lambda x: jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)(x), axis_name="d")(
        draw((2, 1, 3))
    )


def test_too_few_examples_still_warn():
    options = dict(axis_name="d", unbound_axis="local")
    layer = jaxnorm.nnx.IterNorm(3, rngs=nnx.Rngs(0), **options)
    with pytest.warns(UserWarning, match="2 examples for groups of 3"):
        layer(draw((2, 3)))


@BOTH
def test_inference_needs_no_axis(framework):
    """As in Flax: running statistics are not pooled."""
    subject = SUBJECTS[0]
    layer = subject.layer(framework, subject.input(), axis_name="d")
    assert layer.infer(layer.params, layer.stats, subject.input()).shape == subject.shape
