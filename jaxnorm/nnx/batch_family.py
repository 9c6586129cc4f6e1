"""NNX modules of the methods around batch norm."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm.methods.ibn import residual_sum
from jaxnorm.nnx.shell import RunningStatsShell, StatelessShell, module


@module
class BatchRenorm(methods.BatchRenorm, RunningStatsShell):
    """Batch renormalization.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.BatchRenorm(1, rmax=3.0, dmax=5.0, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[1.0], [2.0]])
        >>> layer(x).round(3).tolist(), int(layer.step[...])
        ([[1.0], [2.0]], 1)
    """

    _promotes = ("mean", "var", "scale", "bias")
    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)
    step: nnx.BatchStat = dataclasses.field(init=False)


@module
class AdaBN(methods.AdaBN, RunningStatsShell):
    """Batch normalization with running statistics per domain.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> options = {"domains": ("photos", "sketches"), "momentum": None}
        >>> layer = jaxnorm.nnx.AdaBN(1, **options, rngs=nnx.Rngs(0))
        >>> sketches = jnp.array([[10.0], [50.0]])
        >>> y = layer(sketches, domain="sketches")
        >>> layer.mean[...].tolist(), layer.mean_sketches[...].tolist()
        ([0.0], [30.0])
        >>> layer(sketches, use_running_average=True, domain="sketches").round(3).tolist()
        [[-1.0], [1.0]]
    """

    _promotes = ("mean", "var", "scale", "bias")
    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)

    def __post_init__(self, *arguments: Any) -> None:
        super().__post_init__(*arguments)
        self.domains = tuple(self.domains)  # a list would be none of NNX's static attributes

    def __call__(
        self: Any,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        mask: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, data of one domain, and in training moves this domain's statistics.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            use_running_average: True for inference, False for training; None for the layer's
                choice, which `train()`, `eval()` and `nnx.view` set.
            domain: whose statistics are used and moved; None for the first.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.
            update_stats: whether training moves the running statistics; None for the layer's
                choice.

        Returns:
            Array of the shape of `x`.
        """
        frozen, moves = self._mode(use_running_average, update_stats, self._who)
        mode = dict(use_running_average=frozen, update_stats=moves)
        return self._normalize(x, mask, domain=domain, **mode)

    def set_view(
        self,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
        domain: str | None = None,
    ) -> None:
        """Changes options; `nnx.view(model, ...)` calls it for all layers of a model.

        Args:
          use_running_average: True for inference, False for training; None leaves it as it is.
          update_stats: whether training moves the running statistics; None leaves it as it is.
          domain: that of calls that name none; None leaves it as it is.
        """
        super().set_view(use_running_average, update_stats)
        if domain is not None:
            self.domain = domain


@module
class SwitchableNorm(methods.SwitchableNorm, RunningStatsShell):
    """Switchable normalization.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.SwitchableNorm(1, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]]))
        >>> [f"{value:.2f}" for value in y.ravel()]
        ['-0.98', '0.49', '-0.85', '1.19']
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean_weight: nnx.Param = dataclasses.field(init=False)
    var_weight: nnx.Param = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)


@module
class IBNa(methods.IBNa, RunningStatsShell):
    """IBN-a: instance norm for the first features, batch norm for the others.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.IBNa(2, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[[1.0, 1.0], [3.0, 1.0]], [[20.0, 3.0], [60.0, 3.0]]])
        >>> y = layer(x)
        >>> y[..., 0].round(3).tolist(), y[..., 1].round(3).tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]])
        >>> layer.scale.shape, layer.mean.shape
        ((2,), (1,))
    """

    use_running_average: bool | None = False

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)
    mean: nnx.BatchStat = dataclasses.field(init=False)
    var: nnx.BatchStat = dataclasses.field(init=False)


@module
class IBNb(methods.IBNb, StatelessShell):
    """IBN-b: instance norm after a residual sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> layer = jaxnorm.nnx.IBNb(1, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[[1.0], [2.0]]])
        >>> layer(x, shortcut=2 * x).round(3).tolist()
        [[[-1.0], [1.0]]]
    """

    scale: nnx.Param | None = dataclasses.field(init=False)
    bias: nnx.Param | None = dataclasses.field(init=False)

    def __call__(
        self: Any,
        x: ArrayLike,
        shortcut: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x + shortcut`.

        Args:
            x: input such as `[batch, height, width, features]`; float, bfloat16 or complex;
                integers become float32.
            shortcut: array of the shape of `x`, or None for nothing.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(residual_sum(x, shortcut, self._who), mask)
