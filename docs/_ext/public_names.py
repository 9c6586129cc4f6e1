"""What the library calls public: the names that the reference must document."""

import importlib
import types
from typing import Any

MODULES = ("jaxnorm", "jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.tools", "jaxnorm.diagnose")
REGISTRY = "jaxnorm.methods"


def members_of(module: str) -> dict[str, Any]:
    """The public names of a module, with what they name, in alphabetical order."""
    home = importlib.import_module(module)
    return {name: value for name, value in sorted(vars(home).items()) if _is_public(name, value)}


def public_names() -> dict[str, Any]:
    """Full names of all that is public, each thing once, under the shortest of its names."""
    found = {f"{module}.{name}": v for module in MODULES for name, v in members_of(module).items()}
    known = {id(value) for value in found.values()}
    registry = members_of(REGISTRY).items()
    return found | {f"{REGISTRY}.{name}": v for name, v in registry if id(v) not in known}


def _is_public(name: str, value: Any) -> bool:
    if name.startswith("_") or isinstance(value, types.ModuleType):
        return False
    if isinstance(value, type) or callable(value):
        return getattr(value, "__module__", "").startswith("jaxnorm")
    return name.isupper() and name != "TYPE_CHECKING"
