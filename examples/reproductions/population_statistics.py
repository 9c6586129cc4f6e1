"""Population statistics against running averages at inference.

In inference, batch norm needs the mean and variance of a feature over all data. Most train with
running averages of what the batches had (EMA). Wu and Johnson ("Rethinking 'Batch' in BatchNorm",
2021, arXiv 2105.07576, section 3) instead average over many batches seen by the weights as they
are, which they call PreciseBN. They report that with large batches, and the high learning rates
that go with them, the validation error by running averages is far off and jumps early in training,
while that by population statistics is not; that both agree at the end; that a thousand to ten
thousand images are enough; and that the batches in which the population is seen must not be tiny,
since each layer hands the noise of its batch statistics on to the next.

This script trains a network of four hidden dense layers with batches of 256, 32 and 4 images, at
rates in proportion. At times spread over the training it measures the test error with running
averages of three momenta and with `jaxnorm.tools.population_stats`. Then it takes population
statistics of an early and of the last network from fewer images, and in smaller batches.

What differs from the paper: it trains a residual network on ImageNet with batches of up to 8192;
here it is a dense network on about a thousand digits, which are then the whole population. Where
a convolution sees many positions of each image, a dense layer sees one, so that as many images say
less. The running averages here have no start: each is a weighted mean of what the batches had, so
that only the age of the statistics tells, not the 0 and 1 that layers begin with. A large momentum
means here, as in Flax, that much of the old is kept.

How to run:

    python examples/reproductions/population_statistics.py
    python examples/reproductions/population_statistics.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/population_statistics.py --steps 600
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from study import (
    CLASSES,
    Finding,
    Images,
    Report,
    Spread,
    StudyOptions,
    TrainState,
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
from jaxnorm.tools import population_stats

EXACT = "population"
"""The name of population statistics beside the running averages."""

SEEN = 128
"""Images in a batch in which the population is seen, where nothing else is said."""

NEAR = 1.0
"""Test errors that differ by less, in percentage points, agree."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train a network, and test it by running averages and by population statistics."""

    sizes: tuple[int, ...] = (256, 32, 4)
    """Images in a batch, from large to small."""

    rate: float = 0.1
    """Learning rate for batches of 32; that for others is proportional to their size."""

    steps: int = 300
    """Steps of training."""

    momenta: tuple[float, ...] = (0.5, 0.9, 0.99)
    """How much of the old a running average keeps; the paper speaks of 0.9."""

    samples: tuple[int, ...] = (32, 64, 128, 256, 512, 1280)
    """From how many images to take population statistics, in batches of 32."""

    seen_in: tuple[int, ...] = (2, 4, 16, 128)
    """Images in the batches in which 256 images are seen for population statistics."""

    train_images: int = 1280
    """How many training images to use, at most; they are the population."""

    def check(self) -> None:
        """Refuses impossible options."""
        super().check()
        if not self.sizes or min(self.sizes) < 2:
            raise UsageError(f"--sizes must be 2 or more, not {self.sizes}")
        if not self.momenta or not all(0 <= momentum < 1 for momentum in self.momenta):
            raise UsageError(f"--momenta must be at least 0 and less than 1, not {self.momenta}")
        if not self.samples or min(self.samples) < 32:
            raise UsageError(f"--samples must be 32 or more, a batch, not {self.samples}")
        if not self.seen_in or not all(2 <= size <= 256 for size in self.seen_in):
            raise UsageError(f"--seen-in must be from 2 to 256, not {self.seen_in}")
        if self.steps < 10:
            raise UsageError(f"--steps must be at least 10, not {self.steps}")


class Network(nn.Module):
    """Dense layers with batch norm, and a linear output.

    Running statistics are those of the last batch; `Averages` makes averages of them.
    """

    width: int = 64
    depth: int = 4

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        x = images.reshape(len(images), -1)
        for _ in range(self.depth):
            x = nn.Dense(self.width, use_bias=False)(x)
            x = nn.relu(jnn.BatchNorm(use_running_average=not train, momentum=0.0)(x))
        return nn.Dense(CLASSES)(x)


NETWORK = Network()
AXES: Any = (0, None)
MANY = nn.vmap(Network, variable_axes={"params": 0, "batch_stats": 0}, in_axes=AXES)()
"""Networks side by side, each with its own images; one compiled program sees to all of them."""


class Kind(NamedTuple):
    """A way to train: images in a batch, and the learning rate."""

    size: int
    rate: float

    def __str__(self) -> str:
        return f"batches of {self.size}, rate {self.rate:g}"


