"""`jaxnorm`'s layer, RMS, group and instance norm in place of Flax's.

They normalize each example by itself, so one law holds for all four. Options are tried in
combinations in which any two of them meet. Where the two libraries differ on purpose is the matter
of `test_dropin_differences.py`.
"""

import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from modules import (
    FRAMEWORKS,
    NORMAL,
    assert_close,
    assert_sums_close,
    covering,
    draw,
    label,
    shapes,
)
from row_norms import (
    ALL,
    BOTH,
    DY,
    FLAX,
    MASK,
    NORMS,
    OURS,
    SHAPE,
    WITH_FEATURE_AXES,
    X,
    both_layers,
    first_output,
    one_layer,
    options_of,
    output,
    without_parameters,
)

import jaxnorm.linen

pytestmark = pytest.mark.usefixtures("quick_compile")

# Options

ONE_FEATURE_AXIS = ((-1, -1), ((1, 2), -1), ((0, -1), 1))  # reduction_axes, feature_axes
SEVERAL = ((2, (-1, 1)), ((1, 2, 3), (2, 3, 1)))
GROUPS = ((1, None), (2, None), (None, 4))  # num_groups, group_size
COMMON = {
    "input_dtype": (jnp.float32, jnp.bfloat16, jnp.float16),
    "param_dtype": (jnp.float32, jnp.bfloat16),
    "use_scale": (True, False),
    "masked": (False, True),
    "epsilon": (1e-6, 0.1),
    "use_fast_variance": (True, False),
}
# What is missing for NNX differs on purpose.
DTYPES = {"linen": (None, jnp.float32, jnp.bfloat16), "nnx": (None, jnp.float32)}
AXES = {"linen": ONE_FEATURE_AXIS + SEVERAL, "nnx": ONE_FEATURE_AXIS}
OWN = {
    "LayerNorm": lambda framework: {"axes": AXES[framework], "use_bias": (True, False)},
    "RMSNorm": lambda framework: {"axes": AXES[framework]},
    "GroupNorm": lambda framework: {
        "groups": GROUPS,
        "reduction_axes": (None, (1, -1), (0, 1, 2, 3), 3) if framework == "linen" else (None,),
        "use_bias": (True, False),
    },
    "InstanceNorm": lambda framework: {
        "feature_axes": (-1, 1, (1, -1), (-1,)) if framework == "linen" else (-1, 1),
        "use_bias": (True, False),
    },
}
COMBINATIONS = [
    pytest.param(framework, norm, options, id=f"{framework}.{norm}:{label(options)}")
    for framework in FRAMEWORKS
    for norm in NORMS
    for options in covering(2, OWN[norm](framework) | {"dtype": DTYPES[framework]} | COMMON)
]


@pytest.mark.parametrize(("framework", "norm", "options"), COMBINATIONS)
def test_same_variables_outputs_and_gradients(framework, norm, options):
    options = dict(options)
    x = X.astype(options.pop("input_dtype"))
    mask = MASK if options.pop("masked") else None
    for pair, names in (
        ("axes", ("reduction_axes", "feature_axes")),
        ("groups", ("num_groups", "group_size")),
    ):
        if pair in options:
            options |= zip(names, options.pop(pair), strict=True)
    flaxs, ours = both_layers(framework, norm, x, **options)
    chex.assert_trees_all_equal((ours.params, ours.stats), (flaxs.params, {}), strict=True)

    @jax.jit
    def run(params, x, mask, dy):
        def one(layer):
            y, pull, _ = jax.vjp(
                lambda p, x: layer.train(p, {}, x, mask=mask), params, x, has_aux=True
            )
            return y, pull(dy.astype(y.dtype))

        return one(ours), one(flaxs)

    (y, gradients), (expected_y, expected_gradients) = run(ours.params, x, mask, DY)
    assert_close(y, expected_y, y.dtype)
    # Flax adds up the gradient of x from terms that are rounded to its dtype.
    dtypes = x.dtype, y.dtype, options["param_dtype"]
    assert_sums_close(gradients[0], expected_gradients[0], *dtypes)
    assert_close(gradients[1], expected_gradients[1], *dtypes)


