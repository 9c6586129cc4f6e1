"""NNX modules that whiten groups of features."""

import dataclasses

from flax import nnx

from jaxnorm import methods
from jaxnorm.nnx.shell import RunningStatsShell, module


@module
class DecorrelatedBatchNorm(methods.DecorrelatedBatchNorm, RunningStatsShell):
    """Decorrelated batch normalization.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.DecorrelatedBatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> layer.train()
        >>> y = layer(jnp.array([[0.0, 0.0], [4.0, 4.0], [0.0, 4.0], [4.0, 0.0]]))
        >>> y.round(3).tolist(), layer.cov[...].tolist()
        ([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], [[[2.5, 0.0], [0.0, 2.5]]])
        >>> layer.eval()
        >>> layer(y).shape
        (4, 2)
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    cov: nnx.BatchStat = dataclasses.field(init=False)


@module
class IterNorm(methods.IterNorm, RunningStatsShell):
    """Iterative normalization.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.IterNorm(32, num_groups=None, group_size=16, rngs=nnx.Rngs(0))
        >>> layer.train()
        >>> y = layer(jax.random.normal(jax.random.key(0), (8, 4, 4, 32)))
        >>> y.shape, layer.cov[...].shape
        ((8, 4, 4, 32), (2, 16, 16))
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    cov: nnx.BatchStat = dataclasses.field(init=False)
