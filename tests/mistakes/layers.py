"""Layers of both frameworks, and small models, with which mistakes are made."""

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm


def zeros(*shape):
    return np.zeros(shape, np.float32)


def ones(*shape):
    return np.ones(shape, np.float32)


def linen_layer(name, x, train=False, call=None, **options):
    """The variables of a Linen layer, initialized for training where it has that choice."""
    if train:
        options["use_running_average"] = False
    layer = getattr(jaxnorm.linen, name)(**options)
    return layer.init(jax.random.key(0), x, **call or {})


def nnx_layer(name, *sizes, **options):
    return getattr(jaxnorm.nnx, name)(*sizes, rngs=nnx.Rngs(0), **options)


def bound(module, x):
    """A Linen model with its variables."""
    return module.bind(module.init(jax.random.key(0), x))


def shaped(module, x):
    """A Linen model with shapes in the place of its variables."""
    return module.bind(jax.eval_shape(module.init, jax.random.key(0), x))


class Net(nn.Module):
    """A layer inside a model, so that it has a path."""

    norm: nn.Module

    def __call__(self, x, **call):
        return self.norm(x, **call)
