"""AdaBN, a prior on the statistics, and TENT on corrupted and on foreign digits.

A trained classifier meets images of the same kind that are noisy, blurred or pale, and no labels.
Li et al. ("Revisiting Batch Normalization For Practical Domain Adaptation", 2016, arXiv 1603.04779)
replace the statistics of its batch norms by those of the new images: AdaBN. Schneider et al.
("Improving robustness against common corruptions by covariate shift adaptation", 2020, arXiv
2006.16971) show that this lowers the error on the corruptions of ImageNet-C. With few images they
mix in the statistics of the training, as if these came from N images, and report that then even a
single image is enough to gain. Wang et al. ("Tent: Fully Test-Time Adaptation by Entropy
Minimization", 2021, arXiv 2006.10726) normalize by each batch as it comes, and also take one step
on scales and biases towards surer predictions. Table 2 reports errors on the strongest corruptions
of CIFAR-10 of 40.8% as trained, 17.3% with the statistics of the batches, and 14.3% with TENT.

This script trains a small convolutional network on clean digits, and corrupts others, in seven ways
at five severities in the style of ImageNet-C (Hendrycks and Dietterich, 2019, arXiv 1903.12261). It
tests the network as trained, with AdaBN on all of them (without labels), and with TENT; and at the
highest severity with batches of different sizes, with and without a prior of N = 16. With
`--foreign`, it also goes from MNIST to USPS and back, with `adapt_stats` and TENT.

What differs from the papers: the network is small and the images few, so that TENT sees 16 batches
instead of 50 and more. Its rate is 0.003 instead of 0.001: parameters under Adam can then go as far
as in the paper. The corruptions are made for small images in grey; none comes from ImageNet-C. At
severity 5, `pixelate` leaves 3 x 3 of 8 x 8 pixels, too few to tell most digits.

How to run:

    python examples/reproductions/corrupted_digits.py
    python examples/reproductions/corrupted_digits.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/corrupted_digits.py --foreign
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import optax
from contrast_and_style import show
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import (
    CLASSES,
    COLORS,
    Finding,
    Report,
    Spread,
    StudyOptions,
    TrainState,
    UsageError,
    band,
    compare,
    conclude,
    create_state,
    draw_batches,
    each,
    eval_step,
    images_of,
    run,
    tidy,
    train,
)
from study.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from study.examples import Domain, load_domains

from jaxnorm import linen as jnn
from jaxnorm.tools import Tent, TentState, adapt_stats, batch_adapter, tent

SIZES = (1, 4, 16, 64)
"""Images in a batch that is adapted to by itself."""
STRENGTHS = (0, 16)
"""What the statistics of the training are worth, in images."""
BATCH = 64
"""Images in a batch of TENT."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train on clean digits, test on corrupted ones, adapt in between without labels."""

    train_images: int = 500
    """How many clean images to train on, at most."""

    target_images: int = 1024
    """How many images to corrupt, at most: test images, then training images not trained on."""

    steps: int = 300
    """Training steps, with batches of 64."""

    tent_rate: float = 0.003
    """Learning rate of TENT, with Adam."""

    passes: int = 5
    """Passes of TENT over the images in its second form, which then predicts."""

    foreign: bool = False
    """Also from MNIST to USPS and back; needs JAXNORM_DATA with mnist.npz and usps.npz."""

    def check(self) -> None:
        """Refuses impossible options."""
        super().check()
        if min(self.steps, self.passes) < 1 or self.tent_rate <= 0:
            raise UsageError("--steps and --passes must be at least 1, --tent-rate positive")
        if min(self.train_images, self.target_images) < BATCH:
            raise UsageError(f"--train-images and --target-images must be at least {BATCH}")


# --- Network and training -------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions with batch norm, and a linear output."""

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, side, side, 1] to logits [batch, classes]."""
        x = images
        for number in (1, 2):
            x = nn.Conv(number * self.width, (3, 3), strides=number, use_bias=False)(x)
            x = nn.relu(jnn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


@cache
def recipe(steps: int) -> tuple[Network, optax.GradientTransformation]:
    """One for all seeds, so that they share a compiled step."""
    return Network(), optax.adam(optax.cosine_decay_schedule(3e-3, steps))


def trained(images: np.ndarray, labels: np.ndarray, seed: int, steps: int) -> TrainState:
    """A network that has learned clean images."""
    network, optimizer = recipe(steps)
    state = create_state(network, seed, images, optimizer)
    return train(state, images, labels, draw_batches(len(images), BATCH, steps, seed))[0]


def bound(state: TrainState) -> nn.Module:
    """The network with its variables, which is what jaxnorm's tools take."""
    return Network().bind({"params": state.params, "batch_stats": state.batch_stats})


# --- The ways to adapt ----------------------------------------------------------------------------


