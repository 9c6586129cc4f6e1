"""Where the benefit of batch norm comes from: stable distributions or a smooth loss.

Batch norm was made to keep the distributions of a network's layer inputs from shifting during
training (Ioffe and Szegedy, "Batch Normalization", 2015, arXiv 1502.03167). Santurkar et al. ("How
Does Batch Normalization Help Optimization?", 2018, arXiv 1805.11604) report that this is not why it
helps:

- Noise after batch norm, with a mean and a spread that are drawn anew for each unit in each step,
  makes the distributions less stable than they are without batch norm. The network still trains
  about as well as with batch norm, and better than without (section 2.1, figure 2).
- Each layer's gradient is taken before the layers below have made their step. What this step does
  to the gradient, internal covariate shift by definition 2.1, is not less with batch norm than
  without, and often more (section 2.2, figure 3). Where it falls faster with batch norm as the
  training goes on, they put that down to the parameters converging faster.
- Along a step, the loss varies less with batch norm, the gradient changes less, and the effective
  smoothness, change of gradient by distance, is better (section 3.1, figure 4).

This script trains a deep dense network in these three ways, and measures all of this during
training with `jaxnorm.diagnose`: `input_shift`, `covariate_shift` and `loss_landscape`.

What differs from the paper: its networks are a VGG on CIFAR-10 and a deep linear one; here it is a
dense network of eight hidden layers with ReLU, at the paper's rate of 0.1 without momentum, and it
is measured along steps of 1/2 to 4 rates. The noise multiplies each unit by 1 to 1.25 and adds -0.5
to 0.5, drawn for the step, and up to 0.1 more or less of both, drawn for each image; in inference
there is none. The paper shows distributions as pictures; here their distance is a number: how far
the values move in a step, in standard deviations (1-D Wasserstein distance, the median of all
units). All is measured on the batch of the step, with the network in training. Loss and gradients
at different parameters are compared under the same noise, the inputs of layers under the noise of
their steps. In the picture, lines are medians of the seeds and bands their range.

Two things to mind when reading the figures, with the default options. Without batch norm the
network learns little in the first 50 steps: its gradients are small then, and so are their changes.
After that it trains at the edge of stability: its effective smoothness is near 2 / rate = 20,
beyond which steps along the gradient of a quadratic diverge.

How to run:

    python examples/reproductions/where_the_benefit_comes_from.py
    python examples/reproductions/where_the_benefit_comes_from.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/where_the_benefit_comes_from.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

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
    TrainState,
    UsageError,
    accuracy_of,
    compare,
    conclude,
    create_state,
    draw_batches,
    each,
    images_of,
    run,
    tidy,
    train,
    train_step,
)
from study.training import loss_of

from jaxnorm import linen as jnn
from jaxnorm.diagnose import covariate_shift, input_shift, loss_landscape

Kind = Literal["no norm", "batch norm", "noisy batch norm"]
KINDS: tuple[Kind, ...] = ("no norm", "batch norm", "noisy batch norm")
NONE, BATCH, NOISY = KINDS

MULTIPLES = np.linspace(0.5, 4, 8)
"""Of the learning rate: the steps along the gradient."""

MEAN, STD, JITTER = 0.5, 1.25, 0.1
"""Of the noise: what is added, what is multiplied by, how much both vary by image; at most."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train a deep network without batch norm, with it, and with noise after it."""

    depth: int = 8
    """Hidden layers; a quick run has one."""

    steps: int = 400
    """Steps of stochastic gradient descent, without momentum."""

    rate: float = 0.1
    """Learning rate."""

    batch_size: int = 128
    """Images in a batch."""

    every: int = 10
    """Steps from one measurement to the next."""

    train_images: int = 10000
    """How many training images to use, at most."""

    @property
    def used(self) -> "Options":
        """These, or smaller ones for a quick run."""
        return replace(self, depth=1, steps=20, every=10) if self.quick else self

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        super().check()
        if self.depth < 1:
            raise UsageError(f"--depth must be at least 1, not {self.depth}")
        if min(self.steps, self.every) < 1 or self.every > self.steps:
            raise UsageError(
                f"--every must be from 1 to --steps, not {self.every} with {self.steps} steps"
            )
        if self.batch_size < 2:
            raise UsageError(f"--batch-size must be at least 2, not {self.batch_size}")
        if not self.rate > 0:
            raise UsageError(f"--rate must be above 0, not {self.rate}")


