"""The picture of a run: how long others take, method by method, and the band of the noise."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from benchmarks.cases import DTYPES, METHODS
from benchmarks.peers import FLAX, OURS
from benchmarks.results import Results, mean_ratio
from benchmarks.timing import AGAIN

INK, FAINT, BAND = "#222222", "#777777", "#d9d9de"
COLORS = ("#555555", "#c2571a", "#eba06b", "#2e8b57", "#8e4585", "#b0305c", "#31688e")
MARKERS = "osD^vPX*"  # one more than colors, so that 56 pairs come before the first one again
TICKS = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8)


def draw(results: Results, target: Path) -> None:
    """Writes the picture."""
    dtypes = [d for d in DTYPES if results.chosen("training", d) or models_of(results, d)]
    ways = list(dict.fromkeys(way for one in results.layers for way in one.times.seconds))
    ways = [way for way in ways if way != OURS and not way.endswith(AGAIN)] or [FLAX]
    styles = styles_of(ways)
    labels = [m for m in METHODS if any(one.case.method == m for one in results.layers)]
    labels += list(dict.fromkeys(one.name for one in results.models))
    size = (max(9.0, 5.2 * len(dtypes) + 1.5), 0.72 * len(labels) + 1.9)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        draw_panel(axes, results, dtype, labels, styles)
    panels[0][0].set_yticks(range(len(labels)), labels, fontsize=11)
    panels[0][0].set_ylim(len(labels) - 0.4, -0.6)
    handles = [
        Line2D([], [], color=color, marker=marker, ls="", ms=8, label=way)
        for way, (color, marker) in styles.items()
    ]
    handles += [Line2D([], [], color=BAND, lw=9, label="noise: Flax over itself")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    title = "Training step: their time over jaxnorm's (right of 1, jaxnorm is faster)"
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    figure.savefig(target, dpi=140)
    plt.close(figure)


def styles_of(ways: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A color and a marker for each, however many there are."""
    return dict(zip(ways, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))


def models_of(results: Results, dtype: str):
    """Whole models in one dtype."""
    return [one for one in results.models if one.dtype == dtype]


def draw_panel(
    axes: Axes,
    results: Results,
    dtype: str,
    labels: Sequence[str],
    styles: Mapping[str, tuple[str, str]],
) -> None:
    """One dtype: small marks are sizes, large ones their geometric mean."""
    low, high = results.noise()
    axes.axvspan(low, max(high, low + 1e-3), color=BAND, zorder=0)
    axes.axvline(1, color=INK, lw=1, zorder=1)
    for place, (way, (color, marker)) in enumerate(styles.items()):
        offset = 0.64 * (place + 0.5) / len(styles) - 0.32
        for row, label in enumerate(labels):
            of_method = [o for o in results.chosen("training", dtype) if o.case.method == label]
            here = [one for one in of_method if way in one.times.seconds]
            y = row + offset
            if here:
                ratios = [one.times.ratio(way, OURS).middle for one in here]
                axes.plot(
                    ratios, [y] * len(ratios), ms=3.2, alpha=0.65, color=color, marker=marker, ls=""
                )
                axes.plot([mean_ratio(here, way)], [y], ms=8, color=color, marker=marker, ls="")
            for one in models_of(results, dtype) if way == FLAX else ():
                if one.name == label:
                    ratio = one.times.ratio(FLAX, OURS)
                    axes.plot([ratio.low, ratio.high], [row, row], color=color, lw=1.5)
                    axes.plot([ratio.middle], [row], ms=8, color=color, marker=marker, ls="")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(dtype, fontsize=12, color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    for row in range(1, len(labels)):
        axes.axhline(row - 0.5, color="#e5e5e8", lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
