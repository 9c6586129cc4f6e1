"""One NNX module per method."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm.nnx.shell import ModalShell, RunningStatsShell, Shell, StatelessShell, module


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

    _promotes = ("mean", "var", "scale", "bias")
    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)


@module
class LayerNorm(methods.LayerNorm, StatelessShell):
    """Layer normalization; a drop-in for `flax.nnx.LayerNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.LayerNorm(2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0], [20.0, 60.0]])).round(3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
    """

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)


@module
class RMSNorm(methods.RMSNorm, Shell):
    """Root mean square normalization; a drop-in for `flax.nnx.RMSNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.RMSNorm(2, zero_centered_scale=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[7.0, -7.0]])).round(3).tolist(), layer.scale[...].tolist()
        ([[1.0, -1.0]], [0.0, 0.0])
    """

    _promotes = ("scale",)

    scale: nnx.Param | None = dataclasses.field(init=False)

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes `x`; the mask may also be given by position, as in Flax."""
        return self._normalize(x, mask)


@module
class GroupNorm(methods.GroupNorm, StatelessShell):
    """Group normalization; a drop-in for `flax.nnx.GroupNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.GroupNorm(4, 2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = dataclasses.field(default=32, kw_only=False)
    group_size: int | None = dataclasses.field(default=None, kw_only=False)

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)


@module
class InstanceNorm(methods.InstanceNorm, ModalShell):
    """Instance normalization; a drop-in for `flax.nnx.InstanceNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.InstanceNorm(1, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[[1.0], [3.0]], [[20.0], [60.0]]]))[..., 0].round(3).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)

    def __call__(
        self: Any,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and with running statistics moves them in training.

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
