"""Folding of whole models: what is folded does the same, and the norms are really gone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tool_models import (
    Branches,
    NNXBranches,
    NNXResNet,
    ResNet,
    image,
    stir,
    stirred,
    vector,
)

import jaxnorm
from jaxnorm.tools.folding.fold import Folded, fold

pytestmark = pytest.mark.usefixtures("quick_compile")
FRAMEWORKS = ("linen", "nnx")


def out(model, *args, **kwargs):
    """The model's output in inference, as one program."""
    return jax.tree.map(np.asarray, program(model, *args, **kwargs)[0]())


def program(model, *args, **kwargs):
    """The model in inference as a function without arguments, and its compiled text."""
    if isinstance(model, nnx.Module):
        model.eval()
        graph, state = nnx.split(model)
        fun = jax.jit(lambda state: nnx.merge(graph, state)(*args, **kwargs))
        return lambda: fun(state), lambda: fun.lower(state).compile().as_text()
    module, variables = model.unbind()
    fun = jax.jit(lambda variables: module.apply(variables, *args, **kwargs))
    return lambda: fun(variables), lambda: fun.lower(variables).compile().as_text()


def bound(module, x):
    """A Linen module with variables as after training."""
    flat = flatten_dict(jax.jit(module.init)(jax.random.key(0), x))
    return module.bind(
        unflatten_dict({path: stirred(path[1:], leaf) for path, leaf in flat.items()})
    )


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


# --- Whole models

MODELS = {"resnet": (ResNet, NNXResNet, image), "branches": (Branches, NNXBranches, vector)}


@functools.cache
def model_of(framework, kind):
    linen, of_nnx, example = MODELS[kind]
    if framework == "linen":
        return bound(linen(), example()), example
    return stir(of_nnx(rngs=nnx.Rngs(0))), example


@functools.cache
def folded_of(framework, kind):
    model, example = model_of(framework, kind)
    return fold(model, example())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_folded_models_do_the_same(framework, kind):
    (model, example), folded = model_of(framework, kind), folded_of(framework, kind)
    other = example(batch=3) + 0.5
    np.testing.assert_allclose(out(folded.model, other), out(model, other), rtol=1e-4, atol=1e-4)
    assert folded.difference.relative < 1e-5
    assert (
        dict(folded.pairs)
        == {
            "resnet": {
                "stem_norm": "stem",
                **{f"block{b}/norm{i}": f"block{b}/conv{i}" for b, i in ((1, 1), (1, 2))},
                **{f"block2/norm{i}": f"block2/conv{i}" for i in (1, 2, 3)},
            },
            "branches": {
                "layers/norm": "layers/dense",
                "checkpointed/norm": "checkpointed/dense",
            },
        }[kind]
    )
    assert (
        dict(folded.left)
        == {
            "resnet": {},
            "branches": {
                "shared": "it is called 2 times",
                "after_branch": "what 'both' makes is also used by 'add'",
            },
        }[kind]
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_norms_are_skipped(framework):
    """Compiled, the program takes no root any more, and the model has no variables of norms."""
    model, _ = model_of(framework, "resnet")
    folded = folded_of(framework, "resnet").model
    before, after = (program(m, image())[1]() for m in (model, folded))
    for operation in (" rsqrt(", " subtract("):
        assert before.count(operation) >= 6
        assert operation not in after
    for operation in (" convolution(", " dot("):
        assert before.count(operation) == after.count(operation) > 0
    variables = nnx.state(folded) if framework == "nnx" else folded.variables
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables)]
    assert len(paths) > 10
    assert not [path for path in paths if "norm" in path or "mean" in path]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_shared_or_changed(framework):
    x = vector()
    norm = nn.BatchNorm(use_running_average=True)
    if framework == "linen":
        model = bound(LinenPair(nn.Dense(3), norm), x)
    else:
        rngs = nnx.Rngs(0)
        model = stir(NNXPair(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)))
    before = [np.array(leaf) for leaf in arrays_of(model)]
    returned = arrays_of(fold(model, x).model)
    assert len(returned) == 2
    for leaf in returned:
        leaf.delete()
    for leaf, value in zip(arrays_of(model), before, strict=True):
        np.testing.assert_array_equal(leaf, value)
    if framework == "nnx":
        assert not model.norm.use_running_average  # only the folded model is in inference


