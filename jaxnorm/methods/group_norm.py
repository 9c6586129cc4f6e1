"""Group normalization (Wu & He 2018, arXiv:1803.08494).

    mean = sum x / n,   var = sum |x - mean|^2 / n          over a group of features of one example,
    y = (x - mean) / sqrt(var + epsilon) * scale + bias     and over its spatial axes

One group is layer norm over space and features; groups of one feature are instance norm.

When to use: convolutional networks with few examples per device (detection, segmentation, video),
where the batch's statistics are too noisy. With 16 or more, batch norm is usually somewhat better.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks
from jaxnorm.core.devices import AxisName
from jaxnorm.core.feature_groups import group_shape, placed_by_compiler
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.normalize import normalize
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.spec import Initializer, Slot, Values


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    axes: int | Sequence[int] | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "group_norm",
) -> jax.Array:
    """Normalizes groups of features of each example by their common mean and variance.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of any shape, such as `[batch, height, width, features]`; float, bfloat16 or
            complex; integers become float32.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        axes: the axes along which mean and variance are taken; `axis` must be among them, and
            counts for the features of one group. None for all but the first, the batch.
        axis: the feature axis.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.
        axis_name: name or names of mapped axes over which the examples extend.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        Array of the shape of `x`.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: groups that do not divide the features; axes out of range, named twice, or
            without the feature axis; a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        As `normalize`: float32 or wider, one rounding, right at means of many standard deviations,
        `x` and statistics kept for the backward pass. Under `jax.jit` features may lie on several
        devices, also where these cut groups: only sums travel.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> jaxnorm.group_norm(x, num_groups=2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Source:
        Wu & He 2018 (arXiv:1803.08494), equation 7.
    """
    x = checks.input_array(x, who)
    (axis,) = ax.canonical_axes(axis, x.ndim, who)
    axes = reduced_axes(axes, axis, x.ndim, who, "axes")
    groups = group_shape(x.shape[axis], num_groups, group_size, who)
    where = checked_mask(where, x.shape, who)
    scale = checks.feature_array(scale, x.shape, (axis,), who, "scale")
    bias = checks.feature_array(bias, x.shape, (axis,), who, "bias")

    def by_group(
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        where: jax.Array | None,
    ) -> jax.Array:
        if where is not None:
            split = groups if where.shape[axis] > 1 else (1, 1)
            where = where.reshape(*where.shape[:axis], *split, *where.shape[axis + 1 :])
        y, _ = normalize(
            x.reshape(*x.shape[:axis], *groups, *x.shape[axis + 1 :]),
            None if scale is None else scale.reshape(groups),
            None if bias is None else bias.reshape(groups),
            # The features of a group are the second of the two axes that `axis` was split into.
            axes=tuple(a + (a >= axis) for a in axes),
            axis=(axis, axis + 1),
            where=where,
            epsilon=epsilon,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            dtype=dtype,
            who=who,
        )
        return y.reshape(x.shape)

    return placed_by_compiler(by_group, x, axis)(x, scale, bias, where)


def reduced_axes(
    axes: int | Sequence[int] | None, axis: int, ndim: int, who: str, what: str
) -> tuple[int, ...]:
    """The canonical axes along which moments are taken; by default all but the batch's.

    Raises:
        ValueError: the feature `axis` is not among them, or as `canonical_axes`.
    """
    if axes is None:
        return tuple(a for a in range(ndim) if a > 0 or a == axis)
    axes = ax.canonical_axes(axes, ndim, who, what)
    if axis not in axes:
        raise ValueError(
            f"{who}: {what}={axes} must include the feature axis {axis}, of which each group takes "
            f"its part. Use {what}={tuple(sorted((*axes, axis)))}."
        )
    return axes


@dataclasses.dataclass(eq=False, repr=False)
class GroupNorm(Affine):
    """Group normalization, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `GroupNorm`: the same arguments, variables, defaults and results.

    Variables, each with one entry per feature: `scale` and `bias` in `params` (NNX: `nnx.Param`).

    Args:
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        reduction_axes: the axes along which mean and variance are taken, the feature axis among
            them; None for all but the first.
        axis_name: name or names of mapped axes over which the examples extend. Not used while
            initializing.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        use_fast_variance: accepted for Flax's sake; the variance is always right.
        axis: the feature axis.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.

    Raises:
        TypeError: input of 8-bit floats; a complex mask; an epsilon that is no number; a result
            that `dtype` cannot hold.
        ValueError: groups that do not divide the features, axes without the feature axis, an input
            or a mask of the wrong shape, axes out of range or named twice.
        NameError: `axis_name` is not bound.

    Source:
        Wu & He 2018 (arXiv:1803.08494), equation 7.

    Differs:
        From Flax as `LayerNorm` does, and: any feature axis; masks may have size 1 along the
        features; in NNX, `reduction_axes` that leave out a spatial axis are right, and an input
        without a batch works.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    reduction_axes: int | Sequence[int] | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    _: dataclasses.KW_ONLY
    axis: int = -1

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.axis, ndim, who)

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        group_shape(features[0], self.num_groups, self.group_size, who)
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
        (axis,) = self._feature_axes(x.ndim, who)
        y = group_norm(
            x,
            *self._affine(values, x),
            num_groups=self.num_groups,
            group_size=self.group_size,
            axes=reduced_axes(self.reduction_axes, axis, x.ndim, who, "reduction_axes"),
            axis=axis,
            where=mask,
            epsilon=self.epsilon,
            dtype=dtype,
            who=who,
            **self._mapped_axes(initializing, who),
        )
        return y, {}
