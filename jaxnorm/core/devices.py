"""Sums over mapped axes: `pmap`, `shard_map`, and `vmap` with an `axis_name`.

Under `jit` with sharded arrays none of this is needed: there an array is whole, and the compiler
inserts the collectives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | Sequence[str]


class Devices(NamedTuple):
    """The mapped axes over which evidence is pooled. Static and hashable.

    Attributes:
        names: the names of the mapped axes.
        group_of: for each index along them, the group in which it pools; None for one group.
    """

    names: tuple[str, ...]
    group_of: tuple[int, ...] | None = None

    @property
    def parts(self) -> int | None:
        """How many devices pool together, or None if groups differ in size."""
        if self.group_of is None:
            return lax.axis_size(self.names)
        members = set(np.bincount(self.group_of).tolist())
        return members.pop() if len(members) == 1 else None

    def sum(self, *values: jax.Array) -> tuple[jax.Array, ...]:
        """Each value summed over the devices that pool together, by one collective."""
        if self.group_of is None:
            return lax.psum(values, self.names)
        # JAX has no collective over groups under vmap and under shard_map's default checks. A table
        # with one row a group, zero but for the own row, is summed over all devices instead.
        own = jnp.asarray(self.group_of)[lax.axis_index(self.names)]
        rows = jnp.arange(max(self.group_of) + 1) == own

        def table(value: jax.Array) -> jax.Array:
            # Selected, not multiplied: a NaN of one group must not reach the rows of another.
            row = jnp.expand_dims(value, 0)
            return jnp.where(rows.reshape((-1,) + (1,) * value.ndim), row, jnp.zeros_like(row))

        summed = lax.psum(tuple(table(value) for value in values), self.names)
        return tuple(lax.dynamic_index_in_dim(rows, own, 0, keepdims=False) for rows in summed)


def devices(
    axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None, who: str
) -> Devices | None:
    """The mapped axes named by the arguments that Flax's layers take, or None for none.

    Raises:
        NameError: a name is not bound by an enclosing `pmap`, `shard_map` or `vmap`.
        ValueError: groups without an axis name, or groups that miss or repeat an index.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                f"{who}: axis_index_groups={_lists(axis_index_groups)} needs the mapped axis "
                f"whose indices it groups. Set axis_name, for example axis_name='batch'."
            )
        return None
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        _check_bound(name, who)
    if axis_index_groups is None:
        return Devices(names)
    return Devices(names, _group_of(axis_index_groups, lax.axis_size(names), who))


def _check_bound(name: str, who: str) -> None:
    try:
        lax.axis_size(name)
    except NameError as error:
        raise NameError(
            f"{who}: axis_name={name!r} is not bound here: the call is not inside a jax.pmap, "
            f"jax.shard_map or jax.vmap that maps an axis of this name. Map it, for example "
            f"jax.vmap(step, axis_name={name!r}), or leave axis_name=None: under jax.jit with "
            f"sharded arrays the statistics are global already."
        ) from error


def _lists(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """As users write them; Flax makes tuples of them."""
    return [list(group) for group in groups]


def _group_of(groups: Sequence[Sequence[int]], size: int, who: str) -> tuple[int, ...]:
    members = [int(index) for group in groups for index in group]
    if sorted(members) != list(range(size)):
        raise ValueError(
            f"{who}: axis_index_groups={_lists(groups)} must name each index "
            f"from 0 to {size - 1} exactly once, since {size} devices are mapped. For pairs use "
            f"{[[i, i + 1] if i + 1 < size else [i] for i in range(0, size, 2)]}."
        )
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    return tuple(group_of[index] for index in range(size))
