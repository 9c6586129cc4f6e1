"""Traces of one model never serve another.

Tools watch and exchange layers while a program is traced. `jax.jit` does not know of it: it keeps
what it traced by function, shapes and static arguments, `nn.jit` by a fingerprint of the module
that has no path. A block that one model traced would then be called by the other: a frozen model
would train, or the user's own would stop. So what a tool does to a model is made a part of both
keys, by a context of JAX and an addition to the fingerprint.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.linen import transforms

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Watched:
    """One run of a model, whose layers are watched; no other shares its traces.

    Attributes:
        number: of the run.
    """

    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    def below(self, path: Path) -> Any:
        """What tells the trace of the module at `path` from others."""
        return path


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A model in which other layers stand in the place of some.

    Attributes:
        path: of the model.
        layers: by the path of a layer inside the model, what makes the other.
    """

    path: Path
    layers: Mapping[Path, Any]

    def below(self, path: Path) -> Any:
        """What is exchanged inside of the module at `path`: where it is the same, traces are."""
        whole = {(*self.path, *key): make for key, make in self.layers.items()}
        size = len(path)
        return frozenset((key[size:], make) for key, make in whole.items() if key[:size] == path)


_done = jax.make_user_context(default_value=())  # a part of what `jax.jit` keeps traces by


@contextlib.contextmanager
def traced_apart(what: Watched | Exchanged) -> Iterator[None]:
    """What is traced inside is kept for the same `what` alone."""
    with _done((*_done.value, what)):
        yield


_fingerprint_of_flax = transforms._module_fingerprint


def _fingerprint(module: Any) -> Any:
    """Flax's fingerprint of a module, with what is done to the part of the model that it is."""
    fingerprint = _fingerprint_of_flax(module)
    if module.scope is None or not _done.value:
        return fingerprint
    path = tuple(module.path)
    return fingerprint, tuple(what.below(path) for what in _done.value)


transforms._module_fingerprint = _fingerprint
