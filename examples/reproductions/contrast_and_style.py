"""Instance norm and IBN where the look of the images changes.

Ulyanov, Vedaldi and Lempitsky ("Instance Normalization", 2016, arXiv 1607.08022) normalize each
feature of each image by itself, so that the contrast of an image leaves no trace. Pan, Luo, Shi and
Tang ("Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", 2018, arXiv
1807.09441) observe that this keeps changes of appearance out of a classifier, but also some of what
tells the classes apart. Their IBN-a gives the first norm of a residual block's branch half to
instance norm; IBN-b puts instance norm into the stem and behind the sums of early blocks. Section
4.1 reports that on ImageNet both err less than the residual network with batch norm, IBN-a the
least, and that where brightness, color, contrast or painting style change in testing, both lose
less, IBN-b the least.

This script trains four small residual networks on a few hundred images of digits, white on black,
from the same first weights: with batch norm, instance norm, IBN-a and IBN-b, placed as in the
paper. The test images are shown as they are, and with another look: the paper's three simple
changes (brighter, red, more contrast), weak contrast, inverted, in random colors, and on striped
ground in place of a painter's style.

What differs from the paper: size, data, and styles, which are drawn and not painted by a network.
The first convolution reflects the image at its border: of 8x8 pixels nearly half are there, and
zeros around them would give away how bright an image is. Changed values are not cut off at 0 and 1.
The training images are all in shades of grey.

How to run:

    python examples/reproductions/contrast_and_style.py
    python examples/reproductions/contrast_and_style.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/contrast_and_style.py --train-images 3000
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
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

from jaxnorm import linen as jnn

NORMS = ("batch norm", "instance norm", "IBN-a", "IBN-b")
CONTRASTS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 4.0)
"""By what the distance of each pixel from the mean of its image is multiplied."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train networks with four norms, and test them on images that look different."""

    train_images: int = 400
    """How many training images to use, at most; with more, all networks are nearly perfect."""

    test_images: int = 2000
    """How many test images to use, at most."""

    steps: int = 300
    """Training steps."""

    batch_size: int = 64
    """Images in each training batch."""

    rate: float = 0.1
    """The first learning rate; it falls to 0 along a cosine."""

    def check(self) -> None:
        """Refuses impossible options."""
        super().check()
        if self.steps < 1 or self.test_images < 1:
            raise UsageError("--steps and --test-images must be at least 1")
        if not 1 < self.batch_size <= self.train_images:
            raise UsageError("--batch-size must be from 2 to the number of --train-images")


# --- What images look like ------------------------------------------------------------------------


def contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Each image's pixels at `factor` times their distance from its mean."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + np.float32(factor) * (images - mean)


def plus(images: np.ndarray, red: float, green: float, blue: float) -> np.ndarray:
    """So much more of each color, where 255 is white."""
    return images + np.array([red, green, blue], np.float32) / 255


def painted(images: np.ndarray) -> np.ndarray:
    """Each image in a bright random color on a dark one."""
    rng = np.random.default_rng(0)
    ground, ink = rng.uniform(0, 0.4, (2, len(images), 1, 1, 3)).astype(np.float32)
    return ground + (0.6 + ink - ground) * images


def striped(images: np.ndarray) -> np.ndarray:
    """Each image on fine diagonal stripes, whose direction, phase and colors are random."""
    rng = np.random.default_rng(0)
    count, side = images.shape[:2]
    draw = partial(rng.uniform, size=(count, 1, 1, 1))
    angle, phase = draw(0, np.pi), draw(0, 2 * np.pi)
    rows, columns = np.mgrid[:side, :side][..., None]
    # Two to three pixels to a stripe: as fine as the strokes of the digits.
    waves = np.sin(phase + 1.3 * (np.cos(angle) * rows + np.sin(angle) * columns))
    ground = (0.25 + 0.25 * waves) * rng.uniform(0.3, 1, (count, 1, 1, 3))
    return np.asarray(np.maximum(images, ground), np.float32)


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as trained": lambda images: images,
    "brighter": lambda images: plus(images, 50, 50, 50),
    "red": lambda images: plus(images, 50, 0, 0),
    "contrast x 1.5": lambda images: contrast(images, 1.5),
    "contrast x 0.2": lambda images: contrast(images, 0.2),
    "inverted": lambda images: 1 - images,
    "colors": painted,
    "stripes": striped,
}
AFFINE = ("brighter", "red", "contrast x 1.5", "contrast x 0.2")
"""What instance norm behind a convolution removes: one factor for an image, one term per color."""


def in_color(data: Images) -> Images:
    """Grey images with three equal colors."""
    return data._replace(
        train_images=np.repeat(data.train_images, 3, -1),
        test_images=np.repeat(data.test_images, 3, -1),
    )


