"""Whole models of Flax's users run unchanged with `jaxnorm`'s layers: only one import differs.

Both start from the same variables, which must be those that the other creates. In float64 they must
agree closely also where float32 would hide a difference in its rounding.
"""

import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from modules import draw
from swapped_models import NNXNet, ResNet, Transformer

import jaxnorm.linen
import jaxnorm.nnx

IMAGES, IMAGE_TARGETS = draw((4, 6, 6, 2)), draw((4, 3), seed=1)
SEQUENCES, SEQUENCE_TARGETS = draw((3, 5, 2)), draw((3, 5, 3), seed=1)

LINEN_MODELS = {
    "ResNet with BatchNorm": (ResNet, {}, IMAGES, IMAGE_TARGETS),
    "ResNet with GroupNorm": (ResNet, {"num_groups": 2}, IMAGES, IMAGE_TARGETS),
    "Transformer with LayerNorm": (Transformer, {}, SEQUENCES, SEQUENCE_TARGETS),
    "Transformer with RMSNorm": (Transformer, {"use_rms": True}, SEQUENCES, SEQUENCE_TARGETS),
}
PRECISIONS = {
    "float32": ({}, 1e-5),
    # One rounding amounts to 1/256, and there are a dozen layers.
    "bfloat16": ({"dtype": jnp.bfloat16}, 0.05),
    "float64": ({"param_dtype": jnp.float64, "use_fast_variance": False}, 1e-12),
}
SGD = optax.sgd(0.05, momentum=0.9)
STEPS = 3


class Run(NamedTuple):
    """What came of training a model for a few steps.

    Attributes:
        output, gradients: of the first step.
        params: after the last step.
        stats: running statistics after the first step, and after the last.
        inference: the output in inference, with statistics that are the same for both models.
    """

    output: Any
    gradients: Any
    params: Any
    stats: Any
    inference: Any


def assert_agree(found: Run, expected: Run, limit: float, limit_of_stats: float):
    """Each array equals the other up to `limit` times the largest entry among those of its kind."""
    chex.assert_trees_all_equal_structs(found, expected)
    for name, limit_here in {**dict.fromkeys(Run._fields, limit), "stats": limit_of_stats}.items():
        pair = getattr(found, name), getattr(expected, name)
        pair = jax.tree.map(lambda a: np.asarray(a, np.float64), pair)
        largest = max((np.abs(leaf).max() for leaf in jax.tree.leaves(pair[1])), default=0)
        chex.assert_trees_all_close(*pair, rtol=0, atol=limit_here * largest, custom_message=name)


def assert_same_start(found, expected):
    """Of parameters in float64 ours keep statistics in float64, Flax's in float32."""
    chex.assert_trees_all_equal(found, expected, strict=not jax.config.jax_enable_x64)


def loss_of(y, targets):
    return ((y - targets) ** 2).mean()


# Linen


def train_linen(model, variables, x, targets, stats_of_inference=None) -> Run:
    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        y, changed = model.apply(variables, x, mutable=["batch_stats"])
        return loss_of(y, targets), (y, changed.get("batch_stats", {}))

    @jax.jit
    def step(params, stats, momentum):
        gradients, (y, stats) = jax.grad(loss, has_aux=True)(params, stats)
        updates, momentum = SGD.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), stats, momentum, y, gradients

    params, stats = variables["params"], variables.get("batch_stats", {})
    momentum, seen = SGD.init(params), []
    for _ in range(STEPS):
        params, stats, momentum, *rest = step(params, stats, momentum)
        seen.append((stats, *rest))
    (first_stats, y, gradients), *_ = seen
    infer = jax.jit(lambda variables: model.apply(variables, x, train=False))
    inference = infer({"params": params, "batch_stats": stats_of_inference or stats})
    return Run(y, gradients, params, (first_stats, stats), inference)


# The default run takes each model, and each precision with the first, a run with -m slow the rest.
LINEN_RUNS = [
    pytest.param(
        *model,
        *precision,
        id=f"{name}, {bits}",
        marks=() if bits == "float32" or name == "ResNet with BatchNorm" else pytest.mark.slow,
    )
    for name, model in LINEN_MODELS.items()
    for bits, precision in PRECISIONS.items()
    if bits != "bfloat16" or name in ("ResNet with BatchNorm", "Transformer with LayerNorm")
]


@pytest.mark.parametrize(("model", "kind", "x", "targets", "options", "limit"), LINEN_RUNS)
def test_linen_model_is_the_same(model, kind, x, targets, options, limit, quick_compile):
    with jax.enable_x64("param_dtype" in options):
        x, targets = (jnp.asarray(a, options.get("param_dtype")) for a in (x, targets))
        flaxs, ours = (model(norms, **kind, **options) for norms in (nn, jaxnorm.linen))
        variables, own = (jax.jit(m.init)(jax.random.key(0), x) for m in (flaxs, ours))
        assert_same_start(own, variables)
        expected = train_linen(flaxs, variables, x, targets)
        found = train_linen(ours, variables, x, targets, expected.stats[1])
        assert found.output.dtype == expected.output.dtype
        assert_agree(found, expected, limit, max(limit, 1e-6))


def test_same_partitioning_and_table_of_a_linen_model():
    flaxs, ours = (Transformer(norms) for norms in (nn, jaxnorm.linen))
    key = jax.random.key(0)
    expected, found = (
        nn.get_partition_spec(jax.eval_shape(model.init, key, SEQUENCES)) for model in (flaxs, ours)
    )
    assert found == expected
    scale = found["params"]["blocks"]["norm_mlp"]["scale"]
    assert scale == jax.sharding.PartitionSpec("layers", "features")
    chex.assert_equal(*(model.tabulate(key, SEQUENCES) for model in (ours, flaxs)))


# NNX


def train_nnx(model, x, targets, stats_of_inference=None) -> Run:
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y = model(x)
            return loss_of(y, targets), y

        gradients, y = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return y, gradients

    def state(kind):
        return jax.tree.map(jnp.array, nnx.state(model, kind))

    model.train()
    seen = [(*step(model, optimizer), state(nnx.BatchStat)) for _ in range(STEPS)]
    (y, gradients, first_stats), *_, (_, _, stats) = seen
    params = state(nnx.Param)
    model.eval()
    nnx.update(model, stats if stats_of_inference is None else stats_of_inference)
    inference = nnx.jit(lambda model: model(x))(model)
    return Run(y, gradients, params, (first_stats, stats), inference)


@pytest.mark.parametrize(("options", "limit"), PRECISIONS.values(), ids=PRECISIONS)
def test_nnx_model_is_the_same(options, limit, quick_compile):
    with jax.enable_x64("param_dtype" in options):
        x, targets = (jnp.asarray(a, options.get("param_dtype")) for a in (IMAGES, IMAGE_TARGETS))
        flaxs, ours = (NNXNet(norms, nnx.Rngs(0), **options) for norms in (nnx, jaxnorm.nnx))
        assert_same_start(nnx.state(ours), nnx.state(flaxs))
        with warnings.catch_warnings():
            # Flax writes float64 averages into its float32 statistics.
            warnings.filterwarnings("ignore", "scatter inputs have incompatible types")
            expected = train_nnx(flaxs, x, targets)
        found = train_nnx(ours, x, targets, expected.stats[1])
        assert found.output.dtype == expected.output.dtype
        assert_agree(found, expected, limit, max(limit, 1e-6))
