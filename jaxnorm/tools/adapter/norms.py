"""The norms of a model: which of its layers they are, and which of them a user chose."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen

from jaxnorm.tools.adapter import linen_model, nnx_model
from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.adapter.kinds import method_of
from jaxnorm.tools.adapter.lookalikes import lookalikes
from jaxnorm.tools.adapter.models import Model, Path

Only = str | Callable[[str], bool] | None
"""Which norms: a pattern of paths, `"block1/*"`, a function of the path, or None for all."""

NORMS = (*linen_model.NORMS, *nnx_model.NORMS)


def norms_of(model: Model, given: Any, args: Any, kwargs: Any, who: str) -> dict[Path, Any]:
    """The norms of a model that a user gave, by their paths, by an example call.

    Users' own norms, and what the call does not reach, such as the norm of a head that is there in
    training only, but has variables like a norm, are a `Lookalike` in the place of a layer.

    Raises:
        ValueError: a Linen module without a call: its layers exist only inside of one.
    """
    if isinstance(given, linen.Module) and not (args or kwargs):
        raise ValueError(
            f"{who}: found the Linen module {type(given).__name__} without a call, but its layers "
            f"are known only in one. Add an example input: {who}(model.bind(variables), x)."
        )
    run = example_call(args, kwargs, who)
    layers = model.known_layers(run)
    norms = {path: layer for path, layer in layers.items() if is_norm(layer)}
    return norms | lookalikes(model, run)


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