class Averages:
    """Running averages of the batches' statistics, by several momenta at once.

    Momentum plays no part in the training, so that one training serves all.
    """

    def __init__(self, momenta: Sequence[float]):
        self._momenta, self._count, self._kept = np.asarray(momenta), 0, None

    def follow(self, of_batch: Any) -> None:
        """Takes in the statistics of a further batch."""
        self._count += 1
        # The weights of all batches sum up to 1.
        new = (1 - self._momenta) / (1 - self._momenta**self._count)
        if self._kept is None:
            self._kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(new)), of_batch)
        self._kept = _blend(self._kept, of_batch, jnp.asarray(new, jnp.float32))

    def each(self) -> list[Any]:
        """The averages, in the order of the momenta."""
        return [_pick(self._kept, number) for number in range(len(self._momenta))]


@jax.jit
@partial(jax.vmap, in_axes=(0, None, 0))
def _blend(kept: Any, batch: Any, weight: jax.Array) -> Any:
    return jax.tree.map(lambda old, new: old + weight * (new - old), kept, batch)


def _pick(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], tree)


class Snapshot(NamedTuple):
    """A network during its training, and the running averages it then had."""

    seed: int
    step: int
    state: TrainState
    averages: list[Any]


@cache
def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """One for all seeds, so that they share a compiled step."""
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)


def trained(
    kind: Kind, seed: int, data: Images, moments: Sequence[int], options: Options
) -> list[Snapshot]:
    """Trains a network, and keeps it as it is after some of the steps."""
    steps = moments[-1]
    averages, kept = Averages(options.momenta), []

    def after_step(step: int, state: TrainState) -> None:
        averages.follow(state.batch_stats)
        if step in moments:
            kept.append(Snapshot(seed, step, state, averages.each()))

    state = create_state(NETWORK, seed, data.train_images, optimizer(kind.rate, steps))
    batches = draw_batches(len(data.train_images), kind.size, steps, seed)
    train(state, data.train_images, data.train_labels, batches, after_step)
    return kept