def test_a_folded_model_can_be_folded_again_and_trained_on():
    class TwoNorms(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="dense", use_bias=False)(x)
            for name in ("first", "second"):
                x = nn.BatchNorm(use_running_average=True, name=name)(x)
            return x

    x = vector()
    model = bound(TwoNorms(), x)
    once = fold(model, x)
    assert dict(once.pairs) == {"first": "dense"}
    assert once.left["second"].startswith("its input comes from 'first', not straight from")
    twice = fold(once.model, x)
    assert dict(twice.pairs) == {"second": "dense"}
    assert not twice.left
    np.testing.assert_allclose(out(twice.model, x), out(model, x), rtol=1e-5, atol=1e-5)
    module, variables = twice.model.unbind()
    slope = jax.grad(lambda params: module.apply({"params": params}, x).sum())
    assert slope(variables["params"])["dense"]["bias"].tolist() == [6.0, 6.0, 6.0]


def test_the_report():
    report = str(folded_of("linen", "branches"))
    assert report.startswith("folded 2 of 4 norms; the outputs differ by ")
    assert "\nlayers/norm        layers/dense\n" in report
    assert report.endswith("\nafter_branch  what 'both' makes is also used by 'add'")


def test_only_some():
    model, example = model_of("nnx", "resnet")
    folded = fold(model, example(), only="block1/*")
    assert set(folded.pairs) == {"block1/norm1", "block1/norm2"}
    assert folded.left["stem_norm"] == "it was not asked for"
    assert isinstance(folded, Folded)
    assert "NNXResNet" not in repr(folded)


# --- All layers, against the norm in float64

NO_BIAS = dict(use_bias=False)
MASK = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 2, 1, 6)), jnp.float32)
LAYERS = {
    "dense": ((4, 3), -1, lambda: nn.Dense(5), lambda r: nnx.Linear(3, 5, rngs=r)),
    "dense, no batch": ((3,), -1, lambda: nn.Dense(5), lambda r: nnx.Linear(3, 5, rngs=r)),
    "convolution 1d, causal": (
        (2, 6, 3),
        -1,
        lambda: nn.Conv(4, (3,), padding="CAUSAL", **NO_BIAS),
        lambda r: nnx.Conv(3, 4, (3,), padding="CAUSAL", **NO_BIAS, rngs=r),
    ),
    "convolution 2d, strides, circular": (
        (2, 6, 6, 3),
        -1,
        lambda: nn.Conv(4, (3, 2), strides=2, padding="CIRCULAR", **NO_BIAS),
        lambda r: nnx.Conv(3, 4, (3, 2), strides=2, padding="CIRCULAR", **NO_BIAS, rngs=r),
    ),
    "convolution 2d, dilated, groups, two batch axes": (
        (2, 1, 6, 6, 4),
        -1,
        lambda: nn.Conv(6, (2, 2), kernel_dilation=2, feature_group_count=2),
        lambda r: nnx.Conv(4, 6, (2, 2), kernel_dilation=2, feature_group_count=2, rngs=r),
    ),
    "convolution 2d, depthwise, masked": (
        (2, 5, 5, 3),
        -1,
        lambda: nn.Conv(6, (2, 2), feature_group_count=3, mask=MASK, **NO_BIAS),
        lambda r: nnx.Conv(3, 6, (2, 2), feature_group_count=3, mask=MASK, **NO_BIAS, rngs=r),
    ),
    "convolution 3d": (
        (1, 3, 3, 3, 2),
        -1,
        lambda: nn.Conv(4, (2, 2, 2), padding=1),
        lambda r: nnx.Conv(2, 4, (2, 2, 2), padding=1, rngs=r),
    ),
    "transposed": (
        (2, 4, 4, 3),
        -1,
        lambda: nn.ConvTranspose(5, (3, 3), strides=(2, 2), **NO_BIAS),
        lambda r: nnx.ConvTranspose(3, 5, (3, 3), strides=(2, 2), **NO_BIAS, rngs=r),
    ),
    "transposed, transposed kernel": (
        (2, 4, 4, 3),
        -1,
        lambda: nn.ConvTranspose(5, (3, 3), (2, 2), "CIRCULAR", transpose_kernel=True),
        lambda r: nnx.ConvTranspose(
            3, 5, (3, 3), (2, 2), padding="CIRCULAR", transpose_kernel=True, rngs=r
        ),
    ),
    "local": ((2, 4, 5, 3), -1, lambda: nn.ConvLocal(3, (2, 2), padding="VALID", **NO_BIAS), None),
    "general, both features": (
        (2, 3, 4),
        (-2, -1),
        lambda: nn.DenseGeneral((5, 6), axis=(1, 2), **NO_BIAS),
        lambda r: nnx.LinearGeneral((3, 4), (5, 6), axis=(1, 2), **NO_BIAS, rngs=r),
    ),
    "general, one of two features": (
        (2, 3, 4),
        1,
        lambda: nn.DenseGeneral((5, 6), axis=(1, 2)),
        lambda r: nnx.LinearGeneral((3, 4), (5, 6), axis=(1, 2), rngs=r),
    ),
    "general, batch axis": (
        (2, 7, 3),
        (0, -1),
        lambda: nn.DenseGeneral(5, batch_dims=(0,), **NO_BIAS),
        lambda r: nnx.LinearGeneral(3, 5, batch_axis={0: 2}, **NO_BIAS, rngs=r),
    ),
    "einsum": (
        (7, 2, 3),
        (1, -1),
        lambda: nn.Einsum((3, 4, 5), "nbc,cde->nebd", use_bias=False),
        lambda r: nnx.Einsum("nbc,cde->nebd", (3, 4, 5), rngs=r),
    ),
    "einsum, ellipsis": (
        (7, 2, 3),
        -1,
        lambda: nn.Einsum((3, 4, 5), "...c,cde->...ed"),
        lambda r: nnx.Einsum("...c,cde->...ed", (3, 4, 5), (5, 4), rngs=r),
    ),
}


