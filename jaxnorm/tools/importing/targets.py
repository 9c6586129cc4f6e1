"""The layers of a model that an import fills, with where their variables are."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen, nnx

from jaxnorm.methods.weight_spec import WeightSpec
from jaxnorm.tools.adapter.kinds import method_of
from jaxnorm.tools.adapter.models import Model, Path, Run

LINEAR_KINDS = {
    linen.Conv: "Conv",
    nnx.Conv: "Conv",
    linen.ConvTranspose: "ConvTranspose",
    nnx.ConvTranspose: "ConvTranspose",
    linen.Dense: "Dense",
    nnx.Linear: "Dense",
    linen.DenseGeneral: "DenseGeneral",
    nnx.LinearGeneral: "DenseGeneral",
    linen.Einsum: "Einsum",
    nnx.Einsum: "Einsum",
    linen.ConvLocal: "ConvLocal",
}

WRAPPERS = (
    WeightSpec,
    linen.WeightNorm,
    linen.SpectralNorm,
    nnx.WeightNorm,
    nnx.SpectralNorm,
)
"""Modules that normalize the kernels of others."""

VARIABLE = "variable"
"""The kind of a variable that belongs to no layer we know: it is taken as it is."""


@dataclasses.dataclass(frozen=True)
class TargetLayer:
    """A layer that is to be filled.

    Attributes:
        path: the names on the way to it.
        kind: which layer it is, ours or Flax's: the name of the method, `"BatchNorm"`, or
            `"Conv"`, `"ConvTranspose"`, `"Dense"`, `"DenseGeneral"`, ...; or `VARIABLE`.
        layer: the Linen or NNX module, for its options; None for a variable.
        x: shape and dtype of its input at its first call, or None.
        keys: where in `Model.arrays` each of its variables is, by role. Roles are the names of
            variables; those of a wrapper that normalizes the kernel are `"kernel/scale"`,
            `"kernel/u"`, `"kernel/sigma"`. That of a variable of its own is `""`.
        shapes: of these variables, as they are inside the layer: without the axes of scans.
        wrapper: the module around it that normalizes its kernel, if there is one.
        channels_first: what the user says of the source's axes, see `import_layers`.
    """

    path: Path
    kind: str
    layer: Any
    x: Any
    keys: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    wrapper: Any = None
    channels_first: bool | tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)


def target_layers(model: Model, run: Run) -> list[TargetLayer]:
    """The layers that `run` calls, and then all parameters and statistics of no such layer."""
    wanted = {
        key: leaf
        for key, leaf in model.arrays.items()
        if model.collection(key) in ("params", "batch_stats")
    }
    wrappers: dict[Path, Any] = {}
    ties: list[list[Path]] = []
    calls = {
        path: calls[0]
        for path, calls in model.layers(_noting(run, wrappers, ties)).items()
        if kind_of(calls[0].layer) is not None
    }
    first = {place: key for key in wanted for place in places(key, ties)}
    beside: dict[Path, dict[str, Path]] = {}
    wrapped: dict[Path, Any] = {}
    for key in wanted:
        for path, role in beside_layers(key):
            if path in calls:
                beside.setdefault(path, {})[role] = key
                wrapped[path] = wrappers.get(key[1:-1]) or wrappers.get(key[:-2])
                break
    layers = []
    owned: set[Path | None] = set()
    for path, call in calls.items():
        own = {name: model.key(path, name) or (*path, name) for name in call.values}
        found = {name: first[place] for name, place in own.items() if place in first}
        shapes = {name: call.values[name].shape for name in found}
        around = beside.get(path, {})
        shapes |= {role: wanted[key].shape for role, key in around.items()}
        kind = kind_of(call.layer)
        assert kind is not None
        wrapper = wrapped.get(path)
        layer = TargetLayer(path, kind, call.layer, call.x, found | around, shapes, wrapper)
        layers += [dataclasses.replace(layer, path=place) for place in places(path, ties)]
        for place in (*own.values(), *around.values()):
            owned |= {place, *places(place, ties)}
    for place, key in first.items():
        if place not in owned:
            path = place if model.key(key[:-1], key[-1]) == key else place[1:]
            shape = wanted[key].shape
            layers.append(TargetLayer(path, VARIABLE, None, None, {"": key}, {"": shape}))
    return layers


def places(path: Path, ties: list[list[Path]]) -> list[Path]:
    """Where else the module or variable at a path is, after the path itself.

    Args:
        path: the names on the way to it.
        ties: paths of modules and variables that are the same, see `tied`.
    """
    # With the ties on the way, of which each is taken once: modules may hold each other.
    taken: dict[Path, frozenset[int]] = {path: frozenset()}
    found = [path]
    for place in found:
        for i, tied in enumerate(ties):
            for one in tied:
                if i in taken[place] or place[: len(one)] != one:
                    continue
                for other in tied:
                    new = other + place[len(one) :]
                    if new not in taken:
                        taken[new] = taken[place] | {i}
                        found.append(new)
    return found


def _noting(run: Run, wrappers: dict[Path, Any], ties: list[list[Path]]) -> Run:
    """`run`, which notes the modules that normalize kernels, by their paths, and what is tied."""

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        if isinstance(context.module, WRAPPERS):
            wrappers[tuple(module.path)] = module
        return next_fun(*args, **kwargs)

    def noting(model: Any) -> Any:
        if isinstance(model, nnx.Module):
            for path, module in nnx.iter_modules(model):
                if isinstance(module, WRAPPERS):
                    wrappers[tuple(map(str, path))] = module
            ties[:] = tied(model)
            return run(model)
        with linen.intercept_methods(note):
            return run(model)

    return noting


def tied(model: nnx.Module) -> list[list[Path]]:
    """The paths of modules and variables that stand in several places.

    A module that contains itself has paths without end, and is not one of these.
    """
    several = [[tuple(map(str, path)) for path in paths] for paths in nnx.find_duplicates(model)]
    return [
        paths
        for paths in several
        if not any(a != b and a[: len(b)] == b for a in paths for b in paths)
    ]


def kind_of(layer: Any) -> str | None:
    """The kind of a layer; None for one that wraps another, or that is none of these."""
    method = method_of(layer)
    if method is not None:
        return method.__name__
    for cls, kind in LINEAR_KINDS.items():
        if isinstance(layer, cls):
            return kind
    return None


def beside_layers(key: Path) -> Iterator[tuple[Path, str]]:
    """The layers to which a variable of a wrapper around them may belong, and its role there.

    Linen: `("params", *wrapper, "conv/kernel/scale")`, where `conv` is below the wrapper or beside
    it; `"conv/kernel/value/scale"` if the kernel is boxed.
    NNX: `(*wrapper, "scales", "('kernel',)")`, `(*wrapper, "batch_stats", "('kernel', 'u')")`.
    """
    name, *parts = key[-1].split("/")
    if parts:
        boxed = len(parts) > 2 and parts[-2] == "value"
        role = "/".join([*parts[:-2], parts[-1]] if boxed else parts)
        yield (*key[1:-1], name), role
        yield (*key[1:-2], name), role
    elif len(key) > 1 and key[-2] in ("scales", "batch_stats"):
        parts = re.findall(r"'([^']*)'", key[-1])
        if key[-2] == "scales":
            parts.append("scale")
        yield (*key[:-2], "layer_instance", *parts[:-2]), "/".join(parts[-2:])
