"""`jaxnorm`'s BatchNorm in place of Flax's: the same arguments, variables, results and gradients.

Options are tried in combinations in which any two of them meet. Where the two libraries differ on
purpose, a test of its own says so, and shows that there is a difference.
"""

import copy
import inspect
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from modules import (
    DY,
    FLAX,
    FRAMEWORKS,
    IMAGES,
    NORMAL,
    OUR_OPTIONS,
    OURS,
    USES,
    LinenNet,
    X,
    assert_close,
    covering,
    draw,
    draw_mask,
    label,
    linen_layer,
    nnx_layer,
    rounding,
    shapes,
    state_of,
)
from oracles import batch_norm as oracle

import jaxnorm.linen
import jaxnorm.nnx

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)

SHAPE = X.shape
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
LINEN_ONLY = {"axis": (-1, 1, (1, -1)), "dtype": (None, jnp.float32, jnp.bfloat16)}
NNX_ONLY = {"axis": (-1, 1), "dtype": (None, jnp.float32)}  # bfloat16: see the differences
CHOICES = {
    "param_dtype": (jnp.float32, jnp.bfloat16),
    "input_dtype": DTYPES,
    "use_scale": (True, False),
    "use_bias": (True, False),
    "masked": (False, True),
    "momentum": (0.99, 0.6),
    "epsilon": (1e-5, 0.1),
    "use_fast_variance": (True, False),
}
COMBINATIONS = [
    pytest.param(framework, options, id=f"{framework}:{label(options)}")
    for framework, own in (("linen", LINEN_ONLY), ("nnx", NNX_ONLY))
    for options in covering(2, own | CHOICES)
]


def both_layers(framework, x, **options):
    make = FRAMEWORKS[framework]
    options = {"scale_init": NORMAL, "bias_init": NORMAL} | options
    return make(x, FLAX[framework], **options), make(x, OURS[framework], **options)


# Options


@pytest.mark.parametrize(("framework", "options"), COMBINATIONS)
def test_same_variables_outputs_statistics_and_gradients(framework, options):
    options = dict(options)
    x = draw(SHAPE, options.pop("input_dtype"))
    mask = draw_mask(SHAPE) if options.pop("masked") else None
    flaxs, ours = both_layers(framework, x, **options)
    chex.assert_trees_all_equal((ours.params, ours.stats), (flaxs.params, flaxs.stats), strict=True)

    (outputs, stats, gradients), expected = (
        _training_and_inference(layer, x, mask) for layer in (ours, flaxs)
    )
    assert_close(outputs, expected[0], outputs[0].dtype)
    assert_close(stats, expected[1])
    # Flax adds up the gradient of x from terms that are rounded to its dtype.
    assert_close(gradients, expected[2], x.dtype, outputs[0].dtype, options["param_dtype"])


def _training_and_inference(layer, x, mask):
    """Outputs of one training step and of inference after it, new statistics, gradients."""

    @jax.jit
    def run(params, stats, x, mask, dy):
        def train(params, x):
            return layer.train(params, stats, x, mask=mask)

        def infer(params, x):
            return layer.infer(params, new, x, mask=mask)

        y, pull_y, new = jax.vjp(train, params, x, has_aux=True)
        z, pull_z = jax.vjp(infer, params, x)
        return (y, z), new, [pull(dy.astype(y.dtype)) for pull in (pull_y, pull_z)]

    return run(layer.params, layer.stats, x, mask, DY)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=jnp.dtype)
@pytest.mark.parametrize("input_dtype", [*DTYPES, jnp.uint8, jnp.bool_], ids=jnp.dtype)
@BOTH
def test_same_dtype_of_the_result(framework, input_dtype, param_dtype):
    half = (jnp.bfloat16, jnp.float16) if framework == "linen" else ()
    x = jax.ShapeDtypeStruct((2, 4), input_dtype)
    for scale, dtype in itertools.product((True, False), (None, jnp.float32, *half)):
        options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=scale, use_bias=False)
        ours, flaxs = (shapes(framework, cls[framework], x, **options) for cls in (OURS, FLAX))
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, flaxs)


