"""What `adabn_digits.py` measures, as a table and a picture: accuracies by what was adapted to."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

SOURCE, TOGETHER, BY_LAYER = "source only", "AdaBN, together", "AdaBN, layer by layer"

Accuracies = dict[str, dict[str, np.ndarray]]
"""For each direction, from a source to a target: by what was done, [seeds]."""


def label(size: int, strength: int) -> str:
    """Names what was adapted to each batch of this size, with this strength of the prior."""
    return f"batches of {size}, N = {strength}"


def table_of(directions: Accuracies, seeds: Sequence[int]) -> Table:
    """Mean and standard deviation over seeds; one seed has no deviation."""
    several = len(seeds) > 1
    what = f"mean and deviation of {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    table = Table(title=f"Test accuracy on the target, {what}")
    table.add_column("statistics")
    for direction in directions:
        table.add_column(direction, justify="right")
    for name in next(iter(directions.values())):
        values = (found[name] for found in directions.values())
        table.add_row(
            name,
            *(f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if several else "") for v in values),
        )
    return table


def picture_of(directions: Accuracies, sizes: Sequence[int], strengths: Sequence[int]) -> Figure:
    """Accuracy against the size of batches, a panel for each direction."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(directions), sharey=True)
    # Colours of the palette of Okabe and Ito, which colour-blind readers can tell apart.
    colors = ("#0072B2", "#009E73", "#CC79A7")
    for panel, (direction, found) in zip(panels, directions.items(), strict=True):
        mean = {name: values.mean() for name, values in found.items()}
        flat = partial(panel.axhline, linewidth=1.2, color="black")
        flat(mean[SOURCE], linestyle="--", label=SOURCE)
        flat(mean[TOGETHER], linestyle=":", label="AdaBN, all training images")
        for strength, color, marker in zip(strengths, colors, "os^", strict=False):
            accuracy = [mean[label(size, strength)] for size in sizes]
            name = "each batch alone (N = 0)" if strength == 0 else f"prior of N = {strength}"
            panel.plot(sizes, accuracy, marker=marker, color=color, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, list(map(str, sizes)))
        panel.set(title=direction, xlabel="test images in a batch, without labels")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy on the target's test images")
    panels[0].legend(frameon=False)
    return figure
