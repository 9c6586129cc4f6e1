"""Ghost batches (Hoffer, Hubara & Soudry 2017, arXiv:1705.08741): statistics of k examples each.

    x[0:k], x[k:2k], ...  are each normalized by their own statistics

With more devices a batch becomes larger, and what batch norm takes from it less noisy; that noise
regularizes. With ghost batches the size of what is normalized together is an option, and no longer
follows from how many devices there are. The evidence of all groups is pooled exactly, for running
statistics.

When to use: large batches, above all on many devices, where batch norm over all of it generalizes
worse, or where a group lies on one device and normalizing it then needs no traffic.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks
from jaxnorm.core.covariance import Comoments, pool_comoments
from jaxnorm.core.devices import AxisName, axis_names, devices
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.moments import Moments, pool

Evidence = TypeVar("Evidence", Moments, Comoments)
Norm = Callable[..., tuple[jax.Array, Evidence]]


def ghost_batches(norm: Norm[Evidence], size: int) -> Norm[Evidence]:
    """`norm` over groups of `size` examples in the place of the whole batch.

    Args:
        norm: a function that normalizes by batch statistics: `batch_norm`, `batch_renorm`, `ibn_a`,
            `switchable_norm`, `decorrelated_batch_norm`, `iter_norm`, or one with their arguments
            and results.
        size: how many examples are normalized together, k. Examples lie along axis 0 of the input,
            and with `axis_name` along the mapped axes before it; the groups are made in this
            order, wherever they lie. It must divide the number of examples, and with `axis_name`
            divide those of a device or be a multiple of them.

    Returns:
        A function of the same arguments. It returns the result, and the evidence of all groups
        together, for the running statistics.

    Raises:
        TypeError: `size` is no integer.
        ValueError: it is below 1, groups of it do not fit the examples, features lie along axis 0,
            or `axis_index_groups` are given, which are another choice of groups.
        NameError: `axis_name` is not bound.

    Numerics:
        As `norm`. A group on one device is normalized without traffic, forward and backward;
        pooling the evidence takes some, which the result does not wait for. `merge` says how
        exact that is.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, seen = jaxnorm.ghost_batches(jaxnorm.batch_norm, size=2)(x)
        >>> y[:, 0].round(3).tolist(), seen.count.tolist(), seen.mean.tolist()
        ([-1.0, 1.0, -1.0, 1.0], [4.0], [11.0])

    Source:
        Hoffer, Hubara & Soudry 2017 (arXiv:1705.08741), Algorithm 1.

    Differs:
        From the paper: running statistics move once, by the evidence of all groups, and not once
        for each group; their variance then holds what the groups' means differ by.
    """
    size = check_size(size, "ghost_batches")

    @functools.wraps(norm)
    def by_groups(
        x: ArrayLike,
        *arguments: Any,
        axis: int | Sequence[int] = -1,
        where: ArrayLike | None = None,
        shift: ArrayLike | None = 0.0,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        who: str = getattr(norm, "__name__", "ghost_batches"),
        **options: Any,
    ) -> tuple[jax.Array, Evidence]:
        x = checks.input_array(x, who)
        where = checked_mask(where, x.shape, who)
        check_groups(size, axis_index_groups, who)
        features = _feature_axes(axis, x, who)
        over = devices(axis_name, None, who)
        options |= dict(axis=axis, who=who)
        pooling: dict[str, Any] = dict(shift=shift, axis_name=axis_name)
        local, parts = x.shape[0], 1 if over is None else lax.axis_size(over.names)
        if size == local * parts:
            return norm(x, *arguments, where=where, **pooling, **options)
        if local % size:
            together = _devices_together(size, local, parts, who)
            options |= dict(where=where, axis_index_groups=together)
            y, seen = norm(x, *arguments, **pooling, **options)
            # All devices of a group have its evidence: the first hands it on.
            assert over is not None
            first = lax.axis_index(over.names) % len(together[0]) == 0
            count = jnp.where(first, seen.count, jnp.zeros_like(seen.count))
            return y, _pooled(dataclasses.replace(seen, count=count), None, shift, axis_name)
        # One decision for all groups would be traffic, and a decision for each computes both.
        options["shift"] = None
        arrays = {name: value for name, value in options.items() if _has_arrays(value)}
        static = {name: value for name, value in options.items() if name not in arrays}
        shared = where is None or where.shape[0] == 1

        def of_all(x, where, arguments, arrays):
            return norm(x, *arguments, where=where, **arrays, **static)

        def of_groups(x, where, shift, *given):
            each = jax.vmap(
                lambda x, where: of_all(x, where, *given), in_axes=(0, None if shared else 0)
            )
            y, seen = each(_split(x, size), where if shared else _split(where, size))
            return y.reshape(x.shape), _pooled(seen, 0, shift, axis_name)

        given = arguments, arrays
        others = ax.other_axes(features, x.ndim)
        placed = _placed_as(lambda: of_all(x, where, *given), of_groups, x, others)
        return placed(x, where, shift, *given)

    return by_groups


def _split(array: jax.Array, size: int) -> jax.Array:
    """The examples in groups, along a new axis 0."""
    return array.reshape(array.shape[0] // size, size, *array.shape[1:])


def _has_arrays(value: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


def _placed_as(
    like: Callable[[], Any], function: Callable[..., Any], x: jax.Array, axes: tuple[int, ...]
) -> Callable[..., Any]:
    """`function`, which may divide `axes` of `x` that lie on several devices.

    As `placed_by_compiler`, with results that lie as those of `like`. A group that is on one device
    stays there.
    """
    spec = jax.typeof(x).sharding.spec
    names = [name for a in axes if spec[a] for name in axis_names(spec[a])]
    if not names:
        return function
    lies = jax.tree.map(lambda leaf: leaf.sharding, jax.eval_shape(like))
    return jax.sharding.auto_axes(function, axes=tuple(names), out_sharding=lies)


def _pooled(evidence: Any, axes: int | None, shift: ArrayLike | None, axis_name: Any) -> Any:
    """The evidence of all groups; `shift` has one entry per feature, if it is no number."""
    if isinstance(evidence, Moments):
        return pool(evidence, axes, shift=shift, axis_name=axis_name)
    if shift is not None and jnp.ndim(shift) > 0:
        shift = jnp.reshape(shift, evidence.mean.shape[-2:])
    return pool_comoments(evidence, axes, shift=shift, axis_name=axis_name)


def check_size(size: int, who: str) -> int:
    """`size` as a number of examples.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    number = checks.integer(size)
    if number is None:
        raise TypeError(
            f"{who}: the size {size!r} of ghost batches must be an integer, the number of examples "
            f"that are normalized together. Use 32."
        )
    if number < 1:
        raise ValueError(f"{who}: ghost batches of {number} examples hold nothing. Use 32.")
    return number


