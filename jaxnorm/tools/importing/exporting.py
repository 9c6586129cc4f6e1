"""The variables of a model by the names of another framework: the way back from an import."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxnorm.tools.adapter.models import Run, model_of
from jaxnorm.tools.importing.names import Names, Stack, check_paths, names_of
from jaxnorm.tools.importing.targets import TargetLayer, target_layers

Written = Mapping[str, np.ndarray]


def export_layers(
    model: Any,
    run: Run,
    *,
    knows: Callable[[TargetLayer], bool],
    write: Callable[[TargetLayer, Mapping[str, np.ndarray]], Written],
    names: Names | None = None,
    channels_first: Mapping[str, bool | tuple[int, ...]] | None = None,
    separator: str = ".",
    who: str,
) -> dict[str, np.ndarray]:
    """The arrays of a model by the keys of another framework.

    Args:
        model, run, names, channels_first, who: as in `import_layers`.
        knows: whether the framework has a layer with these variables.
        write: gives the arrays of a layer by local keys, from its variables by role.
        separator: between the names in keys.

    Raises:
        TypeError: no model, or names of another type.
        ValueError: layers that the framework has not; names of nothing, or the same for two.
    """
    held = model_of(model, who)
    targets = target_layers(held, run)
    by_name = {target.name: target for target in targets}
    named = names_of(names, by_name, separator, who)
    layouts = channels_first or {}
    check_paths("channels_first", layouts, by_name, who)
    if refused := [target for target in targets if not knows(target)]:
        listed = [f"'{t.name}' ({t.kind} with {', '.join(sorted(t.keys))})" for t in refused]
        raise ValueError(
            f"{who}: {len(refused)} layers have no counterpart: {', '.join(listed)}. Exchange them "
            f"for layers that have one, such as BatchNorm, and export that model."
        )
    exported: dict[str, np.ndarray] = {}
    for target in targets:
        target = dataclasses.replace(target, channels_first=layouts.get(target.name))
        name = named[target.name]
        for i, each in enumerate(name.names if isinstance(name, Stack) else (name,)):
            arrays = {
                role: _part(held.arrays[key], name, i)
                for role, key in target.keys.items()
                # Evidence that waits for a step means nothing elsewhere.
                if not role.startswith("pending_")
            }
            for local, leaf in write(target, arrays).items():
                key = separator.join(part for part in (each, local) if part)
                if key in exported:
                    raise ValueError(
                        f"{who}: {key!r} would hold two variables, one of '{target.name}'. Give "
                        f"each layer a name of its own: names={{'block1/norm1': 'layer1.0.bn1'}}."
                    )
                exported[key] = np.array(leaf, order="C")
    return exported


def _part(leaf: Any, name: str | Stack, i: int) -> np.ndarray:
    """A variable, or that of one of the layers that are stacked."""
    whole = np.asarray(leaf)
    return whole.take(i, name.axis) if isinstance(name, Stack) else whole
