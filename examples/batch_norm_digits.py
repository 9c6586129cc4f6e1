"""Batch normalization on handwritten digits: a deep sigmoid network with it and without it.

Trains the network of figure 1 of Ioffe and Szegedy (2015, arXiv 1502.03167) twice, from the same
dense weights on the same batches, prints a table and draws the three panels of the figure. Rate and
length are chosen so that a short run shows the difference, which is one in speed before it is one
in accuracy: with --steps 20000, or with --learning-rate 0.5, the network without normalization
learns as well. The paper's claims are tested in `reproductions/batch_norm_figure_1.py`.

    python examples/batch_norm_digits.py
    python examples/batch_norm_digits.py --quick --seed 3 --out quick.png
    JAXNORM_DATA=folder/with/mnist_npz python examples/batch_norm_digits.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import linen as nn
from flax.training import train_state
from parts.command import check_least, check_picture, check_positive, run, write_picture
from parts.digits import CLASSES, Dataset, draw_batches, load_dataset
from parts.figure_1 import History, picture_of, table_of
from rich.console import Console
from rich.progress import track

from jaxnorm import linen as jnn

QUICK_STEPS, LOOK_EVERY = 1000, 25
NAMES = {False: "without batch norm", True: "with batch norm"}


@dataclass(frozen=True)
class Options:
    """Train a deep sigmoid network on digits with and without batch normalization."""

    data: Literal["auto", "digits", "mnist"] = "auto"
    """Images to train on; auto takes MNIST if JAXNORM_DATA names its folder, else the digits."""
    seed: int = 0
    """Seed of the initial weights, the order of the batches and the split of the digits."""
    steps: int | None = None
    """Training steps; by default 4000 on digits, 8000 on MNIST and 1000 in a quick run."""
    learning_rate: float = 0.05
    """Rate of plain gradient descent, the same for both networks."""
    batch_size: int = 60
    """Images in each batch."""
    quick: bool = False
    """A short run, enough to see that everything works."""
    out: Path = Path("batch_norm_digits.png")
    """Where to write the picture (.png, .pdf or .svg)."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        check_least(self, seed=0, steps=1, batch_size=2)
        check_positive(self, "learning_rate")
        check_picture(self.out)


class SigmoidNetwork(nn.Module):
    """Fully connected sigmoid layers, with or without batch normalization, and a linear output."""

    batch_norm: bool
    layers: int = 3
    width: int = 100

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [batch, pixels] to logits [batch, classes]."""
        # Normal with standard deviation 1/sqrt(inputs of the layer).
        gaussian = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = images
        for layer in range(self.layers):
            # The normalization subtracts the mean: its own bias takes the place of one before it.
            biased, name = not self.batch_norm, f"hidden_{layer}"
            x = nn.Dense(self.width, use_bias=biased, kernel_init=gaussian, name=name)(x)
            if self.batch_norm:
                # Debiased, so that running averages are right after a few steps already.
                x = jnn.BatchNorm(use_running_average=not train, momentum=0.95, debias=True)(x)
            self.sow("intermediates", "sigmoid_inputs", x)
            x = nn.sigmoid(x)
        return nn.Dense(CLASSES, kernel_init=gaussian, name="output")(x)


class TrainState(train_state.TrainState):
    """Flax's train state, and the running statistics that the normalization layers keep."""

    batch_stats: Any


def create_state(model: nn.Module, seed: int, images: Any, learning_rate: float) -> TrainState:
    """Draws the initial weights and makes the optimizer."""
    # Keys are made of this one and the names of layers: both networks draw the same weights.
    variables = model.init(jax.random.key(seed), images[:1], train=False)
    # Empty for a network without normalization: the same steps then serve both.
    stats, optimizer = variables.get("batch_stats", {}), optax.sgd(learning_rate)
    return TrainState.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=stats, tx=optimizer
    )


@jax.jit
def train_step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, jax.Array]:
    """One step of gradient descent on one batch. Returns the new state and the loss."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        # In training, layers normalize by this batch and write new running statistics: "mutable".
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, new.get("batch_stats", {})

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), loss


@jax.jit
def eval_step(state: TrainState, images: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the accuracy, and what goes into the sigmoids of the last hidden layer."""
    # The layers normalize with their running statistics: no answer depends on other images.
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, seen = state.apply_fn(variables, images, train=False, mutable=["intermediates"])
    return (logits.argmax(-1) == labels).mean(), seen["intermediates"]["sigmoid_inputs"][-1]


def train(batch_norm: bool, data: Dataset, options: Options) -> History:
    """Trains one of the networks, and looks at the test set now and then."""
    network, history = SigmoidNetwork(batch_norm), History(NAMES[batch_norm])
    state = create_state(network, options.seed, data.train_images, options.learning_rate)
    steps = options.steps or (QUICK_STEPS if options.quick else data.default_steps)
    batches = draw_batches(len(data.train_images), options.batch_size, steps, options.seed)
    for number, batch in enumerate(track(batches, description=f"{history.name:<18}"), start=1):
        state, _ = train_step(state, data.train_images[batch], data.train_labels[batch])
        if number % LOOK_EVERY == 0 or number == steps:
            history.look(number, *eval_step(state, data.test_images, data.test_labels))
    return history


def main(options: Options) -> list[History]:
    """Trains both networks, prints a table and writes a picture."""
    data = load_dataset(options.data, options.seed)
    histories = [train(batch_norm, data, options) for batch_norm in NAMES]
    Console().print(table_of(histories))
    title = f"Sigmoid network on {data.name}, rate {options.learning_rate:g}, seed {options.seed}"
    write_picture(picture_of(histories, title), options.out)
    return histories


if __name__ == "__main__":
    run(main, Options)
