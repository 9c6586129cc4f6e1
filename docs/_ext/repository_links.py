"""Links from a page to what is in the repository but not in docs.

On GitHub a relative link leads there by itself. On the site it leads to the page that shows the
file, if there is one; otherwise to the repository's address, `repository_url` in conf.py; and while
that is empty, a file is offered as a download and a folder is only named. What does not exist fails
the build.
"""

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

SHOWN = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "README.md": "index"}
"""Files of the root, and the page that shows each."""

WRITTEN_AT_ROOT = ("contributing", "changelog")
"""Pages that include a file of the root, whose links start there."""


def turn_links(app: Sphinx, doctree: nodes.document) -> None:
    """Turns the links of one page that lead out of docs."""
    docname = app.env.docname
    folder = ROOT if docname in WRITTEN_AT_ROOT else (DOCS / docname).parent
    for link in filter(_is_unresolved, list(doctree.findall(nodes.Element))):
        path, _, anchor = link["reftarget"].partition("#")
        if link.get("refdomain") == "doc":  # a page outside of docs, which MyST took for one inside
            path, anchor = f"{path}.md", link.get("reftargetid") or ""
        target = Path(os.path.normpath(folder / path))
        if not path or "://" in path:
            continue
        if target.is_relative_to(DOCS) and folder != ROOT:
            continue  # Sphinx knows it, or warns
        if not target.exists() or not target.is_relative_to(ROOT):
            logger.warning("link to %s, which does not exist", link["reftarget"], location=link)
            continue
        link.replace_self(_turned(app, link, target, anchor))


def _is_unresolved(node: nodes.Element) -> bool:
    if isinstance(node, addnodes.download_reference):
        return True
    is_link = isinstance(node, addnodes.pending_xref) and node.get("reftype") == "myst"
    return is_link and (not node.get("refdomain") or node["reftarget"].startswith("/"))


def _turned(app: Sphinx, link: nodes.Element, target: Path, anchor: str) -> nodes.Element:
    here, path = app.env.docname, target.relative_to(ROOT).as_posix()
    page = SHOWN.get(path)
    if target.is_relative_to(DOCS) and target.suffix == ".md":
        page = target.relative_to(DOCS).with_suffix("").as_posix()
    if page:
        turned = addnodes.pending_xref(
            "", refdomain="doc", reftype="myst", refdoc=here, reftarget=page, refexplicit=True
        )
        turned["reftargetid"] = anchor or None
    elif app.config.repository_url:
        kind = "tree" if target.is_dir() else "blob"
        turned = nodes.reference("", refuri=f"{app.config.repository_url}/{kind}/main/{path}")
    elif target.is_dir():
        turned = nodes.inline()
    else:
        turned = addnodes.download_reference(
            "",
            refdoc=here,
            reftarget=os.path.relpath(target, (DOCS / here).parent),
            refexplicit=True,
        )
    turned += link.children
    return turned


def setup(app: Sphinx) -> dict[str, bool]:
    """Runs before Sphinx collects the downloads."""
    app.add_config_value("repository_url", "", "env")
    app.connect("doctree-read", turn_links, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
