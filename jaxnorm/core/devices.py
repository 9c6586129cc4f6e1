"""Sums over mapped axes: `pmap`, `shard_map`, and `vmap` with an `axis_name`.

Under `jit` with sharded arrays none of this is needed: there an array is whole, and the compiler
inserts the collectives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

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
        return tuple(self.own(rows) for rows in self.sum_by_group(*values))

    def sum_by_group(self, *values: jax.Array) -> tuple[jax.Array, ...]:
        """Each value summed over the devices of each group: one row a group, along a new axis 0."""
        if self.group_of is None:
            return tuple(jnp.expand_dims(total, 0) for total in lax.psum(values, self.names))
        # JAX has no collective over groups under vmap and under shard_map's default checks. A table
        # with one row a group, zero but for the own row, is summed over all devices instead.
        rows = jnp.arange(max(self.group_of) + 1) == self._own_group()

        def table(value: jax.Array) -> jax.Array:
            # Selected, not multiplied: a NaN of one group must not reach the rows of another.
            row = jnp.expand_dims(value, 0)
            return jnp.where(rows.reshape((-1,) + (1,) * value.ndim), row, jnp.zeros_like(row))

        return lax.psum(tuple(table(value) for value in values), self.names)

    def own(self, rows: jax.Array) -> jax.Array:
        """The row of this device's group."""
        if self.group_of is None:
            return rows.squeeze(0)
        return lax.dynamic_index_in_dim(rows, self._own_group(), 0, keepdims=False)

    def _own_group(self) -> jax.Array:
        return jnp.asarray(self.group_of)[lax.axis_index(self.names)]


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
    names = axis_names(axis_name)
    check_bound(names, who)
    if axis_index_groups is None:
        return Devices(names)
    return Devices(names, _group_of(axis_index_groups, lax.axis_size(names), who))


def surely_equal(value: jax.Array, over: Devices) -> bool:
    """Whether all devices that pool are known to hold the same `value`.

    Only `shard_map` with its default checks knows: there the type says along which axes a value may
    vary, and an index does along its own.
    """
    checked = set(over.names) <= _varies_along(lax.axis_index(over.names))
    return checked and not _varies_along(value) & set(over.names)


def decide_alike(x: jax.Array, over: Devices | None) -> bool:
    """Whether devices that share collectives decide alike by a value pooled from `x`.

    A branch with a collective must be taken by all its devices or by none. They may decide
    differently if they are mapped along axes over which nothing is pooled.
    """
    mesh = jax.sharding.get_abstract_mesh()
    pooled = set() if over is None else set(over.names)
    others = set(mesh.manual_axes) - pooled
    if over is None and len(mesh.manual_axes) == len(mesh.axis_names):
        return True  # There are no collectives.
    return not others or (over is not None and surely_equal(x, Devices(tuple(others))))


def placed(value: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """`value` on the devices that `spec` says, where mesh axes are explicit and types say so."""
    lies = jax.typeof(value).sharding
    if lies.mesh.empty or tuple(lies.spec) == tuple(spec):
        return value
    return jax.sharding.reshard(value, NamedSharding(lies.mesh, PartitionSpec(*spec)))


def placement(value: jax.Array) -> tuple[Any, ...]:
    """Along which explicit mesh axes each axis of `value` lies, None for none."""
    return tuple(jax.typeof(value).sharding.spec)


def _varies_along(value: jax.Array) -> frozenset[str]:
    return jax.typeof(value).manual_axis_type.varying


def all_varying(*values: jax.Array | None) -> tuple[Any, ...]:
    """`values`, each as one of each device along all mesh axes along which any of them varies.

    Only under `shard_map`, where a value may be the same on all devices, and types say so.
    """
    axes = frozenset[str]().union(*(_varies_along(one) for one in values if one is not None))

    def varying(value: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varies_along(value)))
        return lax.pcast(value, missing, to="varying") if missing else value

    return tuple(None if one is None else varying(one) for one in values)


def is_bound(name: str) -> bool:
    """Whether an enclosing `pmap`, `shard_map` or `vmap` maps an axis of this name."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def check_bound(names: Sequence[str], who: str, option: str = "") -> None:
    """Raises NameError for a name that is not bound; `option` says what else the caller offers."""
    for name in names:
        if not is_bound(name):
            raise NameError(
                f"{who}: axis_name={name!r} is not bound here: the call is not inside a jax.pmap, "
                f"jax.shard_map or jax.vmap that maps an axis of this name. Map it, for example "
                f"jax.vmap(step, axis_name={name!r}), or leave axis_name=None: under jax.jit with "
                f"sharded arrays the statistics are global already.{option}"
            )


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """One name or several, as several."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


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
