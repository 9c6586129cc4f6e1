"""Draws the mark and the wordmarks in `docs/_static`, for light and dark pages.

python docs/wordmark_picture.py

The mark: values as they come, below; as they leave, above.
"""

import math
from pathlib import Path

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

TARGET = Path(__file__).parent / "_static"

BLUE, WHITE = "#1b5e8a", "#ffffff"
ORANGE = "#e69f00"
INKS = {"light": "#1d2b36", "dark": "#eef3f7"}


def bell(width: float, height: float, x: float, y: float) -> str:
    """The path of a normal density that stands on y, in the middle of x."""
    points = []
    for step in range(41):
        t = -2.6 + 5.2 * step / 40
        points.append(f"{x + width * t / 5.2:.2f},{y - height * math.exp(-t * t / 2):.2f}")
    return "M" + " L".join(points)


def mark() -> str:
    """A square of 64 pixels."""
    return "\n".join(
        [
            f'<rect width="64" height="64" rx="14" fill="{BLUE}"/>',
            f'<path d="{bell(50, 34, 32, 48)}" fill="none" stroke="{WHITE}" stroke-width="5" '
            'stroke-linecap="round"/>',
            f'<path d="M32,22 V48" stroke="{ORANGE}" stroke-width="4" stroke-linecap="round"/>',
        ]
    )


def letters(text: str, size: float, x: float, y: float) -> tuple[str, float]:
    """The path of a text, so that no font is needed, and where it ends."""
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans", weight=700))
    parts = []
    for points, code in path.iter_segments():
        pairs = [f"{x + a:.2f},{y - b:.2f}" for a, b in zip(points[::2], points[1::2], strict=True)]
        parts.append({1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}[int(code)] + " ".join(pairs))
        if code == 79:
            parts[-1] = "Z"
    return " ".join(parts), x + path.get_extents().x1


def wordmark(ink: str) -> str:
    """The mark and the name beside it."""
    path, end = letters("jaxnorm", 44, 78, 46)
    return svg(f'{mark()}\n<path d="{path}" fill="{ink}"/>', math.ceil(end) + 2, 64)


def svg(content: str, width: int, height: int) -> str:
    """A whole file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return f"{head}\n{content}\n</svg>\n"


if __name__ == "__main__":
    (TARGET / "mark.svg").write_text(svg(mark(), 64, 64))
    for name, ink in INKS.items():
        (TARGET / f"wordmark_{name}.svg").write_text(wordmark(ink))
    print(f"wrote mark.svg and {len(INKS)} wordmarks to {TARGET}")
