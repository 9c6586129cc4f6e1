"""Linen modules that whiten groups of features."""

from jaxnorm import methods
from jaxnorm.linen.shell import RunningStatsShell


class DecorrelatedBatchNorm(methods.DecorrelatedBatchNorm, RunningStatsShell):
    """Decorrelated batch normalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.DecorrelatedBatchNorm(momentum=0.5)
        >>> x = jnp.array([[0.0, 0.0], [4.0, 4.0], [0.0, 4.0], [4.0, 0.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, updated = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> y.round(3).tolist(), updated["batch_stats"]["cov"].tolist()
        ([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], [[[2.5, 0.0], [0.0, 2.5]]])
        >>> variables = {"params": variables["params"], **updated}
        >>> layer.apply(variables, x, use_running_average=True).shape
        (4, 2)
    """


class IterNorm(methods.IterNorm, RunningStatsShell):
    """Iterative normalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.IterNorm(num_groups=None, group_size=16)
        >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 32))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'cov': (2, 16, 16), 'mean': (32,)}
        >>> y, updated = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> y.shape
        (8, 4, 4, 32)
    """
