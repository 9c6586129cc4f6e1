"""Adapting batch normalization to another data set of digits, without labels.

Li et al. ("Revisiting Batch Normalization For Practical Domain Adaptation", 2016, arXiv 1603.04779)
observe that much of what a network knows about the domain of its data sits in the statistics of its
batch normalization. Their AdaBN replaces them by those of the new domain; no weight changes and no
label is needed. Schneider et al. ("Improving robustness against common corruptions by covariate
shift adaptation", 2020, arXiv 2006.16971) mix the two, for when there are few examples of the new
domain.

This script trains a small convolutional network on one data set of digits and tests it on another:
as it is; adapted to all training images of the other; and with the test images in batches, each of
which is adapted to by itself, with several strengths of the prior. Both directions, several seeds.
It prints a table and draws accuracy against the size of the batches.

How to run:

    JAXNORM_DATA=folder/with/mnist_and_usps_npz python examples/adabn_digits.py
    python examples/adabn_digits.py --quick

The first form carries over from MNIST to USPS and back, read from `mnist.npz` and `usps.npz` in
that folder: arrays `x_train`, `y_train`, `x_test` and `y_test` of type uint8, images of shape
[count, height, width]. Without the variable, it is from scikit-learn's digits to a shifted version
of them, with less contrast, blurred and moved by a pixel, and back.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from digits import CLASSES, Dataset, UsageError, draw_batches, load_mnist, load_small_digits
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxnorm.tools import adapt_stats, batch_adapter

PIXELS = 16
# For a fair comparison both data sets get as many training images, and MNIST fewer test images.
TRAIN_IMAGES, TEST_IMAGES = 7000, 2000
WIDTH = 16
"""Features of the first convolution; each one after it has twice as many."""
SIZES = (5, 20, 100, 500)
STRENGTHS = (0, 16, 64)
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """Train on one data set of digits, test on another, adapt the statistics in between."""

    data: Literal["auto", "digits", "mnist"] = "auto"
    """Images: mnist for MNIST and USPS, digits for scikit-learn's; auto looks at JAXNORM_DATA."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights and of the order of the batches."""

    steps: int = 1000
    """Training steps."""

    batch_size: int = 64
    """Images in each training batch."""

    quick: bool = False
    """A short run of one seed and a narrower network, enough to see that everything works."""

    out: Path = Path("adabn_digits.png")
    """Where to write the picture (.png, .pdf or .svg)."""


# --- Data -----------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """A data set: images [count, 16, 16, 1] with values from 0 to 1, and their labels."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def domain_of(name: str, data: Dataset) -> Domain:
    """At most so many images of a data set, in one size."""
    train = np.random.default_rng(0).permutation(len(data.train_images))[:TRAIN_IMAGES]
    return Domain(
        name,
        resized(data.train_images[train]),
        data.train_labels[train],
        resized(data.test_images[:TEST_IMAGES]),
        data.test_labels[:TEST_IMAGES],
    )


def resized(images: np.ndarray) -> np.ndarray:
    """Square images as rows of pixels, as [count, 16, 16, 1]."""
    side = math.isqrt(images.shape[1])
    shape = (len(images), PIXELS, PIXELS, 1)
    return np.asarray(jax.image.resize(images.reshape(-1, side, side, 1), shape, "linear"))


def shifted(domain: Domain) -> Domain:
    """The same digits as from a worse scanner: blurred, moved, in grey on grey."""

    def seen(images: np.ndarray) -> np.ndarray:
        blurred = sum(
            np.roll(images, (row, column), (1, 2)) for row in (-1, 0, 1) for column in (-1, 0, 1)
        )
        return 0.4 + 0.3 * np.roll(blurred / 9, 1, 2)

    return domain._replace(
        name="shifted digits",
        train_images=seen(domain.train_images),
        test_images=seen(domain.test_images),
    )


def load_domains(choice: Literal["auto", "digits", "mnist"]) -> tuple[Domain, Domain]:
    """The two data sets."""
    folder = os.environ.get("JAXNORM_DATA", "")
    if choice == "digits" or (choice == "auto" and not folder):
        small = domain_of("digits", load_small_digits(0))
        return small, shifted(small)
    if not folder:
        raise UsageError(
            "--data mnist needs the environment variable JAXNORM_DATA to name a folder with "
            "mnist.npz and usps.npz; --data digits needs no files"
        )
    mnist, usps = (load_mnist(Path(folder) / f"{name}.npz") for name in ("mnist", "usps"))
    return domain_of("MNIST", mnist), domain_of("USPS", usps)


