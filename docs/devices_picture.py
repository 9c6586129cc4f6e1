"""Draws `docs/images/devices.png`: which examples are normalized together, and who keeps what.

python docs/devices_picture.py
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image

TARGET = Path(__file__).parent / "images" / "devices.png"

DEVICES, EXAMPLES = 8, 4
LETTERS = "ABCDEFGHIJKLMNOP"
INK, FAINT = "#222222", "#666666"
DPI, COLORS = 160, 128


class Paint(NamedTuple):
    """The color of a box, and of the text in it."""

    fill: str
    text: str = "white"


DEVICE, STATISTICS = Paint("#e9e9ec"), Paint(INK)
HUES = ["#31688e", "#c2571a", "#2e8b57", "#8e4585", "#8f7100", "#b0305c", "#5b5fc7", "#5a6b70"]
PALE = ["#8fbfe0", "#f3b083", "#8fd1ab", "#d7a4d0", "#e0c560", "#f09ab5", "#b9bbf5", "#b4c3c8"]


class Way(NamedTuple):
    """A choice of groups.

    Attributes:
        title: what is normalized together.
        option: what to write.
        groups: for each device, the groups of its parts, in order.
        shared: whether all groups feed one pair of running statistics.
    """

    title: str
    option: str
    groups: Sequence[Sequence[int]]
    shared: bool = True


WAYS = (
    Way("the whole batch", "BatchNorm()", [[0]] * DEVICES),
    Way("two devices", "ghost_batch_size=8", [[i // 2] for i in range(DEVICES)]),
    Way("one device", "ghost_batch_size=4", [[i] for i in range(DEVICES)]),
    Way("half a device", "ghost_batch_size=2", [[2 * i, 2 * i + 1] for i in range(DEVICES)]),
    Way("any devices", "axis_index_groups=[[0, 4], …]", [[i % 4] for i in range(DEVICES)], False),
)

# In units of the width of an example; down is positive.
GAP = 0.7
PITCH = EXAMPLES + GAP
WIDTH = DEVICES * PITCH - GAP
TOP, ROW, LAST = 4.6, 8.3, 8.0


def paint_of(group: int, groups: int) -> Paint:
    """Neighbours differ in hue, or in shade where there are more groups than hues."""
    if groups <= len(HUES):
        return Paint(HUES[group])
    return Paint(PALE[group // 2], INK) if group % 2 else Paint(HUES[group // 2])


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    paint: Paint,
    text: str = "",
    size: float = 13.5,
) -> None:
    """A box with round corners and a text in it."""
    shape = "round,pad=0,rounding_size=0.22"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=paint.fill, ec="none"))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        color=paint.text,
        fontsize=size,
        fontweight="bold",
        ha="center",
        va="center_baseline",
    )


def draw_way(axes: Axes, way: Way, y: float) -> None:
    """One row: its title, what each device holds, and below it the running statistics."""
    axes.text(-0.25, y, way.title, fontsize=17, fontweight="bold", color=INK)
    right = WIDTH + 0.25
    axes.text(right, y, way.option, fontsize=14.5, family="monospace", color=INK, ha="right")
    number = 1 + max(map(max, way.groups))
    for device, groups in enumerate(way.groups):
        left = device * PITCH
        box(axes, left - 0.25, y + 0.65, EXAMPLES + 0.5, 2.7, DEVICE)
        for example in range(EXAMPLES):
            group = groups[example * len(groups) // EXAMPLES]
            paint = paint_of(group, number)
            box(axes, left + example + 0.06, y + 0.95, 0.88, 2.1, paint, LETTERS[group], 12)
        middle = left + EXAMPLES / 2
        arrow = dict(arrowstyle="-|>", color=FAINT, lw=1.4, shrinkA=0, shrinkB=0)
        axes.annotate("", (middle, y + 4.45), (middle, y + 3.4), arrowprops=arrow)
        if not way.shared:
            paint, letter = paint_of(groups[0], number), LETTERS[groups[0]]
            box(axes, left - 0.25, y + 4.5, EXAMPLES + 0.5, 1.5, paint, letter)
    if way.shared:
        text = "one running mean and variance, of all"
        box(axes, -0.25, y + 4.5, WIDTH + 0.5, 1.5, STATISTICS, text)
    else:
        text = "a running mean and variance of each group"
        axes.text(WIDTH / 2, y + 7.3, text, fontsize=14, color=INK, ha="center")


def draw() -> None:
    """Writes the picture."""
    plt.rcParams["font.family"] = "DejaVu Sans"
    height = TOP + ROW * (len(WAYS) - 1) + LAST
    figure = plt.figure(figsize=(7, 7 * (height + 0.6) / (WIDTH + 1.6)), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.8, WIDTH + 0.8), ylim=(height, -0.6))
    axes.axis("off")
    heading = "Same letter, same color: normalized together"
    axes.text(WIDTH / 2, 1.0, heading, fontsize=18.5, fontweight="bold", color=INK, ha="center")
    below = f"{DEVICES} devices with {EXAMPLES} examples each"
    axes.text(WIDTH / 2, 2.7, below, fontsize=15.5, color=FAINT, ha="center")
    for number, way in enumerate(WAYS):
        draw_way(axes, way, TOP + ROW * number)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(TARGET, optimize=True)


if __name__ == "__main__":
    draw()
    print(f"wrote {TARGET}, {TARGET.stat().st_size / 1000:.0f} kB")
