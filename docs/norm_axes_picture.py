"""Draws `docs/images/norm_axes.svg`: what each norm averages over, as found by derivatives.

python docs/norm_axes_picture.py

A block is an input of examples, positions and features. Orange is one element; blue are the others
that its normalized value depends on, by the derivative of jaxnorm's own functions.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

TARGET = Path(__file__).parent / "images" / "norm_axes.svg"

EXAMPLES, POSITIONS, FEATURES = 4, 4, 6
CHOSEN = (0, 0, FEATURES - 1)  # at the corner of the block that is nearest to the reader

INK, FAINT = "#222222", "#555555"
ONE, TOGETHER, OTHER = "#d55e00", "#56a5d8", "#eeeeee"
SHADES = {"top": 1.0, "front": 0.93, "side": 0.84}


class Norm(NamedTuple):
    """A block of the picture.

    Attributes:
        title: the method.
        below: what the statistics are taken over.
        normalize: the function whose dependence is drawn.
    """

    title: str
    below: str
    normalize: Callable[[jax.Array], jax.Array]


NORMS = (
    Norm("batch norm", "examples and space", lambda x: jaxnorm.batch_norm(x)[0]),
    Norm("layer norm", "features", jaxnorm.layer_norm),
    Norm("group norm", "a group of features, space", partial(jaxnorm.group_norm, num_groups=2)),
    Norm("instance norm", "space", lambda x: jaxnorm.instance_norm(x)[0]),
)

# Where the next feature, position and example are drawn, in pixels; the first is at the front.
ALONG_FEATURES, ALONG_POSITIONS, ALONG_EXAMPLES = (15.0, 0.0), (0.0, 21.0), (9.0, -7.5)
WIDTH, HEIGHT, COLUMNS = 200, 205, 2


def dependence(norm: Norm) -> np.ndarray:
    """Which elements the normalized value of the chosen one depends on."""
    x = jax.random.normal(jax.random.key(0), (EXAMPLES, POSITIONS, FEATURES))
    gradient = jax.grad(lambda x: norm.normalize(x)[CHOSEN])(x)
    return np.asarray(jnp.abs(gradient) > 1e-6)


def faces(depends: np.ndarray) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The squares that can be seen: top, front and right side of the block."""
    for example in reversed(range(EXAMPLES)):
        for feature in range(FEATURES):
            yield "top", (example, 0, feature)
        for position in range(POSITIONS):
            yield "side", (example, position, FEATURES - 1)
    for position in range(POSITIONS):
        for feature in range(FEATURES):
            yield "front", (0, position, feature)


def corner(example: int, position: int, feature: int) -> np.ndarray:
    """Where the front, top, left corner of an element is drawn."""
    steps = np.array([ALONG_EXAMPLES, ALONG_POSITIONS, ALONG_FEATURES])
    return np.array([example, position, feature]) @ steps


def square(face: str, element: tuple[int, int, int], color: str) -> str:
    """One square of a face."""
    example, position, feature = element
    across = {"top": (1, 0, 1), "front": (0, 1, 1), "side": (1, 1, 0)}[face]
    start = np.array([example, position, feature + (face == "side")])
    one = np.array([0, 0, 1]) if across[2] else np.array([1, 0, 0])
    corners = [start, start + one, start + across, start + across - one]
    points = " ".join("{:.1f},{:.1f}".format(*corner(*each)) for each in corners)
    return f'<polygon points="{points}" fill="{shaded(color, SHADES[face])}"/>'


def shaded(color: str, share: float) -> str:
    """The color, darker."""
    parts = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part * share):02x}" for part in parts)


def block(norm: Norm) -> str:
    """One block with its texts; its front, top, left corner is at (0, 0)."""
    depends = dependence(norm)
    drawn = []
    for face, element in faces(depends):
        color = ONE if element == CHOSEN else TOGETHER if depends[element] else OTHER
        drawn.append(square(face, element, color))
    middle = (corner(EXAMPLES, 0, FEATURES)[0]) / 2
    front, back = FEATURES * ALONG_FEATURES[0], corner(EXAMPLES, 0, FEATURES)
    height = POSITIONS * ALONG_POSITIONS[1]
    texts = [
        f'<text class="title" x="{middle}" y="-48">{norm.title}</text>',
        f'<text x="{middle}" y="{height + 38}">over {norm.below}</text>',
        f'<text class="axis" x="{front / 2}" y="{height + 15}">features</text>',
        f'<text class="axis" transform="translate(-9 {height / 2}) rotate(-90)">space</text>',
        f'<text class="axis" transform="translate({(front + back[0]) / 2 + 9} '
        f'{height + back[1] / 2 + 10}) rotate(-40)">examples</text>',
    ]
    return "\n".join([*drawn, *texts])


def picture() -> str:
    """The whole picture."""
    rows = -(-len(NORMS) // COLUMNS)
    size = (WIDTH * COLUMNS, HEIGHT * rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{1.4 * size[0]:.0f}" '
        f'viewBox="0 0 {size[0]} {size[1]}">',
        "<style>polygon { stroke: white; stroke-width: 1 } "
        f"text {{ font: 13px sans-serif; fill: {FAINT}; text-anchor: middle }} "
        f".title {{ font-weight: bold; font-size: 16px; fill: {INK} }} "
        ".axis { font-size: 11px }</style>",
        f'<rect width="{size[0]}" height="{size[1]}" rx="8" fill="white"/>',
    ]
    for number, norm in enumerate(NORMS):
        row, column = divmod(number, COLUMNS)
        x, y = WIDTH * column + 38, HEIGHT * row + 72
        parts.append(f'<g transform="translate({x} {y})">\n{block(norm)}\n</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture())
    print(f"wrote {TARGET}")
