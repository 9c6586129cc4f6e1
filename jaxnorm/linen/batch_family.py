"""Linen modules of the methods around batch norm."""

from typing import Any

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm.linen.shell import RunningStatsShell, StatelessShell
from jaxnorm.methods.ibn import residual_sum
from jaxnorm.methods.spec import Slot


class _BeyondBatchNorm(RunningStatsShell):
    """Modules that can start from a checkpoint of `BatchNorm`, which lacks some variables.

    The spec says what then happens.
    """

    def _declare(self: Any, slots: dict[str, Slot], found_in_input: str) -> dict[str, Any]:
        known = ("scale", "bias", "mean", "var")
        if not self.is_initializing():
            slots = {
                name: slot
                for name, slot in slots.items()
                if name in known or self.has_variable(slot.collection, name)
            }
        return super()._declare(slots, found_in_input)


class BatchRenorm(methods.BatchRenorm, _BeyondBatchNorm):
    """Batch renormalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.BatchRenorm(rmax=3.0, dmax=5.0)
        >>> x = jnp.array([[1.0], [2.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, updated = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"]
        ... )
        >>> y.round(3).tolist(), int(updated["batch_stats"]["step"])
        ([[1.0], [2.0]], 1)
        >>> layer.apply(variables, x, use_running_average=True).round(3).tolist()
        [[1.0], [2.0]]
    """


class AdaBN(methods.AdaBN, _BeyondBatchNorm):
    """Batch normalization with running statistics per domain.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.AdaBN(domains=("photos", "sketches"), momentum=None)
        >>> sketches = jnp.array([[10.0], [50.0]])
        >>> variables = layer.init(jax.random.key(0), sketches, use_running_average=False)
        >>> _, updated = layer.apply(
        ...     variables,
        ...     sketches,
        ...     use_running_average=False,
        ...     domain="sketches",
        ...     mutable=["batch_stats"],
        ... )
        >>> stats = updated["batch_stats"]
        >>> stats["mean"].tolist(), stats["mean_sketches"].tolist()
        ([0.0], [30.0])
        >>> variables = {"params": variables["params"], **updated}
        >>> y = layer.apply(variables, sketches, use_running_average=True, domain="sketches")
        >>> y.round(3).tolist()
        [[-1.0], [1.0]]
    """

    @nn.compact
    def __call__(
        self: Any,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        mask: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, data of one domain.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            use_running_average: True for inference, False for training; here or in the constructor,
                not both.
            domain: whose statistics are used and moved; None for the first.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.
            update_stats: whether training moves the running statistics; None for the constructor's
                choice. False needs no mutable collection.

        Returns:
            Array of the shape of `x`.
        """
        mode = self._chosen(use_running_average, update_stats)
        return self._normalize(x, mask, domain=domain, **mode)

    def _check_updates(self, slot: Slot) -> None:
        """Left to the spec: what counts is the count of the call's domain."""


class SwitchableNorm(methods.SwitchableNorm, RunningStatsShell):
    """Switchable normalization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.SwitchableNorm(use_running_average=False)
        >>> x = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> [f"{value:.2f}" for value in y.ravel()]
        ['-0.98', '0.49', '-0.85', '1.19']
        >>> variables["params"]["mean_weight"].tolist()
        [1.0, 1.0, 1.0]
    """


class IBNa(methods.IBNa, RunningStatsShell):
    """IBN-a: instance norm for the first features, batch norm for the others.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.IBNa(use_running_average=False)
        >>> x = jnp.array([[[1.0, 1.0], [3.0, 1.0]], [[20.0, 3.0], [60.0, 3.0]]])
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> y[..., 0].round(3).tolist(), y[..., 1].round(3).tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]])
        >>> variables["params"]["scale"].shape, variables["batch_stats"]["mean"].shape
        ((2,), (1,))
    """


class IBNb(methods.IBNb, StatelessShell):
    """IBN-b: instance norm after a residual sum.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import linen as jnn
        >>> x = jnp.array([[[1.0], [2.0]]])
        >>> y, _ = jnn.IBNb().init_with_output(jax.random.key(0), x, shortcut=2 * x)
        >>> y.round(3).tolist()
        [[[-1.0], [1.0]]]
    """

    @nn.compact
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
