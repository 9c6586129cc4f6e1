"""On pages in Markdown, code that is a full public name links to the reference.

`jaxnorm.tools.fold`, `tools.fold` and `jaxnorm.cite(layer)` become links; on the pages in `TABLES`
also names alone, such as `BatchNorm`.
"""

import re

from docstrings import full_name
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

FULL = re.compile(r"^(jaxnorm|tools|diagnose)\.[\w.]+")
TABLES = {"methods": "jaxnorm.nnx", "which_norm": "jaxnorm.nnx"}
"""Pages with tables of methods, and where their classes are looked up."""


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Links the names of one page."""
    docname = app.env.docname
    for code in list(doctree.findall(nodes.literal)):
        inside = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.download_reference)
        if any(isinstance(parent, inside) for parent in _parents(code)):
            continue
        full = FULL.match(code.astext())
        target = full_name(full[0]) if full else None
        if not full and docname in TABLES:
            target = full_name(code.astext(), TABLES[docname])
        if target:
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target)
            link["refdoc"] = docname
            code.replace_self(link)
            link += code


def _parents(node: nodes.Node):
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects it."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
