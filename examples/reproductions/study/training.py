"""Training of a Linen model: the steps of the README, and a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's train state, and the running statistics that normalization layers keep."""

    batch_stats: Any


def create_state(
    model: nn.Module, seed: int, images: np.ndarray, optimizer: optax.GradientTransformation
) -> TrainState:
    """Draws the initial weights; `model` takes images and `train`."""
    # Without jit: operations one by one are compiled once for all models of these shapes.
    variables = model.init(jax.random.key(seed), images[:2], train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        # Empty for a network without running statistics: the same steps then serve both.
        batch_stats=variables.get("batch_stats", {}),
        tx=optimizer,
    )


def loss_of(state: TrainState, params: Any, images: jax.Array, labels: jax.Array):
    """The cross entropy in training, and the new running statistics."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updated = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, updated.get("batch_stats", {})


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step of the optimizer. Returns the new state and the loss."""
    (loss, stats), gradients = jax.value_and_grad(loss_of, argnums=1, has_aux=True)(
        state, state.params, images, labels
    )
    return state.apply_gradients(grads=gradients, batch_stats=stats), loss


@jax.jit
def eval_step(state: TrainState, images: jax.Array) -> jax.Array:
    """The logits in inference."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, images, train=False)


def train(
    state: TrainState,
    images: np.ndarray,
    labels: np.ndarray,
    batches: np.ndarray,
    after_step: Callable[[int, TrainState], None] | None = None,
) -> tuple[TrainState, np.ndarray]:
    """Trains on `batches`, whose rows hold indices of images.

    Args:
        state: as `create_state` makes it.
        images: all training images.
        labels: theirs.
        batches: [steps, batch size], as `parts.digits.draw_batches` makes them.
        after_step: is called with the number of steps made so far, from 1 on, and the state.

    Returns:
        The trained state, and the losses [steps].
    """
    losses = []
    for number, batch in enumerate(batches, start=1):
        state, loss = train_step(state, images[batch], labels[batch])
        losses.append(loss)
        if after_step is not None:
            after_step(number, state)
    return state, np.array(losses)


def accuracy_of(state: TrainState, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that are classified rightly in inference."""
    return float((jnp.argmax(eval_step(state, images), -1) == labels).mean())
