"""Weight normalization (Salimans & Kingma 2016, arXiv:1602.07868).

    w = scale * v / sqrt(sum v^2 + epsilon)          the sum over all axes but the outputs'

The length of each output's weights is a parameter of its own, `scale`, and their direction is what
is left of `v`: gradients along `v` cannot change the length, so steps along the two do not disturb
each other.

When to use: where no statistics over examples can be had or wanted, as in recurrent networks,
reinforcement learning and generative models of audio. Activations are not normalized: their scale
is right only as far as the initial one was, and deep networks without skips do better with a
normalization of activations.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.moments import Stats
from jaxnorm.core.normalize import normalize_with_stats
from jaxnorm.methods.spec import Initializer, Slot, Values
from jaxnorm.methods.weight_spec import WeightSpec, output_axes


def weight_norm(
    v: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = -1,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
    who: str = "weight_norm",
) -> jax.Array:
    """Divides the weights of each output by their norm, then scales them.

        w = v * scale / sqrt(sum v^2 + epsilon)

    Args:
        v: weight of any shape, `[inputs, outputs]`, `[height, width, inputs, outputs]`, ...; float,
            bfloat16, or complex.
        scale: one factor per output, the new norm, or None for 1.
        axis: the axis or axes of the outputs; the sum is over all others. None for one norm of the
            whole array, with a `scale` of shape ().
        epsilon: added to the squared norm, inside the root.
        dtype: dtype of the result; None for that of `v`, made complex if `scale` is.
        who: the name that error messages give to the caller.

    Returns:
        The weight, of the shape of `v`.

    Raises:
        TypeError: `v` holds no numbers, or floats of 8 bits, or `dtype` cannot hold the result.
        ValueError: axis out of range or named twice; a scale that does not fit.

    Numerics:
        Computes in float32 or wider and rounds once. Weights that are all 0 stay 0, with finite
        derivatives unless `epsilon` is 0.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> jaxnorm.weight_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]), jnp.array([1.0, 4.0])).round(3)
        Array([[0.6, 0. ],
               [0.8, 4. ]], dtype=float32)

    Source:
        Salimans & Kingma 2016 (arXiv:1602.07868), equation 2.
    """
    v = checks.input_array(v, who)
    axis = output_axes(axis, v.ndim, who)
    # Standardization about the origin, with the sum of squares in place of their mean.
    stats = Stats(None, _square_norm(v, axis))
    options: dict[str, Any] = dict(where=None, epsilon=epsilon, dtype=dtype, who=who)
    return normalize_with_stats(v, stats, scale, None, axis=axis, **options)


def _square_norm(v: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    wide = v.astype(precision.accumulation_dtype(v.dtype))
    return precision.abs_square(wide).sum(ax.other_axes(axis, v.ndim))


@dataclasses.dataclass(eq=False, repr=False)
class WeightNorm(WeightSpec):
    """Weight normalization of a layer's weights, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A wrapper of any layer; a drop-in for Flax's `WeightNorm`: the same arguments, variables,
    defaults and results. The layer's stored weights are `v`; beside each there is a `scale`, with
    one entry per output.

    Args:
        layer_instance: the layer whose weights are normalized.
        epsilon: added to the squared norm, inside the root.
        dtype: dtype of the normalized weight; None infers it from `v` and `scale`, as Flax does.
        param_dtype: dtype of `scale`.
        use_scale: whether there is a `scale`.
        scale_init: initializer of `scale`, ones.
        feature_axes: the axis or axes of a weight along which the outputs lie; the norm is over all
            others. None for one norm and one scale for a whole weight.
        variable_filter: which weights are normalized. Linen: parts of their paths, such as
            `{"kernel"}`; None for all. NNX: a filter of Flax, such as `nnx.PathContains("kernel")`.
        keep_init: start from the layer's own initial weights, as PyTorch does: `scale` starts at
            their norms, times what `scale_init` gives. By default it starts at what `scale_init`
            gives alone, as in Flax, which changes the layer's function. In NNX it allows no
            metadata from `scale_init`.

    Raises:
        TypeError: a weight of 8-bit floats; a `dtype` that cannot hold the result; a Linen
            `variable_filter` that is a string.
        ValueError: no weight that `variable_filter` selects; axes out of range or named twice;
            `keep_init` without a scale.

    Source:
        Salimans & Kingma 2016 (arXiv:1602.07868), equation 2.

    Differs:
        From Flax: a weight keeps its dtype when it is stored; a `scale` of 0 leaves `v` alive. In
        Linen, a partitioned weight has its usual name; in NNX, a call changes no stored weight, so
        that `v` can be trained and the layer called under any transformation of JAX.
    """

    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = jax.nn.initializers.ones
    feature_axes: int | Sequence[int] | None = -1
    _: dataclasses.KW_ONLY
    keep_init: bool = False

    def _check_options(self, who: str) -> None:
        if self.keep_init and not self.use_scale:
            raise ValueError(
                f"{who}: keep_init=True keeps the norms of the layer's weights in a scale, but "
                f"use_scale=False leaves none. Drop one of the two."
            )

    def _slots(self, w: jax.Array, who: str) -> dict[str, Slot]:
        if not self.use_scale:
            return {}
        axis = output_axes(self.feature_axes, w.ndim, who)
        init = self._norms_of(w, axis) if self.keep_init else self.scale_init
        return {"scale": Slot("params", ax.sizes(w.shape, axis), self.param_dtype, init)}

    def _norms_of(self, w: jax.Array, axis: tuple[int, ...]) -> Initializer:
        def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
            norm = jnp.sqrt(_square_norm(w, axis) + self.epsilon).astype(dtype)
            # The initializer's result may be an array in a box with metadata.
            return jax.tree.map(lambda factor: norm * factor, self.scale_init(key, shape, dtype))

        return init

    def _transform(
        self, values: Values, w: jax.Array, who: str, *, update_stats: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale = values.get("scale")
        dtypes = [w.dtype] if scale is None else [w.dtype, scale.dtype]
        dtype = precision.promote(*dtypes) if self.dtype is None else self.dtype
        options: dict[str, Any] = dict(axis=self.feature_axes, epsilon=self.epsilon)
        return weight_norm(w, scale, dtype=dtype, who=who, **options), {}
