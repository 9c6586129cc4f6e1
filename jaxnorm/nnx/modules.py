"""One NNX module per method."""

import dataclasses

from flax import nnx

from jaxnorm import methods
from jaxnorm.nnx.shell import RunningStatsShell, module


@module
class BatchNorm(methods.BatchNorm, RunningStatsShell):
    """Batch normalization; a drop-in for `flax.nnx.BatchNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.BatchNorm(2, momentum=0.75, rngs=nnx.Rngs(0))
        >>> layer.train()
        >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> y.round(3).tolist(), layer.mean[...].tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.5, 5.0])
        >>> layer.eval()
        >>> layer(y).shape
        (2, 2)
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)
