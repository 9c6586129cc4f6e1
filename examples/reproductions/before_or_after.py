"""Batch norm before or after the activation.

Ioffe and Szegedy ("Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015, arXiv 1502.03167, section 3.2) put batch norm between a dense layer and its
activation. Their reason: what comes out of an activation changes the shape of its distribution
while the network trains, and a norm fixes only mean and variance; the sums of a dense layer are
more likely symmetric, not sparse and "more Gaussian", so that fixing mean and variance gives a
stable distribution. The paper shows no training with the norm after the activation.

This script trains networks with sigmoid, tanh and ReLU without batch norm, with it before the
activation and with it after, at several learning rates. At the best rate of each it looks at what
goes into the norms, unit by unit, over test images, with mean 0 and variance 1: how far that
distribution is from a Gaussian, and how much it changes from one look to the next. Both are
Wasserstein distances (the mean distance between the values in order), so 0.1 is a tenth of a
standard deviation; two points of equal weight are 0.54 from a Gaussian.

What differs from the paper: its networks are Inception on ImageNet; here they are dense hidden
layers of 100 units, trained for 500 steps of plain gradient descent on digits. Accuracies are means
over the training, one look each 25 steps, since most trainings end close to each other. The best
rates are chosen by them, on the test images, for all networks alike.

How to run:

    python examples/reproductions/before_or_after.py
    python examples/reproductions/before_or_after.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/before_or_after.py --train-images 10000
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from study import (
    CLASSES,
    COLORS,
    DASHES,
    Finding,
    Images,
    Report,
    Spread,
    StudyOptions,
    TrainState,
    UsageError,
    accuracy_of,
    compare,
    conclude,
    draw_batches,
    each,
    images_of,
    run,
    tidy,
)
from study.dense import create_dense_state, train_looking

from jaxnorm import linen as jnn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "ReLU": nn.relu,
}
PLACES = ("without", "before", "after")
GOOD = 0.9
LOOK_EVERY = 25
LOOK_IMAGES = 450
"""Test images, at most, over which distributions are taken."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train with batch norm before the activations, after them, and without it."""

    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates of plain gradient descent."""

    layers: int = 3
    """Hidden layers."""

    steps: int = 500
    """Training steps of each run; a multiple of 25."""

    batch_size: int = 60
    """Images in a batch."""

    train_images: int | None = None
    """How many training images to use, at most; by default all."""

    def check(self) -> None:
        """Refuses numbers that cannot be trained with."""
        super().check()
        if not self.rates or not all(np.isfinite(self.rates)) or min(self.rates) <= 0:
            raise UsageError(f"--rates must be positive numbers, not {self.rates}")
        if self.steps < 2 * LOOK_EVERY or self.steps % LOOK_EVERY:
            raise UsageError(f"--steps must be 50 or more, by {LOOK_EVERY}, not {self.steps}")
        if self.layers < 1:
            raise UsageError(f"--layers must be at least 1, not {self.layers}")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size must be at least 2, not {self.batch_size}")

    @property
    def used_steps(self) -> int:
        """Few in a quick run."""
        return min(self.steps, 2 * LOOK_EVERY) if self.quick else self.steps


class Network(nn.Module):
    """Dense hidden layers, with batch norm at one place or none, and a linear output."""

    activation: str
    place: str
    layers: int
    width: int = 100

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        # He's variance for ReLU, which halves the second moment; that of LeCun for the others.
        gain = 2.0 if self.activation == "ReLU" else 1.0
        gaussian = nn.initializers.variance_scaling(gain, "fan_in", "normal")
        x = images.reshape(len(images), -1)
        for _ in range(self.layers):
            # A norm right behind the dense layer brings the bias.
            use_bias = self.place != "before"
            x = nn.Dense(self.width, use_bias=use_bias, kernel_init=gaussian)(x)
            x = self.norm(x, train) if self.place == "before" else x
            x = ACTIVATIONS[self.activation](x)
            x = self.norm(x, train) if self.place == "after" else x
        return nn.Dense(CLASSES)(x)

    @nn.nowrap
    def norm(self, x: jax.Array, train: bool) -> jax.Array:
        """Batch norm that lets others see what goes into it."""
        self.sow("intermediates", "norm_inputs", x)
        # Debiased, so that inference has right statistics after a few steps already.
        return jnn.BatchNorm(use_running_average=not train, momentum=0.9, debias=True)(x)


# --- The shape of a distribution ------------------------------------------------------------------


def shapes_of(values: np.ndarray) -> np.ndarray:
    """The columns of `values` in order, with mean 0 and variance 1; columns of one value are NaN.

    What is left is the shape of each distribution, and its sign.
    """
    values = np.sort(values.astype(np.float64), axis=0)
    deviation = values.std(0)
    constant = deviation <= 1e-6 * np.abs(values).max(0)
    return (values - values.mean(0)) / np.where(constant, np.nan, deviation)


def from_gaussian(shapes: np.ndarray) -> float:
    """The Wasserstein distance of columns, as `shapes_of` makes them, from a Gaussian; their mean.

    Columns that are NaN do not count.
    """
    ranks = (np.arange(len(shapes)) + 0.5) / len(shapes)
    return _mean_distance(shapes, stats.norm.ppf(ranks)[:, None])


def change(before: np.ndarray, after: np.ndarray) -> float:
    """The Wasserstein distance between the same columns at two times; their mean."""
    return _mean_distance(before, after)


def _mean_distance(first: np.ndarray, second: np.ndarray) -> float:
    distances = np.abs(first - second).mean(0)
    known = distances[np.isfinite(distances)]
    return float(known.mean()) if known.size else float("nan")


@jax.jit
def norm_inputs(state: TrainState, images: jax.Array) -> jax.Array:
    """What goes into the norms of all layers in inference [images, units]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, captured = state.apply_fn(variables, images, train=False, mutable=["intermediates"])
    return jnp.concatenate(captured["intermediates"]["norm_inputs"], axis=-1)


