"""Figure 1 of the batch norm paper, over several seeds.

Ioffe and Szegedy ("Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015, arXiv 1502.03167, section 4.1, figure 1) train a network of three hidden
sigmoid layers on MNIST, with batch norm and without. They report that with it the network reaches a
test accuracy in fewer steps and ends with a higher one, and that the inputs of a typical sigmoid of
the last hidden layer keep a much steadier distribution, in mean and in spread, while the network
trains.

This script repeats `batch_norm_digits.py`, which shows one training of each network in detail, with
several seeds and five times as many steps. Each seed draws the weights, the same for both networks,
the order of the batches, and on scikit-learn's digits the test images. The typical unit is the one
with the median spread; its spread is the distance between the 15th and the 85th percentile of its
inputs over the test images.

What differs from the paper: it gives neither the rate nor the scale of the initial weights of this
experiment. Here the rate is 0.05 and the weights have standard deviation 1/sqrt(inputs). The paper
trains for 50,000 steps on MNIST made black and white; here it is 20,000 on grey digits of 8x8
pixels. At a higher rate the network without batch norm learns faster; `learning_rates.py` compares
both at many rates.

How to run:

    python examples/reproductions/batch_norm_figure_1.py
    python examples/reproductions/batch_norm_figure_1.py --quick
    JAXNORM_DATA=npz/folder python examples/reproductions/batch_norm_figure_1.py --seeds 0 1 2
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from study import (
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
    draw_batches,
    each,
    figure_of,
    run,
    tidy,
)
from study.dense import create_dense_state, train_looking
from study.examples import PERCENTILES, History, SigmoidNetwork, eval_step, load_dataset

NAMES = {False: "without batch norm", True: "with batch norm"}
GOAL = 0.9
QUICK_STEPS = 500
NETWORKS = {batch_norm: SigmoidNetwork(batch_norm) for batch_norm in NAMES}
"""One of each for all seeds, so that they share a compiled step."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Train the network of figure 1 with several seeds."""

    steps: int = 20_000
    """Training steps."""

    learning_rate: float = 0.05
    """Rate of plain gradient descent, the same for both networks."""

    batch_size: int = 60
    """Images in a batch."""

    record_every: int = 25
    """Steps between two looks at the test set."""

    train_images: int | None = None
    """How many training images to use, at most; by default all."""

    def check(self) -> None:
        """Refuses numbers that cannot be trained with."""
        super().check()
        looks, rest = divmod(self.used_steps, max(self.record_every, 1))
        if self.record_every < 1 or looks < 2 or rest:
            raise UsageError("--steps must be a multiple of --record-every, from two looks on")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size must be at least 2, not {self.batch_size}")
        if not (np.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"--learning-rate must be positive, not {self.learning_rate}")

    @property
    def used_steps(self) -> int:
        """Few in a quick run."""
        return min(QUICK_STEPS, self.steps) if self.quick else self.steps


# --- Training -------------------------------------------------------------------------------------


Histories = dict[bool, list[History]]
"""Of the networks without and with batch norm, one for each seed."""


def history_of(seed: int, batch_norm: bool, options: Options) -> tuple[str, History]:
    """The name of the data, and one training; both networks of a seed start alike."""
    data = load_dataset(options.data, seed)
    images, labels = data.train_images[: options.train_images], data.train_labels
    batches = draw_batches(len(images), options.batch_size, options.used_steps, seed)
    state = create_dense_state(NETWORKS[batch_norm], seed, images, options.learning_rate)
    tests = jax.device_put((data.test_images, data.test_labels))
    every, history = options.record_every, History(NAMES[batch_norm])

    def look(state: TrainState) -> None:
        history.look(every * (1 + len(history.steps)), *eval_step(state, *tests))

    train_looking(state, images, labels, batches, every, look)
    return data.name, history


def train_all(options: Options) -> tuple[str, Histories]:
    """The name of the data, and all trainings."""
    histories: Histories = {False: [], True: []}
    name = ""
    for seed, batch_norm in each(product(options.used_seeds, NAMES)):
        name, history = history_of(seed, batch_norm, options)
        histories[batch_norm].append(history)
    return name, histories


# --- What is measured -----------------------------------------------------------------------------


def steps_to_goal(history: History) -> float:
    """Steps to the test accuracy 0.9; all steps where it was never reached."""
    steps = history.steps_to_reach(GOAL)
    return float(history.steps[-1] if steps is None else steps)


def spread_of_unit(history: History) -> np.ndarray:
    """Between the outer percentiles of the inputs of the typical unit, at each look."""
    low, _, high = history.typical_inputs
    return high - low


def travel(history: History) -> float:
    """From the lowest to the highest median of the typical unit, in the sigmoid's own units."""
    return float(np.ptp(history.typical_inputs[1]))