class LinenMany(nn.Module):
    """Each pair on its own input."""

    pairs: dict

    def __call__(self, xs):
        return {kind: self.pairs[kind](x) for kind, x in xs.items()}


class NNXMany(nnx.Module):
    """The twin of `LinenMany`."""

    def __init__(self, pairs):
        self.pairs = nnx.Dict(pairs)

    def __call__(self, xs):
        return {kind: self.pairs[kind](x) for kind, x in xs.items()}


def many(framework, generator):
    """Inputs, the model, what its layers alone make, and the variables of its norms."""
    kinds = {k: row for k, row in LAYERS.items() if framework == "linen" or row[3]}
    xs = {k: jnp.asarray(generator.normal(size=row[0]), jnp.float32) for k, row in kinds.items()}
    if framework == "linen":
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        pairs = {k: LinenPair(row[2](), norm(axis=row[1])) for k, row in kinds.items()}
        model = bound(LinenMany(pairs), xs)
        module, variables = model.unbind()
        made = jax.jit(
            lambda: module.apply(
                variables, method=lambda m: {k: m.pairs[k].layer(x) for k, x in xs.items()}
            )
        )()
        norms = {
            k: {n: v for c in model.pairs[k].norm.variables.values() for n, v in c.items()}
            for k in kinds
        }
        return xs, model, made, norms
    rngs, layers, norms = nnx.Rngs(0), {}, {}
    for k, (_, axis, _, make) in kinds.items():
        layers[k] = make(rngs)
        shape = nnx.eval_shape(lambda layer, x: layer(x), layers[k], xs[k]).shape
        # Flax's norm has features along one axis, ours along several.
        features = [shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis))]
        norms[k] = jaxnorm.nnx.BatchNorm(features, axis=axis, rngs=rngs)
    model = stir(NNXMany({k: NNXPair(layers[k], norms[k]) for k in kinds}))
    variables = {
        k: {name: getattr(norm, name)[...] for name in ("mean", "var", "scale", "bias")}
        for k, norm in norms.items()
    }
    return xs, model, out(NNXMany(layers), xs), variables


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_layer(framework):
    """All in one model, since compiling takes most of the time. The oracle is float64 NumPy."""
    xs, model, made, norms = many(framework, np.random.default_rng(1))
    folded = fold(model, xs)
    names = {k: f"pairs_{k}" if framework == "linen" else f"pairs/{k}" for k in xs}
    assert dict(folded.pairs) == {f"{name}/norm": f"{name}/layer" for name in names.values()}
    found = out(folded.model, xs)
    for k, y in made.items():
        axes = [a % y.ndim for a in np.atleast_1d(LAYERS[k][1])]
        others = tuple(a for a in range(y.ndim) if a not in axes)
        mean, var, scale, offset = (
            np.expand_dims(np.asarray(norms[k][name], np.float64), others)
            for name in ("mean", "var", "scale", "bias")
        )
        expected = (np.asarray(y, np.float64) - mean) / np.sqrt(var + 1e-5) * scale + offset
        np.testing.assert_allclose(found[k], expected, rtol=1e-4, atol=1e-4, err_msg=k)


