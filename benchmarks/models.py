"""Whole models whose norms can be exchanged: a ResNet, a transformer, and fifty norms in a row."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

Norm = Callable[..., nn.Module]
CLASSES = 10


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, figure 5)."""

    features: int
    strides: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """Maps images [N, H, W, C] to images with `features`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        y = conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(conv(self.features, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 for small images: four stages of two blocks."""

    norm: Norm
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """Maps images [N, H, W, 3] to logits."""
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(self.norm()(x))
        for stage in range(4):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, strides, self.norm, self.dtype)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, with a norm before each."""

    norm: Norm
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, _=None):
        """Maps tokens [N, T, D] to such tokens; in the form of a step of a scan."""
        dense = partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        width = x.shape[-1]
        qkv = dense((3, self.heads, width // self.heads))(self.norm()(x))
        # Its weights are computed anew for the backward pass, as fused attention does.
        attention = jax.checkpoint(partial(jax.nn.dot_product_attention, is_causal=True))
        mixed = attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + dense(width, axis=(-2, -1))(mixed)
        y = nn.relu(dense(4 * width)(self.norm()(x)))
        return x + dense(width)(y), None


class Transformer(nn.Module):
    """Blocks one after the other, unrolled or as one `nn.scan`."""

    norm: Norm
    blocks: int
    heads: int
    scan: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """Maps tokens [N, T, D] to logits, from their mean."""
        options = {"norm": self.norm, "heads": self.heads, "dtype": self.dtype}
        if self.scan:
            scanned = nn.scan(
                TransformerBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.blocks,
            )
            x, _ = scanned(**options)(x, None)
        else:
            for _ in range(self.blocks):
                x, _ = TransformerBlock(**options)(x)
        return nn.Dense(CLASSES)(self.norm()(x).mean(1))


class FiftyNorms(nn.Module):
    """Dense layers with a norm and a relu behind each."""

    norm: Norm
    width: int = 64
    layers: int = 50

    @nn.compact
    def __call__(self, x):
        """Maps [N, D] to logits."""
        for _ in range(self.layers):
            x = nn.relu(self.norm()(nn.Dense(self.width)(x)))
        return nn.Dense(CLASSES)(x)


class NNXFiftyNorms(nnx.Module):
    """The same in NNX."""

    def __init__(self, norm: Callable[..., nnx.Module], width: int = 64, layers: int = 50):
        rngs = nnx.Rngs(0)
        self.dense = nnx.List(nnx.Linear(width, width, rngs=rngs) for _ in range(layers))
        self.norms = nnx.List(norm(width, rngs=rngs) for _ in range(layers))
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        """Maps [N, D] to logits."""
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.relu(norm(dense(x)))
        return self.last(x)


class Model(NamedTuple):
    """A model to train, apart from whose norms it has.

    Attributes:
        norm: the class of norms, by its name in both libraries.
        make: makes the module from a norm and a dtype.
        shape: of the input.
    """

    norm: str
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]


def transformer(norm: str, scan: bool) -> Model:
    """Four blocks of width 256."""
    return Model(norm, partial(Transformer, blocks=4, heads=4, scan=scan), (8, 256, 256))


MODELS = {
    "ResNet-18, BatchNorm": Model("BatchNorm", partial(ResNet, width=32), (16, 32, 32, 3)),
    "transformer, RMSNorm": transformer("RMSNorm", scan=False),
    "transformer, RMSNorm, nn.scan": transformer("RMSNorm", scan=True),
}
QUICK_MODELS = {
    "transformer, RMSNorm, nn.scan": Model(
        "RMSNorm", partial(Transformer, blocks=2, heads=2, scan=True), (2, 16, 64)
    ),
}


def module_of(model: Model, library: Any, dtype: str) -> nn.Module:
    """The model with the norms of `flax.linen` or `jaxnorm.linen`."""
    mode = {"use_running_average": False} if model.norm == "BatchNorm" else {}
    norm = partial(getattr(library, model.norm), dtype=jnp.dtype(dtype), **mode)
    return model.make(norm=norm, dtype=jnp.dtype(dtype))


def training_step(module: nn.Module, x: jax.Array):
    """A step of gradient descent, and the variables that it begins with."""
    key = jax.random.key(0, impl="unsafe_rbg")  # which compiles sooner
    variables = dict(jax.jit(module.init)(key, x))
    params, state = variables.pop("params"), variables

    def step(params, state, x, labels):
        def loss(params):
            logits, updated = module.apply({"params": params, **state}, x, mutable=list(state))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), updated

    return step, params, state


def nnx_training_step(module: nnx.Module):
    """The same for NNX."""
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def step(params, state, x, labels):
        def loss(params):
            module = nnx.merge(graph, params, state, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(module(x), labels)
            return losses.mean(), nnx.state(module, nnx.Not(nnx.Param))

        gradient, updated = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), updated

    return step, params, state


def batch_of(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    """Inputs and labels at random."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], shape, jnp.dtype(dtype))
    return x, jax.random.randint(keys[1], shape[:1], 0, CLASSES)
