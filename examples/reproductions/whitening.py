"""Whitening inside a network: decorrelated batch norm and IterNorm against batch norm.

Batch norm makes the variance of each feature 1; whitening also makes the features of a group
uncorrelated. Huang et al. ("Decorrelated Batch Normalization", 2018, arXiv 1804.08450, experiments
on multilayer perceptrons) report that it trains faster per step than batch norm and errs less,
since the inputs of each layer are better conditioned. Huang et al. ("Iterative Normalization:
Beyond Standardization towards Efficient Whitening", 2019, arXiv 1904.03441) replace its
eigendecomposition by a few steps of Newton's iteration. They report that this costs less and is
stabler, above all where many features are whitened by few examples; that whitening in groups does
better than of all features at once; and that five iterations are enough.

This script trains one network of dense layers with each norm, at each of several rates, and keeps
the best rate of each, by the mean of its training loss over the steps. It counts steps and
processor time, and looks at the eigenvalues of the covariance of what each norm hands on.

What differs from the papers: they train on larger data, with convolutional and residual networks
too, and time GPUs, on which eigendecompositions are slow against products of matrices; here a
processor is timed. The ratio of the largest to the smallest eigenvalue, the condition number,
leaves out the smallest tenth of the eigenvalues, since pixels that are always 0 leave some at 0.

How to run:

    python examples/reproductions/whitening.py
    python examples/reproductions/whitening.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/whitening.py --train-images 10000
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import (
    CLASSES,
    COLORS,
    DASHES,
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

NEAR = 0.1
"""Training losses that differ by less than this share are alike."""

KEPT = 0.9
"""The share of eigenvalues, from the largest on, that a condition number looks at."""

ITERATIONS = 5
"""The number of steps of Newton's iteration that the paper settles on."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train a network with batch norm, decorrelated batch norm and IterNorm."""

    width: int = 64
    """Features of each hidden layer; the largest group."""

    depth: int = 4
    """Hidden layers; a quick run has two."""

    group: int = 16
    """Features of a small group."""

    iterations: tuple[int, ...] = (1, 3, 5, 9)
    """Steps of Newton's iteration over all features of a layer; 5 always takes part."""

    rates: tuple[float, ...] = (0.25, 1.0, 4.0)
    """Learning rates, of which each norm gets its best."""

    steps: int = 120
    """Steps of training."""

    batch_size: int = 256
    """Images in a batch."""

    train_images: int = 1280
    """How many training images to use, at most."""

    def check(self) -> None:
        """Refuses impossible options."""
        super().check()
        if self.group < 1 or self.width % self.group:
            raise UsageError(f"--group must divide --width, {self.width}, not be {self.group}")
        if not self.rates or min(self.rates) <= 0:
            raise UsageError(f"--rates must be positive numbers, not {self.rates}")
        if min(self.iterations, default=1) < 1:
            raise UsageError(f"--iterations must be 1 or more, not {self.iterations}")
        if min(self.steps, self.depth) < 1 or self.batch_size < 2:
            raise UsageError("--steps and --depth must be 1 or more, --batch-size 2 or more")


class Kind(NamedTuple):
    """A norm.

    Attributes:
        method: "batch norm", "DBN" or "IterNorm".
        group: features that are whitened together.
        iterations: of Newton's method.
    """

    method: str
    group: int = 1
    iterations: int = 0

    def __str__(self) -> str:
        if self.method == "batch norm":
            return self.method
        how = "" if self.iterations in (0, ITERATIONS) else f", {self.iterations} iterations"
        return f"{self.method}, groups of {self.group}{how}"

    def layer(self, train: bool) -> nn.Module:
        """For training or inference."""
        common: Any = {"use_running_average": not train, "momentum": 0.9}
        if self.method == "batch norm":
            return jnn.BatchNorm(**common)
        common |= {"num_groups": None, "group_size": self.group}
        if self.method == "DBN":
            return jnn.DecorrelatedBatchNorm(**common)
        return jnn.IterNorm(n_steps=self.iterations, **common)


