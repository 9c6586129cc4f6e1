"""Small models that are imported and exported by mistake."""

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm


def ones(*shape):
    return np.ones(shape, np.float32)


def shaped(module, x):
    """A Linen model with shapes in the place of its variables."""
    return module.bind(jax.eval_shape(module.init, jax.random.key(0), x))


class Pair(nn.Module):
    """A dense layer and a norm."""

    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="dense")(x)
        return self.norm(use_running_average=True, name="norm")(x)


class Image(nn.Module):
    """A norm over whole images, of equal sizes along all axes."""

    @nn.compact
    def __call__(self, x):
        options = {"reduction_axes": (1, 2), "feature_axes": (1, 2)}
        return jaxnorm.linen.LayerNorm(epsilon=1e-5, name="norm", **options)(x)


class Tied(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = (nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(self.a(x))


class Scanned(nn.Module):
    """Three dense layers in one."""

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return step(nn.Dense(3, name="dense"), x, None)[0]


def scanned():
    arrays = {"kernel": ones(3, 3, 3), "bias": ones(3, 3)}
    return Scanned().bind({"params": {"dense": arrays}})
