"""Gradient accumulation: the evidence of k batches, for one step of the running statistics.

    pending <- merge(pending, batch)                                each batch
    running <- blend(running, pending),   pending <- nothing        each k-th

Where k micro-batches make one step of the optimizer (`optax.MultiSteps`, or a `lax.scan` over
them), each is normalized by its own statistics, since those of the next are not known yet. A
running average that moved with each would forget k times as fast, and would never see how the means
of micro-batches differ. So their evidence waits until all of it is there. Evidence merges exactly:
what is then stored is what the k micro-batches would have stored as one batch.

Nothing is a count of 0. The mean and variance beside it stay: an average of states that wait for
different batches then averages means and variances, where zeros would draw them to 0.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core import checks, precision
from jaxnorm.core.covariance import Comoments
from jaxnorm.core.moments import Moments
from jaxnorm.core.running import all_finite
from jaxnorm.methods.spec import COUNT, Slot, Values

Evidence = TypeVar("Evidence", Moments, Comoments)

PREFIX = "pending_"
"""That of the names of variables in which evidence waits."""


def check_update_every(update_every: int, who: str) -> None:
    """Raises unless `update_every` is a number of batches.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    batches = checks.integer(update_every)
    if batches is None:
        raise TypeError(
            f"{who}: update_every={update_every!r} must be an integer, the number of batches for "
            f"one step of the running statistics. Use update_every=1, or the k of "
            f"optax.MultiSteps(optimizer, every_k_schedule=k)."
        )
    if batches < 1:
        raise ValueError(
            f"{who}: update_every={batches} batches make no step of the running statistics. Use "
            f"update_every=1; to leave the statistics alone, update_stats=False."
        )


def pending_slots(stats: Mapping[str, Slot], counted: tuple[int, ...]) -> dict[str, Slot]:
    """The variables in which evidence for `stats` waits, whose counts have the shape `counted`.

    No name is the beginning of another: `AdaBN` appends those of its domains.
    """
    zeros = jax.nn.initializers.zeros
    real = precision.real_dtype(stats["mean"].dtype)
    return {
        f"{PREFIX}batches": Slot("batch_stats", (), COUNT, zeros),
        f"{PREFIX}count": Slot("batch_stats", counted, real, zeros),
        **{f"{PREFIX}{name}": slot._replace(init=zeros) for name, slot in stats.items()},
    }


def accumulate(
    values: Values,
    batch: Evidence,
    update_every: int,
    *,
    merge: Callable[[Evidence, Evidence], Evidence],
    skip_nonfinite: bool,
) -> tuple[Evidence, dict[str, jax.Array]]:
    """The evidence that is due after a batch, and the new values of the variables of that waiting.

    Due is all that waited, with the k-th batch. Before, it is evidence with a count of 0, which
    moves no statistics, so that the state has one structure at every batch.
    """
    names = [field.name for field in dataclasses.fields(batch)]
    stored = {name: lax.stop_gradient(values[f"{PREFIX}{name}"]) for name in names}
    seen = {name: getattr(batch, name).astype(stored[name].dtype) for name in names}
    pending = {name: stored[name].reshape(seen[name].shape) for name in names}
    if skip_nonfinite:
        usable = all_finite(batch)
        seen = {name: jnp.where(usable, leaf, jnp.zeros_like(leaf)) for name, leaf in seen.items()}
    kind = type(batch)
    together = merge(kind(**pending), kind(**seen))
    batches = values[f"{PREFIX}batches"] + 1
    # Rounded, since an average of states may hold 1.9999999 batches, or 1.3.
    due = jnp.round(batches) >= update_every

    def unless_due(leaf: jax.Array, name: str) -> jax.Array:
        counts = name in ("count", "batches")
        return jnp.where(due & (counts | ~jnp.isfinite(leaf)), jnp.zeros_like(leaf), leaf)

    new = {name: getattr(together, name).reshape(stored[name].shape) for name in names}
    new |= {"batches": batches}
    count = jnp.where(due, together.count, jnp.zeros_like(together.count))
    return (
        dataclasses.replace(together, count=count),
        {f"{PREFIX}{name}": unless_due(leaf, name) for name, leaf in new.items()},
    )