class Network(nn.Module):
    """Dense layers with a norm each, and a linear output."""

    norm: Callable[[bool], nn.Module]
    width: int
    depth: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        x = images.reshape(len(images), -1)
        for _ in range(self.depth):
            x = self.norm(train)(nn.Dense(self.width, use_bias=False)(x))
            self.sow("intermediates", "normalized", x)
            x = nn.relu(x)
        return nn.Dense(CLASSES)(x)


@cache
def recipe(kind: Kind, width: int, depth: int) -> tuple[Network, optax.GradientTransformation]:
    """One for all seeds and rates, so that they share a compiled step; see `at_rate`."""
    return Network(kind.layer, width, depth), optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)


def at_rate(state: Any, rate: float) -> Any:
    """The state with a learning rate."""
    chosen = {"learning_rate": jnp.asarray(rate, jnp.float32)}
    return state.replace(opt_state=state.opt_state._replace(hyperparams=chosen))


def eigenvalues(x: np.ndarray) -> np.ndarray:
    """Those of the covariance of the rows of x, the largest first."""
    return np.linalg.eigvalsh(np.cov(np.asarray(x, np.float64), rowvar=False, bias=True))[::-1]


def condition(values: np.ndarray) -> float:
    """The ratio of the largest eigenvalue to the smallest of the `KEPT` largest ones."""
    return float(values[0] / values[round(KEPT * len(values)) - 1])


class Run(NamedTuple):
    """What one training gave.

    Attributes:
        losses: for each step.
        seconds: of processor time for a step.
        error: the share of test images that are classified wrongly, in percent.
        values: eigenvalues of the covariance of what the norms hand on, for the last layer.
        condition: their condition number, the geometric mean over layers.
    """

    losses: np.ndarray
    seconds: float
    error: float
    values: np.ndarray
    condition: float

    @property
    def loss(self) -> float:
        """The mean over the steps: the faster the training, the smaller it is."""
        return float(self.losses.mean())


class Measure(NamedTuple):
    """A number that a training gives, by name, with the form in which it is printed."""

    name: str
    of: Callable[[Run], float]
    form: str

    def text(self, values: Sequence[float]) -> str:
        """The mean over seeds with its spread."""
        return format(Spread.of(values), self.form)


