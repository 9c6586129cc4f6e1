"""Weight standardization (Qiao et al. 2019, arXiv:1903.10520), plain and scaled.

    w = (W - mean) / sqrt(var + epsilon)                                     plain
    w = gain (W - mean) / sqrt(max(fan_in var, epsilon))                     scaled

mean and var are those of the weights of one output, of which there are fan_in. The scaled form
(Brock, De & Smith 2021, arXiv:2101.08692) keeps the variance of a signal from layer to layer: each
output has the variance of its inputs, times the square of the gain. With the gain of the
nonlinearity that comes before, networks of residual blocks train without normalized activations.

When to use: the plain form before group or batch normalization, where it smooths training with
small batches; alone it makes outputs grow by sqrt(fan_in). The scaled form in networks without a
normalization of activations. Neither for weights with few inputs, such as those of depthwise
convolutions of small kernels, whose mean and variance are no statistics.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.moments import Stats, moments
from jaxnorm.core.normalize import normalize, normalize_with_stats
from jaxnorm.core.standardize import result_dtype
from jaxnorm.methods.spec import Initializer, Slot, Values
from jaxnorm.methods.weight_spec import WeightSpec, output_axes

ACTIVATION_GAINS = MappingProxyType(
    {
        "identity": 1.0,
        "celu": 1.270926833152771,
        "elu": 1.2716004848480225,
        "gelu": 1.7015043497085571,
        "leaky_relu": 1.70590341091156,
        "log_sigmoid": 1.9193484783172607,
        "relu": 1.7139588594436646,
        "relu6": 1.7131484746932983,
        "selu": 1.0008515119552612,
        "sigmoid": 4.803835391998291,
        "silu": 1.7881293296813965,
        "soft_sign": 2.338853120803833,
        "softplus": 1.9203323125839233,
        "tanh": 1.5939117670059204,
    }
)
"""What restores the variance of a standard normal signal after a nonlinearity of `jax.nn`.