# --- Training -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A network and its learning rate."""

    activation: str
    place: str
    rate: float

    def __str__(self) -> str:
        return f"{self.activation}, {self.place}, rate {self.rate:g}"


class Course(NamedTuple):
    """What was seen in one training.

    Attributes:
        accuracies: on the test images, one for each look.
        gaussian: mean distance of the norms' inputs from a Gaussian; NaN without norms.
        change: mean distance between the norms' inputs of two looks, one after the other.
        inputs: of the norms at the end [images, units], with mean 0 and variance 1.
    """

    accuracies: np.ndarray
    gaussian: float
    change: float
    inputs: np.ndarray

    @property
    def mean(self) -> float:
        """The accuracy, averaged over the training: high if it rises fast and ends high."""
        return float(self.accuracies.mean())


Courses = dict[Kind, list[Course]]
"""One for each seed."""


@cache
def network_of(activation: str, place: str, layers: int) -> Network:
    """One for all seeds and rates, so that they share a compiled step."""
    return Network(activation, place, layers)


def course_of(kind: Kind, seed: int, data: Images, options: Options) -> Course:
    """Trains one network and looks at it each 25 steps."""
    count = len(data.train_images)
    batches = draw_batches(count, options.batch_size, options.used_steps, seed)
    network = network_of(kind.activation, kind.place, options.layers)
    state = create_dense_state(network, seed, data.train_images, kind.rate)
    some = data.test_images[:LOOK_IMAGES]

    def look(state: TrainState) -> tuple[float, np.ndarray]:
        accuracy = accuracy_of(state, data.test_images, data.test_labels)
        if kind.place == "without":
            return accuracy, np.empty((1, 0))
        return accuracy, shapes_of(np.asarray(norm_inputs(state, some)))

    seen = train_looking(state, data.train_images, data.train_labels, batches, LOOK_EVERY, look)
    accuracies, shapes = zip(*seen, strict=True)
    return Course(
        np.array(accuracies),
        float(np.mean([from_gaussian(one) for one in shapes])),
        float(np.mean([change(*pair) for pair in pairwise(shapes)])),
        shapes[-1],
    )


def main(options: Options) -> Report:
    """Trains all networks at all rates, and compares them at the best."""
    data = images_of(options.data, train=options.train_images)
    rates = options.rates[2:3] if options.quick else options.rates
    kinds = [Kind(one, place, rate) for one in ACTIVATIONS for place in PLACES for rate in rates]
    courses: Courses = {kind: [] for kind in kinds}
    for kind, seed in each([(kind, seed) for kind in kinds for seed in options.used_seeds]):
        courses[kind].append(course_of(kind, seed, data, options))
    best = best_of(courses)
    report = Report(
        name="before_or_after",
        about=__doc__ or "",
        setting=f"{data.name}, {len(data.train_images)} training images, {options.layers} hidden "
        f"layers, {options.used_steps} steps of {options.batch_size} images, "
        f"{len(options.used_seeds)} seeds, each network at its best rate",
        headings=[
            "activation",
            "batch norm",
            "rate",
            "mean accuracy",
            "accuracy at the end",
            "from Gaussian",
            "change of shape",
            f"highest rate above {GOOD}",
        ],
        rows=rows_of(courses, best),
        findings=findings_of(best),
        picture=picture_of(courses, best, data.name),
        alt="Accuracy against the learning rate, and what goes into the norms, by activation",
    )
    return conclude(report, options)


# --- What it says ---------------------------------------------------------------------------------


def best_of(courses: Courses) -> Courses:
    """The courses of each network at the rate with the highest mean accuracy."""
    best = {}
    for kind, found in courses.items():
        others = [other for other in courses if other[:2] == kind[:2]]
        if max(others, key=lambda other: np.mean([one.mean for one in courses[other]])) == kind:
            best[kind] = found
    return best


def highest_rate(courses: Courses, activation: str, place: str) -> str:
    """The highest rate at which the mean accuracy, over seeds too, is good."""
    good = [
        kind.rate
        for kind, found in courses.items()
        if kind[:2] == (activation, place) and np.mean([one.mean for one in found]) > GOOD
    ]
    return f"{max(good):g}" if good else "none"


