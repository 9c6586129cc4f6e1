"""Layers of both frameworks as pure functions, models with them, and what Flax's users do there.

A layer is given as pure functions, so that one law can be tried on both frameworks. A use is a
function of a BatchNorm class, Flax's or ours, whose results can be compared.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx


class Layer(NamedTuple):
    """A layer as pure functions of two dictionaries of arrays.

    Attributes:
        params: the first parameters, `scale` and `bias`.
        stats: the first running statistics, `mean`, `var` and, with some options, `updates`.
        train: (params, stats, x, **call) -> y, new stats.
        infer: (params, stats, x, **call) -> y.
    """

    params: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    train: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    infer: Callable[..., jax.Array]


def takes_mode(cls: type) -> bool:
    """Whether a call of this layer says if it is training or inference."""
    return "use_running_average" in inspect.signature(cls.__call__).parameters


def linen_layer(x, cls: type[nn.Module] = jaxnorm.linen.BatchNorm, seed: int = 0, **options):
    module = cls(**options)
    training, inference = (
        {"use_running_average": frozen} if takes_mode(cls) else {} for frozen in (False, True)
    )
    # Under jit the result of the first call is not asked for, and so is not compiled.
    init = jax.jit(lambda x: module.init(jax.random.key(seed), x, **training))
    variables = init(x)

    def train(params, stats, x, **call):
        y, changed = module.apply(
            {"params": params, "batch_stats": stats},
            x,
            mutable=["batch_stats"],
            **training,
            **call,
        )
        return y, changed.get("batch_stats", {})

    def infer(params, stats, x, **call):
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, **inference, **call)

    return Layer(variables.get("params", {}), variables.get("batch_stats", {}), train, infer)


def num_features(x, options):
    """The sizes of `x` along the feature axes that the options of a layer name."""
    axes = options.get("axis", options.get("feature_axes", -1))
    if isinstance(axes, int):
        return x.shape[axes]
    return tuple(x.shape[axis] for axis in sorted(axis % x.ndim for axis in axes))


def nnx_layer(x, cls: type[nnx.Module] = jaxnorm.nnx.BatchNorm, seed: int = 0, **options):
    if jnp.iscomplexobj(x):
        options.setdefault("dtype", x.dtype)
    graph, *states = nnx.split(
        cls(num_features(x, options), rngs=nnx.Rngs(seed), **options), nnx.Param, nnx.BatchStat
    )
    first_params, first_stats = (nnx.to_pure_dict(state) for state in states)
    training, inference = (
        {"use_running_average": frozen} if takes_mode(cls) else {} for frozen in (False, True)
    )

    def layer_of(*dictionaries):
        filled = (
            jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(dictionary))
            for state, dictionary in zip(states, dictionaries, strict=True)
        )
        return nnx.merge(graph, *filled)

    def train(params, stats, x, **call):
        layer = layer_of(params, stats)
        y = layer(x, **training, **call)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    def infer(params, stats, x, **call):
        return layer_of(params, stats)(x, **inference, **call)

    return Layer(first_params, first_stats, train, infer)


FRAMEWORKS = {"linen": linen_layer, "nnx": nnx_layer}
FLAX = {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}
OURS = {"linen": jaxnorm.linen.BatchNorm, "nnx": jaxnorm.nnx.BatchNorm}
OUR_OPTIONS = {
    "debias",
    "ghost_batch_size",
    "running_var",
    "skip_nonfinite",
    "unbound_axis",
    "update_every",
    "update_stats",
    "zero_centered_scale",
}


def shapes(framework: str, cls: type, x: Any, **options):
    """Shapes and dtypes: of parameters, first statistics, a training step and inference."""

    def run(x):
        layer = FRAMEWORKS[framework](x, cls, **options)
        y, new = layer.train(layer.params, layer.stats, x)
        return layer.params, layer.stats, y, new, layer.infer(layer.params, new, x)

    return jax.eval_shape(run, x)


# Inputs, options and limits


def draw(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    """Values of mean .5 and standard deviation 1.5."""
    rng = np.random.default_rng(seed)
    values = 1.5 * rng.normal(size=shape) + 0.5
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1.5j * rng.normal(size=shape)
    return jnp.asarray(values, dtype)


def draw_mask(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """True for about two of three elements."""
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.67)


def draw_weights(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """0 where `draw_mask` is False, else of mean 1, in float32 whatever else is."""
    drawn = np.random.default_rng(seed + 100).uniform(0.2, 1.8, shape)
    return jnp.where(draw_mask(shape, seed), jnp.asarray(drawn, jnp.float32), jnp.float32(0))


def covering(strength: int, choices: dict[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """A few combinations of options in which any `strength` of them meet in all their values."""
    rows = list(itertools.product(*(range(len(tuple(values))) for values in choices.values())))
    meetings = {row: set(itertools.combinations(enumerate(row), strength)) for row in rows}
    missing, chosen = set().union(*meetings.values()), []
    while missing:
        row = max(rows, key=lambda row: len(meetings[row] & missing))
        missing -= meetings[row]
        chosen.append(row)
    return [
        {name: values[i] for (name, values), i in zip(choices.items(), row, strict=True)}
        for row in chosen
    ]


def label(options: dict[str, Any]) -> str:
    """The name that pytest shows for a combination of options."""

    def short(value):
        if value is None or isinstance(value, (bool, int, float, str, tuple)):
            return str(value)
        return jnp.dtype(value).name

    return ",".join(f"{name}={short(value)}" for name, value in options.items())


def rounding(*dtypes) -> float:
    """What a few roundings in the narrowest of `dtypes` may amount to."""
    return 8 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def assert_close(found, expected, *dtypes):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    limit = rounding(jnp.float32, *dtypes)
    chex.assert_trees_all_close(found, expected, rtol=limit, atol=limit)


def assert_sums_close(found, expected, *dtypes):
    """`assert_close` for long sums, whose rounding is that of their largest terms."""
    size = jax.tree.map(lambda leaf: np.maximum(1, np.abs(leaf).max().astype(np.float32)), expected)
    scaled = (
        jax.tree.map(lambda leaf, size: (leaf / size).astype(leaf.dtype), tree, size)
        for tree in (found, expected)
    )
    assert_close(*scaled, *dtypes)


# Uses of Linen: each builds a model without options of the call, and is trained for a step.

NORMAL = jax.nn.initializers.normal(1.0)
X, DY = draw((5, 3, 4)), draw((5, 3, 4), seed=1)
IMAGES, TARGETS = draw((6, 3, 2, 2)), draw((6, 2), seed=1)


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        for layer in (nn.Conv(4, (2, 2), use_bias=False), nn.Dense(3)):
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(layer(x)))
        return nn.Dense(2)(x.mean((1, 2)))


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, _):
        norm = self.norm(use_running_average=False, momentum=0.9, scale_init=NORMAL)
        return nn.tanh(norm(x)), None


class Scanned(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(self.norm)(x, None)[0]


class Shared(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=False, momentum=0.9, scale_init=NORMAL)
        return norm(nn.tanh(norm(x)) + 1)


def _mapped(norm, axis, **options):
    mapped = nn.vmap(
        norm,
        variable_axes={"params": axis, "batch_stats": axis},
        split_rngs={"params": axis is not None},
        axis_name="batch",
    )
    return mapped(use_running_average=False, scale_init=NORMAL, **options)


LINEN_MODELS = {
    "nn.scan over layers": Scanned,
    "nn.remat": lambda norm: nn.remat(norm)(use_running_average=False, scale_init=NORMAL),
    "nn.vmap, own variables": lambda norm: _mapped(norm, 0),
    "nn.vmap, shared variables": lambda norm: _mapped(norm, None, axis_name="batch"),
    "an instance called twice": Shared,
    "frozen in the constructor": lambda norm: norm(use_running_average=True),
}


def linen_step(model: nn.Module):
    """First variables, gradient by the parameters, output and new statistics."""
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def loss(params):
        y, new = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return (y * DY).sum(), (y, new)

    return variables, jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


def train_linen(norm):
    """Losses of three steps, the variables after them, and the output in inference."""
    model = LinenNet(norm)
    variables = jax.jit(lambda key: model.init(key, IMAGES, train=False))(jax.random.key(0))

    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        y, new = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
        return ((y - TARGETS) ** 2).mean(), new["batch_stats"]

    @jax.jit
    def step(params, stats):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), stats, value

    params, stats, losses = variables["params"], variables["batch_stats"], []
    for _ in range(3):
        params, stats, value = step(params, stats)
        losses.append(value)
    assert losses[-1] < losses[0]
    variables = {"params": params, "batch_stats": stats}
    return losses, variables, jax.jit(lambda v: model.apply(v, IMAGES, train=False))(variables)


# Uses of NNX


def state_of(layer: nnx.Module) -> dict[str, Any]:
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(layer)))


class NNXNet(nnx.Module):
    def __init__(self, norm: type, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (2, 2), use_bias=False, rngs=rngs)
        self.norm = norm(4, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def train_nnx(norm):
    """As `train_linen`."""
    model = NNXNet(norm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(IMAGES) - TARGETS) ** 2).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    model.train()
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    model.eval()
    return losses, state_of(model), model(IMAGES)


def _one(cls, **options):
    return cls(4, scale_init=NORMAL, rngs=nnx.Rngs(0), **options)


def _gradient(loss, layer):
    found = nnx.jit(nnx.grad(loss))(layer)
    return nnx.to_pure_dict(found), state_of(layer)


def _stack(cls):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return cls(4, scale_init=NORMAL, rngs=rngs)

    return make(nnx.Rngs(0))


def _each_layer_of_a_stack(cls):
    layers = _stack(cls)
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    return y, state_of(layers)


def _scan_over_a_stack(cls):
    layers = _stack(cls)
    axes = dict(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return nnx.scan(lambda x, layer: layer(nnx.tanh(x)), **axes)(X, layers), state_of(layers)


def _mapped_batch(cls):
    layer = _one(cls, axis_name="batch")
    axes = (nnx.StateAxes({...: None}), 0)
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=axes, axis_name="batch")
    return mapped(layer, X), state_of(layer)


def _own_subclass(cls):
    class Subclass(cls):
        def __init__(self, features, rngs):
            super().__init__(features, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(super().__call__(x))

    layer = Subclass(4, nnx.Rngs(0))
    return layer(X), state_of(layer)


def _loss(layer):
    return (layer(X) * DY).sum()


USES = {
    "a Linen model": ("linen", train_linen),
    **{
        name: ("linen", lambda cls, build=build: linen_step(build(cls)))
        for name, build in LINEN_MODELS.items()
    },
    "an NNX model": ("nnx", train_nnx),
    "nnx.grad": ("nnx", lambda cls: _gradient(_loss, _one(cls))),
    "nnx.remat": ("nnx", lambda cls: _gradient(nnx.remat(_loss), _one(cls))),
    "nnx.vmap over layers": ("nnx", _each_layer_of_a_stack),
    "nnx.scan over layers": ("nnx", _scan_over_a_stack),
    "nnx.vmap over a batch": ("nnx", _mapped_batch),
    "nnx.Sequential": ("nnx", lambda cls: nnx.Sequential(_one(cls), nnx.relu)(X)),
    "an NNX subclass": ("nnx", _own_subclass),
    "num_features of NumPy": ("nnx", lambda cls: cls(np.int64(4), rngs=nnx.Rngs(0))(X)),
    "no random keys needed": (
        "nnx",
        lambda cls: cls(4, use_scale=False, use_bias=False, rngs=None)(X),
    ),
}
