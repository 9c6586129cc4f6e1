"""Normalizing weights: weight norm, and weight standardization with group norm.

Salimans and Kingma ("Weight Normalization", 2016, arXiv 1602.07868, section 5.1) train a
convolutional network on CIFAR-10 by Adam, with the best of a few rates for each way. They report
that weight norm trains faster than the plain weights, that batch norm gets on fastest in the first
passes, and that in the end weight norm errs as often as the plain weights. Their weight norm starts
from data (section 3): one batch is sent through, and scale and bias of each feature are set so that
its mean is 0 and its deviation 1. Qiao et al. ("Weight Standardization", 2019, arXiv 1903.10520,
section 5) report that with very small batches group norm errs less where the weights of the
convolutions are standardized, and then no more than batch norm does with large batches.

This script trains one convolutional network in each of these ways. Weight norm starts from data,
and once from the norms of the plain weights (`keep_init`), where the network is the same function
as the plain one. Since the start alone may help, plain weights start from data once as well. The
rate of each is the one, of four, with the least training loss in the first passes. Group norm with
standardized weights, group norm alone and batch norm are trained by SGD with batches of 32 and 2,
at rates proportional to the size.

What differs from the papers: six layers on digits instead of nine on CIFAR-10 and residual networks
on ImageNet. Small batches are small for the gradient as well, not only for the statistics. Plain
weights start by He's rule. A network "errs no more" than another if it is less than half a point
above it.

How to run:

    python examples/reproductions/weight_norms.py
    python examples/reproductions/weight_norms.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/weight_norms.py --data fashion_mnist
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
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

LARGE, SMALL = 32, 2
"""Images in a batch."""

POINT = 0.5
"""Percent of test images: what counts as no more errors."""


def unchanged(layer: nn.Module) -> nn.Module:
    """The layer with its weights as they are."""
    return layer


def no_norm(train: bool) -> Callable[[jax.Array], jax.Array]:
    """Activations as they are."""
    del train
    return lambda x: x


def batch_norm(train: bool) -> nn.Module:
    """With running statistics that follow within twenty steps."""
    return jnn.BatchNorm(use_running_average=not train, momentum=0.95)


def group_norm(train: bool) -> nn.Module:
    """Four groups, so that each has at least four features."""
    del train
    return jnn.GroupNorm(num_groups=4)


class Way(NamedTuple):
    """What is normalized, and how the weights start.

    Attributes:
        conv: wraps each convolution.
        dense: wraps the last layer.
        norm: of the activations before each relu, in training or inference.
        from_data: whether scales and biases start from one batch.
    """

    conv: Callable[[nn.Module], nn.Module] = unchanged
    dense: Callable[[nn.Module], nn.Module] = unchanged
    norm: Callable[[bool], Any] = no_norm
    from_data: bool = False


KEPT = partial(jnn.WeightNorm, variable_filter={"kernel"}, keep_init=True)
ONES = partial(jnn.WeightNorm, variable_filter={"kernel"})
STANDARD = partial(jnn.WeightStandardization, variable_filter={"kernel"})

PLAIN, PLAIN_DATA = "plain", "plain, from data"
WEIGHT, WEIGHT_DATA = "weight norm, keep_init", "weight norm, from data"
BATCH, GROUP, STANDARDIZED = "batch norm", "group norm", "group norm + standardized weights"
WAYS = {
    PLAIN: Way(),
    PLAIN_DATA: Way(from_data=True),
    WEIGHT: Way(KEPT, KEPT),
    WEIGHT_DATA: Way(ONES, ONES, from_data=True),
    BATCH: Way(norm=batch_norm),
    GROUP: Way(norm=group_norm),
    STANDARDIZED: Way(conv=STANDARD, norm=group_norm),
}
SPEED = (PLAIN, PLAIN_DATA, WEIGHT, WEIGHT_DATA, BATCH)
"""Ways whose speed is compared."""

ERRORS = (BATCH, GROUP, STANDARDIZED)
"""Ways whose errors with small batches are compared."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train with plain, normalized and standardized weights, and compare speed and errors."""

    epochs: int = 8
    """Passes over the training images."""

    early: int = 2
    """The first passes, over which the training loss is averaged to compare speed."""

    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    """Learning rates of Adam, of which each way has its best."""

    sgd_rate: float = 0.1
    """Learning rate of SGD for batches of 32; that for others is proportional to their size."""

    train_images: int = 1200
    """How many training images to use, at most."""

    depth: int = 5
    """Convolutions."""

    @property
    def used_depth(self) -> int:
        """Of a quick run one, since compiling takes most of its time."""
        return 1 if self.quick else self.depth

    def check(self) -> None:
        """Refuses what would leave nothing to compare."""
        super().check()
        if not 1 <= self.early <= self.epochs:
            raise UsageError(f"--early must be from 1 to --epochs, not {self.early}")
        if not self.rates or min(*self.rates, self.sgd_rate) <= 0:
            raise UsageError("--rates and --sgd-rate must be more than 0, and one or more")
        if self.train_images < LARGE:
            raise UsageError(f"--train-images must be at least {LARGE}, not {self.train_images}")


