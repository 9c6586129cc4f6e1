"""The one formula that pools evidence.

Everything that pools evidence passes through it: the elements of an array over some axes, two or
more `Moments`, an axis of stacked `Moments`, the devices of a mapped axis. With parts i of count
n_i, mean m_i and variance v_i,

    n    = sum n_i
    mean = sum n_i m_i / n
    var  = sum n_i (v_i + |m_i - mean|^2) / n

An element is a part with n_i = 1, m_i = x_i, v_i = 0, or with n_i = 0 under a mask. For two parts
the formula is that of Chan, Golub & LeVeque 1983.

About the origin (RMS norm) there is no mean, `mean=None`, and the variance is the mean of |x|^2:
the same formula without its second term.

It takes two passes over the parts and two collectives: for the mean, and for what is about it; or
one of each, about a shift that is known beforehand.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core import axes as ax
from jaxnorm.core import precision
from jaxnorm.core.devices import Devices, decide_alike, placed, placement, surely_equal
from jaxnorm.core.divided import divided
from jaxnorm.core.plain import is_plain
from jaxnorm.core.rules import with_tangent

Pooled = tuple[jax.Array, jax.Array | None, jax.Array]
"""Count, mean and variance."""

Look = Callable[[], tuple[jax.Array | float, jax.Array | None, jax.Array | float]]
"""Gives count, mean and variance of each part. A number stands for all, and costs nothing."""

NEAR = 8.0
"""How many standard deviations a shift may be off: it costs at most a factor 1 + 64 in rounding, so
that float32 keeps more than five digits of the variance."""


STEADY = 16.0
"""How many roundings of the mean count as one standard deviation, where the values vary by less. A
running mean at a momentum of 0.99 stops up to 90 roundings short of a constant: the two together
let it serve, so that a constant feature does not make every step take two passes."""

SMALL = 1 << 15
"""So few numbers stay in a cache: on one device, to read them twice costs less than to compile both
ways."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts that lie along `axes` of arrays of `shape`, on this device or on all of `over`.

    Sums keep these axes, with size 1. A value may have size 1 where `shape` has more: it stands for
    equal values, and is not spread.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    over: Devices | None = None

    @property
    def number(self) -> int | None:
        """How many there are, or None if groups of devices differ in size."""
        local = ax.extent(self.shape, self.axes)
        if self.over is None:
            return local
        return None if self.over.parts is None else local * self.over.parts

    def sum(self, *values: jax.Array) -> tuple[jax.Array, ...]:
        """The sums of several values over all parts, of all devices by one collective."""
        local = tuple(self._local_sum(value) for value in values)
        return local if self.over is None else self.over.sum(*local)

    def sum_by_group(self, *values: jax.Array) -> tuple[jax.Array, ...]:
        """The same for each group of devices: one row a group, along a new axis 0."""
        return self.rows_of_local(*(self._local_sum(value) for value in values))

    def rows_of_local(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
        """`sum_by_group` of what was summed on each device before."""
        if self.over is None:
            return tuple(jnp.expand_dims(value, 0) for value in sums)
        return self.over.sum_by_group(*sums)

    def own(self, rows: jax.Array) -> jax.Array:
        """The row of this device's group."""
        return rows.squeeze(0) if self.over is None else self.over.own(rows)

    def _local_sum(self, value: jax.Array) -> jax.Array:
        if not self.axes:
            return value
        parts = ax.extent(self.shape, self.axes)
        copies = parts // ax.extent(value.shape, self.axes) if value.size else 1
        total = value.sum(self.axes, keepdims=True)
        return total if copies == 1 else total * copies


def reciprocal(count: jax.Array | float) -> jax.Array | float:
    """1 / count, and 0 where `count` is not positive."""
    if isinstance(count, float):
        return 1 / count if count > 0 else 0.0
    positive = count > 0
    return jnp.where(positive, 1 / jnp.where(positive, count, jnp.ones_like(count)), 0)


def weighted_sums(
    count: jax.Array | float, value: jax.Array, parts: Parts
) -> tuple[jax.Array | float, jax.Array]:
    """The total count of all parts, and the sum of their values times their counts.

    A `count` given as a Python number is the same for all parts and known at trace time: it costs
    no sum and no traffic.
    """
    if isinstance(count, float) and parts.number is not None:
        (weighted,) = parts.sum(_times(count, value))
        return count * parts.number, weighted
    total, weighted = parts.sum(count * _ones(value), count * value)
    return total, weighted


def pooled(
    look: Look, parts: Parts, shift: jax.Array | None = None, rest: jax.Array | None = None
) -> Pooled:
    """The one pooling formula (see the top of this file): count, mean and variance of all `parts`.

    Args:
        look: gives the evidence of each part: its count, or one number for all; its mean, or None
            about the origin; its variance, or one number for all. Each way of pooling
            looks for itself: what a branch of the program shares with the rest is written out
            before, and a float32 copy of a bfloat16 array would be dear.
        parts: how they lie.
        shift: an estimate of the mean, of size 1 along the axes of the parts. It changes how often
            the parts are read, and rounding. None reads them twice.
        rest: what rounding took off the means of parts, to be added where deviations are taken.
    """
    if shift is None or is_plain():
        return _by_two_passes(look, parts, rest)
    return _by_one_pass(look, parts, shift, rest)


def _by_two_passes(look: Look, parts: Parts, rest: jax.Array | None = None) -> Pooled:
    """The specification.

    Numerics: the deviations are taken from a first estimate of the mean, and what they miss of the
    true mean is put right afterwards. All sums that matter are then of small numbers, so that the
    result keeps its digits at a mean of many standard deviations, also for the mean itself. The
    first estimate cancels out of the result, so no derivative needs to pass through it.
    """
    count, mean, var = look()
    values = var if mean is None else mean
    assert isinstance(values, jax.Array)
    total, weighted = weighted_sums(count, values, parts)
    share = reciprocal(total)
    if mean is None:
        return _with_count_of_var(total, None, weighted * share)
    pivot = lax.stop_gradient(weighted * share)
    first, new_var = _about_pivot(pivot, share, (count, mean, var), parts, rest)
    return _with_count_of_var(total, pivot + first, new_var)


def pooled_with_rest(look: Look, parts: Parts) -> tuple[Pooled, jax.Array]:
    """`pooled` by two passes, and what rounding took off the mean, for a further pooling.

    At a mean of 1e4 standard deviations, means of parts rounded to float32 no longer say in five
    digits how far they lie apart. The two passes know it.
    """
    count, mean, var = look()
    assert mean is not None
    total, weighted = weighted_sums(count, mean, parts)
    share = reciprocal(total)
    pivot = weighted * share
    first, new_var = _about_pivot(pivot, share, (count, mean, var), parts)
    new_mean = pivot + first
    return _with_count_of_var(total, new_mean, new_var), (pivot - new_mean) + first


def _about_pivot(
    pivot: jax.Array,
    share: jax.Array | float,
    each: tuple[jax.Array | float, jax.Array, jax.Array | float],
    parts: Parts,
    rest: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a first estimate of the mean misses of it, and the variance."""
    count, mean, var = each
    first, second = parts.sum(*_about(_offset(mean, pivot, rest), count, var))
    first, second = first * share, second * share
    return first, _clip_rounding(second - precision.abs_square(first))


def _by_one_pass(
    look: Look, parts: Parts, shift: jax.Array, rest: jax.Array | None = None
) -> Pooled:
    """By one pass and one collective, unless the shift is too far off the mean.

    About any shift s, with d_i = m_i - s,

        mean = s + sum n_i d_i / n,   var = sum n_i (v_i + |d_i|^2) / n - |mean - s|^2

    The subtraction loses digits as the mean moves away from the shift: the error of the variance is
    about eps (1 + |mean - s|^2 / var) times the variance. Where that would show, two passes are
    taken. A running mean is a good shift, known on all devices before the batch is; so is 0 for
    most inputs of batch norm. Which way was taken changes rounding, and nothing else.
    """
    count, mean, var = look()
    assert mean is not None
    if not decide_alike(mean, parts.over):
        return _by_two_passes(look, parts, rest)
    shift = usable_shift(shift, mean, parts.over)
    offset = _offset(mean, shift, rest)
    values = _about(offset, count, var)
    if isinstance(count, float) and parts.number is not None:
        total = own_total = count * parts.number
        first, second = parts.sum_by_group(*values)
    else:
        total, first, second = parts.sum_by_group(count * _ones(mean), *values)
        own_total = parts.own(total)
    share = reciprocal(total)
    first, second = first * share, second * share
    new_var = _clip_rounding(second - precision.abs_square(first))
    # Of all groups, since all must go the same way.
    near = near_enough(first, jnp.expand_dims(shift, 0), new_var, NEAR)
    if parts.over is None and ax.surely(lambda: math.prod(parts.shape) < SMALL):
        near &= divided()  # else a constant False, for which the compiler drops a branch

    new_mean, new_var = shift + parts.own(first), parts.own(new_var)
    # No more than it decides passes through the branches, whose every operand costs compile time.
    new_mean, new_var = lax.cond(
        near, lambda: (new_mean, new_var), lambda: _by_two_passes(look, parts, rest)[1:]
    )
    return _with_count_of_var(own_total, new_mean, new_var)


def near_enough(offset: jax.Array, shift: jax.Array, var: jax.Array, far: float) -> jax.Array:
    """Whether no mean, `shift + offset`, lies more than `far` standard deviations off its shift.

    Evidence is used for more than this one normalization, so that the epsilon which follows does
    not excuse lost digits. Asked so that NaN and infinities say no.
    """
    rounding = STEADY * float(jnp.finfo(var.dtype).eps) * (shift + offset)
    limit = far**2 * (var + precision.abs_square(rounding))
    return ((precision.abs_square(offset) <= limit) & jnp.isfinite(limit)).all()


def pooled_given(
    count: jax.Array,
    mean: jax.Array | None,
    var: jax.Array,
    parts: Parts,
    shift: jax.Array | None,
    rest: jax.Array | None = None,
) -> Pooled:
    """`pooled` for evidence that is there, with derivatives by all of it but `rest`."""
    if mean is None or shift is None:
        return pooled(lambda: (count, mean, var), parts, rest=rest)
    return _pooled_about(parts, count, mean, var, shift, rest)


def _pooled_by_one_pass(
    parts: Parts,
    count: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    shift: jax.Array,
    rest: jax.Array | None,
) -> Pooled:
    return pooled(lambda: (count, mean, var), parts, shift, rest)


def _pooled_by_two_passes(
    parts: Parts,
    count: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    shift: jax.Array,
    rest: jax.Array | None,
) -> Pooled:
    del shift
    return pooled(lambda: (count, mean, var), parts, rest=rest)


def _tangent_of_pooled(parts: Parts, primals, tangents):
    """As a rule, so that derivatives know of no branches, and take one collective as well.

    dmean = sum (n_i dm_i + dn_i (m_i - mean)) / n
    dvar  = sum (n_i (dv_i + 2 <m_i - mean, dm_i>) + dn_i (v_i + |m_i - mean|^2 - var)) / n
    """
    together = _pooled_about(parts, *primals)
    evidence = primals[:3]
    tangents = [
        jnp.zeros_like(primal) if tangent is None else tangent
        for primal, tangent in zip(evidence, tangents[:3], strict=True)
    ]

    def tangent(evidence, together, tangents):
        count, mean, var = evidence
        total, new_mean, new_var = together
        dcount, dmean, dvar = tangents
        offset = mean - new_mean
        first = count * dmean + dcount * offset
        second = count * (dvar + 2 * precision.real_product(offset, dmean))
        second += dcount * (var + precision.abs_square(offset) - new_var)
        dtotal, first, second = parts.sum(dcount, first, second)
        share = reciprocal(total)
        return dtotal, first * share, second * share

    return together, jax.checkpoint(tangent, prevent_cse=False)(evidence, together, tangents)


_pooled_about = with_tangent(_pooled_by_one_pass, _pooled_by_two_passes, _tangent_of_pooled)


def usable_shift(shift: jax.Array, mean: jax.Array, over: Devices | None) -> jax.Array:
    """The shift in the dtype of `mean`, or 0 where it cannot serve as one.

    It must be the same on all devices that pool, and a spoiled running mean must not spoil the
    batch's.
    """
    shift = lax.stop_gradient(shift if jnp.iscomplexobj(mean) else shift.real).astype(mean.dtype)
    if over is not None and not surely_equal(shift, over):
        # Not selected: the type would still say that it differs between devices.
        return placed(jnp.zeros(shift.shape, shift.dtype), placement(shift))
    return jnp.where(jnp.isfinite(shift), shift, jnp.zeros_like(shift))


def _with_count_of_var(count: jax.Array | float, mean: jax.Array | None, var: jax.Array) -> Pooled:
    """The count of the shape of the variance."""
    if isinstance(count, float):
        return jnp.full_like(var, count), mean, var
    # Added to zeros of the variance, it has also its sharding, on meshes with explicit axes.
    return jnp.zeros_like(var) + count, mean, var


def _about(
    offset: jax.Array, count: jax.Array | float, var: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """What each part adds to the sums of its first and second moments about some point."""
    square = precision.abs_square(offset)
    return _times(count, offset), _times(count, square if _is(0.0, var) else var + square)


def _offset(mean: jax.Array, pivot: jax.Array, rest: jax.Array | None) -> jax.Array:
    return mean - pivot if rest is None else (mean - pivot) + rest


def _times(count: jax.Array | float, value: jax.Array) -> jax.Array:
    return value if _is(1.0, count) else count * value


def _is(number: float, value: jax.Array | float) -> bool:
    return isinstance(value, float) and value == number


def _ones(value: jax.Array) -> jax.Array:
    return jnp.ones((1,) * value.ndim, precision.real_dtype(value.dtype))


def _clip_rounding(var: jax.Array) -> jax.Array:
    """Puts a variance that rounding made negative to 0, and leaves its derivatives as they are.

    `jnp.maximum` would halve them at 0, where a constant feature stands.
    """
    return var + lax.stop_gradient(jnp.where(var < 0, -var, jnp.zeros_like(var)))
