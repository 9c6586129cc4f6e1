"""Which layer of the source goes into which layer of the model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Stack(NamedTuple):
    """Layers of the source that are one layer of the model, stacked along an axis by a scan."""

    names: tuple[str, ...]
    axis: int = 0


class Tied(NamedTuple):
    """Names in the source of the same arrays: of one layer that it keeps under several."""

    names: tuple[str, ...]


Name = str | tuple[str, ...] | list[str] | Stack | Tied
Names = Mapping[str, Name] | Callable[[str], Name]


def names_of(
    names: Names | None, targets: Iterable[str], separator: str, who: str
) -> dict[str, tuple[str | Stack, ...]]:
    """The name in the source of each layer of the model; several, if they are tied.

    Raises:
        TypeError: `names` is neither a mapping nor a function, or gives something else than names.
        ValueError: it names layers that the model has not.
    """
    targets = list(targets)
    if names is None:
        names = {}
    if isinstance(names, Mapping):
        check_paths("names", names, targets, who)
        return {target: _checked(_mapped(target, names, separator), who) for target in targets}
    if not callable(names):
        raise TypeError(
            f"{who}: names={names!r} is neither a mapping nor a function. Give names by the path "
            f"of a layer: names={{'block1/norm1': 'layer1.0.bn1'}}."
        )
    return {target: _checked(names(target), who) for target in targets}


def check_paths(option: str, given: Mapping[str, Any], targets: Iterable[str], who: str) -> None:
    """Raises ValueError for paths at which the model has no layer, nor modules around some."""
    targets = list(targets)
    unknown = [
        path
        for path in given
        if not any(f"{target}/".startswith(f"{path}/") or not path for target in targets)
    ]
    if unknown:
        raise ValueError(
            f"{who}: {option} names {unknown}, where the model has nothing. Its layers are "
            f"{targets}."
        )


def _mapped(target: str, names: Mapping[str, Name], separator: str) -> Name:
    """The name by the longest path that is given; what follows the path is alike in both."""
    parts = target.split("/")
    for i in range(len(parts), -1, -1):
        path = "/".join(parts[:i])
        if path not in names:
            continue
        rest = parts[i:]

        def longer(name: str, rest: list[str] = rest) -> str:
            return separator.join([name, *rest] if name else rest)

        match names[path]:
            case str(name):
                return longer(name)
            case Stack(several, axis):
                return Stack(tuple(map(longer, several)), axis)
            case Tied(several):
                return Tied(tuple(map(longer, several)))
            case tuple() | list() as several if all(isinstance(name, str) for name in several):
                return Stack(tuple(map(longer, several)))
            case other:
                return other
    return separator.join(parts)


def _checked(name: Any, who: str) -> tuple[str | Stack, ...]:
    """A name, or several that are stacked; or several that are tied."""
    if isinstance(name, str):
        return (name,)
    several = name.names if isinstance(name, Stack | Tied) else name
    if isinstance(several, tuple | list) and several and all(isinstance(n, str) for n in several):
        if isinstance(name, Tied):
            return tuple(several)
        return (name if isinstance(name, Stack) else Stack(tuple(several)),)
    raise TypeError(
        f"{who}: names gives {name!r}, which is no name. Use text, 'layer1.0.bn1', or for a layer "
        f"that is run by a scan several: ('layers.0.bn', 'layers.1.bn')."
    )
