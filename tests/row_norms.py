"""The four norms that normalize each example by itself, Flax's and ours, and input for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from modules import FRAMEWORKS, NORMAL, Layer, draw, draw_mask
from oracles import standardized

import jaxnorm.linen
import jaxnorm.nnx

FLAX = {"linen": nn, "nnx": nnx}
OURS = {"linen": jaxnorm.linen, "nnx": jaxnorm.nnx}
NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")

BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)
ALL = pytest.mark.parametrize("norm", NORMS)
WITH_FEATURE_AXES = pytest.mark.parametrize("norm", [n for n in NORMS if n != "GroupNorm"])

SHAPE = (2, 4, 4, 8)
X, DY = draw(SHAPE), draw(SHAPE, seed=1)
# At least every other element is valid, so that whatever is normalized has a variance.
MASK = draw_mask(SHAPE) | (sum(jnp.meshgrid(*map(jnp.arange, SHAPE), indexing="ij")) % 2 == 0)
# The axes of `SHAPE` along which statistics are taken by default, GroupNorm having one group.
REDUCED = {"LayerNorm": (3,), "RMSNorm": (3,), "GroupNorm": (1, 2, 3), "InstanceNorm": (1, 2)}


def without_parameters(norm: str) -> dict[str, Any]:
    return {"use_scale": False} | ({} if norm == "RMSNorm" else {"use_bias": False})


def options_of(norm: str, **options: Any) -> dict[str, Any]:
    """`options` for `norm`, with random parameters and one group unless they say otherwise."""
    options = {"scale_init": NORMAL} | options
    if norm != "RMSNorm":
        options = {"bias_init": NORMAL} | options
    if norm == "GroupNorm" and "group_size" not in options:
        options = {"num_groups": 1} | options
    return options


def one_layer(library, framework: str, norm: str, x: Any = X, **options: Any) -> Layer:
    make = FRAMEWORKS[framework]
    return make(x, getattr(library[framework], norm), **options_of(norm, **options))


def both_layers(framework: str, norm: str, x: Any = X, **options: Any) -> list[Layer]:
    """Flax's and ours."""
    return [one_layer(library, framework, norm, x, **options) for library in (FLAX, OURS)]


def output(layer: Layer, x: Any = X, **call: Any) -> jax.Array:
    return layer.train(layer.params, layer.stats, x, **call)[0]


def first_output(
    library, framework: str, norm: str, *call: Any, features: int = 8, **options: Any
) -> jax.Array:
    """What a layer of a user's model gives on its first call."""
    cls = getattr(library[framework], norm)
    if framework == "linen":
        return cls(**options).init_with_output(jax.random.key(0), X, *call)[0]
    return cls(features, rngs=nnx.Rngs(0), **options)(X, *call)


def plain_oracle(norm: str, x: Any) -> np.ndarray:
    """What a layer without parameters does, in float64."""
    return standardized(x, REDUCED[norm], epsilon=1e-6, use_mean=norm != "RMSNorm")
