"""Training of small dense networks, whose steps take less time than starting them from Python."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from study.training import TrainState, train_step

Seen = TypeVar("Seen")


# The rate is a number in the optimizer's state, not in the program.
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)


def create_dense_state(model: nn.Module, seed: int, images: np.ndarray, rate: float) -> TrainState:
    """As `create_state`, for plain gradient descent; all rates share a compiled step.

    The initialization is not compiled as a whole, which takes seconds for each network; networks
    with layers of the same shapes share the compiled parts.
    """
    variables = model.init(jax.random.key(seed), images[:2], train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=SGD,
    )
    optimizer: Any = state.opt_state
    optimizer.hyperparams["learning_rate"] = jnp.float32(rate)
    return state


@jax.jit
def train_steps(
    state: TrainState, images: jax.Array, labels: jax.Array, batches: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One training step for each row of `batches`. Returns the new state and the losses."""

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        return train_step(state, images[batch], labels[batch])

    return jax.lax.scan(step, state, batches)


def train_looking(
    state: TrainState,
    images: np.ndarray,
    labels: np.ndarray,
    batches: np.ndarray,
    every: int,
    look: Callable[[TrainState], Seen],
) -> list[Seen]:
    """Trains on `batches` and returns what `look` sees after each `every` steps.

    The number of steps must be a multiple of `every`, so that one compiled program does for all.
    """
    looks, rest = divmod(len(batches), every)
    if rest:
        raise ValueError(f"train_looking: {len(batches)} steps are no multiple of {every}")
    # Moved to the device once, not for each look.
    images, labels = jax.device_put((images, labels))
    seen = []
    for some in np.split(batches, looks):
        state, _ = train_steps(state, images, labels, some)
        seen.append(look(state))
    return seen
