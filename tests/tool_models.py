"""Models on which the tools are tried: a small ResNet in both frameworks, and one of branches."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

FEATURES = (4, 6)

jit_to_run_once = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class Block(nn.Module):
    """Two convolutions with norms, and a shortcut, projected where shapes change."""

    features: int
    strides: int
    norm: Any

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(self.norm, use_running_average=not train)
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="conv3")(x)
            x = norm(name="norm3")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A small residual network for images [batch, 8, 8, 3]."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(FEATURES[0], (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(self.norm(use_running_average=not train, name="stem_norm")(x))
        x = Block(FEATURES[0], 1, self.norm, name="block1")(x, train)
        x = Block(FEATURES[1], 2, self.norm, name="block2")(x, train)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3, name="head")(x)


class NNXBlock(nnx.Module):
    """The twin of `Block`."""

    def __init__(self, inputs, features, strides, norm, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, features, (3, 3), strides)
        self.norm1 = norm(features, rngs=rngs)
        self.conv2 = conv(features, features, (3, 3))
        self.norm2 = norm(features, rngs=rngs)
        self.projects = inputs != features or strides != 1
        if self.projects:
            self.conv3 = conv(inputs, features, (1, 1), strides)
            self.norm3 = norm(features, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.norm3(self.conv3(x))
        return nnx.relu(x + y)


class NNXResNet(nnx.Module):
    """The twin of `ResNet`, with the same names."""

    def __init__(self, norm=nnx.BatchNorm, *, rngs):
        self.stem = nnx.Conv(3, FEATURES[0], (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = norm(FEATURES[0], rngs=rngs)
        self.block1 = NNXBlock(FEATURES[0], FEATURES[0], 1, norm, rngs)
        self.block2 = NNXBlock(FEATURES[0], FEATURES[1], 2, norm, rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(FEATURES[1], 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = self.block2(self.block1(x))
        return self.head(self.dropout(x.mean((1, 2))))


class Layer(nn.Module):
    """One step of `Branches`, run by `nn.scan` for several layers."""

    train: bool
    norm: Any

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(5, name="dense")(x)
        return x + nn.tanh(self.norm(use_running_average=not self.train, name="norm")(y)), None


class Branches(nn.Module):
    """A user's model for vectors [batch, 4]: a norm used twice, branches, a scan, a checkpoint."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        shared = self.norm(use_running_average=not train, name="shared")
        first = shared(nn.Dense(5, name="first")(x))
        second = shared(nn.Dense(5, name="second")(x))
        both = nn.Dense(5, name="both")(first + second)
        # Used by the norm and by the sum: its batch norm cannot go into the weights.
        x = both + self.norm(use_running_average=not train, name="after_branch")(both)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(train, self.norm, name="layers")(x, None)
        x, _ = nn.remat(Layer)(train, self.norm, name="checkpointed")(x, None)
        return nn.Dense(2, name="head")(x)


class NNXLayer(nnx.Module):
    """The twin of `Layer`."""

    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(5, 5, rngs=rngs)
        self.norm = norm(5, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.norm(self.dense(x)))


