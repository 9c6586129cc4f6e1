"""The report on norms as a table for the terminal."""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxnorm.diagnose.norm_rows import NormRow, farthest_from_one

WIDTH = 100
NOTHING = "·"

Cell = Callable[[NormRow], str]


def _median_and_worst(values: np.ndarray | None, worst: Callable[[np.ndarray], float]) -> str:
    if values is None:
        return NOTHING
    return f"{_short(float(np.median(values)))} {_short(worst(values)):>5}"


def _short(value: float | None) -> str:
    """A number in at most five letters."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or 100 <= value < 99999.5:
        return f"{value:.0f}" if value < 99999.5 else f"{value:.0e}".replace("e+0", "e")
    return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")


def _number(which: np.ndarray | None) -> str:
    return str(int(which.sum())) if which is not None and which.any() else NOTHING


COLUMNS: Sequence[tuple[str, Cell]] = (
    ("ch.", lambda row: str(row.features)),
    ("values", lambda row: _short(row.count)),
    ("mean\noff by", lambda row: _median_and_worst(row.shift, np.max)),
    (
        "variance\nratio",
        lambda row: _median_and_worst(
            row.variance_ratio, lambda ratio: float(ratio[farthest_from_one(ratio)])
        ),
    ),
    ("con-\nstant", lambda row: _number(row.collapsed)),
    ("scale\n0", lambda row: _number(row.zero_scale)),
    ("never\n> 0", lambda row: _number(row.never_positive)),
    (
        "|y|\n> 3",
        lambda row: NOTHING if row.saturated is None else f"{100 * row.saturated.mean():.0f}%",
    ),
    ("singular\nvalues", lambda row: f"{_short(row.smallest)} {_short(row.largest):>5}"),
)
LEGEND = (
    "values: of the batch, behind each statistic. mean off by: of the running mean from the "
    "batch's, in standard deviations, median and worst of the channels. variance ratio: of the "
    "batch's to the running one, the same. constant, scale 0, never > 0: numbers of channels. "
    "|y| > 3: share of outputs. singular values: smallest and largest of the Jacobian."
)


def _what(row: NormRow) -> str:
    """The second line of a norm's name."""
    parts = [f"{row.method}, {row.normalizes_by}"]
    if row.calls > 1:
        parts.append(f"{row.calls} calls")
    if row.updates is not None:
        parts.append(f"{row.updates} updates")
    return ", ".join(parts)


def renderable(
    rows: Sequence[NormRow], nonfinite: str | None, unseen: Mapping[str, str]
) -> RenderableType:
    """What rich draws: the table, below it what there is to say."""
    not_seen = [Text(f"\nnot looked at: {path}: {why}.") for path, why in unseen.items()]
    if not rows:
        seen = " that can be looked at" if unseen else ""
        nothing = Text(f"This call of the model runs through no normalization layers{seen}.")
        return Group(nothing, *not_seen)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, expand=False)
    table.add_column("norm", vertical="bottom", overflow="fold", min_width=20)
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for row in rows:
        name = Text.assemble((row.path, "bold"), "\n", (_what(row), "dim"))
        style = "yellow" if row.warnings else ""
        table.add_row(name, *(cell(row) for _, cell in COLUMNS), style=style)
    parts: list[RenderableType] = [table, Text(LEGEND, style="dim")]
    if nonfinite is not None:
        parts.append(Text(f"\nNaN or infinite values: {nonfinite}.", style="bold red"))
    for row in rows:
        if row.warnings:
            parts.append(Text(f"\n{row.path}", style="bold"))
            parts += [Padding(Text(sentence), (0, 0, 0, 2)) for sentence in row.warnings]
    return Group(*parts, *not_seen)


def as_text(drawn: RenderableType) -> str:
    """The same without colors, at most 100 letters wide."""
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, force_terminal=False).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
