"""Running statistics with a covariance in place of the variance: what whitening specs share."""

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import precision
from jaxnorm.core.covariance import Comoments, JointStats, merge_comoments
from jaxnorm.core.feature_groups import feature_axis, group_shape
from jaxnorm.core.running_covariance import update_running_covariance
from jaxnorm.methods.accumulation import accumulate
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.narrow_stats import widened, widened_stat
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Slot, Values


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class RunningCovariance(Affine, RunningStats):
    """A spec that whitens groups of features, but for the two functions by which it does.

    Args:
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
    """

    num_groups: int | None = 1
    group_size: int | None = None

    @abc.abstractmethod
    def _by_batch(
        self, x: jax.Array, *affine: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, Comoments]:
        """The pure function of training."""

    @abc.abstractmethod
    def _by_stats(
        self, x: jax.Array, stats: JointStats, *affine: jax.Array | None, **options: Any
    ) -> jax.Array:
        """The pure function of inference."""

    def _feature_axes(self: Any, ndim: int, who: str) -> tuple[int, ...]:
        return (feature_axis(self.axis, ndim, who),)

    def _slots(self: Any, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        groups, size = group_shape(features[0], self.num_groups, self.group_size, who)
        real = precision.promote(precision.real_dtype(self.param_dtype), jnp.float32)
        stats = {
            "mean": Slot("batch_stats", features, real, jax.nn.initializers.zeros),
            "cov": Slot("batch_stats", (groups, size, size), real, _identities),
        }
        return self._with_bookkeeping(stats, (groups,)) | self._affine_slots(features)

    def _transform(
        self: Any,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        *,
        initializing: bool,
        use_running_average: bool,
        update_stats: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean, cov = (widened_stat(values[name], name, who) for name in ("mean", "cov"))
        stored = lax.stop_gradient(JointStats(mean.reshape(cov.shape[:2]), cov))
        affine = self._affine(values, x)
        options: dict[str, Any] = dict(axis=self.axis, where=mask, epsilon=self.epsilon)
        options |= dict(dtype=dtype, who=who)
        if use_running_average:
            return self._by_stats(x, stored, *affine, **options), {}
        options |= dict(num_groups=self.num_groups, group_size=self.group_size)
        var = jnp.diagonal(cov, axis1=-2, axis2=-1)
        shift = self._shift(stored.mean, var).reshape(-1)
        options |= dict(shift=shift, **self._mapped_axes(initializing, who))
        y, batch = self._by_batches(self._by_batch, initializing)(x, *affine, **options)
        if initializing:
            return y, {}
        if mask is None:
            self._warn_of_few_examples(x, cov, who)
        return y, self._moved_covariance(values, stored, batch, who) if update_stats else {}

    def _moved_covariance(
        self: Any, values: Values, stored: JointStats, batch: Comoments, who: str
    ) -> dict[str, jax.Array]:
        """The new values of the running statistics after a batch with this evidence."""
        batch, pending, wide = lax.stop_gradient(batch), {}, widened(values)
        if self.update_every > 1:
            batch, pending = accumulate(
                wide,
                batch,
                self.update_every,
                merge=merge_comoments,
                skip_nonfinite=self.skip_nonfinite,
            )
        new, updates = update_running_covariance(
            stored,
            batch,
            momentum=self.momentum,
            updates=wide.get("updates"),
            debias=self.debias,
            ddof=int(self.running_var == "unbiased"),
            skip_nonfinite=self.skip_nonfinite,
        )
        changed = pending | {"mean": new.mean.reshape(-1), "cov": new.cov}
        changed |= {} if updates is None else {"updates": updates}
        return self._as_found(changed, values, who)

    def _warn_of_few_examples(self: Any, x: jax.Array, cov: jax.Array, who: str) -> None:
        groups, size, _ = cov.shape
        count = self._values_together(x, groups * size, who)
        if count is not None and ax.surely(lambda: count <= size):
            warnings.warn(
                f"{who}: trains on {count} examples for groups of {size} features, too few to know "
                f"their covariance, which has rank {max(count - 1, 0)} at most. Use larger "
                f"batches, smaller groups (group_size), or use_running_average=True.",
                stacklevel=2,
            )


def _identities(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Initializer of covariances."""
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