# --- Methods, options and dtypes of norms

NORMS = {
    "zero-centred scale": jaxnorm.linen.BatchNorm(zero_centered_scale=True, epsilon=0.1),
    "no scale": jaxnorm.linen.BatchNorm(use_scale=False),
    "no bias, flax": nn.BatchNorm(use_bias=False, epsilon=0.3),
    "renorm": jaxnorm.linen.BatchRenorm(),
    "domain": jaxnorm.linen.AdaBN(domains=("a", "b"), domain="b"),
    "tracked": jaxnorm.linen.InstanceNorm(track_running_stats=True),
    "narrow": jaxnorm.linen.BatchNorm(dtype=jnp.bfloat16),
    "wider": jaxnorm.linen.BatchNorm(dtype=jnp.float32),
}


def test_every_method_and_dtype():
    pairs = {
        name: LinenPair(
            nn.Dense(3, dtype=jnp.bfloat16 if name == "wider" else None),
            norm.clone(use_running_average=True),
        )
        for name, norm in NORMS.items()
    }
    xs = dict.fromkeys(NORMS, vector())
    model = bound(LinenMany(pairs), xs)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        folded = fold(model, xs)
    assert not folded.left
    before, after = out(model, xs), out(folded.model, xs)
    for name in NORMS:
        assert after[name].dtype == before[name].dtype, name
        tolerance = 0.1 if name in ("narrow", "wider") else 1e-5
        np.testing.assert_allclose(
            after[name].astype(float), before[name].astype(float), tolerance, tolerance
        )


class Step(nn.Module):
    """A convolution without bias and its norm."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(3, (2,), use_bias=False, name="conv")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class NNXStep(nnx.Module):
    """The twin of `Step`."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (2,), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Stacked(nn.Module):
    """Steps in a scan."""

    lift: str

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        split = {"params": True}
        if self.lift == "scan":
            lifted = nn.scan(Step, variable_axes=axes, split_rngs=split, length=2)
        else:
            lifted = nn.vmap(
                Step, variable_axes=axes, split_rngs=split, axis_size=2, in_axes=(None, None)
            )
        return lifted(name="steps")(x, None)[0]


class NNXStacked(nnx.Module):
    """The twin of `Stacked`."""

    def __init__(self, lift):
        self.lift = lift
        split = nnx.split_rngs(splits=2)
        self.steps = split(nnx.vmap(NNXStep))(nnx.Rngs(0))

    def __call__(self, x):
        if self.lift == "scan":
            in_axes = (0, nnx.Carry)
            return nnx.scan(lambda step, x: step(x), in_axes=in_axes, out_axes=nnx.Carry)(
                self.steps, x
            )
        return nnx.vmap(lambda step, x: step(x), in_axes=(0, None))(self.steps, x)


@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stacks_of_layers_get_a_stack_of_biases(framework, lift):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    model = bound(Stacked(lift), x) if framework == "linen" else stir(NNXStacked(lift))
    folded = fold(model, x)
    assert dict(folded.pairs) == {"steps/norm": "steps/conv"}
    assert sorted(leaf.shape for leaf in arrays_of(folded.model)) == [(2, 2, 3, 3), (2, 3)]
    np.testing.assert_allclose(out(folded.model, x), out(model, x), rtol=1e-5, atol=1e-5)


def test_a_mean_of_ten_thousand_deviations():
    """Before and after, the output has the digits that the layer's own sum left."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 9)), jnp.float32)
    model = bound(LinenPair(nn.Dense(3), nn.BatchNorm(use_running_average=True)), x)
    module, variables = model.unbind()
    kernel = np.asarray(variables["params"]["layer"]["kernel"], np.float64)
    made = np.asarray(x, np.float64) @ kernel
    bias = np.float32(1e4 * made.std(0))
    variables["params"]["layer"]["bias"] = jnp.asarray(bias)
    stats = {"mean": jnp.asarray(bias), "var": jnp.asarray(made.var(0), jnp.float32)}
    model = module.bind({**variables, "batch_stats": {"norm": stats}})
    affine = jax.tree.map(np.asarray, variables["params"]["norm"])
    exact = made / np.sqrt(made.var(0) + 1e-5) * affine["scale"] + affine["bias"]
    np.testing.assert_allclose(out(fold(model, x, tolerance=1e-3).model, x), exact, atol=2e-3)
