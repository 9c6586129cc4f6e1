"""What `batch_norm_digits.py` records of a training, its table, and its picture in three panels."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.table import Table

PERCENTILES = (15, 50, 85)
PERCENTILE_IMAGES = 1000
"""The percentiles are taken over this many test images at most: plenty for three percentiles."""


@dataclass
class History:
    """What was recorded of one network while it trained; one entry for each look.

    Attributes:
        name: of the network.
        steps: made before each look.
        test_accuracy: at each look.
        sigmoid_inputs: percentiles over images, each look's `[percentiles, units]`.
        started: when it was made, in seconds.
        seconds: from then to the last look.
    """

    name: str
    steps: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    sigmoid_inputs: list[np.ndarray] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def look(self, step: int, accuracy: ArrayLike, sigmoid_inputs: ArrayLike) -> None:
        """Records the accuracy, and percentiles of what goes into sigmoids `[images, units]`."""
        watched = np.asarray(sigmoid_inputs)[:PERCENTILE_IMAGES]
        self.steps.append(step)
        self.test_accuracy.append(float(np.asarray(accuracy)))
        self.sigmoid_inputs.append(np.percentile(watched, PERCENTILES, axis=0))
        self.seconds = time.perf_counter() - self.started

    def steps_to_reach(self, accuracy: float) -> int | None:
        """The first recorded step with at least this test accuracy, if there is one."""
        pairs = zip(self.steps, self.test_accuracy, strict=True)
        return next((step for step, found in pairs if found >= accuracy), None)

    @property
    def typical_unit(self) -> int:
        """The unit with the median spread.

        The spread of a unit is the distance between its outer percentiles, averaged over the
        training. Of an even number of units, the lower of the middle two is taken.
        """
        inputs = np.array(self.sigmoid_inputs)
        spread = (inputs[:, -1] - inputs[:, 0]).mean(axis=0)
        return int(np.argsort(spread)[(spread.size - 1) // 2])

    @property
    def typical_inputs(self) -> np.ndarray:
        """The percentiles of that unit, `[percentiles, looks]`."""
        return np.array(self.sigmoid_inputs)[:, :, self.typical_unit].T


def table_of(histories: Sequence[History]) -> Table:
    """The accuracies of the networks and the steps they took."""
    table = Table(caption="Accuracies on the test images. Seconds with compiling and testing.")
    table.add_column("network")
    for heading in ("accuracy\nat the end", "best\naccuracy", "steps\nto 0.90", "steps\nto 0.95"):
        table.add_column(heading, justify="right")
    table.add_column("seconds", justify="right")
    for history in histories:
        steps_to_reach = [history.steps_to_reach(accuracy) for accuracy in (0.90, 0.95)]
        table.add_row(
            history.name,
            f"{history.test_accuracy[-1]:.3f}",
            f"{max(history.test_accuracy):.3f}",
            *("never" if steps is None else str(steps) for steps in steps_to_reach),
            f"{history.seconds:.1f}",
        )
    return table


def picture_of(histories: Sequence[History], title: str) -> Figure:
    """Three panels like figure 1 of the paper, without normalization and with it."""
    without_norm, with_norm = histories
    # Two colours of the palette of Okabe and Ito, which colour-blind readers can tell apart; the
    # dashes do the same in black and white.
    styles = ((with_norm, "#0072B2", "-"), (without_norm, "#D55E00", "--"))
    figure = Figure(figsize=(13, 4.7), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    figure.suptitle(title)
    accuracy_panel, without_panel, with_panel = figure.subplots(1, 3)

    for history, color, dashes in styles:
        accuracy_panel.plot(
            history.steps, history.test_accuracy, dashes, color=color, label=history.name
        )
    accuracy_panel.set(title="(a) Test accuracy", ylabel="accuracy", ylim=(0, 1.02))
    # Below the panels, where it cannot cover a curve: the colours mean the same in all three.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)

    # On one scale, so that the two can be compared.
    with_panel.sharey(without_panel)
    draw_percentiles(without_panel, without_norm, "#D55E00")
    draw_percentiles(with_panel, with_norm, "#0072B2")
    without_panel.set_title(f"(b) Sigmoid inputs {without_norm.name}")
    with_panel.set_title(f"(c) Sigmoid inputs {with_norm.name}")

    for panel in (accuracy_panel, without_panel, with_panel):
        panel.set_xlabel("training step")
        panel.set_xlim(0, with_norm.steps[-1])
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure


def draw_percentiles(panel: Axes, history: History, color: str) -> None:
    """The percentiles of what goes into one typical sigmoid, over the training."""
    low, middle, high = history.typical_inputs
    panel.fill_between(history.steps, low, high, color=color, alpha=0.2, linewidth=0)
    for curve, width in ((low, 0.8), (middle, 1.8), (high, 0.8)):
        panel.plot(history.steps, curve, color=color, linewidth=width)
    percentiles = ", ".join(f"{percentile}th" for percentile in PERCENTILES)
    panel.set_ylabel(f"unit {history.typical_unit}: {percentiles} percentile")
