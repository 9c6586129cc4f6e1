"""Layers of Haiku, Equinox and Keras, which are loaded only when one is made."""

import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import EPSILON, FOR_IMAGES, GROUPS, MOMENTUM
from benchmarks.functional import Functional, functional


def haiku_layer(method: str, x: jax.Array) -> Functional:
    """A module of Haiku, whose parameters and statistics have the dtype of its input."""
    hk: Any = importlib.import_module("haiku")

    def call(x, training):
        match method:
            case "BatchNorm":
                return hk.BatchNorm(True, True, MOMENTUM, EPSILON)(x, training)
            case "LayerNorm":
                return hk.LayerNorm(-1, True, True, EPSILON)(x)
            case "RMSNorm":
                return hk.RMSNorm(-1, EPSILON)(x)
            case "GroupNorm":
                return hk.GroupNorm(GROUPS, eps=EPSILON)(x)
            case _:
                return hk.InstanceNorm(True, True, EPSILON)(x)

    net = hk.transform_with_state(call)

    def train(params, state, x):
        return net.apply(params, state, None, x, True)

    def evaluate(params, state, x):
        return net.apply(params, state, None, x, False)[0]

    params, state = jax.jit(lambda x: net.init(jax.random.key(0), x, True))(x)
    return functional(params, state, train, evaluate)


def equinox_layer(method: str, x: jax.Array) -> Functional:
    """A module of Equinox, mapped over the batch, since it knows one example at a time."""
    eqx: Any = importlib.import_module("equinox")

    def make():
        features = x.shape[1 if method in FOR_IMAGES else -1]
        match method:
            case "BatchNorm":
                options = {"mode": "batch", "momentum": MOMENTUM}
                return eqx.nn.BatchNorm(features, "batch", EPSILON, **options)
            case "LayerNorm":
                return eqx.nn.LayerNorm(features, EPSILON)
            case "RMSNorm":
                return eqx.nn.RMSNorm(features, EPSILON, use_bias=False)
            case "GroupNorm":
                return eqx.nn.GroupNorm(GROUPS, features, EPSILON)
            case _:
                return eqx.nn.GroupNorm(features, features, EPSILON)

    layer, state = eqx.nn.make_with_state(make)()
    params, trained = eqx.partition(layer, eqx.is_inexact_array)
    _, evaluated = eqx.partition(eqx.nn.inference_mode(layer), eqx.is_inexact_array)

    def call(params, static, state, x):
        layer = eqx.combine(params, static)
        if method == "BatchNorm":
            each = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return each(x, state)
        of_batch = layer
        for _ in x.shape[:1] if method in FOR_IMAGES else x.shape[:-1]:
            of_batch = jax.vmap(of_batch)
        return of_batch(x), state

    def train(params, state, x):
        return call(params, trained, state, x)

    def evaluate(params, state, x):
        return call(params, evaluated, state, x)[0]

    return functional(params, state, train, evaluate)


def keras_layer(method: str, x: jax.Array) -> Functional:
    """A layer of Keras on JAX, with parameters in float32."""
    os.environ["KERAS_BACKEND"] = "jax"
    layers: Any = importlib.import_module("keras.layers")

    dtype = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32"
    options = {"epsilon": EPSILON, "dtype": dtype}
    match method:
        case "BatchNorm":
            layer = layers.BatchNormalization(momentum=MOMENTUM, **options)
        case "LayerNorm":
            layer = layers.LayerNormalization(**options)
        case "RMSNorm":
            layer = layers.RMSNormalization(**options)
        case "GroupNorm":
            layer = layers.GroupNormalization(GROUPS, **options)
        case _:
            layer = layers.GroupNormalization(-1, **options)
    layer.build(x.shape)

    def call(params, state, x, training):
        mode = {"training": training} if method == "BatchNorm" else {}
        return layer.stateless_call(params, state, x, **mode)

    def train(params, state, x):
        return call(params, state, x, True)

    def evaluate(params, state, x):
        return call(params, state, x, False)[0]

    variables = layer.trainable_variables, layer.non_trainable_variables
    params, state = ([one.value for one in some] for some in variables)
    return functional(params, state, train, evaluate)
