"""Running statistics as part of a spec: when they are used, when they move, and by which rule."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core import precision
from jaxnorm.core.moments import Moments, Stats, merge
from jaxnorm.core.running import check_averaging, placed_like, update_running
from jaxnorm.methods.accumulation import PREFIX, accumulate, check_update_every, pending_slots
from jaxnorm.methods.ghost_batches import Norm, check_groups, check_size, ghost_batches
from jaxnorm.methods.narrow_stats import (
    counts_to,
    rounded,
    warn_of_rounding,
    widened,
    widened_stat,
)
from jaxnorm.methods.spec import COUNT, Slot, Spec, Values


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class RunningStats(Spec):
    """Part of specs with the fields `use_running_average`, `momentum`, `param_dtype`, `axis_name`.

    Args:
        debias: free the running average from the pull of its start at (0, 1).
        running_var: `"biased"` stores the variance by which batches are normalized, as Flax does,
            `"unbiased"` with Bessel's correction, as the paper of batch norm and PyTorch do.
        update_stats: whether training moves the running statistics; also an argument of the call.
        skip_nonfinite: leave the running statistics alone on a batch with a NaN or infinite mean or
            variance.
        update_every: how many batches make one step of the running statistics, see
            `accumulation.py`.
        ghost_batch_size: how many examples are normalized together, see `ghost_batches.py`; None
            for the whole batch.
    """

    debias: bool = False
    running_var: Literal["biased", "unbiased"] = "biased"
    update_stats: bool = True
    skip_nonfinite: bool = False
    update_every: int = 1
    ghost_batch_size: int | None = None

    def _check_options(self: Any, who: str) -> None:
        super()._check_options(who)
        check_averaging(self.momentum, self.debias, who)
        check_update_every(self.update_every, who)
        if self.ghost_batch_size is not None:
            check_size(self.ghost_batch_size, who)
            check_groups(self.ghost_batch_size, self.axis_index_groups, who)
        if self.running_var not in ("biased", "unbiased"):
            raise ValueError(
                f"{who}: running_var={self.running_var!r} is unknown. "
                f"Use running_var='biased' or running_var='unbiased'."
            )

    def _mode(
        self: Any, use_running_average: bool | None, update_stats: bool | None, who: str
    ) -> tuple[bool, bool]:
        """Whether a call uses the running statistics and whether it moves them.

        What the call says goes before what the layer says.

        Raises:
            TypeError: `use_running_average` is text.
            ValueError: nothing says which statistics to use, or the two contradict each other.
        """
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            raise ValueError(
                f"{who}: use_running_average is missing, so it is not known whether this is "
                f"training or inference. Pass use_running_average=False to train and True for "
                f"inference, to the call or to the constructor."
            )
        if isinstance(frozen, str):
            raise TypeError(
                f"{who}: use_running_average={frozen!r} must be True or False. Give other "
                f"arguments by name: domain={frozen!r}."
            )
        if frozen and update_stats:
            raise ValueError(
                f"{who}: update_stats=True contradicts use_running_average=True: the running "
                f"statistics move only when the batch's are used. Drop one of the two."
            )
        return frozen, not frozen and (self.update_stats if update_stats is None else update_stats)

    def _stats_slots(self: Any, features: tuple[int, ...], is_complex: bool) -> dict[str, Slot]:
        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        real = precision.promote(precision.real_dtype(self.param_dtype), jnp.float32)
        mean_dtype = precision.promote(real, jnp.complex64) if is_complex else real
        return self._with_bookkeeping(
            {
                "mean": Slot("batch_stats", features, mean_dtype, zeros),
                "var": Slot("batch_stats", features, real, ones),
            },
            features,
        )

    def _with_bookkeeping(
        self: Any, stats: dict[str, Slot], counted: tuple[int, ...]
    ) -> dict[str, Slot]:
        """Running statistics and what it takes to move them, with counts of the shape `counted`."""
        slots = dict(stats)
        if self.debias or self.momentum is None:
            slots["updates"] = Slot("batch_stats", counted, COUNT, jax.nn.initializers.zeros)
        if self.update_every > 1:
            slots |= pending_slots(stats, counted)
        return slots

    def _stored(self, values: Values, x: jax.Array, who: str) -> Stats:
        """The running statistics in float32 or wider, through which no gradient passes."""
        mean, var = (widened_stat(values[name], name, who) for name in ("mean", "var"))
        stats = lax.stop_gradient(Stats(mean, var))
        if precision.is_complex(x.dtype) and not precision.is_complex(values["mean"].dtype):
            raise TypeError(
                f"{who}: the input is {x.dtype}, but the running mean is stored as "
                f"{values['mean'].dtype} and would lose the imaginary part. Create the layer for "
                f"complex input: initialize a Linen module with a complex example, or an NNX "
                f"module with dtype=jnp.complex64."
            )
        return stats

    def _shift(self, mean: jax.Array | None, var: jax.Array) -> jax.Array:
        """What a batch's moments are taken about: the running mean, or 0 if that is near it.

        Within a standard deviation 0 serves as well, and better for features that are 0 throughout
        some batches, as rare features and dead units are: about 0, one pass finds their moments.
        """
        assert mean is not None
        return jnp.where(precision.abs_square(mean) <= var, jnp.zeros_like(mean), mean)

    def _moved(
        self: Any,
        values: Values,
        stored: Stats,
        batch: Moments,
        who: str,
        ddof: int | None = None,
    ) -> dict[str, jax.Array]:
        """The new values of the running statistics after a batch with this evidence.

        `ddof` is what is taken off the count in its variance, by default what the options say.
        """
        batch, pending, wide = lax.stop_gradient(batch), {}, widened(values)
        if self.update_every > 1:
            batch, pending = accumulate(
                wide,
                placed_like(stored, batch),
                self.update_every,
                merge=self._merged,
                skip_nonfinite=self.skip_nonfinite,
            )
        return self._as_found(self._blended(wide, stored, batch, ddof) | pending, values, who)

    def _as_found(
        self: Any, changed: Mapping[str, jax.Array], values: Values, who: str
    ) -> dict[str, jax.Array]:
        """The new values in the dtypes of the old ones, so that a state keeps its types.

        Raises:
            ValueError: the count of batches cannot reach `update_every` in its dtype.
        """
        found = {name: values[name] for name in changed if name in values}
        batches = found.get(f"{PREFIX}batches")
        if batches is not None and self.update_every > counts_to(batches.dtype):
            raise ValueError(
                f"{who}: update_every={self.update_every} batches are counted in {batches.dtype}, "
                f"which holds whole numbers up to {counts_to(batches.dtype)}. Store the count in "
                f"float32: {PREFIX}batches.astype(jnp.float32)."
            )
        warn_of_rounding(found, self.momentum, type(self).__name__)
        return {
            name: rounded(leaf, found[name].dtype) if name in found else leaf
            for name, leaf in changed.items()
        }

    def _merged(self, pending: Moments, batch: Moments) -> Moments:
        """The evidence of batches together."""
        return merge(pending, batch)

    def _blended(
        self: Any, values: Values, stored: Stats, batch: Moments, ddof: int | None
    ) -> dict[str, jax.Array]:
        """The new values of the running statistics after one step of their average."""
        new, updates = update_running(
            stored,
            batch,
            momentum=self.momentum,
            updates=values.get("updates"),
            debias=self.debias,
            ddof=int(self.running_var == "unbiased") if ddof is None else ddof,
            skip_nonfinite=self.skip_nonfinite,
        )
        assert new.mean is not None
        changed = {"mean": new.mean, "var": new.var}
        return changed if updates is None else changed | {"updates": updates}

    def _by_batches(self: Any, norm: Norm, initializing: bool) -> Norm:
        """`norm` over the batches that are normalized together."""
        if self.ghost_batch_size is None or initializing:
            return norm
        return ghost_batches(norm, self.ghost_batch_size)

    def _values_together(self: Any, x: jax.Array, features: int, who: str) -> int | None:
        """How many values of each feature are normalized together, None if that differs.

        A symbolic size (`jax.export`) if the input has some.
        """
        local = x.size // max(features, 1)
        if self.ghost_batch_size is not None:
            return self.ghost_batch_size * local // max(x.shape[0], 1)
        over = self._pooled_over(who)
        parts = 1 if over is None else over.parts
        return None if parts is None else local * parts

    def _warn_of_single_values(self: Any, x: jax.Array, features: int, who: str) -> None:
        if self._values_together(x, features, who) == 1:
            warnings.warn(
                f"{who}: trains on one value per feature, which is its own mean: the output is the "
                f"bias whatever the input, and the running variance decays to 0. Use larger "
                f"batches, or use_running_average=True.",
                stacklevel=2,
            )