# --- Networks -------------------------------------------------------------------------------------


class Network(nn.Module):
    """A small residual network: a stem, two blocks, the mean over pixels, a linear output.

    IBN-a and IBN-b stand in the stem and the early block as in the paper. The last block has batch
    norm alone there, since what tells the classes apart is in it. All norms have the same names, so
    that all networks can begin with the same weights.
    """

    norm: str
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, side, side, 3] to logits [batch, classes]."""
        convolve = partial(nn.Conv, self.width, (3, 3), use_bias=False)
        batch_norm = partial(jnn.BatchNorm, use_running_average=not train, momentum=0.9)
        ibn_a = partial(jnn.IBNa, use_running_average=not train, momentum=0.9)
        norm = jnn.InstanceNorm if self.norm == "instance norm" else batch_norm
        after_sum = {"IBN-b": jnn.IBNb}.get(self.norm)
        stem, first = after_sum or norm, ibn_a if self.norm == "IBN-a" else norm
        x = nn.relu(stem(name="stem")(convolve(padding="REFLECT")(images)))

        y = nn.relu(first(name="early_1")(convolve()(x)))
        y = norm(name="early_2")(convolve()(y))
        x = nn.relu(after_sum(name="early_sum")(y, x) if after_sum else x + y)
        x = nn.avg_pool(x, (2, 2), (2, 2))

        y = nn.relu(norm(name="late_1")(convolve()(x)))
        x = nn.relu(x + norm(name="late_2")(convolve()(y)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@cache
def recipe(norm: str, steps: int, rate: float) -> tuple[nn.Module, optax.GradientTransformation]:
    """One for all seeds, so that they share a compiled step."""
    return Network(norm), optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)


@cache
def drawn_weights(seed: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The weights of convolutions and output, with which all networks of a seed begin."""
    network, optimizer = recipe(NORMS[0], 1, 0.0)
    params = create_state(network, seed, np.zeros(shape, np.float32), optimizer).params
    return {name: value for name, value in params.items() if not is_norm(name)}


