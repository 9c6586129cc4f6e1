"""Docstrings and signatures as the reference shows them.

Docstrings here are plain text first: formulas are indented blocks, and `names` stand in single
backticks. This module makes the blocks literal and the names links, shows signatures as they stand
in the source, and puts together what a Linen or NNX class inherits from its specification.
"""

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from public_names import MODULES, public_names
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

from jaxnorm import methods
from jaxnorm.nnx.shell import Shell

SECTION = re.compile(r"^(\w[\w ]*):$")
SHELL_ARGUMENTS = ("parent",)  # of every Linen module; only Flax passes them


class NameRole(SphinxRole):
    """Text in single backticks: code, and a link if it is the name of something public."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The node."""
        code = nodes.literal(self.rawtext, self.text)
        target = full_name(self.text, self.env.ref_context.get("py:module", "jaxnorm"))
        if not target:
            return [code], []
        link = addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=target)
        link["refdoc"] = self.env.docname
        return [link], []


@functools.cache
def _names() -> Any:
    return public_names()


def full_name(text: str, module: str = "jaxnorm") -> str | None:
    """The public name that `text` means where `module` is documented; None for none."""
    homes = [f"{home}." for home in (module, *MODULES)]
    candidates = [text, *(home + text for home in homes), f"jaxnorm.{text}"]
    names = _names()
    return next((name for name in candidates if name in names), None)


def make_rest(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Makes reStructuredText of a docstring, which Napoleon then takes apart."""
    lines[:] = rest_of(_joined_names(lines))


def rest_of(lines: list[str]) -> list[str]:
    """Indented blocks before the sections become literal; in other text, * and | are themselves."""
    made: list[str] = []
    section, is_literal, in_code = "", False, False
    for line in lines:
        heading = SECTION.match(line)
        section = heading[1] if heading else section
        if line and not line.startswith(" "):
            is_literal = False
        after_blank = not made or not made[-1].strip()
        is_block = line.startswith("    ") and after_blank and not section
        if is_block and not is_literal and not _in_list(made):
            made += [".. code-block:: none", ""]
            is_literal = True
        if is_literal or section == "Example":
            made.append(line)
            continue
        in_code = in_code and bool(line.strip())
        text, in_code = _escaped(line, in_code)
        made.append(text)
    return made


def _in_list(made: list[str]) -> bool:
    return next((line for line in reversed(made) if line.strip()), "").startswith("- ")


def _escaped(line: str, in_code: bool) -> tuple[str, bool]:
    """The line, and whether its end is inside of backticks."""
    parts = line.split("`")
    for number, part in enumerate(parts):
        if (number % 2 == 1) == in_code:
            parts[number] = re.sub(r"([*|])", r"\\\1", part)
    return "`".join(parts), in_code != (len(parts) % 2 == 0)


def _joined_names(lines: list[str]) -> list[str]:
    """Names of arguments that share a text stand in one line, however long."""
    joined: list[str] = []
    for line in lines:
        last = joined[-1] if joined else ""
        if re.match(r"^    \w[^:]*,$", last) and line.startswith(" " * 8):
            joined[-1] = f"{last} {line.strip()}"
        else:
            joined.append(line)
    return joined


def add_inherited(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Adds to a Linen or NNX class what its specification says, before the example."""
    spec = specification(obj)
    if spec is None or what != "class":
        return
    inherited = inspect.cleandoc(spec.__doc__ or "").splitlines()[1:]
    if obj.__module__.startswith("jaxnorm.nnx") and issubclass(obj, Shell):
        inherited = _with_arguments(inherited, _arguments(inspect.cleandoc(Shell.__doc__ or "")))
    example = lines.index("Example:") if "Example:" in lines else len(lines)
    lines[:] = [*lines[:example], *inherited, "", *lines[example:]]


def specification(obj: Any) -> type | None:
    """The class of options that a Linen or NNX class inherits, if it is one."""
    module = getattr(obj, "__module__", "")
    if not isinstance(obj, type) or not module.startswith(("jaxnorm.linen", "jaxnorm.nnx")):
        return None
    return getattr(methods, obj.__name__, None)


def _arguments(docstring: str) -> list[str]:
    _, _, after = docstring.partition("Args:\n")
    return after.partition("\n\n")[0].splitlines()


def _with_arguments(lines: list[str], arguments: list[str]) -> list[str]:
    if "Args:" not in lines:
        return [*lines, "", "Args:", *arguments]
    start = lines.index("Args:") + 1
    return [*lines[:start], *arguments, *lines[start:]]


def show_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """The signature as it is written, not as Python resolves it."""
    if specification(obj) is not None:
        return _module_signature(obj), ""
    written = _definition(obj) if what in ("function", "method") else None
    if written is None:
        return None
    arguments = ast.unparse(written.args)
    if what == "method":
        arguments = re.sub(r"^(self|cls)(: Any)?(, )?", "", arguments)
    return f"({arguments})", ast.unparse(written.returns) if written.returns else ""


def _definition(obj: Any) -> ast.FunctionDef | None:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))
    except (OSError, TypeError):
        return None
    (parsed,) = ast.parse(source).body[:1]
    return parsed if isinstance(parsed, ast.FunctionDef) else None


def _module_signature(cls: type) -> str:
    types = _written_types(cls)
    found = inspect.signature(cls.__init__).parameters.values()
    parameters = [p for p in found if p.name not in ("self", *SHELL_ARGUMENTS)]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    shown = [_parameter(p, types) for p in parameters if p not in keyword_only]
    shown += ["*"] * bool(keyword_only) + [_parameter(p, types) for p in keyword_only]
    return f"({', '.join(shown)})"


def _parameter(parameter: inspect.Parameter, types: dict[str, str]) -> str:
    written = f"{parameter.name}: {types.get(parameter.name, 'Any')}"
    default = parameter.default
    if default is parameter.empty:
        return written
    return f"{written} = {getattr(default, '__name__', None) or repr(default)}"


def _written_types(cls: type) -> dict[str, str]:
    """The annotations of its fields, as they stand in the source of it and its bases."""
    types = {"name": "str | None"}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("jaxnorm"):
            source = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            body = source.body if isinstance(source, ast.ClassDef) else []
            fields = [line for line in body if isinstance(line, ast.AnnAssign)]
            types |= {ast.unparse(f.target): ast.unparse(f.annotation) for f in fields}
    return {n: re.sub(r"^dataclasses\.InitVar\[(.*)\]$", r"\1", t) for n, t in types.items()}


def resolve(app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Node):
    """Types in signatures: those of this library are links, those of others stay plain."""
    if node.get("refdomain") != "py":
        return None
    target = full_name(node["reftarget"].rpartition(".")[2])
    if target and target != node["reftarget"]:
        domain = env.domains["py"]
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)
    return content if node["reftype"] == "class" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects all of it; before Napoleon, which takes the sections apart."""
    app.add_role("name", NameRole())
    app.connect("autodoc-process-docstring", add_inherited, priority=100)
    app.connect("autodoc-process-docstring", make_rest, priority=200)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
