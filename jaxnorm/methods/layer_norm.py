"""Layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450).

    mean = sum x / n,   var = sum |x - mean|^2 / n          over the features of one example
    y = (x - mean) / sqrt(var + epsilon) * scale + bias

Each example, and each position of a sequence, is normalized by itself: training and inference are
the same, and nothing is stored but scale and bias.

When to use: transformers and recurrent networks, any batch size. In convolutional networks batch or
group norm usually do better, since features of one example differ more in their scale.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core.devices import AxisName
from jaxnorm.core.normalize import normalize
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.spec import Initializer, Slot, Values


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axes: int | Sequence[int] = -1,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "layer_norm",
) -> jax.Array:
    """Normalizes each example by the mean and variance of its features.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of any shape, such as `[batch, time, features]`; float, bfloat16 or complex;
            integers become float32.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        axes: the axes along which mean and variance are taken.
        axis: the feature axis or axes: `scale` and `bias` have the shape of `x` along them, in
            increasing order.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`. An example without valid elements becomes
            `x / sqrt(1 + epsilon) * scale + bias`.
        epsilon: added to the variance, inside the root.
        axis_name: name or names of mapped axes over which the features of an example extend.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        Array of the shape of `x`.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: axes out of range or named twice; a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        As `normalize`: float32 or wider, one rounding, right at means of many standard deviations,
        `x` and statistics kept for the backward pass.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 3.0], [20.0, 60.0]])
        >>> jaxnorm.layer_norm(x, bias=jnp.array([0.0, 1.0])).round(3).tolist()
        [[-1.0, 2.0], [-1.0, 2.0]]

    Source:
        Ba, Kiros & Hinton 2016 (arXiv:1607.06450), equations 3 and 4.
    """
    y, _ = normalize(
        x,
        scale,
        bias,
        axes=axes,
        axis=axis,
        where=where,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )
    return y


@dataclasses.dataclass(eq=False, repr=False)
class LayerNorm(Affine):
    """Layer normalization, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `LayerNorm`: the same arguments, variables, defaults and results.

    Variables: `scale` and `bias` in `params` (NNX: `nnx.Param`), of the shape of the input along
    the feature axes, in increasing order of axes.

    Args:
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        reduction_axes: the axes along which mean and variance are taken.
        feature_axes: the axes along which `scale` and `bias` differ.
        axis_name: name or names of mapped axes over which the features of an example extend. Not
            used while initializing.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        use_fast_variance: accepted for Flax's sake; the variance is always right.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.

    Raises:
        TypeError: input of 8-bit floats; a complex mask; an epsilon that is no number; a result
            that `dtype` cannot hold.
        ValueError: an input or a mask of the wrong shape, axes out of range or named twice.
        NameError: `axis_name` is not bound.

    Source:
        Ba, Kiros & Hinton 2016 (arXiv:1607.06450), equations 3 and 4.

    Differs:
        From Flax: the variance keeps its digits at large means; devices and masks are weighted by
        counts; an example that is masked out as a whole has a finite result and gradient; no
        collective while initializing; in NNX several feature axes, and bfloat16 results that do not
        round the input first. A mask of numbers between 0 and 1 holds weights, where Flax knows
        counted and not counted. Refused where Flax guesses: masks whose axes fit in several ways,
        an axis named twice.
    """

    _axis_option = "feature_axes"

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
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
        y = layer_norm(
            x,
            *self._affine(values, x),
            axes=ax.canonical_axes(self.reduction_axes, x.ndim, who, "reduction_axes"),
            axis=self.feature_axes,
            where=mask,
            epsilon=self.epsilon,
            dtype=dtype,
            who=who,
            **self._mapped_axes(initializing, who),
        )
        return y, {}
