"""The report on norms as a picture: their channels, from the first norm to the last."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jaxnorm.diagnose.norm_rows import LAG, NormRow

INK, FAINT, FINE = "#222222", "#666666", "#e3efe6"
DOT, MEDIAN, BAR = "#31688e", "#c2571a", "#5b5fc7"
SHARES: Sequence[tuple[str, str, Callable[[NormRow], Any]]] = (
    ("constant", "#222222", lambda row: row.collapsed),
    ("scale 0", "#8e4585", lambda row: row.zero_scale),
    ("never above 0", "#31688e", lambda row: row.never_positive),
    ("outputs beyond 3", "#e0a030", lambda row: row.saturated),
)


def picture(rows: Sequence[NormRow]) -> Figure:
    """Panels above each other, in which each norm has its column."""
    panels = [_draw_shares]
    if any(row.shift is not None for row in rows):
        panels = [_draw_shift, _draw_ratio, *panels]
    else:
        panels = [_draw_deviation, *panels]
    if any(row.largest is not None for row in rows):
        panels.append(_draw_singular_values)
    size = (max(6.5, 2.5 + 0.55 * len(rows)), 0.9 + 1.9 * len(panels))
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes, rows)
        axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=FAINT)
    last = all_axes[-1]
    last.set_xlim(-0.6, len(rows) - 0.4)
    # The path is the user's: a dollar sign in it is no formula.
    labels = [row.path.replace("$", r"\$") for row in rows]
    last.set_xticks(range(len(rows)), labels, rotation=40, ha="right", rotation_mode="anchor")
    return figure


def _title(axes: Axes, text: str, explained: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_title(explained, loc="right", fontsize=8, color=FAINT)


def _draw_dots(axes: Axes, columns: Sequence[np.ndarray | None]) -> None:
    """A dot for each channel, side by side as chance has it, and a line for the median."""
    chance = np.random.default_rng(0)
    for column, values in enumerate(columns):
        if values is None:
            continue
        values = values[np.isfinite(values)]
        x = column + chance.uniform(-0.22, 0.22, len(values))
        axes.plot(x, values, ".", color=DOT, markersize=6, alpha=0.6, markeredgewidth=0)
        if len(values):
            axes.hlines(np.median(values), column - 0.32, column + 0.32, color=MEDIAN, linewidth=2)


def _log_scale(axes: Axes) -> None:
    """At least from 0.5 to 2; with ticks at 0.5, 1, 2, 5, ..., or at powers of 10 if it is long."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(low, 0.5), max(high, 2)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_shift(axes: Axes, rows: Sequence[NormRow]) -> None:
    _title(axes, "Running means, off the batch's by", "standard deviations; a dot is a channel")
    axes.axhspan(0, LAG, color=FINE)
    _draw_dots(axes, [row.shift for row in rows])
    if axes.get_ylim()[1] > 5:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)


def _draw_ratio(axes: Axes, rows: Sequence[NormRow]) -> None:
    _title(axes, "Variance of the batch to the running one", "1 where they agree")
    axes.axhspan(0.5, 2, color=FINE)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    _draw_dots(axes, [row.variance_ratio for row in rows])
    _log_scale(axes)


def _draw_deviation(axes: Axes, rows: Sequence[NormRow]) -> None:
    _title(axes, "Standard deviation of the input", "a dot is a channel")
    _draw_dots(axes, [np.maximum(row.deviation, 1e-12) for row in rows])
    _log_scale(axes)


def _draw_shares(axes: Axes, rows: Sequence[NormRow]) -> None:
    _title(axes, "Shares, %", "")
    width = 0.8 / len(SHARES)
    for number, (label, color, read) in enumerate(SHARES):
        known = [read(row) for row in rows]
        heights = [0 if which is None else 100 * np.mean(which) for which in known]
        left = np.arange(len(rows)) - 0.4 + number * width
        axes.bar(left, heights, width, align="edge", color=color, label=label)
    axes.set_ylim(0, max(10, axes.get_ylim()[1]))
    options = dict(fontsize=8, labelcolor=FAINT, frameon=False, handlelength=1, borderaxespad=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=len(SHARES), **options)


def _draw_singular_values(axes: Axes, rows: Sequence[NormRow]) -> None:
    _title(axes, "Singular values of the Jacobian", "smallest to largest")
    axes.axhline(1, color=FAINT, linewidth=0.8)
    for column, row in enumerate(rows):
        for value in (row.smallest, row.largest):
            if value is not None and value > 0:
                axes.plot(column, value, "_", color=BAR, markersize=12, markeredgewidth=2)
        if row.smallest and row.largest:
            axes.vlines(column, row.smallest, row.largest, color=BAR, linewidth=2)
    _log_scale(axes)