def _last_loss(one: Run) -> float:
    return float(one.losses[-max(len(one.losses) // 10, 1) :].mean())


LOSS = Measure("mean loss", lambda one: one.loss, ".3f")
LAST_LOSS = Measure("last loss", _last_loss, ".4f")
ERROR = Measure("test error", lambda one: one.error, ".1f")
TIME = Measure("ms a step", lambda one: 1e3 * one.seconds, ".1f")
CONDITION = Measure("log10 of condition", lambda one: float(np.log10(one.condition)), ".1f")
MEASURES = (LOSS, LAST_LOSS, ERROR, TIME, CONDITION)


def trained(kind: Kind, rate: float, seed: int, data: Images, options: Options) -> Run:
    """Trains a network and measures."""
    network, optimizer = recipe(kind, options.width, 2 if options.quick else options.depth)
    state = at_rate(create_state(network, seed, data.train_images, optimizer), rate)
    steps = 20 if options.quick else options.steps
    batches = draw_batches(len(data.train_images), options.batch_size, steps, seed)
    train(state, data.train_images, data.train_labels, batches[:1])  # Compiles, out of the timing.
    started = time.process_time()
    state, losses = train(state, data.train_images, data.train_labels, batches)
    seconds = (time.process_time() - started) / steps
    values = handed_on(network, state, data.train_images[batches[-1]])
    error = 100 * (1 - accuracy_of(state, data.test_images, data.test_labels))
    conditions = np.exp(np.mean(np.log([condition(layer) for layer in values])))
    return Run(losses, seconds, error, values[-1], float(conditions))


def handed_on(network: Network, state: Any, images: np.ndarray) -> list[np.ndarray]:
    """For each layer the eigenvalues of what its norm makes of a batch in training."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, seen = network.apply(variables, images, True, mutable=["intermediates", "batch_stats"])
    return [eigenvalues(np.asarray(x)) for x in seen["intermediates"]["normalized"]]


Runs = dict[Kind, list[Run]]
"""For each norm, at its best rate, one for each seed."""


def kinds_of(options: Options) -> list[Kind]:
    """All norms; the first five are those of the curves."""
    groups = (options.group, options.width)
    kinds = [Kind("batch norm"), *(Kind("DBN", group) for group in groups)]
    kinds += [Kind("IterNorm", group, ITERATIONS) for group in groups]
    if options.quick:
        return kinds[::2]
    others = [number for number in options.iterations if number != ITERATIONS]
    return kinds + [Kind("IterNorm", options.width, number) for number in others]


def best(by_rate: dict[float, list[Run]]) -> float:
    """The rate of the smallest mean loss; a diverged training counts as infinite."""
    means = {rate: np.mean([one.loss for one in runs]) for rate, runs in by_rate.items()}
    return min(means, key=lambda rate: np.nan_to_num(means[rate], nan=np.inf))


def main(options: Options) -> Report:
    """Trains all networks, and compares them."""
    options.check()
    data = images_of(options.data, train=options.train_images)
    if options.batch_size > len(data.train_images):
        raise UsageError(f"--batch-size: there are {len(data.train_images)} training images only")
    kinds = kinds_of(options)
    rates = options.rates[:1] if options.quick else options.rates
    found: dict[Kind, dict[float, list[Run]]] = {
        kind: {rate: [] for rate in rates} for kind in kinds
    }
    jobs = [(kind, rate, seed) for seed in options.used_seeds for kind in kinds for rate in rates]
    for kind, rate, seed in each(jobs, "trainings"):
        found[kind][rate].append(trained(kind, rate, seed, data, options))
    chosen = {kind: best(found[kind]) for kind in kinds}
    runs = {kind: found[kind][chosen[kind]] for kind in kinds}
    steps = len(runs[kinds[0]][0].losses)
    report = Report(
        name="whitening",
        about=__doc__ or "",
        setting=f"{data.name}, {len(data.train_images)} training images, {steps} steps with "
        f"batches of {options.batch_size}, layers of {options.width} features, "
        f"{len(options.used_seeds)} seeds; training loss as mean over all steps and over the last "
        "tenth, test error in percent, processor time, condition number of what norms hand on",
        headings=["norm", "best rate", *(measure.name for measure in MEASURES)],
        rows=[row_of(kind, chosen[kind], runs[kind]) for kind in kinds],
        findings=findings_of(runs, options),
        picture=picture_of(runs, data.name, options),
        alt="Training loss against steps and processor time, eigenvalues of what norms hand on, "
        "and loss against the number of iterations",
    )
    return conclude(report, options)


def row_of(kind: Kind, rate: float, runs: list[Run]) -> list[str]:
    """A row of the table."""
    texts = (measure.text([measure.of(one) for one in runs]) for measure in MEASURES)
    return [str(kind), f"{rate:g}", *texts]


def alike(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether the first is at most `NEAR` above the second, by the 95% interval of their ratio."""
    ratio = compare(np.log(first).tolist(), np.log(second).tolist())
    if np.isnan(ratio.margin):
        return None
    if ratio.mean + ratio.margin <= np.log1p(NEAR):
        return True
    return False if ratio.mean - ratio.margin > np.log1p(NEAR) else None


def findings_of(runs: Runs, options: Options) -> list[Finding]:
    """The claims of the two papers."""
    batch, small = Kind("batch norm"), Kind("DBN", options.group)
    whole = Kind("DBN", options.width)
    iter_small = Kind("IterNorm", options.group, ITERATIONS)
    iter_whole = Kind("IterNorm", options.width, ITERATIONS)
    longest = Kind("IterNorm", options.width, max((ITERATIONS, *options.iterations)))

    def says(
        claim: str, first: Kind, second: Kind, measure: Measure, near: bool = False
    ) -> list[Finding]:
        if not {first, second} <= runs.keys() or first == second:
            return []
        values = [[measure.of(one) for one in runs[kind]] for kind in (first, second)]
        pairs = zip((first, second), values, strict=True)
        measured = "; ".join(f"{kind}: {measure.text(part)}" for kind, part in pairs)
        held = alike(*values) if near else compare(*values).less
        return [Finding(claim, f"{measure.name}: {measured}", held)]

    within = f"its mean loss is at most {NEAR:.0%} above"
    return [
        *says("DBN trains faster per step than batch norm: its mean training loss is smaller "
              "(1804.08450)", small, batch, LOSS),
        *says("the test error of DBN is smaller than that of batch norm (1804.08450)",
              small, batch, ERROR),
        *says("what DBN hands on is better conditioned (1804.08450)",
              small, batch, CONDITION),
        *says("DBN in groups errs less than over all features (1904.03441)", small, whole, ERROR),
        *says(f"IterNorm trains as fast per step as DBN: {within} (1904.03441)",
              iter_small, small, LOSS, near=True),
        *says("a step with IterNorm costs less than one with DBN, on this CPU "
              "(1904.03441 speaks of GPUs)",
              iter_whole, whole, TIME),
        *says("over all features, IterNorm is stabler than DBN: its test error is smaller "
              "(1904.03441)", iter_whole, whole, ERROR),
        *says(f"{ITERATIONS} iterations are enough: {within} that with {longest.iterations} "
              "(1904.03441)", iter_whole, longest, LOSS, near=True),
    ]  # fmt: skip


def picture_of(runs: Runs, data: str, options: Options) -> Figure:
    """Loss over steps and time, eigenvalues, and what iterations give."""
    figure, (by_step, by_time, values, iterations) = figure_of(4, f"Whitening in a network: {data}")
    curves = [kind for kind in runs if kind.iterations in (0, ITERATIONS)]
    for number, kind in enumerate(curves):
        losses = np.array([one.losses for one in runs[kind]])
        steps = np.arange(1, losses.shape[1] + 1)
        seconds = float(np.median([one.seconds for one in runs[kind]]))
        band(by_step, steps, losses, str(kind), number)
        band(by_time, steps * seconds, losses, str(kind), number)
        band(values, steps[:0], losses[:, :0], str(kind), number)
        mean = np.mean([one.values for one in runs[kind]], 0)
        values.plot(mean, color=COLORS[number], linestyle=DASHES[number])
    by_step.set(xlabel="steps", title="at the best rate of each")
    by_time.set(xlabel="seconds of processor time", title="the same over time")
    for panel in (by_step, by_time):
        panel.set(yscale="log", ylabel="training loss")
    values.set(yscale="log", ylim=(1e-4, None), title="what the last norm hands on")
    values.set(xlabel="number of the eigenvalue", ylabel="eigenvalue of the covariance")
    draw_iterations(iterations, runs, options.width)
    tidy(figure)
    return figure


def draw_iterations(panel: Axes, runs: Runs, width: int) -> None:
    """The mean training loss against the number of iterations, and that of DBN."""
    those = sorted(
        (kind for kind in runs if (kind.method, kind.group) == ("IterNorm", width)),
        key=lambda kind: kind.iterations,
    )
    for number, kind in enumerate(those):
        found = Spread.of([one.loss for one in runs[kind]])
        panel.bar(number, found.mean, yerr=None if len(found.values) == 1 else found.std,
                  color=COLORS[4], capsize=4)  # fmt: skip
    panel.set_xticks(range(len(those)), [str(kind.iterations) for kind in those])
    panel.set(xlabel="iterations of IterNorm, over all features", ylabel="mean training loss")
    whole = runs.get(Kind("DBN", width))
    if whole:
        loss = float(np.mean([one.loss for one in whole]))
        panel.axhline(loss, color=COLORS[2], linestyle=DASHES[2])
        panel.set_title("line: DBN over all features")


if __name__ == "__main__":
    run(main, Options)