# Signatures

OTHER_DEFAULTS = {"promote_dtype", "scale_metadata", "bias_metadata"}


def parameters(function):
    found = dict(inspect.signature(function).parameters)
    found.pop("self", None)
    return found


SIGNATURES = {
    "linen constructor": (nn.BatchNorm, jaxnorm.linen.BatchNorm),
    "linen call": (nn.BatchNorm.__call__, jaxnorm.linen.BatchNorm.__call__),
    "nnx constructor": (nnx.BatchNorm.__init__, jaxnorm.nnx.BatchNorm.__init__),
    "nnx call": (nnx.BatchNorm.__call__, jaxnorm.nnx.BatchNorm.__call__),
}


@pytest.mark.parametrize(("flaxs", "ours"), SIGNATURES.values(), ids=SIGNATURES)
def test_same_arguments_defaults_and_positions(flaxs, ours):
    flaxs, ours = parameters(flaxs), parameters(ours)
    assert set(ours) - set(flaxs) <= OUR_OPTIONS
    assert {name: p.kind for name, p in ours.items() if name in flaxs} == {
        name: p.kind for name, p in flaxs.items()
    }
    for name in set(flaxs) - OTHER_DEFAULTS:
        assert ours[name].default == flaxs[name].default, name

    def positional(found):
        return [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(flaxs)


def test_linen_takes_arguments_by_position_as_flax_does():
    values = (True, 1, 0.5, 0.1, "bfloat16", "float16", False, False, NORMAL, NORMAL, "batch")
    values += ([[0]], False, False)
    names = list(parameters(nn.BatchNorm))[: len(values)]
    assert names[-1] == "force_float32_reductions"
    for cls in (nn.BatchNorm, jaxnorm.linen.BatchNorm):
        layer = cls(*values)
        assert tuple(getattr(layer, name) for name in names) == values


@pytest.mark.parametrize("cls", [nnx.BatchNorm, jaxnorm.nnx.BatchNorm], ids=["flax", "ours"])
def test_nnx_refuses_a_second_positional_argument(cls):
    with pytest.raises(TypeError, match="positional argument"):
        cls(4, True, rngs=nnx.Rngs(0))


# Uses


@pytest.mark.parametrize(("framework", "use"), USES.values(), ids=USES)
def test_same_in_use(framework, use):
    ours, flaxs = use(OURS[framework]), use(FLAX[framework])
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, flaxs)
    # Several normalizations after each other multiply what is rounded.
    chex.assert_trees_all_close(ours, flaxs, rtol=1e-4, atol=1e-4)


# NNX


def nnx_pair(**options):
    """Flax's layer and ours."""
    options = {"momentum": 0.9, "scale_init": NORMAL} | options
    return [cls["nnx"](4, rngs=nnx.Rngs(0), **options) for cls in (FLAX, OURS)]


def _set(mode):
    def apply(layer, x):
        getattr(layer, mode)()
        return layer(x)

    return apply


MODES = {
    "default": lambda layer, x: layer(x),
    "train()": _set("train"),
    "eval()": _set("eval"),
    "call, training": lambda layer, x: layer(x, use_running_average=False),
    "call, inference": lambda layer, x: layer(x, use_running_average=True),
    "view, inference": lambda layer, x: nnx.view(layer, use_running_average=True)(x),
    "view, training": lambda layer, x: nnx.view(layer, use_running_average=False)(x),
    "call before eval()": lambda layer, x: _set("eval")(layer, x) + layer(x, False),
}


@pytest.mark.parametrize("run", MODES.values(), ids=MODES)
def test_same_ways_to_choose_training_or_inference(run):
    flaxs, ours = nnx_pair()
    for layer in (flaxs, ours):  # so that running statistics and the batch's differ
        layer(DY)
    assert_close(run(ours, X), run(flaxs, X))
    assert_close(state_of(ours), state_of(flaxs))