class Noise(nn.Module):
    """Another mean and another spread for each unit in each step of the training.

    The key of the draws is kept with the running statistics, so that the same state draws the same
    noise, and each training step moves it on.

    Attributes:
        shape: layers, images, units.
    """

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """What the units are multiplied by, and what is added to them, each of `shape`."""
        kept = self.variable(
            "batch_stats", "key", lambda: jax.random.key_data(self.make_rng("params"))
        )
        key, following = jax.random.split(jax.random.wrap_key_data(kept.value))
        kept.value = jax.random.key_data(following)
        layers, images, units = self.shape
        # The first row is that of the step, the others are those of the images.
        draws = jax.random.uniform(key, (2, layers, 1 + images, units), minval=-1, maxval=1)
        of_step, of_image = draws[:, :, :1], JITTER * draws[:, :, 1:]
        scale = 1 + (STD - 1) * (1 + of_step[0]) / 2 + of_image[0]
        return scale, MEAN * of_step[1] + of_image[1]


class Layer(nn.Module):
    """Weights, batch norm and noise if wanted, ReLU. Keeps what the next layer gets as input."""

    kind: Kind
    width: int

    @nn.compact
    def __call__(
        self, x: jax.Array, noise: tuple[jax.Array, jax.Array] | None, train: bool
    ) -> jax.Array:
        """Maps units [batch, features] to [batch, width]; noise is what multiplies and is added."""
        plain = self.kind == NONE
        x = nn.Dense(self.width, use_bias=plain, kernel_init=nn.initializers.glorot_uniform())(x)
        if not plain:
            x = jnn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        if noise is not None:
            x = x * noise[0] + noise[1]
        x = nn.relu(x)
        self.sow("intermediates", "outputs", x)
        return x


class Network(nn.Module):
    """Hidden layers of one kind, and a linear output. In inference no noise is added."""

    kind: Kind
    depth: int
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        x = images.reshape(len(images), -1)
        noise = Noise((self.depth, len(images), self.width))() if self.noisy(train) else None
        for number in range(self.depth):
            its_own = None if noise is None else (noise[0][number], noise[1][number])
            x = Layer(self.kind, self.width)(x, its_own, train)
        return nn.Dense(CLASSES, kernel_init=nn.initializers.glorot_uniform())(x)

    def noisy(self, train: bool) -> bool:
        """Whether noise is added; while variables are made, to make its key."""
        return self.kind == NOISY and (train or self.is_initializing())


def layers_of(params: Mapping[str, Any]) -> list[str]:
    """The names of the layers in the order of the network, the output last."""
    return [*(f"Layer_{number}" for number in range(len(params) - 1)), "Dense_0"]


Values = jax.Array | np.ndarray


class Measures(NamedTuple):
    """Of one step of the training.

    Attributes:
        inputs: how far the inputs of the layers move, in standard deviations; the median of all
            units of all layers.
        gradients: internal covariate shift by definition 2.1, the mean of the layers.
        cosine: of the angle between the gradients, the mean of the layers.
        loss_range: of the loss along the gradient.
        predictiveness: the largest change of the gradient along it.
        smoothness: the largest change of the gradient by distance.
    """

    inputs: Values
    gradients: Values
    cosine: Values
    loss_range: Values
    predictiveness: Values
    smoothness: Values