Adapter = Callable[[np.ndarray], jax.Array]
"""Gives the logits of batches [count, size, ...], each of which is adapted to by itself."""


def adapter(state: TrainState, images: np.ndarray, strength: int = 0) -> Adapter:
    """Made once for each network and strength of the prior."""
    return jax.vmap(batch_adapter(bound(state), images[:2], prior_strength=strength))


@partial(jax.jit, static_argnames="rate")
def tent_step(
    state: TrainState, adapted: TentState, batch: jax.Array, rate: float
) -> tuple[jax.Array, TentState]:
    """The logits of a batch, and one step of TENT on it."""
    return adaptation(state, batch, rate).step(adapted, batch)


@partial(jax.jit, static_argnames="rate")
def tent_logits(state: TrainState, adapted: TentState, batch: jax.Array, rate: float) -> jax.Array:
    """The logits of a batch, without a step."""
    return adaptation(state, batch, rate).predict(adapted, batch)


def adaptation(state: TrainState, batch: np.ndarray | jax.Array, rate: float) -> Tent:
    """TENT for the network of a state."""
    return tent(bound(state), optax.adam(rate), batch)


def split(images: np.ndarray, size: int) -> np.ndarray:
    """Batches [count, size, ...] of as many images as fill them."""
    count = len(images) // size
    return images[: count * size].reshape(count, size, *images.shape[1:])


def error_of(logits: np.ndarray | jax.Array, labels: np.ndarray) -> float:
    """The share of wrong predictions in percent; logits `[..., classes]`, of the first images."""
    classes = np.asarray(logits).argmax(-1).ravel()
    return float(100 * np.mean(classes != labels[: len(classes)]))


def tent_errors(
    state: TrainState, images: np.ndarray, labels: np.ndarray, rate: float, passes: int
) -> tuple[float, float]:
    """Errors of TENT while it sees images for the first time, and after several passes."""
    batches = split(images, BATCH)
    adapted = adaptation(state, batches[0], rate).init()
    online = []
    for number in range(passes):
        for batch in batches:
            logits, adapted = tent_step(state, adapted, batch, rate)
            if number == 0:
                online.append(logits)
    after = [tent_logits(state, adapted, batch, rate) for batch in batches]
    return error_of(np.array(online), labels), error_of(np.array(after), labels)


# --- The experiment -------------------------------------------------------------------------------

Errors = dict[str, dict[str, list[float]]]
"""In percent, one for each seed, by what was done and by the images."""

TRAINED, ADABN, BATCHES = "as trained", "AdaBN", f"batches of {BATCH}, N = 0"
ONLINE, AFTER = "TENT, first pass", "TENT, after all passes"
WORST = SEVERITIES[-1]


def way(size: int, strength: int) -> str:
    """Names batches that are adapted to by themselves."""
    return f"batches of {size}, N = {strength}"


def images_for(name: str, severity: int) -> str:
    """Names corrupted images."""
    return f"{name} {severity}"


def measure(state: TrainState, target: np.ndarray, labels: np.ndarray, options: Options) -> Errors:
    """All errors of one trained network; one entry each."""
    errors: Errors = {}

    def add(done: str, images: str, error: float) -> None:
        errors.setdefault(done, {})[images] = [error]

    severities = SEVERITIES[-1:] if options.quick else SEVERITIES
    sizes = SIZES[1:2] + SIZES[-1:] if options.quick else SIZES
    names = list(CORRUPTIONS)[::3] if options.quick else list(CORRUPTIONS)
    adapters = {strength: adapter(state, target, strength) for strength in STRENGTHS}
    conditions = [("clean", 0), *((name, severity) for name in names for severity in severities)]
    for name, severity in conditions:
        images = corrupted(target, name, severity) if severity else target
        seen = images_for(name, severity) if severity else name
        add(TRAINED, seen, error_of(eval_step(state, images), labels))
        add(ADABN, seen, error_of(adapters[0](images[None]), labels))
        if severity not in (0, WORST):
            continue
        for size in sizes:
            for strength in STRENGTHS:
                logits = adapters[strength](split(images, size))
                add(way(size, strength), seen, error_of(logits, labels))
        passes = 1 if options.quick else options.passes
        online, after = tent_errors(state, images, labels, options.tent_rate, passes)
        add(ONLINE, seen, online)
        add(AFTER, seen, after)
    return errors


