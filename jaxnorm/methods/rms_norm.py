"""Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean |x|^2 + epsilon) * scale              over the features of one example

Layer norm without the mean and without a bias: one reduction less, and about as good.

When to use: large transformers, where it has replaced layer norm; often with a zero-centred scale
(`y * (1 + scale)`). Where the mean of the features carries no meaning but varies, layer norm.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core.devices import AxisName
from jaxnorm.core.normalize import normalize
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.spec import Initializer, Slot, Values


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axes: int | Sequence[int] = -1,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "rms_norm",
) -> jax.Array:
    """Divides each example by the root mean square of its features.

        y = x / sqrt(mean |x|^2 + epsilon) * scale

    Args:
        x: array of any shape, such as `[batch, time, features]`; float, bfloat16 or complex;
            integers become float32.
        scale: one factor per feature, or None for 1; a zero-centred one is passed as `1 + scale`.
        axes: the axes along which the mean square is taken.
        axis, where, epsilon, axis_name, axis_index_groups, dtype, who: as in `layer_norm`.

    Returns:
        Array of the shape of `x`.

    Raises:
        TypeError, ValueError, NameError: as `layer_norm`.

    Numerics:
        As `normalize`: float32 or wider, one rounding, `x` and statistics kept for the backward
        pass.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[7.0, -7.0, 1.0, 1.0]])
        >>> jaxnorm.rms_norm(x, scale=jnp.full(4, 5.0)).round(2).tolist()
        [[7.0, -7.0, 1.0, 1.0]]

    Source:
        Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.

    Differs:
        From the paper: epsilon, as in every implementation.
    """
    y, _ = normalize(
        x,
        scale,
        axes=axes,
        axis=axis,
        where=where,
        epsilon=epsilon,
        use_mean=False,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )
    return y


@dataclasses.dataclass(eq=False, repr=False)
class RMSNorm(Affine):
    """Root mean square layer normalization, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `RMSNorm`: the same arguments, variables, defaults and results.

    Variables: `scale` in `params` (NNX: `nnx.Param`), of the shape of the input along the feature
    axes, in increasing order of axes.

    Args:
        epsilon: added to the mean square, inside the root.
        dtype: dtype of the result; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of `scale`.
        use_scale: whether there is a `scale`.
        scale_init: initializer of `scale`, ones.
        reduction_axes: the axes along which the mean square is taken.
        feature_axes: the axes along which `scale` differs.
        axis_name: name or names of mapped axes over which the features of an example extend. Not
            used while initializing.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        use_fast_variance: accepted for Flax's sake; without a mean there is but one way.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.

    Raises:
        TypeError, ValueError, NameError: as `LayerNorm`.

    Source:
        Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.

    Differs:
        From Flax as `LayerNorm` does.
    """

    _axis_option = "feature_axes"
    use_bias: ClassVar[bool] = False

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = jax.nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.feature_axes, ndim, who, "feature_axes")

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        return self._affine_slots(features)

    def _transform(
        self,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        *,
        initializing: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale, _ = self._affine(values, x)
        y = rms_norm(
            x,
            scale,
            axes=ax.canonical_axes(self.reduction_axes, x.ndim, who, "reduction_axes"),
            axis=self.feature_axes,
            where=mask,
            epsilon=self.epsilon,
            dtype=dtype,
            who=who,
            **self._mapped_axes(initializing, who),
        )
        return y, {}