def outputs_of(state: TrainState, images: jax.Array) -> jax.Array:
    """Of the hidden layers in training, the inputs of those after them: [batch, all units]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    kept = ["batch_stats", "intermediates"]
    _, found = state.apply_fn(variables, images, train=True, mutable=kept)
    hidden = layers_of(state.params)[:-1]
    return jnp.concatenate([found["intermediates"][name]["outputs"][0] for name in hidden], 1)


@jax.jit
def measures_of(
    before: TrainState, after: TrainState, images: jax.Array, labels: jax.Array, rate: float
) -> Measures:
    """What the step from `before` to `after` on this batch does."""

    def loss(params):
        return loss_of(before, params, images, labels)[0]

    moved = input_shift(outputs_of(before, images), outputs_of(after, images))
    layers = layers_of(before.params)
    shifts = covariate_shift(loss, before.params, after.params, layers)
    # No layer is before the first.
    later = [shifts[name] for name in layers[1:]]
    along = loss_landscape(loss, before.params, rate * jnp.asarray(MULTIPLES, jnp.float32))
    return Measures(
        jnp.median(moved.wasserstein),
        jnp.stack([one.distance for one in later]).mean(),
        jnp.stack([one.cosine for one in later]).mean(),
        along.loss_range,
        along.gradient_distances.max(),
        along.smoothness,
    )


class Run(NamedTuple):
    """One training.

    Attributes:
        losses: of the batches, [steps].
        error: of the test images in inference, in percent.
        measures: each [measured steps].
    """

    losses: np.ndarray
    error: float
    measures: Measures


Runs = dict[Kind, list[Run]]
"""One for each seed."""


@cache
def recipe(kind: Kind, depth: int, rate: float) -> tuple[Network, optax.GradientTransformation]:
    """One for all seeds, so that they share a compiled step."""
    return Network(kind, depth), optax.sgd(rate)


def training(kind: Kind, seed: int, data: Images, options: Options) -> Run:
    """Trains a network, and measures some of its steps."""
    images, labels = data.train_images, data.train_labels
    batches = draw_batches(len(images), options.batch_size, options.steps, seed)
    network, optimizer = recipe(kind, options.depth, options.rate)
    state = create_state(network, seed, images, optimizer)
    found = []

    def look(number: int, state: TrainState) -> None:
        if number % options.every or number >= options.steps:
            return
        batch = batches[number]
        after, _ = train_step(state, images[batch], labels[batch])
        found.append(measures_of(state, after, images[batch], labels[batch], options.rate))

    look(0, state)
    state, losses = train(state, images, labels, batches, look)
    error = 100 * (1 - accuracy_of(state, data.test_images, data.test_labels))
    return Run(losses, error, Measures(*map(np.array, zip(*found, strict=True))))


def on_average(measure: str) -> Callable[[Run], float]:
    """The mean over the training."""
    return lambda run: float(getattr(run.measures, measure).mean())


def in_the_first_step(measure: str) -> Callable[[Run], float]:
    """Before anything is learned."""
    return lambda run: float(getattr(run.measures, measure)[0])


QUANTITIES: dict[str, Callable[[Run], float]] = {
    "training loss": lambda run: float(run.losses.mean()),
    "test error at the end, percent": lambda run: run.error,
    "shift of layer inputs": on_average("inputs"),
    "shift of gradients": on_average("gradients"),
    "shift of gradients, first step": in_the_first_step("gradients"),
    "cosine of gradients": on_average("cosine"),
    "cosine of gradients, first step": in_the_first_step("cosine"),
    "range of the loss": on_average("loss_range"),
    "change of the gradient": on_average("predictiveness"),
    "effective smoothness": on_average("smoothness"),
}
"""One number for each run; means over the training, but where it says otherwise."""


def values(runs: Runs, kind: Kind, quantity: str) -> list[float]:
    """One for each seed."""
    return [QUANTITIES[quantity](run) for run in runs[kind]]


def main(options: Options) -> Report:
    """Trains all networks, and compares what was measured."""
    options.check()
    used = options.used
    data = images_of(used.data, train=used.train_images)
    runs: Runs = {kind: [] for kind in KINDS}
    jobs: list[tuple[Kind, int]] = [(kind, seed) for kind in KINDS for seed in used.used_seeds]
    for kind, seed in each(jobs):
        runs[kind].append(training(kind, seed, data, used))
    report = Report(
        name="where_the_benefit_comes_from",
        about=__doc__ or "",
        setting=f"{data.name}, {len(data.train_images)} training images, {used.depth} hidden "
        f"layers, {used.steps} steps at rate {used.rate:g}, {len(used.used_seeds)} seeds; means "
        f"over the training, measured every {used.every} steps",
        headings=["", *KINDS],
        rows=[
            [name, *(f"{Spread.of(values(runs, kind, name)):.3g}" for kind in KINDS)]
            for name in QUANTITIES
        ],
        findings=findings_of(runs),
        picture=picture_of(runs, used, data.name),
        alt="Training loss, shift of inputs and of gradients, range of the loss, change of "
        "gradients and effective smoothness over the training, for the three networks; lines are "
        "medians of the seeds, bands their range",
    )
    return conclude(report, options)


def findings_of(runs: Runs) -> list[Finding]:
    """The claims of the paper."""

    def less(claim: str, quantity: str, first: Kind, second: Kind) -> Finding:
        found = compare(values(runs, first, quantity), values(runs, second, quantity))
        return Finding(claim, seen(runs, quantity, first, second), found.less)

    distance, angle = (
        f"with batch norm, the step of the layers before {moves} a layer's gradient no less "
        "(definition 2.1, figure 3)"
        for moves in ("moves", "turns")
    )
    return [
        less(
            "with noise after it, batch norm still trains better than no norm (figure 2)",
            "training loss",
            NOISY,
            NONE,
        ),
        closeness(runs),
        less(
            "with this noise, layer inputs shift more than without batch norm (figure 2)",
            "shift of layer inputs",
            NONE,
            NOISY,
        ),
        less(f"over the training, {distance}", "shift of gradients", NONE, BATCH),
        less(f"over the training, {angle}", "cosine of gradients", BATCH, NONE),
        less(f"in the first step, {distance}", "shift of gradients, first step", NONE, BATCH),
        less(f"in the first step, {angle}", "cosine of gradients, first step", BATCH, NONE),
        less(
            "along a step, the loss varies less with batch norm (figure 4a)",
            "range of the loss",
            BATCH,
            NONE,
        ),
        less(
            "along a step, the gradient changes less with batch norm (figure 4b)",
            "change of the gradient",
            BATCH,
            NONE,
        ),
        less(
            "along a step, the gradient changes less by distance with batch norm: the effective "
            "smoothness is a smaller number (figure 4c)",
            "effective smoothness",
            BATCH,
            NONE,
        ),
    ]


def seen(runs: Runs, quantity: str, *kinds: Kind) -> str:
    """What was measured."""
    found = (f"{kind} {Spread.of(values(runs, kind, quantity)):.3g}" for kind in kinds)
    return f"{quantity}: {'; '.join(found)}"


def closeness(runs: Runs) -> Finding:
    """That noise takes away the smaller part of what batch norm gives."""
    none, batch, noisy = (np.array(values(runs, kind, "training loss")) for kind in KINDS)
    return Finding(
        "with noise after it, batch norm trains about as well as without, judged by whether its "
        "loss is nearer to that of batch norm than to that of no norm (figure 2)",
        seen(runs, "training loss", *KINDS),
        compare(list(noisy - batch), list(none - noisy)).less,
    )


PANELS = (
    ("inputs", "shift of layer inputs", "in standard deviations", "log"),
    ("cosine", "shift of gradients", "cosine, before and after others' step", "linear"),
    ("loss_range", "along a step: loss", "largest less smallest", "log"),
    ("predictiveness", "along a step: gradient", "largest change", "log"),
    ("smoothness", "along a step: smoothness", "largest change by distance", "log"),
)
"""A measure, title and label of its panel, and the scale."""


def picture_of(runs: Runs, options: Options, data: str) -> Figure:
    """The loss and the measures over the training; the upper row is about shift."""
    figure = Figure(figsize=(13.8, 8.2), layout="constrained")
    figure.suptitle(f"Where the benefit of batch norm comes from: {data}")
    first, *others = np.ravel(figure.subplots(2, 3))
    steps = np.arange(0, options.steps, options.every)
    for number, kind in enumerate(KINDS):
        losses = np.array([one.losses for one in runs[kind]])
        # Of each step alone the loss is too restless to be read.
        parts = np.array_split(losses, len(steps), axis=1)
        draw(first, steps, np.stack([part.mean(1) for part in parts], 1), kind, number)
        for panel, (name, *_) in zip(others, PANELS, strict=True):
            curves = np.array([getattr(one.measures, name) for one in runs[kind]])
            draw(panel, steps, curves, kind, number)
    first.set(title="training", ylabel="loss", yscale="log", xlabel="step")
    for panel, (_, title, label, scale) in zip(others, PANELS, strict=True):
        panel.set(title=title, ylabel=label, yscale=scale, xlabel="step")
    tidy(figure)
    return figure


def draw(panel: Axes, steps: np.ndarray, curves: np.ndarray, kind: Kind, number: int) -> None:
    """The median of the seeds within their range, which suits a logarithmic axis."""
    middle, color = np.median(curves, 0), COLORS[number]
    panel.plot(steps, middle, color=color, linestyle=DASHES[number], label=kind)
    panel.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    run(main, Options)