# --- Model and training ---------------------------------------------------------------------------


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
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: ArrayLike, labels: ArrayLike
) -> None:
    """One step on one batch."""

    def loss_of(model: Network) -> jax.Array:
        logits, targets = model(images), jnp.asarray(labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def train(source: Domain, width: int, seed: int, steps: int, batch_size: int) -> Network:
    """A network that has learned the source."""
    model = Network(width, nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    model.train()
    for batch in draw_batches(len(source.train_images), batch_size, steps, seed):
        train_step(model, optimizer, source.train_images[batch], source.train_labels[batch])
    model.eval()
    return model


@nnx.jit
def predicted(model: Network, images: ArrayLike) -> jax.Array:
    """The class of each image."""
    return model(images).argmax(-1)


def accuracy(model: Network, target: Domain) -> float:
    """The share of test images that the model gets right."""
    return float(np.mean(np.asarray(predicted(model, target.test_images)) == target.test_labels))


# --- The experiment: the part to copy -------------------------------------------------------------


def accuracies(
    model: Network, target: Domain, sizes: Sequence[int], strengths: Sequence[int]
) -> dict[str, float]:
    """What a network of the source does on the target, before and after adapting to it."""
    images = target.train_images
    batches = np.array_split(images, math.ceil(len(images) / 500))
    by_layer = adapt_stats(model, batches, order="layer by layer")
    found = {
        "source only": accuracy(model, target),
        "AdaBN, together": accuracy(adapt_stats(model, batches), target),
        "AdaBN, layer by layer": accuracy(by_layer, target),
    }
    for size in sizes:
        count = len(target.test_images) // size * size
        batches = target.test_images[:count].reshape(-1, size, PIXELS, PIXELS, 1)
        for strength in strengths:
            predict = batch_adapter(model, batches[0], prior_strength=strength)
            classes = np.asarray(jax.lax.map(predict, batches)).argmax(-1).ravel()
            found[label(size, strength)] = float(np.mean(classes == target.test_labels[:count]))
    return found


def label(size: int, strength: int) -> str:
    """Names what was adapted to each batch of this size, with this strength of the prior."""
    return f"batches of {size}, N = {strength}"


class Result(NamedTuple):
    """Accuracies of each direction, by what was done, [seeds]."""

    directions: dict[str, dict[str, np.ndarray]]
    picture: Path


def main(options: Options) -> Result:
    """Runs the experiment, prints its table and writes its picture."""
    check_options(options)
    first, second = load_domains(options.data)
    seeds = options.seeds[:1] if options.quick else options.seeds
    steps = min(options.steps, 80) if options.quick else options.steps
    sizes = SIZES[1:2] if options.quick else SIZES
    strengths = STRENGTHS[:2] if options.quick else STRENGTHS
    width = WIDTH // 2 if options.quick else WIDTH
    console = Console()
    directions = {}
    for source, target in ((first, second), (second, first)):
        runs = []
        for seed in seeds:
            model = train(source, width, seed, steps, options.batch_size)
            own = accuracy(model, source)
            console.print(f"{source.name}, seed {seed}: accuracy on its own test images {own:.3f}")
            runs.append(accuracies(model, target, sizes, strengths))
        directions[f"{source.name} to {target.name}"] = {
            name: np.array([run[name] for run in runs]) for name in runs[0]
        }
    result = Result(directions, options.out)
    console.print(table_of(result, seeds))
    draw_picture(result, sizes, strengths).savefig(options.out, dpi=150)
    console.print(f"picture: {options.out}", highlight=False)
    return result


def check_options(options: Options) -> None:
    """Raises UsageError for options that make no sense."""
    if options.steps < 1 or options.batch_size < 1:
        raise UsageError("--steps and --batch-size must be at least 1")
    if not options.seeds:
        raise UsageError("--seeds needs one seed or more")
    if options.out.suffix not in PICTURE_SUFFIXES:
        raise UsageError(f"--out must end in {', '.join(PICTURE_SUFFIXES)}, found {options.out}")


# --- Showing it -----------------------------------------------------------------------------------


def table_of(result: Result, seeds: Sequence[int]) -> Table:
    """Mean and standard deviation over seeds; one seed has no deviation."""
    several = len(seeds) > 1
    what = f"mean and deviation of {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    table = Table(title=f"Test accuracy on the target, {what}")
    table.add_column("statistics")
    for direction in result.directions:
        table.add_column(direction, justify="right")
    for name in next(iter(result.directions.values())):
        values = (found[name] for found in result.directions.values())
        table.add_row(
            name,
            *(f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if several else "") for v in values),
        )
    return table


def draw_picture(result: Result, sizes: Sequence[int], strengths: Sequence[int]) -> Figure:
    """Accuracy against the size of batches, a panel for each direction."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(result.directions), sharey=True)
    # Colours of the palette of Okabe and Ito, which colour-blind readers can tell apart.
    colors = ("#0072B2", "#009E73", "#CC79A7")
    for panel, (direction, found) in zip(panels, result.directions.items(), strict=True):
        mean = {name: values.mean() for name, values in found.items()}
        flat = partial(panel.axhline, linewidth=1.2, color="black")
        flat(mean["source only"], linestyle="--", label="source only")
        flat(mean["AdaBN, together"], linestyle=":", label="AdaBN, all training images")
        for strength, color, marker in zip(strengths, colors, "os^", strict=False):
            accuracy = [mean[label(size, strength)] for size in sizes]
            name = "each batch alone (N = 0)" if strength == 0 else f"prior of N = {strength}"
            panel.plot(sizes, accuracy, marker=marker, color=color, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, list(map(str, sizes)))
        panel.set(title=direction, xlabel="test images in a batch, without labels")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy on the target's test images")
    panels[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
