"""Folding batch norm for inference: a small residual network on digits, before and after.

    python examples/fold_batch_norm.py
    python examples/fold_batch_norm.py --quick --width 8

Trains a network with batch normalization on scikit-learn's digits, folds each norm into the
convolution before it, and compares the two: accuracy, answers that differ, operations of the
compiled program that are left of the norms, and time for a batch.

How to read the times: what the norms cost depends on the machine. XLA fuses a norm with its
neighbours, but on CPUs not with the convolution. The two models are timed in turns, since a shared
machine is slower at one moment than at another, and the median is shown.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from parts.command import check_least, run
from parts.digits import CLASSES, Dataset, draw_batches, load_small_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxnorm import linen as jnn
from jaxnorm.tools import fold


@dataclass(frozen=True)
class Options:
    """Train a residual network, fold its batch norms, and compare accuracy and time."""

    seed: int = 0
    """Seed of the weights, the batches and the split of the data."""
    steps: int = 400
    """Training steps."""
    width: int = 32
    """Channels of the network."""
    blocks: int = 3
    """Residual blocks, each with two convolutions."""
    rounds: int = 40
    """How often each of the two models is timed."""
    quick: bool = False
    """A short run, enough to see that everything works."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        check_least(self, seed=0, steps=1, width=1, blocks=1, rounds=1)


class Measured(NamedTuple):
    """What was measured of a model."""

    answers: np.ndarray
    accuracy: float
    roots: int  # in the compiled program
    call: Callable[[], Any]
    seconds: list[float]


class Network(nn.Module):
    """Residual blocks of convolutions, each followed by a norm."""

    width: int
    blocks: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, pixels] to logits [batch, classes]."""
        conv = partial(nn.Conv, self.width, (3, 3), use_bias=False)
        norm = partial(jnn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(conv()(images.reshape(-1, 8, 8, 1))))
        for _ in range(self.blocks):
            y = norm()(conv()(nn.relu(norm()(conv()(x)))))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@partial(jax.jit, static_argnums=0)
def train_step(model: Network, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
    """One step of gradient descent on one batch."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        given = {**variables, "params": params}
        logits, updates = model.apply(given, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    gradients, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda w, slope: w - 0.2 * slope, variables["params"], gradients)
    return {"params": params, **updates}


def measure(models: list[tuple[nn.Module, Any]], data: Dataset, rounds: int) -> list[Measured]:
    """Each model on the test images in one batch, timed in turns."""
    images = jnp.asarray(data.test_images)
    found = []
    for model, variables in models:
        program = jax.jit(model.apply).lower(variables, images).compile()
        call = partial(program, variables, images)
        answers = np.asarray(call()).argmax(-1)
        roots = (program.as_text() or "").count(" rsqrt(")
        found.append(
            Measured(answers, float((answers == data.test_labels).mean()), roots, call, [])
        )
    for _ in range(rounds):
        for one in found:
            start = time.perf_counter()
            jax.block_until_ready(one.call())
            one.seconds.append(time.perf_counter() - start)
    return found


def main(options: Options) -> list[Measured]:
    """Trains, folds, compares, and prints a table."""
    steps, rounds = (150, 5) if options.quick else (options.steps, options.rounds)
    data = load_small_digits(options.seed)
    model = Network(options.width, options.blocks)
    variables = jax.jit(model.init)(jax.random.key(options.seed), data.train_images[:1])
    batches = draw_batches(len(data.train_images), 60, steps, options.seed)
    for batch in track(batches, description="training", transient=True):
        variables = train_step(model, variables, data.train_images[batch], data.train_labels[batch])

    folded = fold(model.bind(variables), data.train_images[:16], train=False)
    found = measure([(model, variables), folded.model.unbind()], data, rounds)
    Console().print(str(folded), table_of(*found), sep="\n", highlight=False)
    return found


def table_of(before: Measured, after: Measured) -> Table:
    """Both models, a row each."""
    changed = int((before.answers != after.answers).sum())
    table = Table("model", "accuracy", "roots taken", "ms a batch")
    table.caption = f"{changed} of {len(before.answers)} answers differ. Medians of calls in turns."
    for name, one in (("with batch norm", before), ("folded", after)):
        milliseconds = 1e3 * statistics.median(one.seconds)
        table.add_row(name, f"{one.accuracy:.3f}", str(one.roots), f"{milliseconds:.2f}")
    return table


if __name__ == "__main__":
    run(main, Options)