def check_groups(size: int, axis_index_groups: Sequence[Sequence[int]] | None, who: str) -> None:
    """Raises ValueError for groups of devices beside those of examples."""
    if axis_index_groups is not None:
        raise ValueError(
            f"{who}: ghost batches of {size} examples and axis_index_groups both say what is "
            f"normalized together. Drop one of them."
        )


def _feature_axes(axis: int | Sequence[int], x: jax.Array, who: str) -> tuple[int, ...]:
    """The canonical feature axes.

    Raises:
        ValueError: axis 0 is among them, or there is none.
    """
    features = ax.canonical_axes(axis, x.ndim, who)
    if x.ndim == 0 or 0 in features:
        raise ValueError(
            f"{who}: ghost batches take examples along axis 0, but there features lie in the input "
            f"of shape {x.shape}. Use an input [examples, ..., features]."
        )
    return features


def _devices_together(size: int, local: int, parts: int, who: str) -> list[list[int]]:
    """Groups of neighbouring devices that hold `size` examples each, more than one device does.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(local, int):
        raise ValueError(
            f"{who}: {local} examples, a symbolic size, are not known to make ghost batches of "
            f"{size}. Export with a multiple of them: jax.export.symbolic_shape('{size}*b, ...')."
        )
    together, rest = divmod(size, local)
    if rest or parts % together:
        found, rule = f"{local} examples", "these must divide them"
        if parts > 1:
            found += f" on each of {parts} devices"
            rule = "these must divide the examples of a device, or be made of whole devices"
        fitting = [k for k in range(2, local + 1) if local % k == 0]
        fitting += [local * k for k in range(2, parts + 1) if parts % k == 0]
        nearest = min(fitting, key=lambda k: (abs(k - size), -k), default=1)
        raise ValueError(
            f"{who}: {found} do not make ghost batches of {size}: {rule}. Use {nearest}, or fill "
            f"the batch up and mask what was added."
        )
    return [list(range(start, start + together)) for start in range(0, parts, together)]
