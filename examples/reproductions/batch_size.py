"""Small and dependent batches: batch norm, batch renormalization, group and layer norm.

Batch norm estimates the statistics of a feature from the examples of one batch. Wu and He ("Group
Normalization", 2018, arXiv 1803.08494, figure 1) report that its error grows as the batches shrink
from 32 to 2 images, while that of group norm stays; with large batches, batch norm is ahead. Ioffe
("Batch Renormalization", 2017, arXiv 1702.03275, section 4.2 and 4.3) reports that batch
renormalization does nearly as well with batches of 4 as with large ones, and that where batches are
not i.i.d., batch norm breaks down and batch renormalization does not.

This script trains one convolutional network with each norm and each size of batch for the same
number of passes over the data, at rates proportional to the size, as Wu and He do. Then once more
with batches that hold images of a single class, at a lower rate: at the usual one, no network
learns from them, whatever its norm.

What differs from the papers: their networks are residual ones on ImageNet, with statistics for each
of several GPUs; here they are four convolutions and a dense layer on digits, and that layer's
statistics come from as many numbers as there are images in the batch. Their limits of batch
renormalization (r up to 3, d up to 5) rise over tens of thousands of steps; here in the second
tenth of the training. In 1702.03275, small batches are parts of a large one over which gradients
are averaged, and dependent batches hold two images of each of 16 classes.

How to run:

    python examples/reproductions/batch_size.py
    python examples/reproductions/batch_size.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/batch_size.py --train-images 10000
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from study import (
    CLASSES,
    COLORS,
    Finding,
    Images,
    Report,
    Spread,
    StudyOptions,
    UsageError,
    accuracy_of,
    band,
    compare,
    conclude,
    create_state,
    draw_batches,
    each,
    figure_of,
    images_of,
    run,
    tidy,
    train,
)

from jaxnorm import linen as jnn

Norm = Callable[[int], Callable[[bool], nn.Module]]
"""Makes a layer for training or inference, knowing how many steps will be made."""


def renorm(steps: int, train: bool) -> nn.Module:
    """Limits rise from batch norm's, 1 and 0, to the paper's in the second tenth of a training."""
    tenth = max(steps // 10, 1)
    rmax, dmax = (
        optax.linear_schedule(start, end, tenth, tenth) for start, end in ((1.0, 3.0), (0.0, 5.0))
    )
    return jnn.BatchRenorm(use_running_average=not train, momentum=0.95, rmax=rmax, dmax=dmax)


def batch_norm(steps: int, train: bool) -> nn.Module:
    """With running statistics that follow within twenty steps."""
    del steps
    return jnn.BatchNorm(use_running_average=not train, momentum=0.95)


NORMS: dict[str, Norm] = {
    "batch norm": lambda steps: partial(batch_norm, steps),
    "batch renorm": lambda steps: partial(renorm, steps),
    "group norm": lambda steps: lambda train: jnn.GroupNorm(num_groups=4),
    "layer norm": lambda steps: lambda train: jnn.LayerNorm(reduction_axes=(1, 2, 3)),
}


DEPENDENT = 32
"""Images in a batch that holds one class alone."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train with batches of different sizes, and of a single class, by four norms."""

    sizes: tuple[int, ...] = (64, 32, 16, 8, 4, 2)
    """Images in a batch."""

    epochs: int = 6
    """Passes over the training images."""

    rate: float = 0.1
    """Learning rate for batches of 32; that for others is proportional to their size."""

    dependent_rate: float = 0.003
    """Learning rate for batches of one class."""

    train_images: int = 1200
    """How many training images to use, at most."""

    @property
    def passes(self) -> int:
        """One in a quick run."""
        return 1 if self.quick else self.epochs

    def check(self) -> None:
        """Refuses impossible options."""
        super().check()
        if min(self.sizes, default=0) < 2:
            raise UsageError(f"--sizes must be 2 or more images, not {self.sizes}")
        if self.epochs < 1 or min(self.rate, self.dependent_rate) <= 0:
            raise UsageError("--epochs must be 1 or more, --rate and --dependent-rate positive")


class Network(nn.Module):
    """Four convolutions and a dense layer, with a norm behind each, and a linear output."""

    norm: Callable[[bool], nn.Module]
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        x = images
        for features, strides in ((1, 2), (1, 1), (2, 2), (2, 1)):
            x = nn.Conv(features * self.width, (3, 3), strides=strides, use_bias=False)(x)
            x = nn.relu(self.norm(train)(x))
        x = nn.Dense(4 * self.width, use_bias=False)(x.reshape(len(x), -1))
        x = self.norm(train)(x[:, None, None])
        return nn.Dense(CLASSES)(nn.relu(x)[:, 0, 0])


class Kind(NamedTuple):
    """A way to train.

    Attributes:
        norm: one of `NORMS`.
        size: images in a batch.
        dependent: whether all images of a batch are of one class.
    """

    norm: str
    size: int
    dependent: bool = False

    def __str__(self) -> str:
        return f"{self.norm}, {self.size}{' of one class' if self.dependent else ' in a batch'}"


