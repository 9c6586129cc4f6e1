"""Running statistics: estimates blended over batches.

`momentum` is always the weight of the OLD value, as in Flax, Haiku and Keras; PyTorch's is that of
the new one. All three averages here are the one step `keep * old + take * new`; they differ in how
much they take. What is stored is therefore always an estimate that can be used as it is: nothing
has to be corrected when it is read.
"""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.core import checks, precision
from jaxnorm.core.devices import placed, placement
from jaxnorm.core.moments import Moments, Stats


def _blend(old: Stats, new: Stats, keep: ArrayLike, take: ArrayLike, who: str) -> Stats:
    """`keep * old + take * new`, in the dtypes of `old`; what has a weight of 0 may be anything."""
    _same_shape(new.var, old.var, "an estimate", who)
    _same_origin(old, new, who)

    def step(old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        old_leaf = jnp.asarray(old_leaf)
        new_leaf = jnp.asarray(new_leaf).astype(old_leaf.dtype)
        return _share(keep, old_leaf) + _share(take, new_leaf)

    return jax.tree.map(step, old, new)


def _share(weight: ArrayLike, value: jax.Array) -> jax.Array:
    weight = jnp.asarray(weight, precision.real_dtype(value.dtype))
    return jnp.where(weight == 0, jnp.zeros_like(value), weight * value)


def _check_estimates(old: Stats, new: Stats, who: str) -> None:
    for stats in (old, new):
        checks.of_kind(Stats, stats, who, "Of evidence, take the estimate: moments.stats().")
    check_running(who, mean=old.mean, var=old.var)


def check_running(who: str, **leaves: ArrayLike | None) -> None:
    """Raises TypeError for running statistics, by name, that are not in float32 or wider."""
    for name, leaf in leaves.items():
        dtype = jnp.float32 if leaf is None else jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"{who}: the running {name} is {dtype}, in which a moving average stops moving. "
                f"Store the statistics in float32: {name}.astype(jnp.float32)."
            )


def ema(old: Stats, new: Stats, momentum: ArrayLike) -> Stats:
    """Exponential moving average: `momentum * old + (1 - momentum) * new`.

    Args:
        old: the running estimate, starting at `Stats(0, 1)`.
        new: the estimate of the newest batch, of the same shape.
        momentum: weight of the OLD value, from 0 to 1.

    Returns:
        `Stats` with the shapes and dtypes of `old`.

    Raises:
        TypeError: `old` or `new` is no `Stats`, or `old` is not float32 or wider.
        ValueError: they differ in shape; a momentum outside 0 to 1.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> old = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.ones(1))
        >>> new = jaxnorm.Stats(mean=jnp.ones(1), var=jnp.full(1, 3.0))
        >>> jaxnorm.ema(old, new, momentum=0.75).var.tolist()
        [1.5]
    """
    _check_estimates(old, new, "ema")
    check_averaging(momentum, False, "ema")
    return _blend(old, new, momentum, 1 - momentum, "ema")


def debiased_ema(old: Stats, new: Stats, momentum: ArrayLike, updates: ArrayLike) -> Stats:
    """Exponential moving average without the pull of its starting value.

    Equal to h / (1 - momentum^t) for the average h of t batches started at 0, and to the mean of
    these batches weighted by momentum^age. The starting value of `old` is forgotten at once.

    Args:
        old: the running estimate, itself a result of this function, or anything at the start.
        new: the estimate of the newest batch, of the same shape.
        momentum: weight of the OLD value, from 0 to below 1, approached as updates accumulate.
        updates: how many batches `old` has seen, whole or, in an average of states, a fraction; a
            scalar, or of the shape of `old.var`. Below 0 it is taken for 0.

    Returns:
        `Stats` with the shapes and dtypes of `old`.

    Raises:
        TypeError: `old` or `new` is no `Stats`, or `old` is not float32 or wider.
        ValueError: they differ in shape; a momentum outside 0 to below 1.

    Numerics:
        Right for every momentum below 1, also for those that float32 would round to 1.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> start = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.ones(1))
        >>> batch = jaxnorm.Stats(mean=jnp.full(1, 5.0), var=jnp.full(1, 2.0))
        >>> after_one = jaxnorm.debiased_ema(start, batch, momentum=0.99, updates=0)
        >>> after_one.mean.tolist(), after_one.var.tolist()
        ([5.0], [2.0])

    Source:
        Kingma & Ba 2015, "Adam" (arXiv:1412.6980), section 3, for the correction.
    """
    _check_estimates(old, new, "debiased_ema")
    check_averaging(momentum, True, "debiased_ema")
    return _debiased(old, new, 1 - momentum, updates)