def test_same_structure_of_the_nnx_state():
    for options in ({}, {"use_scale": False}, {"use_bias": False}):
        flaxs, ours = nnx_pair(**options)
        states = nnx.state(flaxs), nnx.state(ours)
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        chex.assert_trees_all_equal(*states, strict=True)


def test_same_metadata_of_parameters():
    options = {"scale_metadata": {"owner": "scale"}, "bias_metadata": {"owner": "bias"}}
    for layer in nnx_pair(**options):
        assert (layer.scale.owner, layer.bias.owner) == ("scale", "bias")
        assert "owner" not in layer.mean.get_metadata()
    chex.assert_equal(*({**layer.scale.get_metadata()} for layer in nnx_pair(**options)))


def test_layers_built_alike_share_what_is_compiled():
    """The initializers are spent once a layer stands: they are no part of what `nnx.jit` sees."""
    for cls in (nnx.BatchNorm, jaxnorm.nnx.BatchNorm):
        inits = [jax.nn.initializers.normal() for _ in range(2)]
        first, second = (nnx.graphdef(cls(4, scale_init=init, rngs=nnx.Rngs(0))) for init in inits)
        assert first == second, cls
        assert hash(first) == hash(second), cls


def _through_jit(layer, x):
    return nnx.jit(lambda layer, x: layer(x))(layer, x), layer


def _through_merge(layer, x):
    twin = nnx.merge(*nnx.split(layer))
    return twin(x), twin


def _through_update(layer, x):
    twin = nnx_pair()[1]
    nnx.update(twin, nnx.state(layer))
    return twin(x), twin


def _with_twin(copier):
    def through(layer, x):
        twin, before = copier(layer), state_of(layer)
        y = twin(x)
        chex.assert_trees_all_equal(state_of(layer), before)
        return y, twin

    return through


WAYS = {
    "nnx.jit": _through_jit,
    "nnx.split and nnx.merge": _through_merge,
    "nnx.update": _through_update,
    "nnx.clone": _with_twin(nnx.clone),
    "copy.deepcopy": _with_twin(copy.deepcopy),
    "pickle": _with_twin(lambda layer: pickle.loads(pickle.dumps(layer))),
}


@pytest.mark.parametrize("through", WAYS.values(), ids=WAYS)
def test_a_layer_survives(through):
    (_, layer), (_, reference) = nnx_pair(), nnx_pair()
    for each in (layer, reference):
        each(DY)
    y, travelled = through(layer, X)
    assert_close(y, reference(X))
    assert_close(state_of(travelled), state_of(reference))
    assert travelled.momentum == 0.9


EDITS = {
    "use_running_average": True,
    "momentum": 0.5,
    "epsilon": 0.5,
    "scale": None,
    "use_scale": False,
    "dtype": jnp.float32,
}


@pytest.mark.parametrize(("name", "value"), EDITS.items(), ids=EDITS)
def test_same_after_an_attribute_is_set(name, value):
    x, (flaxs, ours) = draw(SHAPE, jnp.bfloat16), nnx_pair()
    for layer in (flaxs, ours):
        layer(DY)
        setattr(layer, name, value)
    assert_close(ours(x), flaxs(x))
    assert_close(state_of(ours), state_of(flaxs))


def test_same_table_of_an_nnx_layer():
    def table(cls):
        # `nnx.tabulate` puts its own methods into the class for a while.
        layer = type("BatchNorm", (cls,), {})(4, rngs=nnx.Rngs(0))
        return nnx.tabulate(layer, X)

    chex.assert_equal(table(jaxnorm.nnx.BatchNorm), table(nnx.BatchNorm))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=jnp.dtype)
