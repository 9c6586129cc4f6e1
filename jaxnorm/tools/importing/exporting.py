"""The variables of a model by the names of another framework: the way back from an import."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxnorm.tools.adapter.models import Path, Run, model_of
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
    # Of each key the variables of its layer: layers that have all in common may have one name.
    made_of: dict[str, Mapping[str, Path]] = {}
    for target in targets:
        target = dataclasses.replace(target, channels_first=layouts.get(target.name))
        whole = {
            role: np.asarray(held.arrays[key])
            for role, key in target.keys.items()
            # Evidence that waits for a step means nothing elsewhere.
            if not role.startswith("pending_")
        }
        for name in named[target.name]:
            for each, arrays in _parts(whole, target, name, who):
                for local, leaf in write(target, arrays).items():
                    key = separator.join(part for part in (each, local) if part)
                    if made_of.setdefault(key, target.keys) != target.keys:
                        raise ValueError(
                            f"{who}: {key!r} would hold two variables, one of '{target.name}'. "
                            f"Give each layer a name of its own: "
                            f"names={{'block1/norm1': 'layer1.0.bn1'}}."
                        )
                    exported[key] = np.array(leaf, order="C")
    return exported


def _parts(
    whole: dict[str, np.ndarray], target: TargetLayer, name: str | Stack, who: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The variables of a layer, or of each of those that are stacked, with their names.

    Raises:
        ValueError: there are more or fewer layers than names.
    """
    for role, leaf in whole.items():
        shape = target.shapes[role]
        if isinstance(name, Stack):
            axis = name.axis % (len(shape) + 1)
            shape = (*shape[:axis], len(name.names), *shape[axis:])
        # Those of a wrapper are known as they are stored only.
        if leaf.shape != shape and "/" not in role:
            raise ValueError(
                f"{who}: {role!r} of '{target.name}' is {leaf.shape}, of which names={name!r} "
                f"makes {shape}. A scan stacks layers; give a name for each: "
                f"names={{{target.name!r}: Stack(('layers.0', 'layers.1'), axis=0)}}."
            )
    if not isinstance(name, Stack):
        yield name, whole
        return
    for i, each in enumerate(name.names):
        yield each, {role: leaf.take(i, name.axis) for role, leaf in whole.items()}
