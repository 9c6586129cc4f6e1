"""Folding of whole models: what is folded does the same, and the norms are really gone.

Pairs of all kinds of layers and norms stand in one model, each on its own input, which is folded
and compiled once for each framework.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import (
    Branches,
    NNXBranches,
    NNXResNet,
    ResNet,
    drawn,
    drawn_nnx,
    image,
    values_of,
    vector,
)

import jaxnorm
from jaxnorm.tools.folding.fold import fold

pytestmark = pytest.mark.usefixtures("quick_compile")
FRAMEWORKS = ("linen", "nnx")


def function_of(model, method="__call__"):
    """The model in inference as a function of its state, and that state."""
    if isinstance(model, nnx.Module):
        model.eval()
        graph, state = nnx.split(model)

        def run(state, *args, **call):
            return getattr(nnx.merge(graph, state), method)(*args, **call)

        return run, state
    module, variables = model.unbind()
    return functools.partial(module.apply, method=method), variables


def outs(models, *args, **call):
    """What several models return in inference, by one program."""
    functions, states = zip(*map(function_of, models), strict=True)

    @jax.jit
    def run(states):
        return [f(state, *args, **call) for f, state in zip(functions, states, strict=True)]

    return run(states)


def arrays_of(model):
    return jax.tree.leaves(
        nnx.state(model, (nnx.Param, nnx.BatchStat))
        if isinstance(model, nnx.Module)
        else model.variables
    )


class LinenPair(nn.Module):
    layer: nn.Module
    norm: nn.Module

    def __call__(self, x, **call):
        return self.norm(self.layer(x), **call)


class NNXPair(nnx.Module):
    def __init__(self, layer, norm):
        self.layer, self.norm = layer, norm

    def __call__(self, x, **call):
        return self.norm(self.layer(x), **call)


def nnx_pair(layer, norm, **options):
    """A pair of a dense layer and a norm with variables as after training."""
    return drawn_nnx(lambda rngs: NNXPair(layer(4, 3, rngs=rngs), norm(3, **options, rngs=rngs)))


# --- Whole models

MODELS = {
    "resnet": (
        image,
        {
            "stem_norm": "stem",
            **{f"block{b}/norm{i}": f"block{b}/conv{i}" for b, i in ((1, 1), (1, 2))},
            **{f"block2/norm{i}": f"block2/conv{i}" for i in (1, 2, 3)},
        },
        {},
    ),
    "branches": (
        vector,
        {"layers/norm": "layers/dense", "checkpointed/norm": "checkpointed/dense"},
        {
            "shared": "it is called 2 times",
            "after_branch": "what 'both' makes is also used by 'add'",
        },
    ),
}
MAKE = {
    ("linen", "resnet"): lambda: drawn(ResNet(), image()),
    ("linen", "branches"): lambda: drawn(Branches(), vector()),
    ("nnx", "resnet"): lambda: drawn_nnx(NNXResNet),
    ("nnx", "branches"): lambda: drawn_nnx(NNXBranches),
}
IN_TURN = [("linen", "branches"), ("nnx", "resnet")]


@pytest.mark.parametrize(
    ("framework", "kind"),
    [pytest.param(*row, marks=() if row in IN_TURN else pytest.mark.slow) for row in MAKE],
)
def test_folded_models_do_the_same(framework, kind):
    """And their programs take no root any more, and hold no variables of norms."""
    example, pairs, left = MODELS[kind]
    model = MAKE[framework, kind]()
    folded = fold(model, example())
    assert dict(folded.pairs) == pairs
    assert dict(folded.left) == left
    assert folded.difference.relative < 1e-5
    other = example(batch=3) + 0.5
    before, after = outs([model, folded.model], other)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    programs = []
    for each in (model, folded.model):
        function, state = function_of(each)
        programs.append(str(jax.make_jaxpr(function)(state, other)))
    for operation in ("rsqrt", "sub"):
        counts = [program.count(f" {operation} ") for program in programs]
        assert counts == [len(left) + bool(left) + len(pairs), len(left) + bool(left)]
    for operation in ("conv_general_dilated", "dot_general"):
        before, after = (program.count(f"{operation}[") for program in programs)
        assert before == after
    if kind == "resnet":
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
        assert len(paths) > 10
        assert not [path for path in paths if "norm" in path or "mean" in path]


def test_the_report():
    folded = fold(MAKE["linen", "branches"](), vector(), only="layers/*")
    report = str(folded)
    assert report.startswith("folded 1 of 4 norms; the outputs differ by ")
    assert "\nlayers/norm  layers/dense\n" in report
    assert report.endswith("it was not asked for")
    assert folded.left["checkpointed/norm"] == "it was not asked for"
    assert "Branches" not in repr(folded)


class TwoNorms(nn.Module):
    """Two norms behind each other."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="dense", use_bias=False)(x)
        for name in ("first", "second"):
            x = nn.BatchNorm(use_running_average=True, name=name)(x)
        return x


