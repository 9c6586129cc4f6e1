"""One look for all pictures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""

DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
"""They tell curves apart in black and white."""


def figure_of(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(4.6 * panels, 4.4), layout="constrained")
    figure.suptitle(title)
    return figure, list(np.ravel(figure.subplots(1, panels)))


def band(
    panel: Axes, x: Sequence[float] | np.ndarray, values: np.ndarray, label: str, number: int
) -> None:
    """The mean over seeds with a band of one standard deviation; `values` is [seeds, points]."""
    values = np.asarray(values, float)
    mean, color = values.mean(0), COLORS[number % len(COLORS)]
    panel.plot(x, mean, color=color, linestyle=DASHES[number % len(DASHES)], label=label)
    if len(values) > 1:
        std = values.std(0, ddof=1)
        panel.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)


def tidy(figure: Figure) -> None:
    """Grids, no frames, and one legend below the panels for what they share."""
    labelled = {}
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        handles, labels = panel.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    if labelled:
        columns = min(len(labelled), 4)
        figure.legend(
            labelled.values(), labelled, loc="outside lower center", ncols=columns, frameon=False
        )
