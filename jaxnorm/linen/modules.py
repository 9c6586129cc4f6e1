"""One Linen module per method."""

from typing import Any

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm.linen.shell import ModalShell, RunningStatsShell, StatelessShell


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


class LayerNorm(methods.LayerNorm, StatelessShell):
    """Layer normalization; a drop-in for `flax.linen.LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> x = jnp.array([[1.0, 3.0], [20.0, 60.0]])
        >>> y, variables = jnn.LayerNorm().init_with_output(jax.random.key(0), x)
        >>> y.round(3).tolist(), variables["params"]["scale"].tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [1.0, 1.0])
    """

    force_float32_reductions: bool = True
    """Accepted for Flax's sake: sums and statistics are never narrower than float32."""


class RMSNorm(methods.RMSNorm, StatelessShell):
    """Root mean square normalization; a drop-in for `flax.linen.RMSNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.RMSNorm(zero_centered_scale=True)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.array([[7.0, -7.0]]))
        >>> y.round(3).tolist(), variables["params"]["scale"].tolist()
        ([[1.0, -1.0]], [0.0, 0.0])
    """

    force_float32_reductions: bool = True
    """Accepted for Flax's sake: sums and statistics are never narrower than float32."""


class GroupNorm(methods.GroupNorm, StatelessShell):
    """Group normalization; a drop-in for `flax.linen.GroupNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> y, _ = jnn.GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)
        >>> y.round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    force_float32_reductions: bool = True
    """Accepted for Flax's sake: sums and statistics are never narrower than float32."""


class InstanceNorm(methods.InstanceNorm, ModalShell):
    """Instance normalization; a drop-in for `flax.linen.InstanceNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> x = jnp.array([[[1.0], [3.0]], [[20.0], [60.0]]])
        >>> y, _ = jnn.InstanceNorm().init_with_output(jax.random.key(0), x)
        >>> y[..., 0].round(3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
    """

    force_float32_reductions: bool = True
    """Accepted for Flax's sake: sums and statistics are never narrower than float32."""

    @nn.compact
    def __call__(
        self: Any,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: input whose first axis is that of examples; float, bfloat16 or complex; integers
                become float32.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.
            use_running_average, update_stats: as in `BatchNorm`; only with running statistics.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(x, mask, **self._chosen(use_running_average, update_stats))