def _debiased(old: Stats, new: Stats, rest: ArrayLike, updates: ArrayLike) -> Stats:
    """`debiased_ema` by 1 - momentum, which has more digits than a momentum near 1."""
    rest = jnp.asarray(rest, old.var.dtype)
    batches = _with_the_newest(updates, old)
    # (1 - momentum) / (1 - momentum^t) by expm1: at momentum .99 plain differences lose two digits.
    # For a momentum of 1 it is 1 / t.
    log_momentum = jnp.log1p(-jnp.where(rest > 0, rest, jnp.ones_like(rest)))
    take = jnp.expm1(log_momentum) / jnp.expm1(batches * log_momentum)
    take = jnp.where(rest > 0, take, 1 / batches)
    return _blend(old, new, 1 - take, take, "debiased_ema")


def cumulative_average(old: Stats, new: Stats, updates: ArrayLike) -> Stats:
    """The plain mean of the estimates of all batches so far.

    Args:
        old: the mean of the first `updates` estimates; anything where that is 0.
        new: the estimate of the newest batch, of the same shape.
        updates: how many batches `old` has seen, as in `debiased_ema`.

    Returns:
        `Stats` with the shapes and dtypes of `old`.

    Raises:
        TypeError: `old` or `new` is no `Stats`, or `old` is not float32 or wider.
        ValueError: they differ in shape.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> old = jaxnorm.Stats(mean=jnp.full(1, 2.0), var=jnp.ones(1))
        >>> new = jaxnorm.Stats(mean=jnp.full(1, 8.0), var=jnp.ones(1))
        >>> jaxnorm.cumulative_average(old, new, updates=2).mean.tolist()
        [4.0]
    """
    _check_estimates(old, new, "cumulative_average")
    take = 1 / _with_the_newest(updates, old)
    return _blend(old, new, 1 - take, take, "cumulative_average")


def _with_the_newest(updates: ArrayLike, old: Stats) -> jax.Array:
    """How many batches there are with the newest: 1 or more, so that it weighs from 0 to 1.

    An average of states with weights below 0 (extrapolation, a lookahead) may have counted less.
    """
    return jnp.maximum(jnp.asarray(updates, old.var.dtype), 0) + 1


def bessel(stats: Stats, count: ArrayLike) -> Stats:
    """Bessel's correction: turns a biased variance of `count` values into the unbiased one.

    Args:
        stats: estimate with a biased variance.
        count: number of values behind it; a scalar, or of the shape of `stats.var`.

    Returns:
        `Stats` with the variance times count / (count - 1), and variance 1 where `count` is not
        above 1, since a single value tells nothing of the spread.

    Raises:
        TypeError: `stats` is no `Stats`, or not float32 or wider.
        ValueError: the count has another shape.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> biased = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.full(1, 3.0))
        >>> jaxnorm.bessel(biased, count=4).var.tolist()
        [4.0]

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 2, step 10: m / (m - 1).
    """
    checks.of_kind(Stats, stats, "bessel", "Of evidence, use moments.stats(ddof=1).")
    check_running("bessel", mean=stats.mean, var=stats.var)
    if jnp.ndim(count) > 0:
        _same_shape(count, stats.var, "a count", "bessel")
    count = jnp.broadcast_to(jnp.asarray(count, stats.var.dtype), stats.var.shape)
    return Stats(stats.mean, Moments(count, stats.mean, stats.var).stats(ddof=1).var)


def update_running(
    old: Stats,
    batch: Moments,
    *,
    momentum: ArrayLike | None = 0.99,
    updates: jax.Array | None = None,
    debias: bool = False,
    ddof: int = 0,
    skip_nonfinite: bool = False,
) -> tuple[Stats, jax.Array | None]:
    """One step of running statistics: the estimate supported by `batch`, blended into `old`.

    Args:
        old: the running estimate, starting at `Stats(0, 1)`.
        batch: evidence of the newest batch, of the same shape.
        momentum: weight of the OLD value, from 0 to 1; None for the cumulative average.
        updates: of the shape of `old.var`: how many batches moved each entry, starting at 0. Needed
            for `momentum=None` and for `debias`. float32, so that states can be averaged, which
            leaves fractions; it counts to 2**24 and stays there. Integers are counted on as such.
        debias: free the average from the pull of its starting value, see `debiased_ema`.
        ddof: 0 stores the biased variance, 1 the unbiased one.
        skip_nonfinite: leave everything as it was if any mean or variance of the batch is NaN or
            infinite; otherwise one such batch spoils the running statistics for good.

    Returns:
        The new `Stats`, with the shapes and dtypes of `old`, and the new `updates` (None if none
        were given). Entries without evidence, whose count does not exceed `ddof`, do not move.

    Raises:
        TypeError: `old` is no `Stats` or not float32 or wider, or `batch` no `Moments`.
        ValueError: contradicting options, or evidence or counts of another shape.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> running = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.ones(1))
        >>> batch = jaxnorm.moments(jnp.array([[4.0], [6.0]]), axes=0)
        >>> running, _ = jaxnorm.update_running(running, batch, momentum=0.9)
        >>> running.mean.tolist(), running.var.tolist()
        ([0.5], [1.0])

        Gradient accumulation: each micro-batch is normalized by its own statistics, and all
        together make one step, as if they had been one batch.

        >>> import jax
        >>> def step(running, micro_batches):
        ...     def forward(carry, x):
        ...         y, seen = jaxnorm.batch_norm(x)
        ...         return carry, seen
        ...
        ...     _, each = jax.lax.scan(forward, None, micro_batches)
        ...     return jaxnorm.update_running(running, jaxnorm.pool(each, axes=0), momentum=0.5)[0]
        >>> micro_batches = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])
        >>> step(jaxnorm.Stats(jnp.zeros(1), jnp.ones(1)), micro_batches).var.tolist()
        [3.0]

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.1.
    """
    check_averaging(momentum, debias, "update_running")
    checks.of_kind(Stats, old, "update_running", "Start at Stats(jnp.zeros(n), jnp.ones(n)).")
    check_running("update_running", mean=old.mean, var=old.var)
    checks.of_kind(Moments, batch, "update_running", "Take it from jaxnorm.moments(x, axes).")
    _same_shape(batch.var, old.var, "evidence", "update_running")
    if updates is not None:
        updates = jnp.asarray(updates)
        _same_shape(updates, old.var, "a count of updates", "update_running")
    if updates is None and (momentum is None or debias):
        raise ValueError(
            f"update_running: {'debias=True' if debias else 'momentum=None'} depends on how many "
            f"batches were seen before. Pass updates=jnp.zeros({old.var.shape}) at the "
            f"start, and what this function returns from then on."
        )
    # The rest is taken here, while a momentum that is a Python number has all its digits.
    rest = None if momentum is None else 1 - momentum
    return _updated(old, batch, updates, momentum, rest, debias, ddof, skip_nonfinite)


