"""One Linen module per method."""

from jaxnorm import methods
from jaxnorm.linen.shell import RunningStatsShell


class BatchNorm(methods.BatchNorm, RunningStatsShell):
    """Batch normalization; a drop-in for `flax.linen.BatchNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.BatchNorm(momentum=0.75)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, updated = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> y.round(3).tolist(), updated["batch_stats"]["mean"].tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.5, 5.0])
        >>> variables = {"params": variables["params"], **updated}
        >>> layer.apply(variables, x, use_running_average=True).shape
        (2, 2)
    """

    force_float32_reductions: bool = True
    """Accepted for Flax's sake: sums and statistics are never narrower than float32."""