def population(snapshots: list[Snapshot], images: np.ndarray, count: int, size: int) -> list[Any]:
    """Statistics of each network over `count` images in batches of `size`.

    The images are others for each seed, the same for all networks of a seed.
    """
    count = count // size * size
    rows = [np.random.default_rng(one.seed).permutation(len(images))[:count] for one in snapshots]
    batches = [images[part] for part in np.split(np.stack(rows), count // size, axis=1)]
    states = [one.state for one in snapshots]
    each_one = [{"params": one.params, "batch_stats": one.batch_stats} for one in states]
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each_one)
    exact = population_stats(
        MANY.bind(variables), batches, call=lambda m, x: m(x, False), progress=False
    )
    return [_pick(exact.variables["batch_stats"], number) for number in range(len(snapshots))]


def error_of(state: TrainState, stats: Any, data: Images) -> float:
    """The share of test images that a network with these statistics gets wrong, in percent."""
    state = state.replace(batch_stats=stats)
    return 100 * (1 - accuracy_of(state, data.test_images, data.test_labels))


Curves = dict[str, np.ndarray]
"""For each kind of statistics the test errors [seeds, moments]."""


def curves_of(snapshots: list[Snapshot], data: Images, options: Options) -> Curves:
    """The errors by all running averages and by population statistics."""
    exact = population(snapshots, data.train_images, len(data.train_images), SEEN)
    names = [*(f"average, momentum {momentum:g}" for momentum in options.momenta), EXACT]
    errors = [
        [error_of(one.state, stats, data) for stats in (*one.averages, found)]
        for one, found in zip(snapshots, exact, strict=True)
    ]
    seeds = len({one.seed for one in snapshots})
    return {
        name: np.reshape(of_all, (seeds, -1))
        for name, of_all in zip(names, np.transpose(errors), strict=True)
    }


class Taken(NamedTuple):
    """Errors [seeds] of an early and of the last network, by population statistics of some kind."""

    early: np.ndarray
    last: np.ndarray


def taken(snapshots: list[Snapshot], data: Images, count: int, size: int) -> Taken:
    """The errors by statistics of `count` images in batches of `size`."""
    found = population(snapshots, data.train_images, count, size)
    errors = [error_of(one.state, stats, data) for one, stats in zip(snapshots, found, strict=True)]
    return Taken(np.array(errors[::2]), np.array(errors[1::2]))


class Result(NamedTuple):
    """What was measured.

    Attributes:
        moments: the steps after which networks were tested.
        curves: for each way to train.
        by_count: for each number of images, in batches of 32.
        by_size: for each size of batches, of 256 images.
        early: the step of the early network of `by_count` and `by_size`.
    """

    moments: list[int]
    curves: dict[Kind, Curves]
    by_count: dict[int, Taken]
    by_size: dict[int, Taken]
    early: int


def measure(kinds: list[Kind], data: Images, options: Options) -> Result:
    """Trains all networks and tests them with all statistics."""
    steps = 40 if options.quick else options.steps
    moments = sorted(set(np.geomspace(1, steps, 5 if options.quick else 14).round().astype(int)))
    early = min(moments, key=lambda moment: abs(moment - steps / 10))
    curves, snapshots = {}, {kind: [] for kind in kinds}
    jobs = [(kind, seed) for kind in kinds for seed in options.used_seeds]
    for kind, seed in each(jobs, "trainings"):
        snapshots[kind] += trained(kind, seed, data, moments, options)
    for kind in each(kinds, "statistics over the training"):
        curves[kind] = curves_of(snapshots[kind], data, options)
    two = [one for one in snapshots[kinds[0]] if one.step in (early, steps)]
    most = len(data.train_images)
    counts = [count for count in options.samples if 32 <= count <= most]
    sizes = [size for size in options.seen_in if size <= min(256, most)]
    if options.quick:
        counts, sizes = counts[:1], sizes[:1]
    by_count, by_size = {}, {}
    for count in each(counts, "numbers of images"):
        by_count[count] = taken(two, data, count, 32)
    for size in each(sizes, "sizes of batches"):
        by_size[size] = taken(two, data, min(256, most), size)
    return Result(moments, curves, by_count, by_size, early)


def main(options: Options) -> Report:
    """Trains all networks, tests them with all statistics, and compares the errors."""
    options.check()
    data = images_of(options.data, train=options.train_images)
    if max(options.sizes) > len(data.train_images):
        raise UsageError(f"--sizes: there are {len(data.train_images)} training images only")
    sizes = options.sizes[:1] if options.quick else options.sizes
    kinds = [Kind(size, options.rate * size / 32) for size in sizes]
    result = measure(kinds, data, options)
    steps = result.moments[-1]
    report = Report(
        name="population_statistics",
        about=__doc__ or "",
        setting=f"Test error in percent on {data.name}, {len(data.train_images)} training images, "
        f"{steps} steps, {len(options.used_seeds)} seeds; early, if no step is named, is the mean "
        f"over the steps {', '.join(map(str, early_moments(result.moments)))}",
        headings=["training", "statistics", "early", "last"],
        rows=rows_of(result),
        findings=findings_of(result, options),
        picture=picture_of(result, data.name),
        alt="Test error over the steps by running averages and population statistics, and against "
        "the number of images for the latter",
    )
    return conclude(report, options)


def early_moments(moments: Sequence[int]) -> list[int]:
    """Those in the first fifth of the training, but for the very first steps."""
    return [moment for moment in moments if 3 <= moment <= max(moments[-1] / 5, 5)]


def early_of(result: Result, kind: Kind, name: str) -> np.ndarray:
    """The mean error [seeds] over the early steps."""
    chosen = np.isin(result.moments, early_moments(result.moments))
    return result.curves[kind][name][:, chosen].mean(1)


def rows_of(result: Result) -> list[list[str]]:
    """The rows of the table."""
    rows = [
        [
            str(kind),
            name,
            f"{Spread.of(list(early_of(result, kind, name))):.1f}",
            f"{Spread.of(list(errors[:, -1])):.1f}",
        ]
        for kind, curves in result.curves.items()
        for name, errors in curves.items()
    ]
    how = {f"{count} images": errors for count, errors in result.by_count.items()}
    how |= {f"256 images by {size}": errors for size, errors in result.by_size.items()}
    first = next(iter(result.curves))
    for name, errors in how.items():
        early, last = (f"{Spread.of(list(part)):.1f}" for part in errors)
        rows.append([f"{first}, step {result.early}", f"population, {name}", early, last])
    return rows


def largest_rise(errors: np.ndarray) -> np.ndarray:
    """By how much the error rises at most from one time to the next, for each seed."""
    return np.maximum(np.diff(errors, axis=1).max(1), 0)


def agree(first: np.ndarray, second: np.ndarray) -> bool | None:
    """Whether the 95% interval of the difference, paired by seed, is within `NEAR` of 0, or out."""
    difference = compare(first.tolist(), second.tolist())
    if np.isnan(difference.margin):
        return None
    if abs(difference.mean) + difference.margin <= NEAR:
        return True
    return False if abs(difference.mean) - difference.margin > NEAR else None


def less(claim: str, first: str, low: np.ndarray, second: str, high: np.ndarray) -> Finding:
    """The claim that the first values are lower than the second ones; each has a name."""
    measured = f"{first}: {_spread(low)}; {second}: {_spread(high)}"
    return Finding(f"{claim} (section 3)", measured, compare(low.tolist(), high.tolist()).less)


def _spread(values: np.ndarray) -> str:
    return f"{Spread.of(values.tolist()):.1f}"


def findings_of(result: Result, options: Options) -> list[Finding]:
    """The claims of the paper."""
    usual = min(options.momenta, key=lambda momentum: abs(momentum - 0.9))
    name = "average, momentum {:g}".format
    average, short, long = map(name, (usual, min(options.momenta), max(options.momenta)))
    large, small = next(iter(result.curves)), list(result.curves)[-1]
    exact, averaged = result.curves[large][EXACT], result.curves[large][average]
    early, early_averaged, early_long = (
        early_of(result, large, one) for one in (EXACT, average, long)
    )
    gap = early_of(result, small, average) - early_of(result, small, EXACT)
    ends = [result.curves[small][one][:, -1] for one in (EXACT, short)]
    return [
        less(
            f"early, with {large}, population statistics err less than running averages",
            *(EXACT, early, average, early_averaged),
        ),
        less(
            "the error by running averages jumps, that by population statistics does not: its "
            "largest rise from one test to the next is smaller",
            *(EXACT, largest_rise(exact), average, largest_rise(averaged)),
        ),
        Finding(
            f"in the end both agree, within {NEAR:g} percentage point (section 3)",
            f"{EXACT}: {_spread(exact[:, -1])}; {average}: {_spread(averaged[:, -1])}",
            agree(exact[:, -1], averaged[:, -1]),
        ),
        less(
            "averages that keep more are of older weights, and err more early",
            *(average, early_averaged, long, early_long),
        ),
        less(
            f"early, running averages are behind by less with {small}, than with {large}",
            *(f"batches of {small.size}", gap),
            *(f"batches of {large.size}", early_averaged - early),
        ),
        less(
            "averages that keep little know few images only: at the end of a training with "
            f"{small}, they err more than population statistics",
            *(EXACT, ends[0], short, ends[1]),
        ),
        *statistics_findings(result),
    ]


def statistics_findings(result: Result) -> list[Finding]:
    """The claims on how population statistics are taken."""
    counts, sizes = result.by_count, result.by_size
    few, many = min(counts), max(counts)
    some = min(counts, key=lambda count: abs(count - many / 4))
    tiny, large = min(sizes), max(sizes)
    shown = (f"{count} images: {_spread(counts[count].early)}" for count in (few, some, many))
    names = [f"batches of {size}" for size in (large, tiny)]
    return [
        Finding(
            f"few images are enough: by {some} the early network errs as by {many}, within "
            f"{NEAR:g} percentage point (section 3)",
            "; ".join(shown),
            agree(counts[some].early, counts[many].early),
        ),
        *(
            less(
                f"{when}, of the same images, batches of {tiny} give worse statistics than batches "
                f"of {large}",
                *(names[0], sizes[large][part], names[1], sizes[tiny][part]),
            )
            for part, when in enumerate(("early", "in the end"))
        ),
    ]


def picture_of(result: Result, data: str) -> Figure:
    """Error over steps for large and small batches, and against images and sizes of batches."""
    shown = list(dict.fromkeys((next(iter(result.curves)), list(result.curves)[-1])))
    figure, panels = figure_of(len(shown) + 2, f"Statistics at inference: {data}")
    for panel, kind in zip(panels, shown, strict=False):
        for number, (name, errors) in enumerate(result.curves[kind].items()):
            band(panel, result.moments, errors, name, number)
        panel.set(xscale="log", yscale="log", xlabel="steps of training", title=str(kind))
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        panel.yaxis.set_major_formatter(LogFormatter())
    titles = ("population statistics, in batches of 32", "population statistics of 256 images")
    labels = ("images seen", "images in a batch")
    parts = (result.by_count, result.by_size)
    for panel, title, label, taken_by in zip(panels[-2:], titles, labels, parts, strict=True):
        for part, name in enumerate((f"after {result.early} steps", "after the last step")):
            errors = np.transpose([errors[part] for errors in taken_by.values()])
            band(panel, list(taken_by), errors, name, 4 + part)
        panel.set(xscale="log", xlabel=label, title=title, ylim=(0, None))
        panel.set_xticks(list(taken_by), map(str, taken_by))
        panel.minorticks_off()
    for panel in panels:
        panel.set_ylabel("test error, percent")
    tidy(figure)
    return figure


if __name__ == "__main__":
    run(main, Options)