def relative_travel(history: History) -> float:
    """The same, in mean spreads of that unit."""
    return travel(history) / float(spread_of_unit(history).mean())


def widening(history: History) -> float:
    """The widest spread of the typical unit over its narrowest."""
    spread = spread_of_unit(history)
    return float(spread.max() / spread.min())


MEASURES: dict[str, tuple[Callable[[History], float], str]] = {
    f"steps to {GOAL}": (steps_to_goal, ".0f"),
    "accuracy at the end": (lambda history: history.test_accuracy[-1], ".3f"),
    "median travels": (travel, ".2f"),
    "median travels, in spreads": (relative_travel, ".2f"),
    "widest over narrowest spread": (widening, ".2f"),
}
CLAIMS = (
    f"batch norm reaches a test accuracy of {GOAL} in fewer steps (figure 1a)",
    "batch norm ends with a higher test accuracy (figure 1a)",
    "with batch norm, the median of a typical sigmoid's inputs travels less (figure 1b and c)",
    "with batch norm, it travels less in units of their spread, too (figure 1b and c)",
    "with batch norm, the spread of a typical sigmoid's inputs changes by a smaller factor "
    "(figure 1b and c)",
)


def main(options: Options) -> Report:
    """Trains both networks with all seeds, and compares them."""
    data, histories = train_all(options)
    report = Report(
        name="batch_norm_figure_1",
        about=__doc__ or "",
        setting=f"{data}, {options.used_steps} steps of {options.batch_size} images at rate "
        f"{options.learning_rate:g}, {len(options.used_seeds)} seeds",
        headings=["network", *MEASURES],
        rows=[[name, *cells(histories[key])] for key, name in NAMES.items()],
        findings=findings_of(histories),
        picture=picture_of(histories, data),
        alt="Test accuracy and the inputs of a typical sigmoid over training, for all seeds",
        notes=["Where an accuracy was never reached, all steps made are counted."],
    )
    return conclude(report, options)


def measured(histories: list[History], measure: str) -> list[float]:
    """One number for each seed."""
    return [MEASURES[measure][0](history) for history in histories]


def cells(histories: list[History]) -> list[str]:
    """All measures of one network."""
    found = ((Spread.of(measured(histories, one)), digits) for one, (_, digits) in MEASURES.items())
    return [format(spread, digits) for spread, digits in found]


def findings_of(histories: Histories) -> list[Finding]:
    """The claims of figure 1."""
    found = []
    for number, (claim, measure) in enumerate(zip(CLAIMS, MEASURES, strict=True)):
        plain, norm = (histories[key] for key in NAMES)
        numbers = f"{cells(norm)[number]} with, {cells(plain)[number]} without"
        difference = compare(measured(norm, measure), measured(plain, measure))
        held = difference.more if measure == "accuracy at the end" else difference.less
        found.append(Finding(claim, f"{measure}: {numbers}", held))
    return found


# --- Picture --------------------------------------------------------------------------------------


def picture_of(histories: Histories, data: str) -> Figure:
    """The three panels of figure 1."""
    figure, (left, *panels) = figure_of(3, f"Sigmoid network on {data}, 3 layers of 100")
    for number, (key, name) in enumerate(reversed(NAMES.items())):
        steps = histories[key][0].steps
        band(left, steps, np.array([one.test_accuracy for one in histories[key]]), name, number)
    left.set(title="(a) Test accuracy", ylabel="accuracy", ylim=(0, 1.02))
    for panel, (key, name), letter, number in zip(panels, NAMES.items(), "bc", (1, 0), strict=True):
        draw_inputs(panel, histories[key], number)
        panel.set_title(f"({letter}) Sigmoid inputs {name}")
    panels[0].sharey(panels[1])
    for panel in (left, *panels):
        # Most happens early.
        panel.set(xlabel="training step", xscale="log")
        panel.xaxis.set_minor_formatter(NullFormatter())
    tidy(figure)
    return figure


def draw_inputs(panel: Axes, histories: list[History], number: int) -> None:
    """The median of each seed's typical unit, and the percentiles of the first seed's."""
    for history in histories[1:]:
        panel.plot(history.steps, history.typical_inputs[1], color=COLORS[number], linewidth=0.7)
    first = histories[0]
    low, middle, high = first.typical_inputs
    panel.fill_between(first.steps, low, high, color=COLORS[number], alpha=0.2, linewidth=0)
    panel.plot(first.steps, middle, color=COLORS[number], linewidth=2)
    panel.set_ylabel(f"input; shaded: {PERCENTILES[0]}th to {PERCENTILES[-1]}th percentile")


if __name__ == "__main__":
    run(main, Options)
