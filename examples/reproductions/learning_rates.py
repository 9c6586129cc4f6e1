"""Batch norm at high learning rates and from badly scaled initial weights.

Ioffe and Szegedy ("Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015, arXiv 1502.03167) say in section 3.3 that batch norm allows higher learning
rates: a factor on the weights before a norm changes neither its result nor what flows back to the
layer below, and the larger the weights are, the smaller their gradient is. In section 4.2 an
Inception network with batch norm trains at 5 and 30 times the rate of the original, reaches the
original's accuracy in fewer steps and then passes it; the original without batch norm breaks down
at 5 times the rate.

This script first measures those laws of one layer. Then it trains a sigmoid and a ReLU network,
with batch norm and without, for the same number of steps on a grid of learning rates and, each at
the rate that was best for it, on a grid of factors on the initial weights of the hidden layers.
Last, it trains at 5 and 30 times the rate that was best without batch norm. A run survives if it
ends above a test accuracy of 0.9, the black line in the picture. Where the highest rate of the grid
survives, higher ones might, too.

What differs from the paper: its networks are Inception on ImageNet, with momentum and a falling
rate; here they are three dense hidden layers of 100 units, as in the paper's figure 1, with plain
gradient descent at a constant rate, on digits. Section 4.2 has no grid of initial weights: that
part tests section 3.3. The output layer has no norm after it, so its weights keep their usual
scale. The best rates are chosen by test accuracy, for all networks alike.

How to run:

    python examples/reproductions/learning_rates.py
    python examples/reproductions/learning_rates.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/learning_rates.py --train-images 10000
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    TrainState,
    UsageError,
    accuracy_of,
    compare,
    conclude,
    draw_batches,
    each,
    figure_of,
    images_of,
    run,
    tidy,
)
from study.dense import create_dense_state, train_looking

import jaxnorm
from jaxnorm import linen as jnn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"sigmoid": nn.sigmoid, "ReLU": nn.relu}
SURVIVED = 0.9
"""A run that ends with a higher test accuracy has survived."""

FACTORS = (1, 5, 30)
"""On the rate that was best without batch norm, as in section 4.2."""

PARTS = {
    "rates": "rate {0.rate:g}",
    "scales": "best rate, initial weights x {0.scale:g}",
    "factors": "{1} x the best rate without batch norm",
}
"""Of the experiment, and how their trainings are named."""

NETWORKS = [(activation, batch_norm) for activation in ACTIVATIONS for batch_norm in (False, True)]

LOOK_EVERY = 25


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train at many rates and from initial weights of many sizes, with and without batch norm."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates of plain gradient descent."""

    scales: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Factors on the initial weights of the hidden layers."""

    steps: int = 1000
    """Training steps of each run; a multiple of 25."""

    batch_size: int = 60
    """Images in a batch."""

    train_images: int | None = None
    """How many training images to use, at most; by default all."""

    def check(self) -> None:
        """Refuses grids and numbers that cannot be trained with."""
        super().check()
        for flag, grid in (("rates", self.rates), ("scales", self.scales)):
            if not grid or not all(np.isfinite(grid)) or min(grid) <= 0:
                raise UsageError(f"--{flag} must be positive numbers, not {grid}")
        if self.steps < LOOK_EVERY or self.steps % LOOK_EVERY:
            raise UsageError(f"--steps must be a multiple of {LOOK_EVERY}, not {self.steps}")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size must be at least 2, not {self.batch_size}")

    @property
    def used_steps(self) -> int:
        """Few in a quick run."""
        return min(self.steps, 4 * LOOK_EVERY) if self.quick else self.steps


class Network(nn.Module):
    """Three hidden layers, with batch norm before the activations or not, and a linear output."""

    activation: str
    batch_norm: bool
    width: int = 100

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        # He's variance for ReLU, which halves the second moment; that of LeCun for the sigmoid.
        gain = 2.0 if self.activation == "ReLU" else 1.0
        gaussian = nn.initializers.variance_scaling(gain, "fan_in", "normal")
        x = images.reshape(len(images), -1)
        for layer in range(3):
            dense = nn.Dense(
                self.width,
                use_bias=not self.batch_norm,
                kernel_init=gaussian,
                name=f"hidden_{layer}",
            )
            x = dense(x)
            if self.batch_norm:
                # Debiased, so that inference has right statistics after a few steps already.
                norm = jnn.BatchNorm(use_running_average=not train, momentum=0.9, debias=True)
                x = norm(x)
            x = ACTIVATIONS[self.activation](x)
        return nn.Dense(CLASSES, name="output")(x)


class Kind(NamedTuple):
    """A network and how it is trained; `part` says what for."""

    activation: str
    batch_norm: bool
    part: str
    rate: float
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Of the network."""
        return f"{self.activation}, {'with' if self.batch_norm else 'without'} batch norm"

    def __str__(self) -> str:
        return f"{self.name}, rate {self.rate:g}, weights x {self.scale:g}"