def foreign_errors(domains: tuple[Domain, Domain], options: Options, seed: int) -> Errors:
    """The same from one data set to another, both ways."""
    errors: Errors = {}
    count, steps = (2 * BATCH, 5) if options.quick else (2000, options.steps)
    rate, passes = options.tent_rate, 1 if options.quick else options.passes
    for source, target in (domains, domains[::-1]):
        state = trained(source.train_images[:count], source.train_labels[:count], seed, steps)
        images, labels = target.test_images, target.test_labels
        adapted = adapt_stats(bound(state), np.split(target.train_images[:count], 4))
        online, after = tent_errors(state, images, labels, rate, passes)
        found = {
            TRAINED: error_of(eval_step(state, images), labels),
            ADABN: error_of(adapted(images), labels),
            BATCHES: error_of(adapter(state, images)(split(images, BATCH)), labels),
            ONLINE: online,
            AFTER: after,
        }
        for done, error in found.items():
            errors.setdefault(done, {})[f"{source.name} to {target.name}"] = [error]
    return errors


def merged(runs: list[Errors]) -> Errors:
    """Errors of several seeds as one."""
    return {
        done: {images: [run[done][images][0] for run in runs] for images in runs[0][done]}
        for done in runs[0]
    }


def mean_error(errors: Errors, done: str, severities: tuple[int, ...] = (WORST,)) -> list[float]:
    """The mean over corruptions of some severities, for each seed."""
    seen = [images_for(name, severity) for name in CORRUPTIONS for severity in severities]
    return list(np.mean([errors[done][images] for images in seen if images in errors[done]], 0))


def main(options: Options) -> Report:
    """Trains, corrupts, adapts, and compares."""
    options.check()
    domains = load_domains("mnist") if options.foreign else None
    data = images_of(options.data)
    count = options.train_images
    unseen = np.concatenate([data.test_images, data.train_images[count:]])[: options.target_images]
    labels = np.concatenate([data.test_labels, data.train_labels[count:]])[: options.target_images]
    runs, foreign = [], []
    for seed in each(options.used_seeds):
        steps = 40 if options.quick else options.steps
        state = trained(data.train_images[:count], data.train_labels[:count], seed, steps)
        runs.append(measure(state, unseen, labels, options))
        if domains:
            foreign.append(foreign_errors(domains, options, seed))
    errors = merged(runs)
    findings = findings_of(errors)
    notes = []
    if foreign:
        found = merged(foreign)
        findings += foreign_findings(found)
        notes = foreign_notes(found)
    report = Report(
        name="corrupted_digits",
        about=__doc__ or "",
        setting=f"Error in percent on {len(unseen)} images of {data.name} with corruptions of "
        f"severity {WORST}, {min(count, len(data.train_images))} clean training images, "
        f"{options.steps} steps, {len(options.used_seeds)} seeds",
        headings=["statistics", *map(short, errors[ONLINE]), "mean of corrupted"],
        rows=rows_of(errors),
        findings=findings,
        picture=picture_of(errors, unseen[0], data.name),
        alt="Error against severity, for each corruption, and against the size of batches",
        notes=notes,
    )
    return conclude(report, options)


def short(images: str) -> str:
    """The corruption alone."""
    return images.partition(" ")[0]


def rows_of(errors: Errors) -> list[list[str]]:
    """A row for everything that was done."""
    return [
        [
            done,
            *(f"{Spread.of(errors[done][images]):.1f}" for images in errors[ONLINE]),
            f"{Spread.of(mean_error(errors, done)):.1f}",
        ]
        for done in errors
    ]


def less(claim: str, errors: dict[str, list[float]]) -> Finding:
    """Claims that the first of two ways errs less than the second."""
    first, second = errors.values()
    found = "; ".join(f"{done}: {Spread.of(values):.1f}" for done, values in errors.items())
    return Finding(claim, found, compare(first, second).less)


def findings_of(errors: Errors) -> list[Finding]:
    """The claims of the three papers on corrupted images."""

    def between(claim: str, first: str, second: str) -> Finding:
        return less(claim, {done: mean_error(errors, done) for done in (first, second)})

    smallest = min(size for size in SIZES if way(size, 0) in errors)
    with_prior = way(smallest, STRENGTHS[-1])
    return [
        *lower_on_each(errors),
        between(
            f"batches of {smallest} do not suffice without a prior: they err more than no "
            "adaptation (2006.16971, section 5)",
            TRAINED,
            way(smallest, 0),
        ),
        between(
            f"with a prior, batches of {smallest} err less than without (2006.16971, section 5)",
            *(with_prior, way(smallest, 0)),
        ),
        between(
            f"with a prior, batches of {smallest} err less than no adaptation (2006.16971)",
            *(with_prior, TRAINED),
        ),
        between(
            "TENT errs less than the statistics of its batches alone, while it sees images for the "
            "first time (2006.10726, table 2)",
            ONLINE,
            BATCHES,
        ),
        between("and after several passes (2006.10726, table 3)", AFTER, BATCHES),
    ]