def rows_of(courses: Courses, best: Courses) -> list[list[str]]:
    """One for each network."""
    rows = []
    for kind, found in best.items():
        row = [kind.activation, kind.place, f"{kind.rate:g}"]
        row.append(f"{Spread.of([one.mean for one in found]):.3f}")
        row.append(f"{Spread.of([one.accuracies[-1] for one in found]):.3f}")
        for values in ([one.gaussian for one in found], [one.change for one in found]):
            row.append("" if kind.place == "without" else f"{Spread.of(values):.3f}")
        row.append(highest_rate(courses, kind.activation, kind.place))
        rows.append(row)
    return rows


def findings_of(best: Courses) -> list[Finding]:
    """The claim and the two parts of its reason, for each activation."""
    found = []
    for activation in ACTIVATIONS:
        courses = {kind.place: best[kind] for kind in best if kind.activation == activation}
        found += findings_for(activation, courses)
    return found


def findings_for(activation: str, courses: dict[str, list[Course]]) -> list[Finding]:
    """`courses` by the place of the norm."""
    accuracies = {place: [one.mean for one in courses[place]] for place in PLACES}
    distances = {place: [one.gaussian for one in courses[place]] for place in PLACES[1:]}
    changes = {place: [one.change for one in courses[place]] for place in PLACES[1:]}

    def words(measured: dict[str, list[float]], places: Sequence[str]) -> str:
        return "; ".join(f"{place}: {Spread.of(measured[place]):.3f}" for place in places)

    source = "the paper has no tanh" if activation == "tanh" else "section 4"
    return [
        Finding(
            f"{activation}: batch norm before the activation trains better than none ({source})",
            "mean accuracy " + words(accuracies, ("before", "without")),
            compare(accuracies["before"], accuracies["without"]).more,
        ),
        Finding(
            f"{activation}: it trains better before the activation than after (section 3.2 expects "
            "it, without numbers)",
            "mean accuracy " + words(accuracies, ("before", "after")),
            compare(accuracies["before"], accuracies["after"]).more,
        ),
        Finding(
            f"{activation}: what goes into the norm is closer to a Gaussian before (section 3.2)",
            "distance " + words(distances, ("before", "after")),
            compare(distances["before"], distances["after"]).less,
        ),
        Finding(
            f"{activation}: what goes into the norm changes its shape less before (section 3.2)",
            "from look to look " + words(changes, ("before", "after")),
            compare(changes["before"], changes["after"]).less,
        ),
    ]


def picture_of(courses: Courses, best: Courses, data: str) -> Figure:
    """Above, accuracy against the rate; below, what goes into the norms."""
    figure = Figure(figsize=(4.4 * len(ACTIVATIONS), 7.5), layout="constrained")
    figure.suptitle(f"Batch norm before or after the activation: {data}")
    above, below = figure.subplots(2, len(ACTIVATIONS), sharey="row")
    for activation, upper, lower in zip(ACTIVATIONS, above, below, strict=True):
        for number, place in enumerate(PLACES):
            kinds = [kind for kind in courses if kind[:2] == (activation, place)]
            draw_accuracies(upper, kinds, courses, number)
            if place != "without":
                (kind,) = (kind for kind in best if kind[:2] == (activation, place))
                draw_inputs(lower, best[kind], number)
        x = np.linspace(-4, 4, 200)
        lower.plot(x, stats.norm.pdf(x), color="black", linewidth=0.8, label="Gaussian")
        upper.set(title=activation, xscale="log", xlabel="learning rate")
        lower.set(xlim=(-4, 4), xlabel="input of a norm, in standard deviations of its unit")
    above[0].set_ylabel("test accuracy, mean over the training")
    below[0].set_ylabel("density at the end, all units; cut at 1.2")
    below[0].set_ylim(0, 1.2)
    tidy(figure)
    return figure


def draw_accuracies(panel: Axes, kinds: Sequence[Kind], courses: Courses, number: int) -> None:
    """The mean over seeds against the rate, with a band from the lowest to the highest."""
    values = np.array([[one.mean for one in courses[kind]] for kind in kinds])
    rates = [kind.rate for kind in kinds]
    label = "without batch norm" if number == 0 else PLACES[number]
    look = {"color": COLORS[(number + 1) % 3], "linestyle": DASHES[number]}
    panel.plot(rates, values.mean(1), marker="o", label=label, **look)
    panel.fill_between(rates, values.min(1), values.max(1), alpha=0.15, color=look["color"])


def draw_inputs(panel: Axes, courses: Sequence[Course], number: int) -> None:
    """Their distribution at the end of the training, of all units and seeds."""
    values = np.concatenate([one.inputs[np.isfinite(one.inputs)] for one in courses])
    density, edges = np.histogram(values, bins=80, range=(-4, 4), density=True)
    look = {"color": COLORS[(number + 1) % 3], "linestyle": DASHES[number]}
    panel.stairs(density, edges, label=PLACES[number], linewidth=1.5, **look)


if __name__ == "__main__":
    run(main, Options)