Curves = dict[Kind, list[np.ndarray]]
"""Test accuracies at each look, for each seed."""


# --- The laws of one layer ------------------------------------------------------------------------


class Deviations(NamedTuple):
    """How far a layer with weights `a W` is from the laws, in shares of the largest number.

    Attributes:
        result: of BN((aW)u) from BN(Wu).
        to_inputs: of the gradient by u from that with W.
        to_weights: of `a` times the gradient by aW from that with W.
    """

    result: float
    to_inputs: float
    to_weights: float


def deviations(scale: float, epsilon: float, seed: int = 0) -> Deviations:
    """Of a dense layer with batch norm, 100 inputs and units and 60 examples."""
    inputs, weights, flowing = np.random.default_rng(seed).standard_normal((3, 100, 100), "f4")
    inputs, flowing = inputs[:60], flowing[:60]

    def layer(weights: Any, inputs: Any) -> jax.Array:
        return jaxnorm.batch_norm(inputs @ weights, epsilon=epsilon)[0]

    usual, pull = jax.vjp(layer, weights, inputs)
    to_weights, to_inputs = pull(flowing)
    scaled, scaled_pull = jax.vjp(layer, scale * weights, inputs)
    to_scaled, to_scaled_inputs = scaled_pull(flowing)
    return Deviations(
        _share(scaled, usual),
        _share(to_scaled_inputs, to_inputs),
        _share(scale * to_scaled, to_weights),
    )