The values published with arXiv:2101.08692, where they were estimated from samples; the exact value
for relu is sqrt(2 / (1 - 1 / pi)) = 1.7128.
"""


def weight_standardization(
    w: ArrayLike,
    *,
    axis: int | Sequence[int] | None = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "weight_standardization",
) -> jax.Array:
    """Gives the weights of each output mean 0 and variance 1.

        w = (W - mean) / sqrt(var + epsilon)

    Args:
        w: weight of any shape, `[inputs, outputs]`, `[height, width, inputs, outputs]`, ...; float,
            bfloat16, or complex.
        axis: the axis or axes of the outputs; mean and variance are over all others. None for those
            of the whole array.
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None for that of `w`.
        who: the name that error messages give to the caller.

    Returns:
        The weight, of the shape of `w`.

    Raises:
        TypeError: `w` holds no numbers, or floats of 8 bits, or `dtype` cannot hold the result.
        ValueError: axis out of range or named twice; fewer than two weights per output.

    Numerics:
        Computes in float32 or wider and rounds once. Exact also where the mean is many standard
        deviations. Weights that are all equal become 0, with finite derivatives unless `epsilon`
        is 0.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> jaxnorm.weight_standardization(jnp.array([[1.0, 10.0], [3.0, 30.0]])).round(3)
        Array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)

    Source:
        Qiao et al. 2019 (arXiv:1903.10520), equation 5.

    Differs:
        From the paper's code, which adds epsilon to the unbiased standard deviation.
    """
    w, axis, inputs = _weight_and_axes(w, axis, who)
    dtype = w.dtype if dtype is None else dtype
    options: dict[str, Any] = dict(epsilon=epsilon, dtype=dtype, who=who)
    return normalize(_near_zero(w, inputs), axes=inputs, axis=axis, **options)[0]


def scaled_weight_standardization(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = -1,
    epsilon: float = 1e-4,
    dtype: DTypeLike | None = None,
    who: str = "scaled_weight_standardization",
) -> jax.Array:
    """Gives the weights of each output mean 0 and variance 1 / fan_in, then scales them.

        w = gain * (W - mean) / sqrt(max(fan_in * var, epsilon))

    Args:
        w: weight of any shape, `[inputs, outputs]`, `[height, width, inputs, outputs]`, ...; float,
            bfloat16, or complex.
        gain: one factor per output, one number for all, or None for 1. See `ACTIVATION_GAINS`.
        axis: the axis or axes of the outputs; mean and variance are over all others, of which there
            are fan_in. None for those of the whole array.
        epsilon: the least value of `fan_in * var`.
        dtype: dtype of the result; None for that of `w`, made complex if `gain` is.
        who: the name that error messages give to the caller.

    Returns:
        The weight, of the shape of `w`.

    Raises:
        TypeError: `w` holds no numbers, or floats of 8 bits, or `dtype` cannot hold the result.
        ValueError: axis out of range or named twice; fewer than two weights per output; a gain that
            does not fit.

    Numerics:
        As `weight_standardization`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> w = jnp.array([[1.0], [3.0], [1.0], [3.0]])
        >>> jaxnorm.scaled_weight_standardization(w, gain=3.0).tolist()
        [[-1.5], [1.5], [-1.5], [1.5]]

    Source:
        Brock, De & Smith 2021 (arXiv:2101.08692), equation 1, with epsilon as in the code that was
        published with arXiv:2102.06171.
    """
    w, axis, inputs = _weight_and_axes(w, axis, who)
    fan_in, outputs = ax.extent(w.shape, inputs), ax.sizes(w.shape, axis)
    gain = jnp.asarray(1.0 if gain is None else gain)
    gain = gain if gain.ndim else jnp.broadcast_to(gain, outputs)
    checks.feature_array(gain, w.shape, axis, who, "gain")
    gain = gain.astype(precision.promote(gain.dtype, precision.real_dtype(w.dtype), jnp.float32))
    dtype = result_dtype(w, gain) if dtype is None else dtype
    w = _near_zero(w, inputs)
    # sqrt(max(fan_in var, epsilon)) = sqrt(fan_in) sqrt(max(var, epsilon / fan_in))
    seen = moments(w, inputs)
    least = checks.static_epsilon(epsilon, who) / fan_in
    stats = Stats(seen.mean, jnp.maximum(seen.var, jnp.full_like(seen.var, least)))
    options: dict[str, Any] = dict(where=None, epsilon=0.0, dtype=dtype, who=who)
    return normalize_with_stats(w, stats, gain * fan_in**-0.5, None, axis=axis, **options)


def _weight_and_axes(
    w: ArrayLike, axis: int | Sequence[int] | None, who: str
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """The weight, the axes of its outputs, and all others."""
    w = checks.input_array(w, who)
    axis = output_axes(axis, w.ndim, who)
    inputs = ax.other_axes(axis, w.ndim)
    if ax.extent(w.shape, inputs) < 2:
        raise ValueError(
            f"{who}: a weight of shape {w.shape} with outputs along {axis} has "
            f"{ax.extent(w.shape, inputs)} value per output, which has no variance. Leave it out, "
            f"by variable_filter if it belongs to a layer, or say along which axes outputs lie."
        )
    return w, axis, inputs


def _near_zero(w: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """`w` in float32 or wider, less a constant near its mean.

    The constant changes neither results nor derivatives. Without it, a mean of many standard
    deviations would be known only to a rounding of its own size.
    """
    w = w.astype(precision.accumulation_dtype(w.dtype))
    return w - lax.stop_gradient(w.mean(inputs, keepdims=True))


@dataclasses.dataclass(eq=False, repr=False)
class WeightStandardization(WeightSpec):
    """Weight standardization of a layer's weights, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A wrapper of any layer, without variables of its own.

    Args:
        layer_instance: the layer whose weights are standardized.
        epsilon: added to the variance, inside the root.
        dtype: dtype of the standardized weight; None for that of the stored one.
        feature_axes: the axis or axes of a weight along which the outputs lie; mean and variance
            are over all others. None for those of the whole weight.
        variable_filter: which weights are standardized. Linen: parts of their paths, such as
            `{"kernel"}`; None for all. NNX: a filter of Flax, such as `nnx.PathContains("kernel")`.

    Raises:
        TypeError: a weight of 8-bit floats; a `dtype` that cannot hold the result; a Linen
            `variable_filter` that is a string.
        ValueError: no weight that `variable_filter` selects; axes out of range or named twice;
            fewer than two weights per output.

    Source:
        Qiao et al. 2019 (arXiv:1903.10520), equation 5.
    """

    epsilon: float = 1e-5
    dtype: Any = None
    feature_axes: int | Sequence[int] | None = -1

    def _transform(
        self, values: Values, w: jax.Array, who: str, *, update_stats: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        options: dict[str, Any] = dict(axis=self.feature_axes, epsilon=self.epsilon)
        return weight_standardization(w, dtype=self.dtype, who=who, **options), {}


@dataclasses.dataclass(eq=False, repr=False)
class ScaledWeightStandardization(WeightSpec):
    """Scaled weight standardization of a layer's weights, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A wrapper of any layer. Beside each weight there is a `scale`, with one entry per output.

    Args:
        layer_instance: the layer whose weights are standardized.
        epsilon: the least value of `fan_in * var`.
        dtype: dtype of the standardized weight; None infers it from the stored one and `scale`.
        param_dtype: dtype of `scale`.
        use_scale: whether there is a `scale`.
        scale_init: initializer of `scale`, ones.
        feature_axes: the axis or axes of a weight along which the outputs lie; mean and variance
            are over all others. None for those of the whole weight.
        gain: a constant factor, such as `ACTIVATION_GAINS["relu"]` after a relu.
        variable_filter: which weights are standardized. Linen: parts of their paths, such as
            `{"kernel"}`; None for all. NNX: a filter of Flax, such as `nnx.PathContains("kernel")`.

    Raises:
        TypeError: a weight of 8-bit floats; a `dtype` that cannot hold the result; a gain that is
            no number; a Linen `variable_filter` that is a string.
        ValueError: no weight that `variable_filter` selects; axes out of range or named twice;
            fewer than two weights per output.

    Source:
        Brock, De & Smith 2021 (arXiv:2101.08692), equation 1.
    """

    epsilon: float = 1e-4
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = jax.nn.initializers.ones
    feature_axes: int | Sequence[int] | None = -1
    _: dataclasses.KW_ONLY
    gain: float = 1.0

    def _check_options(self, who: str) -> None:
        if not isinstance(self.gain, numbers.Real):
            raise TypeError(
                f"{who}: gain={self.gain!r} is no number. For the gain after a relu use "
                f"gain=ACTIVATION_GAINS['relu']; a learned one is there with use_scale=True."
            )

    def _slots(self, w: jax.Array, who: str) -> dict[str, Slot]:
        if not self.use_scale:
            return {}
        outputs = ax.sizes(w.shape, output_axes(self.feature_axes, w.ndim, who))
        return {"scale": Slot("params", outputs, self.param_dtype, self.scale_init)}

    def _transform(
        self, values: Values, w: jax.Array, who: str, *, update_stats: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale = values.get("scale")
        dtypes = [w.dtype] if scale is None else [w.dtype, scale.dtype]
        dtype = precision.promote(*dtypes) if self.dtype is None else self.dtype
        gain = self.gain
        if scale is not None:
            gain = gain * scale.astype(precision.accumulation_dtype(scale.dtype))
        options: dict[str, Any] = dict(axis=self.feature_axes, epsilon=self.epsilon)
        return scaled_weight_standardization(w, gain, dtype=dtype, who=who, **options), {}
