"""Adapting batch normalization to another data set of digits, without labels.

AdaBN (Li et al. 2016, arXiv 1603.04779) replaces the statistics of a trained network's batch norms
by those of a new domain; no weight changes and no label is needed. Schneider et al. (2020, arXiv
2006.16971) mix the two, for when there are few examples of the new domain.

Trains a small network (`parts/convnet.py`) on one data set of digits and tests it on another: as it
is; adapted to all training images of the other; and with test images in batches, each of which is
adapted to by itself, with several strengths of the prior. Both directions, several seeds.

    JAXNORM_DATA=folder/with/mnist_and_usps_npz python examples/adabn_digits.py
    python examples/adabn_digits.py --quick

The first form carries over from MNIST to USPS and back. Without the variable, it is from
scikit-learn's digits to a shifted version of them, and back.
"""

import math
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from parts.accuracies import BY_LAYER, SOURCE, TOGETHER, Accuracies, label, picture_of, table_of
from parts.command import check_least, check_picture, check_seeds, run, write_picture
from parts.convnet import Network, predict, train
from parts.domains import Domain, load_domains
from rich.console import Console

from jaxnorm.tools import adapt_stats, batch_adapter

SIZES = (5, 20, 100, 500)
STRENGTHS = (0, 16, 64)


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

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        check_least(self, steps=1, batch_size=1)
        check_seeds(self.seeds)
        check_picture(self.out)

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """The first of the seeds alone in a quick run."""
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of batches and the strengths of the prior; few in a quick run."""
        return (SIZES[1:2], STRENGTHS[:2]) if self.quick else (SIZES, STRENGTHS)


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    """The share of images whose largest logit is that of their label."""
    return float(np.mean(np.asarray(logits).argmax(-1).ravel() == labels))


def adapted(model: Network, target: Domain, options: Options) -> dict[str, float]:
    """The accuracies of a network of the source on the target: this is the part to copy."""
    images, labels = target.test_images, target.test_labels
    batches = np.array_split(target.train_images, math.ceil(len(target.train_images) / 500))
    models = {
        SOURCE: model,
        TOGETHER: adapt_stats(model, batches),
        BY_LAYER: adapt_stats(model, batches, order="layer by layer"),
    }
    found = {name: accuracy(predict(one, images), labels) for name, one in models.items()}
    for size, strength in product(*options.grid):
        count = len(images) // size
        batches = images[: count * size].reshape(count, size, *images.shape[1:])
        adapter = batch_adapter(model, batches[0], prior_strength=strength)
        logits = jax.lax.map(adapter, batches)
        found[label(size, strength)] = accuracy(logits, labels[: count * size])
    return found


def main(options: Options) -> Accuracies:
    """Trains on each data set, adapts to the other, prints a table and writes a picture."""
    width, steps = (8, min(options.steps, 80)) if options.quick else (16, options.steps)
    console, directions = Console(), {}
    for source, target in permutations(load_domains(options.data)):
        runs = []
        for seed in options.used_seeds:
            model = train(source, width, seed, steps, options.batch_size)
            own = accuracy(predict(model, source.test_images), source.test_labels)
            console.print(f"{source.name}, seed {seed}: accuracy on its own test images {own:.3f}")
            runs.append(adapted(model, target, options))
        found = {name: np.array([run[name] for run in runs]) for name in runs[0]}
        directions[f"{source.name} to {target.name}"] = found
    console.print(table_of(directions, options.used_seeds))
    write_picture(picture_of(directions, *options.grid), options.out)
    return directions


if __name__ == "__main__":
    run(main, Options)
