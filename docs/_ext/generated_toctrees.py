"""Tables of contents for pages that are written for GitHub too, where a directive would show."""

from sphinx.application import Sphinx

CONTENTS = {"tools/README": ("*",)}
"""Pages, and the patterns of the pages below them."""


def add_toctree(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds a hidden table of contents at the end of a page."""
    if docname in CONTENTS:
        lines = ["```{toctree}", ":hidden:", ":glob:", "", *CONTENTS[docname], "```"]
        source[0] += "\n" + "\n".join(lines) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects it."""
    app.connect("source-read", add_toctree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