class NNXBranches(nnx.Module):
    """The twin of `Branches`, with the same names."""

    def __init__(self, norm=nnx.BatchNorm, *, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)
        self.shared = norm(5, rngs=rngs)
        self.both = nnx.Linear(5, 5, rngs=rngs)
        self.after_branch = norm(5, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return NNXLayer(norm, rngs)

        self.layers = stacked(rngs)
        self.checkpointed = NNXLayer(norm, rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        both = self.both(self.shared(self.first(x)) + self.shared(self.second(x)))
        x = both + self.after_branch(both)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        x = run(self.layers, x)
        x = nnx.remat(lambda layer, x: layer(x))(self.checkpointed, x)
        return self.head(x)


def stirred(path, leaf):
    """Values that no initializer gives: statistics and parameters as after training.

    Of a shape alone, kernels are drawn as initializers draw them, by their numbers of inputs.
    """
    generator = np.random.default_rng(sum(map(ord, "/".join(path))))
    values, name, is_shape = generator.normal(size=leaf.shape), path[-1], not hasattr(leaf, "ravel")
    if is_shape:
        name = name.partition("_")[0]  # of a domain: "var_b"
    if name in ("var", "scale"):
        values = np.exp(values / 2)
    elif is_shape and name not in ("mean", "bias"):
        values /= np.sqrt(values.size / np.atleast_1d(values).shape[-1])
    elif name not in ("mean", "bias"):
        values = np.asarray(leaf) + 0.1 * values
    return jnp.array(values, leaf.dtype)


def shapes_of(module, x, **call):
    """A Linen module bound to shapes in the place of arrays: enough for what an import fills."""
    init = partial(module.init, **call)
    return module.bind(jax.eval_shape(init, jax.random.key(0), x))


def shapes_of_nnx(make):
    """An NNX module with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def drawn(module, x, **call):
    """A Linen module with variables as after training, whose initializers are not compiled."""
    return module.bind(_stirred_variables(flatten_dict(shapes_of(module, x, **call).variables)))


def drawn_nnx(make):
    """As `drawn`, of an NNX module."""
    model = shapes_of_nnx(make)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.RngState)):
        is_key = isinstance(variable, nnx.RngKey)
        variable.set_raw_value(jax.random.key(0) if is_key else jnp.uint32(0))
    return stir(model)


def initial_variables(module, x, **options):
    """Variables of a Linen module by their paths, as NumPy arrays."""
    init = jit_to_run_once(partial(module.init, **options))
    return flatten_dict(jax.device_get(init(jax.random.key(0), x)))


def stirred_variables(module, x, **options):
    """Variables of a Linen module, as after training."""
    return _stirred_variables(initial_variables(module, x, **options))


def _stirred_variables(flat):
    return unflatten_dict({path: stirred(path[1:], leaf) for path, leaf in flat.items()})


@cache
def _initial_variables(module, example):
    return initial_variables(module, example())


def stirred_model(module, example):
    """A Linen module with variables as after training; no two calls share an array."""
    return module.bind(_stirred_variables(_initial_variables(module, example)))


def stir(model):
    """Gives an NNX module variables as after training."""
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_raw_value(stirred(tuple(map(str, path)), variable.get_raw_value()))
    return model


@cache
def _initial_module(make, options):
    """The graph and state of a new NNX module."""
    state = jit_to_run_once(lambda: nnx.state(make(*options, rngs=nnx.Rngs(0))))()
    return nnx.graphdef(nnx.eval_shape(lambda: make(*options, rngs=nnx.Rngs(0)))), state


def stirred_module(make, *options):
    """An NNX module with variables as after training; no two calls share an array."""
    graph, state = _initial_module(make, options)
    return stir(nnx.merge(graph, jax.tree.map(jnp.copy, state)))


def values_of(model):
    """All parameters and statistics by their paths, in Linen without the collections."""
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        return {"/".join(map(str, path)): leaf.get_raw_value() for path, leaf in flat}
    return {"/".join(path[1:]): leaf for path, leaf in flatten_dict(model.variables).items()}


def image(batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 8, 8, 3)), jnp.float32)


def vector(batch=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 4)), jnp.float32)


def resnet(framework, norm=None):
    """A ResNet with its variables, as the tools take it."""
    if framework == "linen":
        module = ResNet() if norm is None else ResNet(norm)
        return stirred_model(module, image)
    return stirred_module(NNXResNet, *(() if norm is None else (norm,)))


def branches(framework, norm=None):
    """A model of branches with its variables, as the tools take it."""
    if framework == "linen":
        module = Branches() if norm is None else Branches(norm)
        return stirred_model(module, vector)
    return stirred_module(NNXBranches, *(() if norm is None else (norm,)))
