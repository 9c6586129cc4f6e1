"""The task of `batch_norm_devices.py`: a small convolutional network on the digits.

The images come in batches of one size; the last of each epoch is filled up with padding.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from jaxnorm import linen as jnn
from parts.digits import CLASSES, draw_batches, load_small_digits

SEED = 0
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Batch(NamedTuple):
    """Examples along the first axis of each array; `valid` is False for padding."""

    images: Any
    labels: Any
    valid: Any


class State(NamedTuple):
    """What training changes."""

    params: Any
    batch_stats: Any
    momentum: Any


class Network(nn.Module):
    """Two convolutions with batch normalization, the mean over all pixels, and a linear output.

    `axis_name` is the mapped axis over whose devices the batch is spread, if there is one. The
    products are those of float32, not the coarser ones that GPUs and TPUs take by default: their
    rounding would hide the smaller mistakes.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps images [batch, pixels] to logits [batch, classes]."""
        x = images.reshape(-1, 8, 8, 1)
        for channels in (8, 16):
            x = nn.Conv(channels, (3, 3), use_bias=False, precision="highest")(x)
            norm = jnn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=self.axis_name)
            # Smooth: at the kink of a relu, rounding alone could switch a gradient on.
            x = nn.silu(norm(x, mask=valid[:, None, None, None]))
        return nn.Dense(CLASSES, precision="highest")(x.mean((1, 2)))


def evaluate(state: State, batch: Batch, axis_name: str | None = None) -> tuple[Any, Any, Any]:
    """The mean loss of all valid examples, the new running statistics, and the gradients."""

    def total(values: jax.Array) -> jax.Array:
        return values.sum() if axis_name is None else lax.psum(values.sum(), axis_name)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        network = Network(axis_name)
        logits, new = network.apply(variables, batch.images, batch.valid, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        valid = batch.valid.astype(losses.dtype)
        return total(losses * valid) / total(valid), new["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return loss, batch_stats, gradients


def update(state: State, loss: Any, batch_stats: Any, gradients: Any) -> tuple[State, Any]:
    """One step of the optimizer. Returns the new state and the loss."""
    changes, momentum = OPTIMIZER.update(gradients, state.momentum)
    return State(optax.apply_updates(state.params, changes), batch_stats, momentum), loss


def whole_step(state: State, batch: Batch) -> tuple[State, Any]:
    """One step on the whole batch, wherever its parts lie."""
    return update(state, *evaluate(state, batch))


def make_batches(size: int, steps: int) -> list[Batch]:
    """Batches of the digits in an order of their own in each epoch, the last of each padded."""
    data = load_small_digits(SEED)
    count = len(data.train_images)
    per_epoch = math.ceil(count / size)
    orders = draw_batches(count, count, math.ceil(steps / per_epoch), SEED)
    padding = (0, 0), (0, per_epoch * size - count)
    # The padding is copies of the first image, which would do harm if they counted.
    rows = np.pad(orders, padding).reshape(-1, size)[:steps]
    valid = np.pad(np.ones(orders.shape, bool), padding).reshape(-1, size)[:steps]
    return list(map(Batch, data.train_images[rows], data.train_labels[rows], valid))


def make_state(batch: Batch) -> State:
    """Draws the initial weights."""
    initialize = jax.jit(Network().init)
    variables = initialize(jax.random.key(SEED), batch.images[:1], batch.valid[:1])
    params = variables["params"]
    state = State(params, variables["batch_stats"], OPTIMIZER.init(params))
    return jax.tree.map(np.asarray, state)
