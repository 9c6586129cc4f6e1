"""Running statistics of groups of features: estimates of mean and covariance blended over batches.

The averages are those of `running.py`, taken of each entry of the covariance.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core import checks
from jaxnorm.core.covariance import Comoments, JointStats
from jaxnorm.core.moments import Moments, Stats
from jaxnorm.core.running import check_running, update_running


def update_running_covariance(
    old: JointStats,
    batch: Comoments,
    *,
    momentum: ArrayLike | None = 0.99,
    updates: jax.Array | None = None,
    debias: bool = False,
    ddof: int = 0,
    skip_nonfinite: bool = False,
) -> tuple[JointStats, jax.Array | None]:
    """One step of running statistics: the estimate supported by `batch`, blended into `old`.

    Args:
        old: the running estimate, starting at mean 0 and covariance I.
        batch: evidence of the newest batch, of the same groups of features.
        momentum: weight of the OLD value, from 0 to 1; None for the cumulative average.
        updates: `[groups]`: how many batches moved each group, starting at 0. Needed for
            `momentum=None` and for `debias`. float32 or integers, see `update_running`.
        debias: free the average from the pull of its starting value, see `debiased_ema`.
        ddof: 0 stores the biased covariance, 1 the unbiased one.
        skip_nonfinite: leave everything as it was if any mean or covariance of the batch is NaN or
            infinite; otherwise one such batch spoils the running statistics for good.

    Returns:
        The new `JointStats`, with the shapes and dtypes of `old`, and the new `updates` (None if
        none were given). Groups without evidence, whose count does not exceed `ddof`, do not move.

    Raises:
        TypeError: `old` is no `JointStats` or not float32 or wider, or `batch` no `Comoments`.
        ValueError: contradicting options, or evidence of another shape.

    Numerics:
        The average of covariances is a covariance: symmetric, without negative eigenvalues.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> running = jaxnorm.JointStats(jnp.zeros((1, 2)), jnp.eye(2)[None])
        >>> batch = jaxnorm.comoments(jnp.array([[4.0, 0.0], [6.0, 2.0]]))
        >>> running, _ = jaxnorm.update_running_covariance(running, batch, momentum=0.75)
        >>> running.mean.tolist(), running.cov.tolist()
        ([[1.25, 0.25]], [[[1.0, 0.25], [0.25, 1.0]]])

    Source:
        Huang et al. 2018 (arXiv:1804.08450), which averages covariances or whitening matrices.
    """
    who = "update_running_covariance"
    fix = "Start at JointStats(jnp.zeros((1, n)), jnp.eye(n)[None])."
    checks.of_kind(JointStats, old, who, fix)
    check_running(who, mean=old.mean, cov=old.cov)
    checks.of_kind(Comoments, batch, who, "Take it from comoments(x).")
    shape = jnp.shape(old.cov)
    if jnp.shape(batch.cov) != shape:
        raise ValueError(
            f"{who}: evidence with a covariance of shape {jnp.shape(batch.cov)} does not fit a "
            f"running covariance of shape {shape}. Take both of the same groups: comoments(x, "
            f"num_groups={shape[0]})."
        )

    def spread(value: ArrayLike, axes: tuple[int, ...]) -> jax.Array:
        """A value of a group or of a feature, as one of each entry of the covariance."""
        return jnp.broadcast_to(jnp.expand_dims(jnp.asarray(value), axes), shape)

    new, updates = update_running(
        Stats(spread(old.mean, (2,)), jnp.asarray(old.cov)),
        Moments(spread(batch.count, (1, 2)), spread(batch.mean, (2,)), jnp.asarray(batch.cov)),
        momentum=momentum,
        updates=None if updates is None else spread(updates, (1, 2)),
        debias=debias,
        ddof=ddof,
        skip_nonfinite=skip_nonfinite,
    )
    assert new.mean is not None
    return JointStats(new.mean[..., 0], new.var), None if updates is None else updates[:, 0, 0]
