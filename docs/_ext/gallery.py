"""The gallery: a card for each script in examples and examples/reproductions.

The title is the first line of the script's docstring. The picture is the recorded one of its page
in docs/reproductions, or docs/images/NAME.png or .svg; a script without one fails the build. A
card leads to that page, or else to the page named in `PAGES`, or else to the script.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = ("examples", "examples/reproductions")

PAGES = {
    "adabn_digits": "tools/adapt",
    "batch_norm_devices": "devices",
    "batch_norm_digits_nnx": "start/nnx",
    "fold_batch_norm": "tools/fold",
}
"""Pages of scripts that have none of their own."""

PICTURES = {"batch_norm_devices": "images/devices.png"}
"""Pictures that are named otherwise than the script."""


class Example(NamedTuple):
    """A card.

    Attributes:
        script: its file, from the root of the repository.
        title: what comes before the colon in its docstring's first line.
        text: what comes after it, or "".
        picture: its file, or None if there is none.
        page: where to read on, without `.md`, or None.
    """

    script: Path
    title: str
    text: str
    picture: Path | None
    page: str | None


def examples() -> list[Example]:
    """All scripts, what to run first before the reproductions."""
    return [_example(path) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def _example(path: Path) -> Example:
    about = ast.get_docstring(ast.parse(path.read_text())) or path.stem
    title, _, text = about.splitlines()[0].rstrip(".").partition(": ")
    own = DOCS / "reproductions" / f"{path.stem}.md"
    page = f"reproductions/{path.stem}" if own.exists() else PAGES.get(path.stem)
    script, text = path.relative_to(ROOT), text[:1].upper() + text[1:]
    return Example(script, title, text, _picture(path.stem), page)


def _picture(name: str) -> Path | None:
    pictures = [DOCS / "reproductions" / f"{name}.png"]
    pictures += [DOCS / "images" / f"{name}.{ending}" for ending in ("png", "svg")]
    pictures += [DOCS / PICTURES[name]] if name in PICTURES else []
    return next((picture for picture in pictures if picture.exists()), None)


class Gallery(SphinxDirective):
    """All cards."""

    def run(self) -> list[nodes.Node]:
        """The grid."""
        found = examples()
        for example in found:
            self.env.note_dependency(str(ROOT / example.script))
            if example.picture is None:
                name = f"{example.script.stem}.png"
                raise self.error(
                    f"{example.script} has no picture: docs/images/{name}, "
                    f"or docs/reproductions/{name} with its recorded result"
                )
        cards = "\n\n".join(_card(one, one.picture) for one in found if one.picture)
        return self.parse_text_to_nodes(f":::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{cards}\n\n:::::")


def _card(example: Example, picture: Path) -> str:
    name = example.script.name
    lines = [
        f"::::{{grid-item-card}} {example.title}",
        f":img-top: {picture.relative_to(DOCS).as_posix()}",
        f":img-alt: picture of {name}",
        *([f":link: {example.page}", ":link-type: doc"] if example.page else []),
        "",
        example.text,
        "",
        f"`{name}`" if example.page else f"[`{name}`](../{example.script})",
        "::::",
    ]
    return "\n".join(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
