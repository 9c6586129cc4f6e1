"""Layers of Flax, and of this library, whose names and options are Flax's: Linen and NNX."""

import importlib
from typing import Any

import jax
from flax import nnx

from benchmarks.cases import EPSILON, FURTHER, GROUPS, METHODS, MOMENTUM, RUNNING
from benchmarks.functional import Functional, functional

OPTIONS = {
    **{method: {"epsilon": EPSILON} for method in METHODS},
    "BatchNorm": {"epsilon": EPSILON, "momentum": MOMENTUM},
    "GroupNorm": {"epsilon": EPSILON, "num_groups": GROUPS},
    **FURTHER,
}


def class_of(library: str, method: str) -> Any:
    """A class of `flax.linen`, `flax.nnx`, `jaxnorm.linen` or `jaxnorm.nnx`."""
    return getattr(importlib.import_module(library), method)


def linen_module(library: str, method: str, dtype: Any, training: bool) -> Any:
    """A Linen module that trains or is evaluated."""
    mode = {"use_running_average": not training} if method in RUNNING else {}
    return class_of(library, method)(**OPTIONS[method], **mode, dtype=dtype)


def nnx_module(library: str, method: str, x: jax.Array) -> nnx.Module:
    """An NNX module for an input."""
    rngs = nnx.Rngs(0)
    return class_of(library, method)(x.shape[-1], **OPTIONS[method], dtype=x.dtype, rngs=rngs)


def linen_layer(library: str, method: str, x: jax.Array) -> Functional:
    """Linen modules as functions."""
    training, evaluating = (linen_module(library, method, x.dtype, mode) for mode in (True, False))

    def train(params, state, x):
        return training.apply({"params": params, **state}, x, mutable=list(state))

    def evaluate(params, state, x):
        return evaluating.apply({"params": params, **state}, x)

    state = dict(jax.jit(training.init)(jax.random.key(0), x))
    return functional(state.pop("params"), state, train, evaluate)


def nnx_layer(library: str, method: str, x: jax.Array) -> Functional:
    """An NNX module as functions."""
    layer = nnx_module(library, method, x)
    layer.eval()
    evaluating = nnx.graphdef(layer)
    layer.train()
    training, params, state = nnx.split(layer, nnx.Param, ...)

    def train(params, state, x):
        layer = nnx.merge(training, params, state)
        y = layer(x)
        return y, nnx.state(layer, nnx.Not(nnx.Param))

    def evaluate(params, state, x):
        return nnx.merge(evaluating, params, state)(x)

    return functional(params, state, train, evaluate)