def _share(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


# --- Training -------------------------------------------------------------------------------------


@cache
def network_of(activation: str, batch_norm: bool) -> Network:
    """One for all seeds, rates and scales, so that they share a compiled step."""
    return Network(activation, batch_norm)


def initial_state(kind: Kind, seed: int, data: Images) -> TrainState:
    """With the hidden layers' weights multiplied by the scale that `kind` names."""
    network = network_of(kind.activation, kind.batch_norm)
    state = create_dense_state(network, seed, data.train_images, kind.rate)
    params: dict[str, Any] = {**state.params}
    for name, layer in params.items():
        if name.startswith("hidden"):
            params[name] = {**layer, "kernel": kind.scale * layer["kernel"]}
    return state.replace(params=params)


def curve_of(kind: Kind, seed: int, data: Images, options: Options) -> np.ndarray:
    """Test accuracies after each 25 steps."""
    count = len(data.train_images)
    batches = draw_batches(count, options.batch_size, options.used_steps, seed)
    state = initial_state(kind, seed, data)

    def look(state: TrainState) -> float:
        return accuracy_of(state, data.test_images, data.test_labels)

    seen = train_looking(state, data.train_images, data.train_labels, batches, LOOK_EVERY, look)
    return np.array(seen)


def train_all(kinds: Sequence[Kind], data: Images, options: Options, name: str) -> Curves:
    """One curve for each kind and seed."""
    curves: Curves = {kind: [] for kind in kinds}
    for kind, seed in each([(kind, seed) for kind in kinds for seed in options.used_seeds], name):
        curves[kind].append(curve_of(kind, seed, data, options))
    return curves


def ends(curves: Curves, kind: Kind) -> list[float]:
    """The accuracies after the last step, for each seed."""
    return [float(curve[-1]) for curve in curves[kind]]


def survivals(curves: Curves, kinds: Sequence[Kind]) -> np.ndarray:
    """Which trainings survived [kinds, seeds]."""
    return np.array([ends(curves, kind) for kind in kinds]) > SURVIVED


def grid(curves: Curves, activation: str, batch_norm: bool, part: str) -> list[Kind]:
    """The kinds of one network in one part, in the order of training."""
    return [kind for kind in curves if kind[:3] == (activation, batch_norm, part)]


def best_rate(curves: Curves, activation: str, batch_norm: bool) -> float:
    """The rate with the highest accuracy at the end, averaged over the seeds."""
    kinds = grid(curves, activation, batch_norm, "rates")
    return max(kinds, key=lambda kind: np.mean(ends(curves, kind))).rate


def main(options: Options) -> Report:
    """Trains over the rates, then over the scales and at the paper's factors; compares."""
    data = images_of(options.data, train=options.train_images)
    rates, scales = options.rates, options.scales
    if options.quick:
        rates, scales = rates[2::3], scales[::4]
    kinds = [Kind(*network, "rates", rate) for network in NETWORKS for rate in rates]
    curves = train_all(kinds, data, options, "rates")
    best = {network: best_rate(curves, *network) for network in NETWORKS}
    kinds = [Kind(*one, "scales", best[one], scale) for one in NETWORKS for scale in scales]
    curves |= train_all(kinds, data, options, "scales")
    kinds = [
        Kind(*one, "factors", factor * best[one[0], False])
        for one in NETWORKS
        for factor in FACTORS
    ]
    curves |= train_all(kinds, data, options, "factors")
    report = Report(
        name="learning_rates",
        about=__doc__ or "",
        setting=f"Test accuracy on {data.name}, {len(data.train_images)} training images, "
        f"{options.used_steps} steps of {options.batch_size} images, "
        f"{len(options.used_seeds)} seeds",
        headings=["trained with", *(Kind(*one, "", 0).name for one in NETWORKS)],
        rows=rows_of(curves),
        findings=[law_finding(), *findings_of(curves)],
        picture=picture_of(curves, data.name),
        alt="Test accuracy against the learning rate and against the scale of the initial weights",
        notes=[eps_note()],
    )
    return conclude(report, options)


# --- What it says ---------------------------------------------------------------------------------


def rows_of(curves: Curves) -> list[list[str]]:
    """One row for each training, one column for each network."""
    rows = []
    for part, name in PARTS.items():
        trainings = zip(*(grid(curves, *one, part) for one in NETWORKS), strict=True)
        for number, kinds in enumerate(trainings):
            factor = FACTORS[number] if part == "factors" else None
            accuracies = [f"{Spread.of(ends(curves, kind)):.3f}" for kind in kinds]
            rows.append([name.format(kinds[0], factor), *accuracies])
    return rows


def law_finding() -> Finding:
    """Section 3.3 for one layer, without an epsilon, at which the law is exact."""
    worst = Deviations(*np.max([deviations(a, 0.0) for a in (0.01, 0.3, 3.0, 100.0)], axis=0))
    return Finding(
        "a factor a on the weights changes neither the norm's result nor the gradient by its "
        "inputs, and divides the gradient by the weights by a (section 3.3)",
        f"a from 0.01 to 100, epsilon 0, float32: deviations of at most {worst.result:.0e}, "
        f"{worst.to_inputs:.0e} and {worst.to_weights:.0e} of the largest number",
        max(worst) < 1e-5,
    )


def eps_note() -> str:
    """What epsilon does to the law."""
    found = deviations(0.01, 1e-5)
    return (
        "The law is exact without an epsilon. With 1e-5, weights of 0.01 times the usual (here 100 "
        f"inputs of variance 1 and weights of variance 1) change the result by {found.result:.1%} "
        "of its largest number."
    )


def reached(curves: Curves, activation: str, batch_norm: bool) -> list[float]:
    """The base-10 logarithm of the highest rate that survived, for each seed.

    Where none did, the lowest rate of the grid counts.
    """
    kinds = grid(curves, activation, batch_norm, "rates")
    survived = survivals(curves, kinds)
    rates = np.log10([kind.rate for kind in kinds])
    return np.where(survived, rates[:, None], rates.min()).max(0).tolist()


def highest_of(curves: Curves, activation: str, batch_norm: bool) -> str:
    """The geometric mean of the highest rates that survived, in words."""
    survived = survivals(curves, grid(curves, activation, batch_norm, "rates"))
    alive = [any(seed) for seed in survived.T]
    mean = f"{10 ** np.mean(reached(curves, activation, batch_norm)):.2g}"
    if all(alive):
        return mean
    return f"{mean} ({alive.count(False)} seeds had none)" if any(alive) else "none"


def shares(curves: Curves, activation: str, batch_norm: bool) -> list[float]:
    """The share of the scales that survived, for each seed."""
    kinds = grid(curves, activation, batch_norm, "scales")
    return survivals(curves, kinds).mean(0).tolist()


def looks_to(curves: Curves, kind: Kind, goals: Sequence[float]) -> list[float]:
    """Steps until each seed has its goal; those that never have it count with all steps made."""
    found = []
    for curve, goal in zip(curves[kind], goals, strict=True):
        there = np.flatnonzero(curve >= goal)
        found.append(LOOK_EVERY * (there[0] + 1 if there.size else len(curve)))
    return list(map(float, found))


def findings_of(curves: Curves) -> list[Finding]:
    """The claims on training, for each activation."""
    found = []
    for activation in ACTIVATIONS:
        plain, norm = (reached(curves, activation, used) for used in (False, True))
        highest = [highest_of(curves, activation, used) for used in (True, False)]
        found.append(
            Finding(
                f"{activation}: with batch norm, higher rates survive (section 3.3)",
                f"highest rate above accuracy {SURVIVED}, geometric mean: {highest[0]} with, "
                f"{highest[1]} without",
                compare(norm, plain).more,
            )
        )
        plain, norm = (shares(curves, activation, used) for used in (False, True))
        found.append(
            Finding(
                f"{activation}: with batch norm, more scales of the initial weights survive "
                "(section 3.3)",
                f"share of the grid: {Spread.of(norm):.2f} with, {Spread.of(plain):.2f} without",
                compare(norm, plain).more,
            )
        )
        found += factor_findings(curves, activation)
    return found


def factor_findings(curves: Curves, activation: str) -> list[Finding]:
    """Section 4.2: at 1, 5 and 30 times the rate that is best without batch norm."""
    plain, plain_5, _ = grid(curves, activation, False, "factors")
    _, norm_5, norm_30 = grid(curves, activation, True, "factors")
    goals = ends(curves, plain)
    fast, slow = (looks_to(curves, kind, goals) for kind in (norm_5, plain))

    def accuracies(*kinds: Kind) -> str:
        return "; ".join(f"{kind}: {Spread.of(ends(curves, kind)):.3f}" for kind in kinds)

    return [
        Finding(
            f"{activation}: without batch norm, 5 times the best rate fails (section 4.2)",
            accuracies(plain, plain_5),
            compare(ends(curves, plain_5), goals).less,
        ),
        Finding(
            f"{activation}: with batch norm at 5 times that rate, fewer steps lead to the accuracy "
            "at which the best training without it ends (section 4.2, figure 2)",
            f"steps: {Spread.of(fast):.0f} with, {Spread.of(slow):.0f} without",
            compare(fast, slow).less,
        ),
        Finding(
            f"{activation}: with batch norm at 30 times that rate, the end is higher than that of "
            "the best training without it (section 4.2, figure 3)",
            accuracies(norm_30, plain),
            compare(ends(curves, norm_30), goals).more,
        ),
    ]


def picture_of(curves: Curves, data: str) -> Figure:
    """Accuracy against the rate, and against the scale of the initial weights."""
    figure, (left, right) = figure_of(2, f"High rates and bad initial weights: {data}")
    for number, activation in enumerate(ACTIVATIONS):
        for batch_norm in (False, True):
            rates = grid(curves, activation, batch_norm, "rates")
            scales = grid(curves, activation, batch_norm, "scales")
            look: dict[str, Any] = {
                "color": COLORS[number],
                "linestyle": "-" if batch_norm else "--",
                "marker": "o" if batch_norm else "x",
                "label": f"{activation}, {'batch norm' if batch_norm else 'plain'}",
            }
            for panel, kinds, x in (
                (left, rates, [kind.rate for kind in rates]),
                (right, scales, [kind.scale for kind in scales]),
            ):
                values = np.array([ends(curves, kind) for kind in kinds])
                panel.plot(x, values.mean(1), **look)
                low, high = values.min(1), values.max(1)
                panel.fill_between(x, low, high, color=COLORS[number], alpha=0.12, linewidth=0)
    for panel in (left, right):
        panel.axhline(SURVIVED, color="black", linewidth=0.6)
        panel.set(xscale="log", ylim=(0, 1.02), ylabel="test accuracy at the end")
    left.set_xlabel("learning rate")
    right.set_xlabel("factor on the initial weights of the hidden layers")
    right.set_title("each at its best rate")
    left.set_title("usual initial weights")
    tidy(figure)
    return figure


if __name__ == "__main__":
    run(main, Options)