@cache
def norms_of(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables of a network's norms, which begin the same with each seed."""

    def init() -> dict[str, Any]:
        variables = network.init(jax.random.key(0), jnp.zeros(shape), train=False)
        params = {name: value for name, value in variables["params"].items() if is_norm(name)}
        return {"params": params, "batch_stats": variables.get("batch_stats", {})}

    return jax.jit(init)()


def is_norm(name: str) -> bool:
    """Whether a layer of `Network` is a norm."""
    return name.startswith(("stem", "early", "late"))


def trained(norm: str, seed: int, data: Images, options: Options) -> TrainState:
    """A network that has learned the training images."""
    steps = min(options.steps, 40) if options.quick else options.steps
    network, optimizer = recipe(norm, steps, options.rate)
    shape = (2, *data.train_images.shape[1:])
    norms = norms_of(network, shape)
    state = TrainState.create(
        apply_fn=network.apply,
        params=norms["params"] | drawn_weights(seed, shape),
        batch_stats=norms["batch_stats"],
        tx=optimizer,
    )
    batches = draw_batches(len(data.train_images), options.batch_size, steps, seed)
    return train(state, data.train_images, data.train_labels, batches)[0]


# --- What is measured -----------------------------------------------------------------------------


def error_of(state: TrainState, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that are classified wrongly, in percent."""
    return 100 * (1 - accuracy_of(state, images, labels))


def change_of(state: TrainState, images: np.ndarray, looks: tuple[str, ...] = AFFINE) -> float:
    """By how much a change of looks moves the logits, at most, in percent of their spread."""
    before = np.asarray(eval_step(state, images))
    after = [np.asarray(eval_step(state, LOOKS[look](images))) for look in looks]
    return float(100 * max(np.abs(one - before).max() for one in after) / before.std())


@dataclass
class Measured:
    """What was measured with one norm, each with one entry for each seed.

    Attributes:
        errors: by the look of the images.
        sweep: errors at each of `CONTRASTS`, in their order.
        change: of the logits under the looks that instance norm removes.
    """

    errors: dict[str, list[float]]
    sweep: list[list[float]]
    change: list[float]

    @property
    def shifted(self) -> list[float]:
        """The mean error over all changed looks."""
        return list(np.mean([self.errors[look] for look in LOOKS if look != "as trained"], 0))


Results = dict[str, Measured]
"""By norm."""


def main(options: Options) -> Report:
    """Trains all networks, shows them changed images, and compares their errors."""
    options.check()
    data = in_color(images_of(options.data, train=options.train_images, test=options.test_images))
    images, labels = data.test_images, data.test_labels
    looks = {look: change(images) for look, change in LOOKS.items()}
    contrasts = [contrast(images, factor) for factor in CONTRASTS]
    results = {norm: Measured({look: [] for look in LOOKS}, [], []) for norm in NORMS}
    for norm, seed in each([(norm, seed) for norm in NORMS for seed in options.used_seeds]):
        state = trained(norm, seed, data, options)
        found = results[norm]
        for look, changed in looks.items():
            found.errors[look].append(error_of(state, changed, labels))
        found.sweep.append([error_of(state, changed, labels) for changed in contrasts])
        found.change.append(change_of(state, images))
    report = Report(
        name="contrast_and_style",
        about=__doc__ or "",
        setting=f"Test error in percent on {data.name}, {len(data.train_images)} training images, "
        f"{options.steps} steps, {len(options.used_seeds)} seeds",
        headings=["images", *NORMS],
        rows=rows_of(results),
        findings=findings_of(results),
        picture=picture_of(results, looks, data.name),
        alt="Test error against contrast, and for eight looks of the images, for four norms",
    )
    return conclude(report, options)


def rows_of(results: Results) -> list[list[str]]:
    """A row for each look, one for all changed ones, and one for the logits."""
    rows = [
        [look, *(f"{Spread.of(results[norm].errors[look]):.1f}" for norm in NORMS)]
        for look in LOOKS
    ]
    changed = [f"{Spread.of(results[norm].shifted):.1f}" for norm in NORMS]
    moved = [f"{max(results[norm].change):.1f}" for norm in NORMS]
    return [
        *rows,
        ["mean of all changed", *changed],
        ["largest change of a logit by light and contrast, in % of the logits' spread", *moved],
    ]


def findings_of(results: Results) -> list[Finding]:
    """The claims of the two papers."""

    def less(claim: str, first: str, second: str, shifted: bool) -> Finding:
        values = {
            norm: results[norm].shifted if shifted else results[norm].errors["as trained"]
            for norm in (first, second)
        }
        found = (f"{norm}: {Spread.of(values[norm]):.1f}" for norm in values)
        return Finding(claim, "; ".join(found), compare(values[first], values[second]).less)

    batch, instance, a, b = NORMS
    change = results[instance].change
    return [
        Finding(
            "with instance norm, contrast and light leave no trace (1607.08022, section 2): no "
            "logit moves by more than 1% of the logits' standard deviation",
            f"by {max(change):.2f}% at most; with batch norm by {max(results[batch].change):.0f}%",
            max(change) < 1,
        ),
        less(
            "instance norm alone loses what tells classes apart: it errs more than batch norm on "
            "images as trained (1807.09441, section 1)",
            batch,
            instance,
            shifted=False,
        ),
        less(
            "IBN-a errs less than batch norm on images as trained (1807.09441, section 4.1)",
            a,
            batch,
            shifted=False,
        ),
        less(
            "IBN-a errs less than batch norm on changed images (1807.09441, section 4.1)",
            a,
            batch,
            shifted=True,
        ),
        less(
            "IBN-b errs less than IBN-a on changed images (1807.09441, section 4.1)",
            b,
            a,
            shifted=True,
        ),
    ]


# --- Showing it -----------------------------------------------------------------------------------


def picture_of(results: Results, looks: dict[str, np.ndarray], data: str) -> Figure:
    """Error against contrast, and bars for each look below an image that has it."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(f"Images that look different from those of the training: {data}")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    for number, norm in enumerate(NORMS):
        band(left, CONTRASTS, np.array(results[norm].sweep), norm, number)
    left.set(xscale="log", xlabel="contrast of the test images", ylabel="test error, percent")
    left.set_xticks([0.05, 0.2, 1, 4], ["x 0.05", "x 0.2", "as trained", "x 4"])
    left.minorticks_off()
    width = 0.8 / len(NORMS)
    for number, norm in enumerate(NORMS):
        found = [Spread.of(errors) for errors in results[norm].errors.values()]
        errors = None if len(found[0].values) == 1 else [one.std for one in found]
        places = np.arange(len(LOOKS)) + (number - 1.5) * width
        means = [one.mean for one in found]
        right.bar(places, means, width, yerr=errors, color=COLORS[number], capsize=2)
    right.set_xticks(range(len(LOOKS)), list(LOOKS), rotation=15)
    right.set(ylabel="test error, percent", ylim=(0, 125), yticks=range(0, 101, 20))
    for place, images in enumerate(looks.values()):
        show(right, place, images[0])
    tidy(figure)
    return figure


def show(panel: Axes, place: int, image: np.ndarray) -> None:
    """Puts an image above the bars."""
    # The same height for images of any size; values beyond white and black are drawn as those.
    thumbnail = OffsetImage(np.clip(image, 0, 1), zoom=40 / len(image), interpolation="nearest")
    panel.add_artist(AnnotationBbox(thumbnail, (place, 113), frameon=False))


if __name__ == "__main__":
    run(main, Options)