@jax.jit(static_argnames=("debias", "ddof", "skip_nonfinite"), inline=True)
def _updated(
    old: Stats,
    batch: Moments,
    updates: jax.Array | None,
    momentum: ArrayLike | None,
    rest: ArrayLike | None,
    debias: bool,
    ddof: int,
    skip_nonfinite: bool,
) -> tuple[Stats, jax.Array | None]:
    """`update_running` after the door, as one program where nothing else is jitted."""
    batch = placed_like(old, batch)
    moved = batch.count > ddof
    if skip_nonfinite:
        moved &= all_finite(batch)

    new = batch.stats(ddof)
    if momentum is None:
        assert updates is not None
        blended = cumulative_average(old, new, updates)
    elif debias:
        assert updates is not None
        assert rest is not None
        blended = _debiased(old, new, rest, updates)
    else:
        assert rest is not None
        blended = _blend(old, new, momentum, rest, "ema")
    counted = None if updates is None else updates + moved.astype(updates.dtype)
    return jax.tree.map(partial(jnp.where, moved), blended, old), counted


def placed_like(old: Stats, batch: Moments) -> Moments:
    """The evidence on the devices that hold the running statistics, which stay where they are."""
    lies = placement(jnp.asarray(old.var))
    return jax.tree.map(lambda leaf: placed(jnp.asarray(leaf), lies), batch)


def all_finite(evidence: Any) -> jax.Array:
    """Whether no count, mean or variance of a batch's evidence is NaN or infinite."""
    each = (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(evidence))
    return functools.reduce(jnp.logical_and, each)


def _same_shape(found: ArrayLike, expected: ArrayLike, what: str, who: str) -> None:
    if jnp.shape(found) != jnp.shape(expected):
        raise ValueError(
            f"{who}: {what} of shape {jnp.shape(found)} does not fit running statistics of shape "
            f"{jnp.shape(expected)}. Give both one entry per feature: "
            f"jaxnorm.moments(x, axes) over all other axes, updates=jnp.zeros(features)."
        )


def _same_origin(old: Stats, new: Stats, who: str) -> None:
    if (old.mean is None) != (new.mean is None):
        found = ["a mean and a variance", "a variance about the origin (mean=None)"]
        raise ValueError(
            f"{who}: the old estimate has {found[old.mean is None]}, the new one "
            f"{found[new.mean is None]}. Take the evidence likewise: "
            f"jaxnorm.moments(x, axes, use_mean={old.mean is not None})."
        )


def check_averaging(momentum: ArrayLike | None, debias: bool, who: str) -> None:
    """Raises if the options of a running average contradict each other, or are none."""
    if momentum is None:
        if debias:
            raise ValueError(
                f"{who}: momentum=None is the cumulative average, which has no bias to take off. "
                f"Drop debias=True, or set momentum=0.99."
            )
        return
    if isinstance(momentum, str):
        raise TypeError(
            f"{who}: momentum={momentum!r} must be a number, the weight of the old value, or None. "
            f"Use momentum=0.99."
        )
    if isinstance(momentum, (int, float, np.generic)):
        if not 0 <= momentum <= 1:
            raise ValueError(
                f"{who}: momentum={momentum} is the weight of the old value and must lie from 0 "
                f"to 1. Use momentum=0.99."
            )
        if debias and momentum == 1:
            raise ValueError(
                f"{who}: momentum=1 never takes anything of a new batch, so that debias=True has "
                f"nothing to weigh. Use momentum=None for the average of all batches."
            )