def test_a_folded_model_can_be_folded_again_and_trained_on():
    x = vector()
    model = drawn(TwoNorms(), x)
    once = fold(model, x)
    assert dict(once.pairs) == {"first": "dense"}
    assert once.left["second"].startswith("its input comes from 'first', not straight from")
    twice = fold(once.model, x)
    assert dict(twice.pairs) == {"second": "dense"}
    assert not twice.left
    before, after = outs([model, twice.model], x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    module, variables = twice.model.unbind()
    slope = jax.jit(jax.grad(lambda params: module.apply({"params": params}, x).sum()))
    assert slope(variables["params"])["dense"]["bias"].tolist() == [6.0, 6.0, 6.0]


# --- All layers and norms, against the norm in float64


class Step(nn.Module):
    """A convolution without bias and its norm."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(3, (2,), use_bias=False, name="layer")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class Stacked(nn.Module):
    """Steps in a scan, or side by side."""

    lift: str

    @nn.compact
    def __call__(self, x):
        options = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        if self.lift == "scan":
            lifted = nn.scan(Step, length=2, **options)
        else:
            lifted = nn.vmap(Step, axis_size=2, in_axes=(None, None), **options)
        return lifted(name="steps")(x, None)[0]


class NNXStacked(nnx.Module):
    """The twin of `Stacked`."""

    def __init__(self, lift, rngs):
        self.lift = lift

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return NNXPair(nnx.Conv(3, 3, (2,), **NO_BIAS, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))

        self.steps = make(rngs)

    def __call__(self, x):
        if self.lift == "scan":
            axes = dict(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return nnx.scan(lambda step, x: step(x), **axes)(self.steps, x)
        return nnx.vmap(lambda step, x: step(x), in_axes=(0, None))(self.steps, x)


class Row(NamedTuple):
    """A layer and the norm after it.

    Attributes:
        shape: of the input.
        linen, nnx: make the layer; None where there is none in NNX, or it need not be shown there.
        axis: the features of the norm.
        norm: of Linen, where it is none of Flax's that the float64 oracle knows.
        rounding: what the results may differ by.
    """

    shape: tuple[int, ...]
    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    axis: int | tuple[int, ...] = -1
    norm: nn.Module | None = None
    rounding: float = 1e-4


def of_norm(norm, rounding=1e-5, **layer):
    return Row((6, 4), lambda: nn.Dense(3, **layer), None, norm=norm, rounding=rounding)


def layer(kind, shape, *args, inputs=3, **options):
    """A layer whose options are the same in both frameworks."""
    return Row(
        shape,
        lambda: getattr(nn, kind)(*args, **options),
        lambda rngs: getattr(nnx, kind)(inputs, *args, **options, rngs=rngs),
    )


NO_BIAS = dict(use_bias=False)
MASK = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 2, 1, 6)), jnp.float32)
ROWS = {
    "dense": Row((4, 3), lambda: nn.Dense(5), lambda r: nnx.Linear(3, 5, rngs=r)),
    "dense, no batch": Row((3,), lambda: nn.Dense(5), lambda r: nnx.Linear(3, 5, rngs=r)),
    "convolution 1d, causal": layer("Conv", (2, 6, 3), 4, (3,), padding="CAUSAL", **NO_BIAS),
    "convolution 2d, strides, circular": layer(
        "Conv", (2, 6, 6, 3), 4, (3, 2), strides=2, padding="CIRCULAR", **NO_BIAS
    ),
    "convolution 2d, dilated, groups, two batch axes": layer(
        "Conv", (2, 1, 6, 6, 4), 6, (2, 2), inputs=4, kernel_dilation=2, feature_group_count=2
    ),
    "convolution 2d, depthwise, masked": layer(
        "Conv", (2, 5, 5, 3), 6, (2, 2), feature_group_count=3, mask=MASK, **NO_BIAS
    ),
    "convolution 3d": layer("Conv", (1, 3, 3, 3, 2), 4, (2, 2, 2), inputs=2, padding=1),
    "transposed": layer("ConvTranspose", (2, 4, 4, 3), 5, (3, 3), strides=(2, 2), **NO_BIAS),
    "transposed, transposed kernel": layer(
        "ConvTranspose",
        (2, 4, 4, 3),
        5,
        (3, 3),
        strides=(2, 2),
        padding="CIRCULAR",
        transpose_kernel=True,
    ),
    "local": Row((2, 4, 5, 3), lambda: nn.ConvLocal(3, (2, 2), padding="VALID", **NO_BIAS), None),
    "general, both features": Row(
        (2, 3, 4),
        lambda: nn.DenseGeneral((5, 6), axis=(1, 2), **NO_BIAS),
        lambda r: nnx.LinearGeneral((3, 4), (5, 6), axis=(1, 2), **NO_BIAS, rngs=r),
        axis=(-2, -1),
    ),
    "general, one of two features": Row(
        (2, 3, 4),
        lambda: nn.DenseGeneral((5, 6), axis=(1, 2)),
        lambda r: nnx.LinearGeneral((3, 4), (5, 6), axis=(1, 2), rngs=r),
        axis=1,
    ),
    "general, batch axis": Row(
        (2, 7, 3),
        lambda: nn.DenseGeneral(5, batch_dims=(0,), **NO_BIAS),
        lambda r: nnx.LinearGeneral(3, 5, batch_axis={0: 2}, **NO_BIAS, rngs=r),
        axis=(0, -1),
    ),
    "einsum": Row(
        (7, 2, 3),
        lambda: nn.Einsum((3, 4, 5), "nbc,cde->nebd", use_bias=False),
        lambda r: nnx.Einsum("nbc,cde->nebd", (3, 4, 5), rngs=r),
        axis=(1, -1),
    ),
    "einsum, ellipsis": Row(
        (7, 2, 3),
        lambda: nn.Einsum((3, 4, 5), "...c,cde->...ed"),
        lambda r: nnx.Einsum("...c,cde->...ed", (3, 4, 5), (5, 4), rngs=r),
    ),
    "zero-centred scale": of_norm(jaxnorm.linen.BatchNorm(zero_centered_scale=True, epsilon=0.1)),
    "no scale": of_norm(jaxnorm.linen.BatchNorm(use_scale=False)),
    "no bias, flax": of_norm(nn.BatchNorm(use_bias=False, epsilon=0.3)),
    "renorm": of_norm(jaxnorm.linen.BatchRenorm()),
    "domain": of_norm(jaxnorm.linen.AdaBN(domains=("a", "b"), domain="b")),
    "tracked": of_norm(jaxnorm.linen.InstanceNorm(track_running_stats=True)),
    "narrow": of_norm(jaxnorm.linen.BatchNorm(dtype=jnp.bfloat16), 0.1),
    "wider": of_norm(jaxnorm.linen.BatchNorm(dtype=jnp.float32), 0.1, dtype=jnp.bfloat16),
}
STACKS = ("scan", "vmap")
ALIKE = [name for name in ROWS if name.startswith(("dense", "convolution", "transposed"))]
"""Layers of one code for both frameworks: the default run takes each in one of them, in turn."""


def in_default(framework, name):
    """Whether the default run folds a row in this framework."""
    return name not in ALIKE or FRAMEWORKS[ALIKE.index(name) % 2] == framework


class LinenMany(nn.Module):
    """Each pair on its own input."""

    pairs: dict

    def __call__(self, xs):
        return {name: self.pairs[name](x) for name, x in xs.items()}

    def made(self, xs):
        """What the layers make, before their norms."""
        return {name: self.pairs[name].layer(x) for name, x in xs.items()}


class NNXMany(nnx.Module):
    """The twin of `LinenMany`."""

    def __init__(self, pairs):
        self.pairs = nnx.Dict(pairs)

    def __call__(self, xs):
        return {name: self.pairs[name](x) for name, x in xs.items()}

    made = LinenMany.made


def linen_many(rows, xs):
    pairs = {lift: Stacked(lift) for lift in STACKS}
    for name, row in rows.items():
        norm = row.norm or nn.BatchNorm(axis=row.axis)
        pairs[name] = LinenPair(row.linen(), norm.clone(use_running_average=True))
    return drawn(LinenMany(pairs), xs)


def features_of(row, x):
    """The sizes of the norm's axes in what a layer of NNX makes."""
    shape = nnx.eval_shape(lambda x: row.nnx(nnx.Rngs(0))(x), x).shape
    return [shape[axis] for axis in sorted(axis % len(shape) for axis in np.atleast_1d(row.axis))]


def nnx_many(rows, xs):
    features = {name: features_of(row, xs[name]) for name, row in rows.items()}

    def make(rngs):
        pairs = {lift: NNXStacked(lift, rngs) for lift in STACKS}
        for name, row in rows.items():
            # Flax's norm has features along one axis, ours along several.
            norm = jaxnorm.nnx.BatchNorm(features[name], axis=row.axis, rngs=rngs)
            pairs[name] = NNXPair(row.nnx(rngs), norm)
        return NNXMany(pairs)

    model = drawn_nnx(make)
    for name in rows:
        if getattr(model.pairs[name].layer, "mask", None) is not None:
            model.pairs[name].layer.mask = MASK  # no variable, so that only its shape was there
    return model


class Many(NamedTuple):
    """A model of many pairs, folded, and what both return.

    Attributes:
        model, folded: before and after.
        stored: the arrays of the model, before it was folded.
        made, before, after: by row, what its layer made, and the results of both models.
    """

    model: Any
    folded: Any
    stored: list[np.ndarray]
    made: dict[str, jax.Array]
    before: dict[str, jax.Array]
    after: dict[str, jax.Array]


@functools.cache
def many(framework, is_default):
    rows = {
        name: row
        for name, row in ROWS.items()
        if (framework == "linen" or row.nnx) and in_default(framework, name) == is_default
    }
    shapes = {name: row.shape for name, row in rows.items()} | dict.fromkeys(STACKS, (2, 4, 3))
    generator = np.random.default_rng(1)
    xs = {name: jnp.asarray(generator.normal(size=s), jnp.float32) for name, s in shapes.items()}
    model = (linen_many if framework == "linen" else nnx_many)(rows, xs)
    stored = [np.array(leaf) for leaf in arrays_of(model)]
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        folded = fold(model, xs)
    in_rows = {name: xs[name] for name in rows}
    runs = [
        (*function_of(model, "made"), in_rows),
        (*function_of(model), xs),
        (*function_of(folded.model), xs),
    ]
    functions, states, inputs = zip(*runs, strict=True)

    @jax.jit
    def results(states):
        return [f(*of) for f, *of in zip(functions, states, inputs, strict=True)]

    return Many(model, folded, stored, *results(states))


def norm_of(model, name):
    """The variables of a norm in double precision."""
    norm = model.pairs[name].norm
    if isinstance(norm, nnx.Module):
        values = {role: getattr(norm, role)[...] for role in ("mean", "var", "scale", "bias")}
    else:
        values = {role: v for of in norm.variables.values() for role, v in of.items()}
    return {role: np.asarray(leaf, np.float64) for role, leaf in values.items()}


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        pytest.param(framework, name, marks=() if in_default(framework, name) else pytest.mark.slow)
        for framework in FRAMEWORKS
        for name, row in ROWS.items()
        if framework == "linen" or row.nnx
    ],
)
def test_every_layer_and_norm(framework, name):
    row, case = ROWS[name], many(framework, in_default(framework, name))
    path = f"pairs_{name}" if framework == "linen" else f"pairs/{name}"
    assert case.folded.pairs[f"{path}/norm"] == f"{path}/layer"
    found, expected = case.after[name], case.before[name]
    assert found.dtype == expected.dtype
    if row.norm is None:
        y, norm = np.asarray(case.made[name], np.float64), norm_of(case.model, name)
        axes = [axis % y.ndim for axis in np.atleast_1d(row.axis)]
        others = tuple(axis for axis in range(y.ndim) if axis not in axes)
        mean, var, scale, offset = (
            np.expand_dims(norm[role], others) for role in ("mean", "var", "scale", "bias")
        )
        expected = (y - mean) / np.sqrt(var + 1e-5) * scale + offset
    found, expected = (np.asarray(y, np.float64) for y in (found, expected))
    np.testing.assert_allclose(found, expected, row.rounding, row.rounding)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("lift", STACKS)
def test_stacks_of_layers_get_a_stack_of_biases(framework, lift):
    case = many(framework, True)
    folded = {name: leaf for name, leaf in values_of(case.folded.model).items() if lift in name}
    assert sorted(leaf.shape for leaf in folded.values()) == [(2, 2, 3, 3), (2, 3)]
    np.testing.assert_allclose(case.after[lift], case.before[lift], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_left_shared_or_changed(framework):
    case = many(framework, True)
    assert not case.folded.left
    for leaf, value in zip(arrays_of(case.model), case.stored, strict=True):
        np.testing.assert_array_equal(leaf, value)
    models = (case.model, case.folded.model)
    own, new = ({leaf.unsafe_buffer_pointer() for leaf in arrays_of(m)} for m in models)
    assert new.isdisjoint(own)
