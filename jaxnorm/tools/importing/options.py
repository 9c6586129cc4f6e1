"""Whether a layer has the options of the source's, which its arrays do not show."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxnorm.methods import METHODS
from jaxnorm.tools.adapter.kinds import keeps_statistics, spec_of
from jaxnorm.tools.importing.presets import HIDDEN, PRESETS
from jaxnorm.tools.importing.targets import TargetLayer

SourceOptions = Mapping[str, Mapping[str, Any]]
"""Options of layers of the source, by kind or by path of the model's layer."""

FLAX_ALWAYS = {"running_var": "biased", "debias": False}
"""What Flax's layers do without an option for it."""
OF_STATISTICS = ("momentum", "running_var", "debias")


class Difference(NamedTuple):
    """An option that a layer and the source's have with different values.

    Attributes:
        says: what differs.
        serious: whether the layer can have the source's; otherwise it is only good to know.
    """

    says: str
    serious: bool


def differing_options(
    target: TargetLayer, framework: str, seen: Mapping[str, Any], told: SourceOptions
) -> list[Difference]:
    """Compares a layer with the source's: what was seen in arrays, told, or else its defaults."""
    preset = PRESETS[framework].get(target.kind, {})
    spec = spec_of(target.layer)
    source: dict[str, Any] = {name: preset[name] for name in HIDDEN if name in preset}
    source |= seen
    source |= told.get(target.kind, {})
    source |= told.get(target.name, {})
    source.pop("zero_centered_scale", None)
    if spec is not None and not keeps_statistics(spec):
        source = {name: value for name, value in source.items() if name not in OF_STATISTICS}
    differences = []
    for name, value in source.items():
        if not hasattr(target.layer, name):
            if name in FLAX_ALWAYS and value == FLAX_ALWAYS[name]:
                continue
            says = f"the source's {name} was {value!r}, an option that the model's layer has not"
            differences.append(Difference(says, serious=False))
        elif not _alike(found := getattr(target.layer, name), value):
            says = f"{name} is {found!r}, the source's {value!r}"
            differences.append(Difference(says, serious=True))
    return differences


def check_told(told: Any, targets: Iterable[TargetLayer], who: str) -> None:
    """Raises for options of layers or kinds that are not there, and for unknown options.

    Raises:
        TypeError: no mapping of mappings.
        ValueError: unknown names.
    """
    if not isinstance(told, Mapping) or not all(isinstance(v, Mapping) for v in told.values()):
        raise TypeError(
            f"{who}: source={told!r} says no options. Give them by kind or path of layers, "
            f"source={{'BatchNorm': dict(epsilon=1e-3)}}, or source='same' if they are the model's."
        )
    kinds = {layer.name: layer.kind for layer in targets if layer.layer is not None}
    for name, options in told.items():
        kind = kinds.get(name, name)
        if kind not in kinds.values():
            raise ValueError(
                f"{who}: source names {name!r}, but the model has no such layer, nor this kind. "
                f"Its layers are {kinds}."
            )
        known = {
            field.name
            for method in METHODS
            if method.name == kind
            for field in dataclasses.fields(method.spec)
        }
        if known and (unknown := sorted(set(options) - known)):
            raise ValueError(
                f"{who}: source={{{name!r}: ...}} has options {unknown}, which {kind} has not. It "
                f"has {sorted(known)}."
            )


def _alike(found: Any, value: Any) -> bool:
    if isinstance(found, float) and isinstance(value, float | int):
        return math.isclose(found, value, rel_tol=1e-6)
    return found == value
