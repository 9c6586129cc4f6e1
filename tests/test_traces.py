"""Blocks whose traces Flax or JAX keep: no model calls what was traced for another."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import drawn, drawn_nnx, vector

from jaxnorm import tools
from jaxnorm.diagnose import report_norms

pytestmark = pytest.mark.usefixtures("quick_compile")

X = vector(3)


class Block(nn.Module):
    """A part that is told in the constructor whether it trains."""

    train: bool
    note: Callable[[Any], None]

    @nn.compact
    def __call__(self, x):
        self.note(self.path)
        return nn.BatchNorm(not self.train, name="norm")(nn.Dense(4, name="dense")(x))


def two(make):
    """A model of two blocks, each made by a function of the name, and whether it trains."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for name in "ab":
                x = make(name, train)(x)
            return x

    return Net()


def plain():
    return two(lambda name, train: Block(train, [].append, name=name)), []


def of_a_class():
    traced, kind = [], nn.jit(Block)
    return two(lambda name, train: kind(train, traced.append, name=name)), traced


def of_a_method():
    """What interceptors see from inside only."""
    traced = []

    class Jitted(Block):
        __call__ = nn.jit(Block.__call__)

    return two(lambda name, train: Jitted(train, traced.append, name=name)), traced


def of_a_function():
    traced, call = [], nn.jit(lambda block, x: block(x))
    return two(lambda name, train: partial(call, Block(train, traced.append, name=name))), traced


def of_a_scan():
    traced = []

    class Step(Block):
        @nn.compact
        def __call__(self, x, _):
            return super().__call__(x), None

    stacked = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    scan = nn.jit(nn.scan(Step, length=2, **stacked))
    return two(
        lambda name, train: lambda x: scan(train, traced.append, name=name)(x, None)[0]
    ), traced


def of_other_variables():
    """A module that the model applies itself, by a function that JAX compiles."""
    traced = []

    @partial(jax.jit, static_argnums=0)
    def applied(block, variables, x):
        return block.apply(variables, x, mutable="batch_stats")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            block = Block(train, traced.append, parent=None)

            def initial(kind):
                return block.init(jax.random.key(0), x)[kind]

            params = self.param("a", lambda _: initial("params"))
            stats = self.variable("batch_stats", "a", lambda: initial("batch_stats"))
            y, new = applied(block, {"params": params, "batch_stats": stats.value}, x)
            stats.value = new["batch_stats"]
            return y

    return Net(), traced


WAYS = (of_a_class, of_a_method, of_a_function, of_a_scan)


def movement(module, variables):
    """Of which blocks the statistics move in training."""
    before = variables["batch_stats"]
    train = jax.jit(partial(module.apply, train=True, mutable="batch_stats"))
    after = train(variables, X)[1]["batch_stats"]
    return {n: bool((after[n]["norm"]["mean"] != before[n]["norm"]["mean"]).any()) for n in before}


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_block_stays_and_the_user_s_own_moves(way):
    """One of two blocks that share a trace; and what was traced once is not traced again."""
    module, traced = way()
    variables = drawn(module, X).variables
    frozen, theirs = tools.freeze(module.bind(variables), X, only="a/*").model.unbind()
    assert movement(frozen, theirs) == {"a": False, "b": True}
    assert movement(module, variables) == {"a": True, "b": True}
    count = len(traced)
    assert movement(frozen.clone(), theirs) == {"a": False, "b": True}
    assert movement(module, variables) == {"a": True, "b": True}
    assert len(traced) == count > 0


def test_functions_of_jax_that_apply_a_module():
    module, _ = of_other_variables()
    variables = drawn(module, X).variables
    assert movement(module, variables) == {"a": True}
    frozen = tools.freeze(module.bind(variables), X, only="norm").model.unbind()
    assert movement(*frozen) == {"a": False}
    assert movement(module, variables) == {"a": True}


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def call(block, x):
    return block(x)


NNX_WAYS = {
    "jit": lambda: nnx.jit(call),
    "remat in jit": lambda: nnx.jit(nnx.remat(call)),
    "cached_partial": lambda: partial(
        lambda f, block, x: nnx.cached_partial(f, block)(x), nnx.jit(call)
    ),
}


@pytest.mark.parametrize("way", NNX_WAYS)
def test_nnx_functions_keep_models_apart(way):
    kept = NNX_WAYS[way]()

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = NNXBlock(rngs), NNXBlock(rngs)

        def __call__(self, x):
            return kept(self.b, kept(self.a, x))

    def moved(model):
        model = nnx.clone(model)
        model.train()
        before = [block.norm.mean[...] for block in (model.a, model.b)]
        model(X)
        return [
            bool((b.norm.mean[...] != old).any())
            for b, old in zip((model.a, model.b), before, strict=True)
        ]

    model = drawn_nnx(Net)
    frozen = tools.freeze(model, only="a/*").model
    assert moved(frozen) == [False, True]
    assert moved(model) == [True, True]
    assert moved(frozen) == [False, True]


def adapted_by_tent(model):
    tent = tools.tent(model, optax.sgd(0.1), X)
    return tent.step(tent.init(), X)[0]


TOOLS = {
    "fold": lambda model: dict(tools.fold(model, X).pairs),
    "decay_mask": lambda model: tools.decay_mask(model, X),
    "freeze": lambda model: dict(tools.freeze(model, X).frozen),
    "replace": lambda model: tools.replace(model, tools.to("RMSNorm"), X).model(X),
    "population_stats": lambda model: tools.population_stats(model, [X]).variables,
    "adapt_stats": lambda model: tools.adapt_stats(model, [X], prior_strength=3).variables,
    "tent": adapted_by_tent,
    "report_norms": lambda model: {
        row.path: row.shift for row in report_norms(model, X, singular_values=False).rows
    },
}


# What the others do goes through what these do: their layers, exchanges and evidence.
IN_DEFAULT = ("fold", "decay_mask", "replace", "population_stats")


@pytest.mark.parametrize(
    "tool",
    [pytest.param(t, marks=() if t in IN_DEFAULT else pytest.mark.slow) for t in TOOLS],
)
def test_every_tool_sees_blocks_that_share_a_trace(tool):
    """As it sees the same model without traces that are kept, after other runs of it."""
    module, _ = of_a_method()
    variables = drawn(module, X).variables
    expected = TOOLS[tool](plain()[0].bind(variables))
    jax.eval_shape(module.apply, variables, X)
    tools.decay_mask(module.bind(variables), X)
    found = TOOLS[tool](module.bind(variables))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(mine, str | bool):
            assert mine == theirs
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