@ALL
@BOTH
def test_same_dtype_of_the_result(framework, norm):
    choices = ((None, jnp.bfloat16), (jnp.float32, jnp.bfloat16), (True, False))
    for input_dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32):
        x = jax.ShapeDtypeStruct(SHAPE, input_dtype)
        for dtype, param_dtype, use_scale in itertools.product(*choices):
            options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=use_scale)
            options = options_of(norm, **options)
            ours, flaxs = (
                shapes(framework, getattr(library[framework], norm), x, **options)
                for library in (OURS, FLAX)
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(ours, flaxs)


@ALL
@BOTH
def test_takes_what_flax_takes(framework, norm):
    """Integers, and masks of numbers and of the last axes."""
    flaxs, ours = both_layers(framework, norm)
    counts = jnp.arange(X.size, dtype=jnp.int32).reshape(SHAPE) % 13
    for x, mask in ((counts, None), (X, MASK.astype(jnp.float32)), (X, 2 * MASK[0].astype(int))):
        with jax.numpy_rank_promotion("allow"):
            counts = None if mask is None else mask != 0  # new JAX asks NNX for booleans
            expected = output(flaxs, x, mask=counts)
        assert_close(output(ours, x, mask=mask), expected)


AXES_AS_USERS_GIVE_THEM = {
    "NumPy's integers": dict(reduction_axes=np.int64(-1), feature_axes=np.int64(-1)),
    "lists": dict(reduction_axes=[1, 2], feature_axes=[-1]),
    "a tuple of NumPy's": dict(reduction_axes=(np.int64(1), np.int8(-1)), feature_axes=-1),
}


@pytest.mark.parametrize("axes", AXES_AS_USERS_GIVE_THEM.values(), ids=AXES_AS_USERS_GIVE_THEM)
@BOTH
@WITH_FEATURE_AXES
def test_same_for_axes_as_users_give_them(framework, norm, axes):
    if norm == "InstanceNorm":
        axes = {"feature_axes": axes["feature_axes"]}
    found, expected = (
        first_output(library, framework, norm, scale_init=NORMAL, **axes)
        for library in (OURS, FLAX)
    )
    assert_close(found, expected)


@BOTH
def test_same_for_groups_of_numpy_integers(framework):
    flaxs, ours = both_layers(framework, "GroupNorm", num_groups=None, group_size=np.int64(4))
    assert_close(output(ours), output(flaxs))


@ALL
@BOTH
def test_same_for_complex_input(framework, norm):
    x = draw(SHAPE, jnp.complex64)
    flaxs, ours = both_layers(framework, norm, x)
    chex.assert_trees_all_equal(ours.params, flaxs.params, strict=True)

    @jax.jit
    def run(params):
        def loss(params, x, layer):
            y, _ = layer.train(params, {}, x)
            return (y * DY).real.sum() + y.imag.sum(), y

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return grad(params, x, ours), grad(params, x, flaxs)

    assert_close(*run(ours.params))


@ALL
@BOTH
def test_same_in_float64(x64, framework, norm):
    """Computed in double precision throughout, whatever the parameters' dtype."""
    x = draw(SHAPE, jnp.float64)
    flaxs, ours = both_layers(framework, norm, x, use_fast_variance=False)
    assert ours.params["scale"].dtype == jnp.float32
    found, expected = output(ours, x), output(flaxs, x)
    assert found.dtype == expected.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@ALL
def test_same_structure_of_the_nnx_state(norm):
    metadata = {"scale_metadata": {"owner": "scale"}}
    for options in ({}, without_parameters(norm), metadata):
        options = options_of(norm, **options)
        flaxs, ours = (
            nnx.state(getattr(library["nnx"], norm)(8, rngs=nnx.Rngs(0), **options))
            for library in (FLAX, OURS)
        )
        assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
        chex.assert_trees_all_equal(ours, flaxs, strict=True)


# Signatures

OUR_OPTIONS = {
    "LayerNorm": {"zero_centered_scale", "unbound_axis"},
    "RMSNorm": {
        "zero_centered_scale",
        "unbound_axis",
        "bias_metadata",
    },  # the latter only in NNX, where it is refused
    "GroupNorm": {"zero_centered_scale", "unbound_axis", "axis"},
    "InstanceNorm": {
        "zero_centered_scale",
        "unbound_axis",
        "track_running_stats",
        "use_running_average",
        "momentum",
        "debias",
        "running_var",
        "update_stats",
        "skip_nonfinite",
        "update_every",
        "ghost_batch_size",
    },
}
OUR_CALL = {"InstanceNorm": {"use_running_average", "update_stats"}}
OTHER_DEFAULTS = {"promote_dtype", "scale_metadata", "bias_metadata"}


def parameters(function):
    found = dict(inspect.signature(function).parameters)
    found.pop("self", None)
    return found


@pytest.mark.parametrize("method", ["__init__", "__call__"])
@ALL
@BOTH
def test_same_arguments_defaults_and_positions(framework, norm, method):
    flaxs, ours = (
        parameters(getattr(getattr(library[framework], norm), method)) for library in (FLAX, OURS)
    )
    added = (OUR_OPTIONS if method == "__init__" else OUR_CALL).get(norm, set())
    if framework == "linen":
        added = added - {"bias_metadata"}
    assert set(ours) - set(flaxs) == added
    assert {ours[name].kind for name in added} <= {inspect.Parameter.KEYWORD_ONLY}
    assert {name: p.kind for name, p in ours.items() if name in flaxs} == {
        name: p.kind for name, p in flaxs.items()
    }
    for name in set(flaxs) - OTHER_DEFAULTS:
        assert ours[name].default == flaxs[name].default, name

    def positional(found):
        return [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(flaxs)


ALL_BY_POSITION = {
    "LayerNorm": (0.1, "bfloat16", "float16", False, False, NORMAL, NORMAL, 1, 2),
    "RMSNorm": (0.1, "bfloat16", "float16", False, NORMAL, 1, 2),
    "GroupNorm": (None, 4, 0.1, "bfloat16", "float16", False, False, NORMAL, NORMAL, (1, 3)),
    "InstanceNorm": (0.1, "bfloat16", "float16", False, False, NORMAL, NORMAL, 2),
}


@ALL
def test_linen_takes_arguments_by_position_as_flax_does(norm):
    values = (*ALL_BY_POSITION[norm], "batch", ((0,),), False, False)
    names = list(parameters(getattr(nn, norm)))[: len(values)]
    assert names[-1] == "force_float32_reductions"
    for library in (nn, jaxnorm.linen):
        layer = getattr(library, norm)(*values)
        assert tuple(getattr(layer, name) for name in names) == values


def test_nnx_takes_groups_and_the_mask_of_rms_norm_by_position():
    flaxs, ours = (library["nnx"] for library in (FLAX, OURS))
    for groups in ((4,), (None, 2)):
        assert_close(*(n.GroupNorm(8, *groups, rngs=nnx.Rngs(0))(X) for n in (ours, flaxs)))
    assert_close(*(n.RMSNorm(8, rngs=nnx.Rngs(0))(X, MASK) for n in (ours, flaxs)))


# Misuse


GROUP_MISUSE = {
    "groups that do not divide": {"num_groups": 3},
    "the default of 32 groups": {},
    "no groups": {"num_groups": 0},
    "a group size that does not divide": {"num_groups": None, "group_size": 3},
    "both group options": {"num_groups": 2, "group_size": 4},
    "neither group option": {"num_groups": None},
}
MISUSE = {
    **{name: ("GroupNorm", (), options, ValueError) for name, options in GROUP_MISUSE.items()},
    "batch as feature axis": ("InstanceNorm", (), {"feature_axes": 0}, ValueError),
    "batch among feature axes": ("InstanceNorm", (), {"feature_axes": (-1, -4)}, ValueError),
    "mask by position": ("LayerNorm", (MASK,), {}, TypeError),
    "an unknown option": ("RMSNorm", (), {"use_bias": False}, TypeError),
}


@pytest.mark.parametrize(("norm", "call", "options", "error"), MISUSE.values(), ids=MISUSE)
@BOTH
def test_same_errors(framework, norm, call, options, error):
    for library in (FLAX, OURS):
        with pytest.raises(error):
            first_output(library, framework, norm, *call, **options)


MISUSE_OF_NNX = {
    "a second position": (lambda n: n["nnx"].LayerNorm(8, 0.1, rngs=nnx.Rngs(0)), TypeError),
    "no random keys": (lambda n: n["nnx"].InstanceNorm(8), TypeError),
    "an axis that is not mapped": (
        lambda n: first_output(n, "nnx", "LayerNorm", axis_name="unbound"),
        NameError,
    ),
}


@pytest.mark.parametrize(("call", "error"), MISUSE_OF_NNX.values(), ids=MISUSE_OF_NNX)
def test_same_errors_of_nnx(call, error):
    for library in (FLAX, OURS):
        with pytest.raises(error):
            call(library)


# Our option


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=jnp.dtype)
@ALL
@BOTH
def test_zero_centered_scale_is_stored_minus_one(framework, norm, param_dtype):
    def make(**options):
        return one_layer(OURS, framework, norm, zero_centered_scale=True, **options)

    layer = make(scale_init=jax.nn.initializers.ones, param_dtype=param_dtype)
    assert (layer.params["scale"].shape, layer.params["scale"].dtype) == ((8,), param_dtype)
    assert not layer.params["scale"].any()
    narrow = make(param_dtype=param_dtype).params
    # Around 1 bfloat16 has steps of 1/128: these would be lost in 1 + scale.
    narrow["scale"] = (1e-3 * draw((8,), seed=2)).astype(param_dtype)
    wide = {name: value.astype(jnp.float32) for name, value in narrow.items()}
    wide["scale"] += 1

    @jax.jit
    def run(narrow, wide):
        def loss(params, layer):
            y, _ = layer.train(params, {}, X)
            return (y * DY).sum(), y

        grad = jax.grad(loss, has_aux=True)
        return grad(narrow, layer), grad(wide, one_layer(OURS, framework, norm))

    (gradients, y), (expected, expected_y) = run(narrow, wide)
    assert_close(y, expected_y)
    expected = jax.tree.map(lambda gradient: gradient.astype(param_dtype), expected)
    assert_close(gradients, expected, param_dtype)
