"""The reference: a directive that documents names, and a check that none was left out.

    ```{names} jaxnorm.tools
    fold
    fold_pair
    ```

writes a table of these names and then what the docstring of each says. The build fails if a public
name is documented nowhere, or twice.
"""

from types import FunctionType
from typing import Any

from docutils import nodes
from public_names import members_of, public_names
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class Names(SphinxDirective):
    """Documents the names in its content, which are public ones of the module in its argument."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table, and the entry of each name."""
        module = self.arguments[0]
        names = [line.strip() for line in self.content if line.strip()]
        there = members_of(module)
        for name in names:
            if name not in there:
                raise self.error(f"{module}.{name} is no public name")
        lines = ["```{eval-rst}", f".. currentmodule:: {module}", ""]
        lines += [".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        for name in names:
            lines += ["", *_entry(name, there[name])]
        return self.parse_text_to_nodes("\n".join([*lines, "```"]))


def _entry(name: str, value: Any) -> list[str]:
    if isinstance(value, type):
        members = ", ".join(_documented_members(value))
        return [f".. autoclass:: {name}", *([f"   :members: {members}"] if members else [])]
    if callable(value):
        return [f".. autofunction:: {name}"]
    return [f".. autodata:: {name}", "   :no-value:"]


def _documented_members(cls: type) -> list[str]:
    """Its own methods and properties, and how its objects are called."""
    own = [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and isinstance(value, FunctionType | property | classmethod | staticmethod)
        and value.__doc__
    ]
    call = next((vars(b)["__call__"] for b in cls.__mro__ if "__call__" in vars(b)), None)
    is_called = isinstance(call, FunctionType) and call.__module__.startswith("jaxnorm")
    return [*own, *(["__call__"] if is_called and call.__doc__ else [])]


def check_all_documented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns, and by that fails the build, of public names that no page documents."""
    documented = env.domains["py"].data["objects"]
    for name in public_names():
        if name not in documented:
            logger.warning("%s is public, and no page of docs/reference documents it", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive and the check."""
    app.add_directive("names", Names)
    app.connect("env-check-consistency", check_all_documented)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