def test_custom_promote_dtype_casts_as_in_flax(dtype):
    calls = []

    def promote(arrays, *, dtype):
        calls.append(([None if a is None else a.shape for a in arrays], dtype))
        return tuple(None if a is None else a.astype(dtype) for a in arrays)

    flaxs, ours = nnx_pair(dtype=dtype, promote_dtype=promote, use_bias=False)
    assert_close(ours(X), flaxs(X), dtype)
    assert calls[0] == calls[1]
    # The batch's statistics are those of the input as it was cast, and stay float32.
    assert_close(state_of(ours), state_of(flaxs))
    assert calls[0] == ([SHAPE, (4,), (4,), (4,), None], dtype)


# Linen


def test_same_partitioning_metadata():
    options = {"scale_init": nn.with_partitioning(NORMAL, ("model",))}
    layers = [cls["linen"](use_running_average=False, **options) for cls in (FLAX, OURS)]
    flaxs, ours = (layer.init(jax.random.key(0), X) for layer in layers)
    assert ours["params"]["scale"].names == ("model",)
    chex.assert_trees_all_equal(ours, flaxs)
    assert nn.get_partition_spec(ours) == nn.get_partition_spec(flaxs)
    for variables in (ours, nn.unbox(ours)):
        found, expected = (layer.apply(variables, X, mutable=["batch_stats"]) for layer in layers)
        assert_close(found, expected)


def test_same_table_of_variables():
    models = (LinenNet(cls["linen"]) for cls in (FLAX, OURS))
    chex.assert_equal(*(m.tabulate(jax.random.key(0), IMAGES, train=False) for m in models))


@BOTH
def test_shapes_without_values(framework):
    """Nothing in building a layer looks at values, nor needs the mapped axis to exist."""

    def build(x):
        layer = FRAMEWORKS[framework](x, axis_name="unbound", debias=True)
        return layer.params, layer.stats

    expected = jax.eval_shape(build, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(build(jnp.ones((2, 4))), expected)


# Differences


def far_from_zero(framework, cls):
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 4)).astype(np.float32)
    layer = FRAMEWORKS[framework](x, cls, momentum=0.0)
    y, new = layer.train(layer.params, layer.stats, jnp.asarray(x))
    return x, y, new["var"]


@BOTH
def test_variance_keeps_its_digits_far_from_zero(framework):
    """Flax takes E[x^2] - E[x]^2, which rounds to noise here."""
    x, y, var = far_from_zero(framework, OURS[framework])
    expected, _, _, expected_var = oracle(x)
    np.testing.assert_allclose(var, expected_var, rtol=1e-6)
    # Not closer: the mean itself is stored in float32.
    np.testing.assert_allclose(y, expected, atol=np.spacing(np.float32(1e4)))
    _, y, var = far_from_zero(framework, FLAX[framework])
    assert np.abs(var - expected_var).max() > 0.1
    assert np.abs(y - expected).max() > 0.1


def test_bfloat16_result_does_not_round_input_and_statistics_in_nnx():
    """NNX Flax with dtype=bfloat16 casts them before it computes; Linen Flax does not."""
    x = draw((64, 4)) + 100
    ours = nnx_layer(x, dtype=jnp.bfloat16, momentum=0.0)
    linen = linen_layer(x, nn.BatchNorm, dtype=jnp.bfloat16, momentum=0.0)
    flaxs = nnx_layer(x, nnx.BatchNorm, dtype=jnp.bfloat16, momentum=0.0)

    def run(layer):
        y, new = layer.train(layer.params, layer.stats, x)
        return (y, layer.infer(layer.params, new, x)), new

    (outputs, stats), expected, (_, rounded) = run(ours), run(linen), run(flaxs)
    chex.assert_trees_all_equal_shapes_and_dtypes((outputs, stats), expected)
    chex.assert_trees_all_close(outputs, expected[0], rtol=rounding(jnp.bfloat16), atol=0.02)
    for name, stats_of_oracle in zip(("mean", "var"), oracle(x)[2:], strict=True):
        np.testing.assert_allclose(stats[name], stats_of_oracle, rtol=1e-5)
    assert np.abs(outputs[1].astype(np.float32) - oracle(x)[0]).max() < 0.02
    assert np.abs(rounded["var"] - stats["var"]).max() > 1e-3