def of_one_class(labels: np.ndarray, size: int, steps: int, seed: int) -> np.ndarray:
    """Batches [steps, size] that hold one class each, drawn anew for each batch."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == one) for one in range(CLASSES)]
    return np.stack([rng.choice(members[rng.integers(CLASSES)], size) for _ in range(steps)])


Errors = dict[Kind, list[float]]
"""One for each seed."""


@cache
def recipe(norm: str, steps: int, rate: float) -> tuple[Network, optax.GradientTransformation]:
    """One for all seeds, so that they share a compiled step."""
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)
    return Network(NORMS[norm](steps)), optimizer


def error_of(kind: Kind, seed: int, data: Images, options: Options) -> float:
    """The share of test images that a newly trained network gets wrong, in percent."""
    count = len(data.train_images)
    steps = options.passes * (count // kind.size)
    if kind.dependent:
        batches = of_one_class(data.train_labels, kind.size, steps, seed)
    else:
        batches = draw_batches(count, kind.size, steps, seed)
    rate = options.dependent_rate if kind.dependent else options.rate * kind.size / 32
    network, optimizer = recipe(kind.norm, steps, rate)
    state = create_state(network, seed, data.train_images, optimizer)
    state, _ = train(state, data.train_images, data.train_labels, batches)
    return 100 * (1 - accuracy_of(state, data.test_images, data.test_labels))


def main(options: Options) -> Report:
    """Trains all networks, and compares their errors."""
    data = images_of(options.data, train=options.train_images)
    sizes = options.sizes[::5] if options.quick else options.sizes
    kinds = [Kind(norm, size) for norm in NORMS for size in sizes]
    kinds += [Kind(norm, DEPENDENT, True) for norm in NORMS]
    errors: Errors = {kind: [] for kind in kinds}
    for kind, seed in each([(kind, seed) for kind in kinds for seed in options.used_seeds]):
        errors[kind].append(error_of(kind, seed, data, options))
    report = Report(
        name="batch_size",
        about=__doc__ or "",
        setting=f"Test error in percent on {data.name}, {len(data.train_images)} training images, "
        f"{options.passes} passes, {len(options.used_seeds)} seeds",
        headings=["norm", *map(str, sizes), f"{DEPENDENT} of one class"],
        rows=[
            [norm, *(f"{Spread.of(errors[kind]):.1f}" for kind in kinds if kind.norm == norm)]
            for norm in NORMS
        ],
        findings=findings_of(errors, sizes),
        picture=picture_of(errors, sizes, data.name),
        alt="Test error against the size of batches for four norms, and with one class a batch",
    )
    return conclude(report, options)


def findings_of(errors: Errors, sizes: tuple[int, ...]) -> list[Finding]:
    """The claims of the two papers, between the largest and the smallest batches."""
    large, small = sizes[0], sizes[-1]

    def less(claim: str, first: Kind, second: Kind) -> Finding:
        found = (f"{kind}: {Spread.of(errors[kind]):.1f}" for kind in (first, second))
        return Finding(claim, "; ".join(found), compare(errors[first], errors[second]).less)

    batch, group, renorm = "batch norm", "group norm", "batch renorm"
    return [
        less(
            f"batch norm errs less with batches of {large} than of {small} (1803.08494, figure 1)",
            Kind(batch, large),
            Kind(batch, small),
        ),
        less(
            f"with batches of {small}, group norm errs less than batch norm (1803.08494, figure 1)",
            Kind(group, small),
            Kind(batch, small),
        ),
        less(
            f"with batches of {large}, batch norm errs less than group norm (1803.08494, figure 1)",
            Kind(batch, large),
            Kind(group, large),
        ),
        *(
            less(
                f"with batches of {size}, batch renormalization errs less than batch norm "
                "(1702.03275, section 4.2)",
                Kind(renorm, size),
                Kind(batch, size),
            )
            for size in sizes[-2:]
        ),
        less(
            "with dependent batches, batch renormalization errs less than batch norm "
            "(1702.03275, section 4.3)",
            Kind(renorm, DEPENDENT, True),
            Kind(batch, DEPENDENT, True),
        ),
    ]


def picture_of(errors: Errors, sizes: tuple[int, ...], data: str) -> Figure:
    """Error against size, and bars for batches of one class."""
    figure, (left, right) = figure_of(2, f"Small and dependent batches: {data}")
    for number, norm in enumerate(NORMS):
        band(left, sizes, np.transpose([errors[Kind(norm, size)] for size in sizes]), norm, number)
        found = Spread.of(errors[Kind(norm, DEPENDENT, True)])
        error = None if len(found.values) == 1 else found.std
        right.bar(number, found.mean, yerr=error, color=COLORS[number], capsize=4)
    left.set(xscale="log", xlabel="images in a batch", ylabel="test error, percent")
    left.invert_xaxis()
    left.set_xticks(sizes, map(str, sizes))
    left.minorticks_off()
    left.set_title("shuffled batches")
    right.set_xticks(range(len(NORMS)), list(NORMS), rotation=20)
    right.set(ylabel="test error, percent", title=f"batches of {DEPENDENT} of one class")
    tidy(figure)
    return figure


if __name__ == "__main__":
    run(main, Options)
