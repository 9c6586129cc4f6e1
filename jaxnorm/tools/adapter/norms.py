"""The norms of a model: which of its layers they are, and which of them a user chose."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen

from jaxnorm.tools.adapter import linen_model, nnx_model
from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.adapter.kinds import method_of
from jaxnorm.tools.adapter.models import Model, Path, Run

Only = str | Callable[[str], bool] | None
"""Which norms: a pattern of paths, `"block1/*"`, a function of the path, or None for all."""

NORMS = (*linen_model.NORMS, *nnx_model.NORMS)


class Unreached(NamedTuple):
    """Variables that look like those of a norm, of a Linen layer that the example call misses.

    Attributes:
        names: of the variables. Statistics say that it is a norm; a scale alone can be another's.
    """

    names: frozenset[str]


UNREACHED = "not called in the example call. Call the model as in training, train=True"
"""Why nothing can be done with a layer that is `Unreached`."""


def norms_of(model: Model, given: Any, args: Any, kwargs: Any, who: str) -> dict[Path, Any]:
    """The norms of a model that a user gave, by their paths, by an example call.

    What the call does not reach, such as the norm of a head that is there in training only, but
    has variables like a norm, is `Unreached` in the place of a layer.

    Raises:
        ValueError: a Linen module without a call: its layers exist only inside of one.
    """
    if isinstance(given, linen.Module) and not (args or kwargs):
        raise ValueError(
            f"{who}: found the Linen module {type(given).__name__} without a call, but its layers "
            f"are known only in one. Add an example input: {who}(model.bind(variables), x)."
        )
    modules: dict[Path, list[linen.Module]] = {}
    layers = model.known_layers(noting(modules, example_call(args, kwargs, who)))
    norms = {path: layer for path, layer in layers.items() if is_norm(layer)}
    if not isinstance(given, linen.Module):
        return norms
    return norms | _unreached(model, modules)


def noting(modules: dict[Path, list[linen.Module]], run: Run) -> Run:
    """`run`, which notes all Linen modules that it calls by their paths, norms or not."""

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "setup":
            modules.setdefault(tuple(context.module.path), []).append(context.module)
        return next_fun(*args, **kwargs)

    def run_and_note(model: Any) -> Any:
        with linen.intercept_methods(note):
            return run(model)

    return run_and_note


def _unreached(model: Model, called: Mapping[Path, Any]) -> dict[Path, Unreached]:
    """What looks like a norm among the variables that belong to no module that is called."""
    groups: dict[Path, set[str]] = {}
    for key in model.arrays:
        if model.collection(key) in ("params", "batch_stats") and key[1:-1] not in called:
            groups.setdefault(key[1:-1], set()).add(key[-1])
    return {
        path: Unreached(frozenset(names))
        for path, names in groups.items()
        if names >= {"mean", "var"}
        or names >= {"mean", "cov"}
        or ("scale" in names and "kernel" not in names)
    }


def is_norm(layer: Any) -> bool:
    """Whether a layer normalizes activations; those that normalize weights are no norms here."""
    return method_of(layer) is not None


def chosen(norms: Mapping[Path, Any], only: Only, who: str) -> dict[Path, Any]:
    """The norms whose paths a user chose.

    Raises:
        TypeError: `only` is neither text nor a function.
        ValueError: no path is meant.
    """
    if only is None:
        return dict(norms)
    if not (isinstance(only, str) or callable(only)):
        raise TypeError(
            f"{who}: only={only!r} must be a pattern of paths, only='block1/*', or a function of a "
            f"path, only=lambda path: path.startswith('block1/')."
        )
    names = {path: "/".join(path) for path in norms}
    found = {
        path: norm
        for path, norm in norms.items()
        if (fnmatch.fnmatchcase(names[path], only) if isinstance(only, str) else only(names[path]))
    }
    if not found:
        raise ValueError(
            f"{who}: only={only!r} chooses none of the norms {sorted(names.values())}. Choose some "
            f"of them: only='*' is all."
        )
    return found