@BOTH
def test_takes_what_flax_takes(framework):
    """Integers, and masks of numbers and of the last axes; new JAX asks NNX for booleans."""
    flaxs, ours = both_layers(framework, X)
    some, counts = draw_mask(SHAPE), (10 * X).astype(jnp.uint8)
    masks = (some.astype(jnp.bfloat16), some[0], 3 * some.astype(jnp.int8))
    for x, mask in ((counts, None), (X > 0, masks[0]), *((X, mask) for mask in masks)):
        where = None if mask is None else mask != 0
        with jax.numpy_rank_promotion("allow"):
            expected = flaxs.train(ours.params, ours.stats, x, mask=where)
        assert_close(ours.train(ours.params, ours.stats, x, mask=mask), expected)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex64], ids=["float64", "complex64"])
@BOTH
def test_statistics_keep_their_dtype(x64, framework, dtype):
    """Linen Flax's take on the dtype of the batch's, so that the next step is traced anew."""
    x = jax.ShapeDtypeStruct((5, 4), dtype)

    def before_and_after(cls):
        _, before, _, after, _ = shapes(framework, cls, x)
        return before, after

    chex.assert_trees_all_equal_shapes_and_dtypes(*before_and_after(OURS[framework]))
    if framework == "linen":
        before, after = before_and_after(nn.BatchNorm)
        assert (before["mean"].dtype, after["mean"].dtype) == (jnp.float32, dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@BOTH
def test_devices_weigh_by_their_valid_elements(framework, masked):
    """Flax averages the statistics of devices, however many elements each has under its mask."""
    x = draw((4, 6, 3))
    mask = jnp.arange(24).reshape(4, 6, 1) % 7 < jnp.arange(1, 5).reshape(4, 1, 1) ** 2
    mask = mask if masked else jnp.ones_like(mask)
    expected, _, *stats = oracle(x.reshape(24, 3), where=mask.reshape(24, 1))

    def run(cls):
        layer = FRAMEWORKS[framework](x[0], cls, axis_name="batch", momentum=0.0)

        def step(x, mask):
            return layer.train(layer.params, layer.stats, x, mask=mask)

        y, new = jax.jit(jax.vmap(step, axis_name="batch"))(x, mask)
        return y.reshape(24, 3), new["mean"], new["var"]

    y, *new = run(OURS[framework])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, statistic in zip(new, stats, strict=True):
        np.testing.assert_allclose(found, np.tile(statistic, (4, 1)), rtol=1e-5, atol=1e-6)
    assert (np.abs(run(FLAX[framework])[0] - expected).max() > 0.01) == masked


@BOTH
def test_nan_under_the_mask_does_no_harm(framework):
    """In Flax it reaches the gradients of the valid elements."""
    mask = draw_mask((6, 3))
    x = jnp.where(mask, draw((6, 3)), jnp.nan)

    def gradient(cls):
        layer = FRAMEWORKS[framework](draw((6, 3)), cls)

        @jax.jit
        @jax.grad
        def of_valid_elements(x):
            y, _ = layer.train(layer.params, layer.stats, x, mask=mask)
            return (y**3).sum(where=mask)

        return of_valid_elements(x)

    assert np.isfinite(gradient(OURS[framework])).all()
    assert not np.isfinite(gradient(FLAX[framework])).all()


def test_narrow_reductions_are_not_to_be_had():
    """Flax stores statistics as narrow as the parameters when told to."""
    options = dict(force_float32_reductions=False, param_dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    for cls, dtype in ((nn.BatchNorm, jnp.bfloat16), (jaxnorm.linen.BatchNorm, jnp.float32)):
        _, before, _, after, _ = shapes("linen", cls, x, **options)
        assert {leaf.dtype for leaf in (*before.values(), *after.values())} == {jnp.dtype(dtype)}
