"""Trees that contain themselves: they have no end, and to go through one fails in odd ways."""

from collections.abc import Mapping
from typing import Any


def check_no_cycle(
    tree: Any, who: str, path: tuple[Any, ...] = (), above: tuple[Any, ...] = ()
) -> None:
    """Raises for a tree of mappings and lists that contains itself.

    Raises:
        ValueError: it does, with the path of the place where it begins again.
    """
    if not isinstance(tree, Mapping | list | tuple):
        return
    if any(tree is one for one in above):
        place = "".join(f"[{key!r}]" for key in path)
        raise ValueError(
            f"{who}: the tree{place} is one that it lies in, so that the tree has no end. Take it "
            f"out: del tree{place}."
        )
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, below in items:
        check_no_cycle(below, who, (*path, key), (*above, tree))