def lower_on_each(errors: Errors) -> list[Finding]:
    """Whether AdaBN lowers the error, on the whole and on each corruption."""
    whole = less(
        "AdaBN lowers the mean error on corrupted images (2006.16971, section 5)",
        {done: mean_error(errors, done) for done in (ADABN, TRAINED)},
    )
    told = {
        images: compare(errors[ADABN][images], errors[TRAINED][images]).less
        for images in errors[ONLINE]
        if images != "clean"
    }
    words = {True: "lower", False: "higher", None: "not told"}
    found = "; ".join(
        f"{word}: {', '.join(short(images) for images in told if told[images] is held) or 'none'}"
        for held, word in words.items()
    )
    held = False if False in told.values() else (None if None in told.values() else True)
    return [whole, Finding(f"and on each corruption, at severity {WORST}", found, held)]


def foreign_findings(errors: Errors) -> list[Finding]:
    """The claims on another data set, for each direction."""

    def between(claim: str, first: str, second: str, images: str) -> Finding:
        return less(f"{images}: {claim}", {done: errors[done][images] for done in (first, second)})

    return [
        finding
        for images in errors[TRAINED]
        for finding in (
            between("AdaBN lowers the error (1603.04779)", ADABN, TRAINED, images),
            between(
                "TENT errs less than the statistics of its batches alone (2006.10726, table 3)",
                ONLINE,
                BATCHES,
                images,
            ),
        )
    ]


def foreign_notes(errors: Errors) -> list[str]:
    """A table of errors on the other data set."""
    directions = list(errors[TRAINED])
    lines = [["statistics", *directions], ["---"] * (1 + len(directions))]
    for done, found in errors.items():
        lines.append([done, *(f"{Spread.of(found[one]):.1f}" for one in directions)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return ["Error in percent on the test images of the other data set, 16x16 pixels:", table]


# --- Showing it -----------------------------------------------------------------------------------


def picture_of(errors: Errors, image: np.ndarray, data: str) -> Figure:
    """Error against severity, for each corruption below an image of it, and against batch size."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    figure.suptitle(f"Adapting to corrupted images without labels: {data}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 2, 1))
    draw_severities(left, errors)
    draw_corruptions(middle, errors, image)
    draw_sizes(right, errors)
    left.set(ylim=(0, None))
    right.set(ylim=(0, None))
    tidy(figure)
    return figure


def draw_severities(panel: Axes, errors: Errors) -> None:
    """The mean over corruptions."""
    known = [one for one in SEVERITIES if images_for("noise", one) in errors[TRAINED]]
    for number, done in enumerate((TRAINED, ADABN)):
        clean = errors[done]["clean"]
        means = [clean, *(mean_error(errors, done, (severity,)) for severity in known)]
        band(panel, [0, *known], np.transpose(means), done, number)
    panel.set_xticks([0, *known], ["clean", *map(str, known)])
    panel.set(xlabel="severity", ylabel="error, percent", title="mean of all corruptions")


def draw_corruptions(panel: Axes, errors: Errors, image: np.ndarray) -> None:
    """Bars at the highest severity."""
    ways, seen = (TRAINED, ADABN, ONLINE, AFTER), list(errors[ONLINE])
    width = 0.8 / len(ways)
    for number, done in enumerate(ways):
        found = [Spread.of(errors[done][images]) for images in seen]
        spread = None if len(found[0].values) == 1 else [one.std for one in found]
        places = np.arange(len(seen)) + (number - 1.5) * width
        means, label = [one.mean for one in found], done if number > 1 else None
        panel.bar(places, means, width, yerr=spread, color=COLORS[number], capsize=2, label=label)
    panel.set_xticks(range(len(seen)), list(map(short, seen)), rotation=15)
    panel.set(ylabel="error, percent", ylim=(0, 125), yticks=range(0, 101, 20))
    panel.set_title(f"severity {WORST}")
    for place, images in enumerate(seen):
        name = short(images)
        changed = image if name == "clean" else corrupted(image[None], name, WORST)[0]
        show(panel, place, np.repeat(changed, 3, -1))


def draw_sizes(panel: Axes, errors: Errors) -> None:
    """Error at the highest severity, where each batch is adapted to by itself."""
    sizes = [size for size in SIZES if way(size, 0) in errors]
    for number, strength in enumerate(STRENGTHS, start=4):
        found = [mean_error(errors, way(size, strength)) for size in sizes]
        name = f"prior of {strength} images" if strength else "no prior"
        band(panel, sizes, np.transpose(found), name, number)
    panel.axhline(Spread.of(mean_error(errors, TRAINED)).mean, color=COLORS[0], linestyle="-")
    panel.axhline(Spread.of(mean_error(errors, ADABN)).mean, color=COLORS[1], linestyle="--")
    panel.set(xscale="log", xlabel="images in a batch")
    panel.set_xticks(sizes, map(str, sizes))
    panel.minorticks_off()
    panel.set(ylabel="error, percent", title=f"each batch by itself, severity {WORST}")


if __name__ == "__main__":
    run(main, Options)
