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
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from digits import CLASSES, UsageError, draw_batches, load_small_digits
from flax import linen as nn
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


class Comparison(NamedTuple):
    """What was measured, before and after folding: accuracies, milliseconds, and roots taken."""

    accuracy: tuple[float, float]
    milliseconds: tuple[float, float]
    roots: tuple[int, int]  # in the compiled programs
    changed_answers: int


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


def seconds_in_turns(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each call."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def main(options: Options) -> Comparison:
    """Trains, folds, compares, and prints a table."""
    for name in ("steps", "width", "blocks", "rounds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(options, name)}")
    steps, rounds = (150, 5) if options.quick else (options.steps, options.rounds)
    data = load_small_digits(options.seed)
    model = Network(options.width, options.blocks)
    variables = jax.jit(model.init)(jax.random.key(options.seed), data.train_images[:1])
    batches = draw_batches(len(data.train_images), 60, steps, options.seed)
    for batch in track(batches, description="training", transient=True):
        variables = train_step(model, variables, data.train_images[batch], data.train_labels[batch])

    console = Console()
    folded = fold(model.bind(variables), data.train_images[:16], train=False)
    console.print(str(folded), highlight=False)

    images = jnp.asarray(data.test_images)
    logits, calls, roots = [], [], []
    for module, values in ((model, variables), folded.model.unbind()):
        compiled = jax.jit(module.apply).lower(values, images).compile()
        logits.append(np.asarray(compiled(values, images)))
        calls.append(partial(compiled, values, images))
        roots.append((compiled.as_text() or "").count(" rsqrt("))
    answers = [values.argmax(-1) for values in logits]
    before, after = seconds_in_turns(calls, rounds)
    accuracies = [float((found == data.test_labels).mean()) for found in answers]
    result = Comparison(
        accuracy=(accuracies[0], accuracies[1]),
        milliseconds=(1e3 * before, 1e3 * after),
        roots=(roots[0], roots[1]),
        changed_answers=int((answers[0] != answers[1]).sum()),
    )
    console.print(make_table(result, len(images)))
    return result


def make_table(result: Comparison, images: int) -> Table:
    """Both models, a row each."""
    device = jax.devices()[0].device_kind
    table = Table(
        caption=f"{images} test images in one batch on {device}; {result.changed_answers} of the "
        f"answers differ. Medians of calls in turns."
    )
    table.add_column("model")
    for heading in ("accuracy", "roots taken", "ms a batch"):
        table.add_column(heading, justify="right")
    for i, name in enumerate(("with batch norm", "folded")):
        table.add_row(
            name,
            f"{result.accuracy[i]:.3f}",
            str(result.roots[i]),
            f"{result.milliseconds[i]:.2f}",
        )
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
