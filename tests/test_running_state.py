"""The state of a layer: what moves it and by which rule, and that its types never change.

Each law is tried on the Linen and on the NNX module; expected values are computed in NumPy.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import FRAMEWORKS, draw, draw_mask
from oracles import batch_norm as oracle

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.methods.narrow_stats import rounded

BOTH = pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)

SHAPE = (6, 2, 3)
START = {"mean": 0.0, "var": 1.0}


def average_from(start, batches):
    return functools.reduce(lambda old, new: 0.8 * old + 0.2 * new, batches, start)


# Options of a layer, and what it has to store after batches of values [batch, feature].
RULES = {
    "ema": ({"momentum": 0.8}, average_from),
    "debiased": (
        {"momentum": 0.8, "debias": True},
        lambda start, batches: average_from(0.0, batches) / (1 - 0.8 ** len(batches)),
    ),
    "cumulative": ({"momentum": None}, lambda start, batches: np.mean(batches, 0)),
}
OPTIONS = pytest.mark.parametrize("options", [rule[0] for rule in RULES.values()], ids=RULES)


def batches_of(dtype=jnp.float32, count=4):
    return jnp.stack([draw(SHAPE, dtype, seed) + seed for seed in range(count)])


def train_on(layer, batches, masks=None, stats=None):
    """The statistics after all batches, by `lax.scan`: it takes a state that keeps its types."""

    def step(stats, inputs):
        x, *mask = inputs
        return layer.train(layer.params, stats, x, mask=mask[0] if mask else None)[::-1]

    inputs = (batches,) if masks is None else (batches, masks)
    return jax.jit(lambda *args: jax.lax.scan(step, *args)[0])(stats or layer.stats, inputs)


def expected_state(rule, batches, masks, ddof=0):
    """By NumPy, in float64."""
    seen = [
        oracle(np.asarray(x), where=None if masks is None else np.asarray(masks)[i])[1:]
        for i, x in enumerate(batches)
    ]
    means = np.stack([mean for _, mean, _ in seen])
    variances = np.stack([var * count / (count - ddof) for count, _, var in seen])
    return {"mean": rule(START["mean"], means), "var": rule(START["var"], variances)}


def assert_state(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
@BOTH
def test_state_follows_its_rule(make, options, rule, running_var, masked):
    batches = batches_of()
    masks = draw_mask(batches.shape) if masked else None
    found = train_on(make(batches[0], running_var=running_var, **options), batches, masks)
    ddof = int(running_var == "unbiased")
    assert_state(found, expected_state(rule, batches, masks, ddof))
    if "updates" in found:
        np.testing.assert_array_equal(found["updates"], np.full(3, 4, np.int32))


DTYPES = {
    "float64": (jnp.float64, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float16": (jnp.float16, jnp.float32),
    "complex64": (jnp.complex64, jnp.complex64),
}


@pytest.mark.parametrize(("dtype", "mean_dtype"), DTYPES.values(), ids=DTYPES)
@BOTH
def test_state_keeps_its_dtype(x64, make, dtype, mean_dtype):
    options, rule = RULES["debiased"]
    batches = batches_of(dtype)
    layer = make(batches[0], **options)
    found = train_on(layer, batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, layer.stats)
    types = {name: leaf.dtype for name, leaf in found.items()}
    assert types == {"mean": mean_dtype, "var": jnp.float32, "updates": jnp.float32}
    wide = batches.astype(jnp.promote_types(dtype, jnp.float64))
    assert_state(found, expected_state(rule, wide, None))


@BOTH
def test_state_is_as_wide_as_parameters_ask(x64, make):
    batches = batches_of(jnp.float64)
    layer = make(batches[0], param_dtype=jnp.float64, momentum=0.8)
    found = train_on(layer, batches)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float64)}
    for name, value in expected_state(average_from, batches, None).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-13)


@BOTH
def test_inference_uses_the_state(make):
    batches = batches_of()
    layer = make(batches[0], scale_init=jax.nn.initializers.normal(1.0))
    stats = train_on(layer, batches)
    x = np.asarray(batches[0], np.float64)
    standardized = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    y = layer.infer(layer.params, stats, batches[0])
    scale = np.asarray(layer.params["scale"])
    np.testing.assert_allclose(y, standardized * scale, rtol=1e-5, atol=1e-5)


@BOTH
def test_complex_state(make):
    """Training and inference of complex input keep the imaginary part."""
    x = draw(SHAPE, jnp.complex64)
    layer = make(x, momentum=0.0)
    y, stats = layer.train(layer.params, layer.stats, x)
    expected, _, mean, var = oracle(x)
    assert_state(stats, {"mean": mean, "var": var})
    for found in (y, layer.infer(layer.params, stats, x)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# What does not move the state


@BOTH
def test_steps_are_traced_once_and_can_reuse_memory(make):
    x = draw(SHAPE)
    layer = make(x, debias=True)
    expected = train_on(layer, jnp.stack([x] * 3))

    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(n=1)
    def step(params, stats, x):
        return layer.train(params, stats, x)[1]

    chex.clear_trace_counter()
    stats = jax.tree.map(jnp.copy, layer.stats)
    for _ in range(3):
        old, stats = stats, step(layer.params, stats, x)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    chex.assert_trees_all_close(stats, expected, rtol=1e-6)


def test_nnx_steps_are_traced_once_for_each_mode():
    x, layer = draw(SHAPE), jaxnorm.nnx.BatchNorm(3, debias=True, rngs=nnx.Rngs(0))

    @nnx.jit
    @chex.assert_max_traces(n=2)
    def call(layer, x):
        return layer(x)

    chex.clear_trace_counter()
    for _ in range(2):
        layer.train()
        call(layer, x)
        call(layer, x)
        layer.eval()
        call(layer, x)
    np.testing.assert_array_equal(layer.updates[...], np.full(3, 4))


@OPTIONS
@BOTH
def test_no_gradient_passes_through_the_state(make, options):
    """Not out of new statistics, and not into old ones, in training nor in inference."""
    x = draw(SHAPE)
    layer = make(x, **options)
    floats = {name: layer.stats[name] for name in ("mean", "var")}

    @jax.jit
    def gradients(params, floats, x):
        def total(what):
            def of(params, floats, x):
                stats = layer.stats | floats
                y, new = layer.train(params, stats, x)
                z = layer.infer(params, stats, x)
                chosen = {"new": (new["mean"], new["var"]), "y": y**3, "z": z**3}[what]
                return sum(leaf.sum() for leaf in jax.tree.leaves(chosen))

            return jax.grad(of, argnums=(0, 1, 2))(params, floats, x)

        return total("new"), total("y"), total("z")

    of_new, of_y, of_z = gradients(layer.params, floats, x)
    for zero in (of_new, of_y[1], of_z[1]):
        chex.assert_trees_all_equal(zero, jax.tree.map(jnp.zeros_like, zero))
    for gradient in (of_y[0], of_y[2], of_z[0], of_z[2]):
        assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))


# Where the layer is told to leave its statistics alone: options, then arguments of the call.
FROZEN = {
    "by the call": ({}, {"update_stats": False}),
    "by the constructor": ({"update_stats": False}, {}),
    "by both": ({"update_stats": False}, {"update_stats": False}),
}
MOVING = {
    "the call before the constructor": ({"update_stats": False}, {"update_stats": True}),
    "by both": ({"update_stats": True}, {"update_stats": True}),
}


@pytest.mark.parametrize(("options", "call"), FROZEN.values(), ids=FROZEN)
@BOTH
def test_frozen_statistics(make, options, call):
    """They stay, while the result is that of training."""
    x = draw(SHAPE)
    layer = make(x, **options)
    y, new = layer.train(layer.params, layer.stats, x, **call)
    chex.assert_trees_all_equal(new, layer.stats)
    np.testing.assert_allclose(y, oracle(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "call"), MOVING.values(), ids=MOVING)
@BOTH
def test_statistics_that_are_told_to_move(make, options, call):
    x = draw(SHAPE)
    layer = make(x, momentum=0.8, **options)
    _, new = layer.train(layer.params, layer.stats, x, **call)
    assert_state(new, expected_state(average_from, x[None], None))


def test_linen_needs_no_mutable_collection_for_frozen_statistics():
    x, layer = draw(SHAPE), jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x, update_stats=False)
    np.testing.assert_allclose(y, oracle(x)[0], rtol=1e-5, atol=1e-5)


def test_nnx_view_freezes_statistics():
    x, layer = draw(SHAPE), jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    y = nnx.view(layer, update_stats=False)(x)
    np.testing.assert_allclose(y, oracle(x)[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(nnx.state(layer), before)
    assert "update_stats: bool | None = None\n    " in nnx.view_info(layer)
    layer(x)
    assert not np.array_equal(layer.mean[...], before["mean"][...])


# Batches without a usable estimate

SPOILED = {"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf, "overflow": 1e30}


@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
@BOTH
def test_skip_nonfinite_leaves_the_whole_state(make, options, rule):
    """One such value in one feature: no feature moves, and no batch is counted."""
    batches = batches_of()
    layer = make(batches[0], skip_nonfinite=True, **options)
    step = jax.jit(lambda stats, x: layer.train(layer.params, stats, x)[1])
    stats = layer.stats
    for x, value in zip(batches, SPOILED.values(), strict=True):
        before, stats = stats, step(stats, x.at[0, 0, 1].set(value))
        chex.assert_trees_all_equal(stats, before)
        stats = step(stats, x)
    assert_state(stats, expected_state(rule, batches, None))


@pytest.mark.parametrize("value", SPOILED.values(), ids=SPOILED)
@BOTH
def test_without_skip_nonfinite_a_feature_is_spoiled(make, value):
    batches = batches_of()
    layer = make(batches[0], momentum=0.8)
    stats = train_on(layer, batches.at[1, 0, 0, 1].set(value))
    np.testing.assert_array_equal(np.isfinite(stats["var"]), [True, False, True])
    healthy = expected_state(average_from, batches, None)
    np.testing.assert_allclose(stats["mean"][::2], healthy["mean"][::2], rtol=1e-5)


# How many elements of each of three features are valid, and which features move with ddof 0 and 1.
VALID = {
    "none at all": ((0, 0, 0), (False, False, False), (False, False, False)),
    "none of one feature": ((12, 0, 12), (True, False, True), (True, False, True)),
    "one of one feature": ((12, 1, 12), (True, True, True), (True, False, True)),
}


@pytest.mark.parametrize("ddof", [0, 1], ids=["biased", "unbiased"])
@pytest.mark.parametrize("valid", VALID.values(), ids=VALID)
@OPTIONS
@BOTH
def test_features_without_evidence_do_not_move(make, options, valid, ddof):
    counts, *moved = valid
    mask = jnp.asarray(np.arange(12).reshape(6, 2, 1) < np.asarray(counts))
    x = jnp.where(mask, draw(SHAPE), jnp.nan)
    layer = make(draw(SHAPE), running_var=["biased", "unbiased"][ddof], **options)
    y, stats = layer.train(layer.params, layer.stats, x, mask=mask)
    assert np.isfinite(y).all()
    expected = oracle(np.nan_to_num(x), where=mask)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for name, leaf in stats.items():
        found = np.asarray(leaf) != np.asarray(layer.stats[name])
        np.testing.assert_array_equal(found, moved[ddof], err_msg=name)


SINGLE = {
    "one example": ((1, 3), {}),
    "one example and position": ((1, 1, 1, 3), {}),
    "all axes are features": ((4, 3), {"axis": (0, 1)}),
}


@pytest.mark.parametrize(("shape", "options"), SINGLE.values(), ids=SINGLE)
@BOTH
def test_one_value_per_feature_warns(make, shape, options):
    x = draw(shape)
    layer = make(x, bias_init=jax.nn.initializers.normal(1.0), **options)
    with pytest.warns(UserWarning, match=r"BatchNorm.*one value per feature.*batches"):
        y, _ = layer.train(layer.params, layer.stats, x)
    np.testing.assert_allclose(y, np.broadcast_to(layer.params["bias"], shape), atol=1e-6)


@BOTH
def test_no_warning_where_one_value_is_not_all(make):
    """Warnings are errors in this suite."""
    x = draw((2, 1, 3))
    layer = make(x[0], axis_name="batch")
    jax.vmap(lambda x: layer.train(layer.params, layer.stats, x), axis_name="batch")(x)
    layer.infer(layer.params, layer.stats, x[0])
    layer = make(x[0])
    layer.train(layer.params, layer.stats, x[0], mask=jnp.ones((1, 1), bool))


@BOTH
def test_statistics_stored_in_bfloat16(make):
    """They serve inference as they are; training that moves them says what it loses."""
    x = draw(SHAPE)
    layer = make(x, momentum=0.0)
    _, stats = layer.train(layer.params, layer.stats, x)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stats)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    found, expected = (layer.infer(layer.params, each, x) for each in (narrow, widened))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    with pytest.warns(UserWarning, match=r"momentum=0\.0, an average stops within 0% of"):
        layer.train(layer.params, narrow, x)
    with pytest.warns(UserWarning, match=r"momentum=0\.99, an average stops within 39% of"):
        make(x).train(layer.params, narrow, x)
    y, _ = layer.train(layer.params, narrow, x, update_stats=False)
    np.testing.assert_allclose(y, oracle(x)[0], rtol=1e-5, atol=1e-5)


def test_finite_values_stay_finite_in_float16():
    found = rounded(jnp.array([1e5, -1e5, jnp.inf, 2.5]), jnp.float16)
    assert found.tolist() == [65504, -65504, jnp.inf, 2.5]


def test_linen_starts_statistics_that_are_missing():
    """A tree of parameters alone is enough to begin training, as in Flax."""
    x, layer = draw(SHAPE), jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    found, expected = (
        layer.apply(each, x, mutable=["batch_stats"])
        for each in ({"params": variables["params"]}, variables)
    )
    chex.assert_trees_all_equal(found, expected)