class Network(nn.Module):
    """Convolutions with a relu each, and a linear output."""

    way: Way
    depth: int

    @property
    def layers(self) -> list[str]:
        """Names, in the order of the calls."""
        return [*(f"conv{number}" for number in range(self.depth)), "output"]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        way, x = self.way, images
        normalized = way.norm is not no_norm
        # The paper's weights before a start from data; only their directions matter to weight norm.
        init = nn.initializers.normal(0.05) if way.from_data else nn.initializers.he_normal()
        options: dict[str, Any] = dict(kernel_init=init, use_bias=not normalized)
        for number, name in enumerate(self.layers[:-1]):
            # The first takes half of the pixels each way, and so does the one in the middle.
            stride = 2 if number in (0, self.depth // 2 + 1) else 1
            x = way.conv(nn.Conv(16, (3, 3), stride, name=name, **options))(x)
            self.sow("intermediates", f"from_{name}", x)
            x = nn.relu(way.norm(train)(x))
        x = x.reshape(len(x), -1)
        x = way.dense(nn.Dense(CLASSES, name="output", kernel_init=init))(x)
        self.sow("intermediates", "from_output", x)
        return x


@partial(jax.jit, static_argnums=0)
def outputs_of(network: Network, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """What each layer returns, before its relu."""
    _, state = network.apply({"params": params}, images, train=True, mutable=["intermediates"])
    seen: Any = state["intermediates"]
    return {layer: seen[f"from_{layer}"][0] for layer in network.layers}


def from_data(network: Network, params: Any, images: np.ndarray) -> Any:
    """Parameters for which every feature has mean 0 and deviation 1 on these images.

    Layer after layer, since each changes what comes into the next.
    """
    flat = flatten_dict(params)
    for layer in network.layers:
        x = np.asarray(outputs_of(network, unflatten_dict(flat), images)[layer])
        mean, std = (moment(axis=tuple(range(x.ndim - 1))) for moment in (x.mean, x.std))
        # Weight norm has a scale that sets the size; elsewhere the weights themselves do.
        sizes = [path for path in flat if path[-1] == f"{layer}/kernel/scale"]
        size, bias = (*sizes, (layer, "kernel"))[0], (layer, "bias")
        flat |= {size: np.asarray(flat[size]) / std, bias: (flat[bias] - mean) / std}
    return unflatten_dict(flat)


class Trained(NamedTuple):
    """What came of one training.

    Attributes:
        losses: of each step, in training.
        error: the share of test images that are classified wrongly, in percent.
    """

    losses: np.ndarray
    error: float


@cache
def adam(way: str, rate: float, depth: int) -> tuple[Network, optax.GradientTransformation]:
    """One network and optimizer for all seeds, so that they share a compiled step."""
    return Network(WAYS[way], depth), optax.adam(rate)


@cache
def sgd(
    way: str, rate: float, steps: int, depth: int
) -> tuple[Network, optax.GradientTransformation]:
    """The same with momentum, and a rate that falls to 0."""
    return Network(WAYS[way], depth), optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)


def trained(
    recipe: tuple[Network, optax.GradientTransformation],
    seed: int,
    batches: np.ndarray,
    data: Images,
) -> Trained:
    """Trains a new network, that starts from the first batch if it starts from data."""
    network, optimizer = recipe
    state = create_state(network, seed, data.train_images, optimizer)
    if network.way.from_data:
        some = data.train_images[batches[0]]
        state = state.replace(params=from_data(network, state.params, some))
    state, losses = train(state, data.train_images, data.train_labels, batches)
    return Trained(losses, 100 * (1 - accuracy_of(state, data.test_images, data.test_labels)))


Speeds = dict[tuple[str, float], list[Trained]]
"""By way and rate, one for each seed."""

Errors = dict[tuple[str, int], list[Trained]]
"""By way and images in a batch, one for each seed."""


def speeds_of(data: Images, options: Options) -> Speeds:
    """Trains with large batches by Adam, at each rate."""
    count = len(data.train_images)
    steps = (count // LARGE) * (options.early if options.quick else options.epochs)
    rates = options.rates[-1:] if options.quick else options.rates
    found: Speeds = {(way, rate): [] for way in SPEED for rate in rates}
    jobs = [(*kind, seed) for kind in found for seed in options.used_seeds]
    for way, rate, seed in each(jobs, "weight norm"):
        batches = draw_batches(count, LARGE, steps, seed)
        recipe = adam(way, rate, options.used_depth)
        found[way, rate].append(trained(recipe, seed, batches, data))
    return found


def errors_of(data: Images, options: Options) -> Errors:
    """Trains by SGD with large and small batches."""
    count = len(data.train_images)
    found: Errors = {(way, size): [] for way in ERRORS for size in (LARGE, SMALL)}
    jobs = [(*kind, seed) for kind in found for seed in options.used_seeds]
    for way, size, seed in each(jobs, "weight standardization"):
        steps = 8 if options.quick else options.epochs * (count // size)
        batches = draw_batches(count, size, steps, seed)
        recipe = sgd(way, options.sgd_rate * size / LARGE, steps, options.used_depth)
        found[way, size].append(trained(recipe, seed, batches, data))
    return found


def mean_loss(runs: list[Trained], steps: int) -> list[float]:
    """Of each training, the mean loss of its first steps."""
    return [float(one.losses[:steps].mean()) for one in runs]


def best_rates(speeds: Speeds, steps: int) -> dict[str, float]:
    """For each way the rate with the least loss in the first steps, over all seeds."""
    rates: dict[str, float] = {}
    for way in SPEED:
        losses = {
            rate: np.mean(mean_loss(runs, steps))
            for (of, rate), runs in speeds.items()
            if of == way
        }
        rates[way] = min(losses, key=lambda rate: losses[rate])
    return rates


def main(options: Options) -> Report:
    """Trains all networks, and compares their speed and errors."""
    options.check()
    data = images_of(options.data, train=options.train_images)
    per_pass = len(data.train_images) // LARGE
    speeds, errors = speeds_of(data, options), errors_of(data, options)
    early = options.early * per_pass
    rates = best_rates(speeds, early)
    rows = []
    for way, rate in rates.items():
        runs = speeds[way, rate]
        loss = Spread.of(mean_loss(runs, early))
        rows.append([way, f"Adam, {LARGE}", f"{rate:g}", f"{loss:.3f}", f"{error_of(runs):.1f}"])
    for (way, size), runs in errors.items():
        rate = options.sgd_rate * size / LARGE
        loss = Spread.of(mean_loss(runs, options.early * (len(data.train_images) // size)))
        rows.append([way, f"SGD, {size}", f"{rate:g}", f"{loss:.3f}", f"{error_of(runs):.1f}"])
    report = Report(
        name="weight_norms",
        about=__doc__ or "",
        setting=f"On {data.name}, {len(data.train_images)} training images, {options.epochs} "
        f"passes, {len(options.used_seeds)} seeds; of Adam's rates {options.rates} the best",
        headings=[
            "network",
            "optimizer, batch",
            "rate",
            f"loss, first {options.early} passes",
            "test error, percent",
        ],
        rows=rows,
        findings=findings_of(speeds, errors, rates, early),
        picture=picture_of(speeds, errors, rates, per_pass, options.early, data.name),
        alt="Training loss over passes and at each rate, plain and with weight norm; test errors "
        "with large and small batches",
    )
    return conclude(report, options)


def error_of(runs: list[Trained]) -> Spread:
    """Test errors over seeds."""
    return Spread.of([one.error for one in runs])


def no_more(first: list[Trained], second: list[Trained]) -> bool | None:
    """Whether the first errs no more than the second, give or take half a point."""
    return compare(error_of(first).values, [one.error + POINT for one in second]).less


def findings_of(
    speeds: Speeds, errors: Errors, rates: dict[str, float], early: int
) -> list[Finding]:
    """The claims of the two papers, and one comparison that tells the start from the rest."""

    def faster(claim: str, first: str, second: str) -> Finding:
        losses = {way: mean_loss(speeds[way, rates[way]], early) for way in (first, second)}
        found = (f"{way}: {Spread.of(loss):.3f}" for way, loss in losses.items())
        return Finding(claim, "early loss, " + "; ".join(found), compare(*losses.values()).less)

    def by_error(
        claim: str, first: tuple[str, int], second: tuple[str, int], held: bool | None
    ) -> Finding:
        found = (
            f"{way}, {size}: {error_of(errors[way, size]):.1f}" for way, size in (first, second)
        )
        return Finding(claim, "error, " + "; ".join(found), held)

    plain, normed = (speeds[way, rates[way]] for way in (PLAIN, WEIGHT_DATA))
    ours, group, batch = (STANDARDIZED, SMALL), (GROUP, SMALL), (BATCH, LARGE)
    less = compare(error_of(errors[ours]).values, error_of(errors[group]).values).less
    return [
        faster(
            "weight norm trains faster than plain weights (1602.07868, section 5.1)",
            WEIGHT_DATA,
            PLAIN,
        ),
        faster(
            "the same from the same function, with `keep_init` (not in the paper)", WEIGHT, PLAIN
        ),
        faster("the same with both started from data (not in the paper)", WEIGHT_DATA, PLAIN_DATA),
        faster(
            "batch norm trains faster yet in the first passes (1602.07868, section 5.1)",
            BATCH,
            WEIGHT_DATA,
        ),
        Finding(
            "in the end weight norm errs no more than plain weights (1602.07868, section 5.1)",
            f"error, {WEIGHT_DATA}: {error_of(normed):.1f}; {PLAIN}: {error_of(plain):.1f}",
            no_more(normed, plain),
        ),
        by_error(
            f"with batches of {SMALL}, group norm errs less with standardized weights "
            "(1903.10520, section 5)",
            ours,
            group,
            less,
        ),
        by_error(
            f"group norm and standardized weights with batches of {SMALL} err no more than batch "
            f"norm with {LARGE} (1903.10520, section 5)",
            ours,
            batch,
            no_more(errors[ours], errors[batch]),
        ),
    ]


def picture_of(
    speeds: Speeds, errors: Errors, rates: dict[str, float], per_pass: int, early: int, data: str
) -> Figure:
    """Loss over passes, loss against the rate, and bars of errors."""
    figure, (curves, tried, bars) = figure_of(3, f"Weight norm and weight standardization: {data}")
    for number, way in enumerate(SPEED):
        losses = np.stack([one.losses for one in speeds[way, rates[way]]])
        # The mean of each half of a pass, drawn at its middle.
        half = per_pass // 2
        parts = losses[:, : losses.shape[1] // half * half].reshape(len(losses), -1, half)
        passes = (np.arange(parts.shape[1]) + 0.5) * half / per_pass
        band(curves, passes, parts.mean(-1), way, number)
        every = [rate for of, rate in speeds if of == way]
        means = [mean_loss(speeds[way, rate], early * per_pass) for rate in every]
        band(tried, every, np.transpose(means), way, number)
    curves.set(xlabel="passes over the images", ylabel="training loss", yscale="log")
    curves.set_title("Adam, each at its best rate")
    tried.set(xlabel="Adam's learning rate", ylabel=f"loss, mean of the first {early} passes")
    tried.set(xscale="log", yscale="log", title="at each rate")
    names = {BATCH: "batch norm", GROUP: "group norm", STANDARDIZED: "group norm,\nstandardized"}
    for place, way in enumerate(ERRORS):
        for shift, size, color in ((-0.2, LARGE, COLORS[5]), (0.2, SMALL, COLORS[6])):
            found = error_of(errors[way, size])
            spread = None if len(found.values) == 1 else found.std
            bars.bar(place + shift, found.mean, 0.4, yerr=spread, color=color, ecolor="gray")
    bars.set_xticks(range(len(ERRORS)), [names[way] for way in ERRORS])
    bars.set(ylabel="test error, percent", title="SGD")
    tidy(figure)
    bars.bar(0, 0, color=COLORS[5], label=f"batches of {LARGE}")
    bars.bar(0, 0, color=COLORS[6], label=f"batches of {SMALL}")
    bars.set_ylim(top=1.25 * bars.get_ylim()[1])
    bars.legend(frameon=False, loc="upper right", ncols=2)
    return figure


if __name__ == "__main__":
    run(main, Options)
