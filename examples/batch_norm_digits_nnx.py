"""Batch normalization in Flax NNX: a small network on handwritten digits, from data to accuracy.

    python examples/batch_norm_digits_nnx.py

The model carries its running statistics. `model.train()` makes its layers normalize by the batch
and move them, `model.eval()` makes them normalize by what was gathered.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from parts.command import check_least, check_positive, run
from parts.digits import CLASSES, draw_batches, load_small_digits
from rich.console import Console
from rich.progress import track

import jaxnorm


@dataclass(frozen=True)
class Options:
    """Train a small network with batch normalization on scikit-learn's digits."""

    seed: int = 0
    """Seed of the weights, the batches and the split of the data."""
    steps: int = 300
    """Training steps."""
    learning_rate: float = 0.5
    """Rate of plain gradient descent."""
    width: int = 100
    """Units in each of the two hidden layers."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        check_least(self, seed=0, steps=1, width=1)
        check_positive(self, "learning_rate")


class Network(nnx.Module):
    """Two hidden layers, each normalized before its sigmoid."""

    def __init__(self, pixels: int, width: int, rngs: nnx.Rngs):
        """Creates layers for images of `pixels` pixels."""
        # The normalization subtracts the mean: a bias before it would have no effect.
        self.first = nnx.Linear(pixels, width, use_bias=False, rngs=rngs)
        self.first_norm = jaxnorm.nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.second_norm = jaxnorm.nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.output = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [batch, pixels] to logits [batch, classes]."""
        x = nnx.sigmoid(self.first_norm(self.first(x)))
        x = nnx.sigmoid(self.second_norm(self.second(x)))
        return self.output(x)


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step of gradient descent on one batch; changes `model` and `optimizer`."""

    def loss_of(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def eval_step(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The accuracy on some images; changes nothing."""
    return jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def main(options: Options) -> float:
    """Trains, prints the test accuracy and returns it."""
    data = load_small_digits(options.seed)
    model = Network(data.train_images.shape[1], options.width, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, optax.sgd(options.learning_rate), wrt=nnx.Param)
    batches = draw_batches(len(data.train_images), 60, options.steps, options.seed)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    model.train()
    for batch in track(batches, description="training", transient=True):
        train_step(model, optimizer, images[batch], labels[batch])
    model.eval()
    tests = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    accuracy = float(eval_step(model, *tests))
    Console().print(f"test accuracy after {options.steps} steps: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    run(main, Options)
