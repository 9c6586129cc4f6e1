"""The network of `adabn_digits.py`, in Flax NNX with Flax's own batch norm, and its training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from parts.digits import CLASSES, draw_batches
from parts.domains import Domain


class Network(nnx.Module):
    """Three convolutions with batch normalization, the mean over pixels, and a linear output."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        channels = (1, width, 2 * width, 4 * width)
        self.convolutions = nnx.List(
            nnx.Conv(before, after, (3, 3), strides, use_bias=False, rngs=rngs)
            for before, after, strides in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(after, momentum=0.95, rngs=rngs) for after in channels[1:]
        )
        self.head = nnx.Linear(channels[-1], CLASSES, rngs=rngs)

    def __call__(self, images: ArrayLike) -> jax.Array:
        """Maps images [batch, 16, 16, 1] to logits [batch, classes]."""
        x = jnp.asarray(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, images: Any, labels: Any) -> None:
    """One step on one batch."""

    def loss_of(model: Network) -> jax.Array:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def train(source: Domain, width: int, seed: int, steps: int, batch_size: int) -> Network:
    """A network that has learned a data set, in inference."""
    model = Network(width, nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    model.train()
    for batch in draw_batches(len(source.train_images), batch_size, steps, seed):
        train_step(model, optimizer, source.train_images[batch], source.train_labels[batch])
    model.eval()
    return model


@nnx.jit
def predict(model: Network, images: Any) -> jax.Array:
    """The logits of images [batch, 16, 16, 1]."""
    return model(images)
