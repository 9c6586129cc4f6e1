"""Instance and batch normalization together: IBN-Net (Pan et al. 2018, arXiv:1807.09441).

    IBN-a    y = concatenate(instance_norm(x[first features]), batch_norm(x[other features]))
    IBN-b    y = instance_norm(x + shortcut)

Instance norm takes contrast and style off the features, batch norm keeps what tells them apart.

When to use: recognition that has to hold for other styles, lights or cities than those trained on.
IBN-a stands in the shallow residual blocks, in the place of the first batch norm, before the
shortcut is added, and costs nothing; IBN-b after the sum of the last block of a stage and in the
stem, and helps more across domains, at some cost within one. Neither belongs in the deep layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName
from jaxnorm.core.feature_groups import feature_axis, placed_by_compiler
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.moments import Moments, Stats
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.batch_norm import BatchNorm, batch_norm, batch_norm_inference
from jaxnorm.methods.instance_norm import instance_norm
from jaxnorm.methods.spec import Initializer, Slot, Values


def ibn_a(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    ratio: float = 0.5,
    axis: int = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    shift: ArrayLike | None = 0.0,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "ibn_a",
) -> tuple[jax.Array, Moments]:
    """Instance norm for the first features, batch norm for the others (training).

        y = concatenate(instance_norm(x[first features]), batch_norm(x[other features]))

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32.
        scale: one factor per feature, of both parts, or None for 1.
        bias: one summand per feature, of both parts, or None for 0.
        ratio: of the features, round(ratio * features) are normalized by instance.
        axis: the feature axis, one.
        batch_axis: the axis or axes of examples; all others are space.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variances, inside the root.
        shift: an estimate of the means of the other features, as in `batch_norm`.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the batch extends: the batch statistics are pooled over them.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and the batch's `Moments` of the other features, for
        `update_running`.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: several feature axes, a ratio that leaves a part without features, axes out of
            range or used twice, a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        As `instance_norm` and `batch_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0, 1.0], [3.0, 1.0]], [[20.0, 3.0], [60.0, 3.0]]])
        >>> y, batch = jaxnorm.ibn_a(x)
        >>> y[..., 0].round(3).tolist(), y[..., 1].round(3).tolist(), batch.mean.tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [[-1.0, -1.0], [1.0, 1.0]], [2.0])

    Source:
        Pan et al. 2018 (arXiv:1807.09441), section 3.2, IBN-a.
    """
    arrays, axis, size = _checked(x, scale, bias, where, ratio=ratio, axis=axis, who=who)
    options: dict[str, Any] = dict(axis=axis, epsilon=epsilon, dtype=dtype, who=who)
    mapped: dict[str, Any] = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)

    def by_part(shift: ArrayLike | None, *arrays: jax.Array | None) -> tuple[jax.Array, Moments]:
        first, others = _parts(arrays, axis, size)
        by_instance, _ = instance_norm(**first, batch_axis=batch_axis, **options)
        by_batch, batch = batch_norm(**others, shift=shift, **options, **mapped)
        return jnp.concatenate([by_instance, by_batch], axis), batch

    return placed_by_compiler(by_part, arrays[0], axis, result="both")(shift, *arrays)


def ibn_a_inference(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    ratio: float = 0.5,
    axis: int = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "ibn_a_inference",
) -> jax.Array:
    """Instance norm for the first features, given statistics for the others (inference).

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32.
        stats: mean and variance of each of the other features: running statistics.
        scale, bias, ratio, axis, batch_axis, where, epsilon, dtype, who: as in `ibn_a`.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `ibn_a`; also for statistics that are none or do not fit.

    Numerics:
        As `instance_norm` and `batch_norm_inference`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0, 1.0], [3.0, 1.0]]])
        >>> stats = jaxnorm.Stats(mean=jnp.array([3.0]), var=jnp.array([4.0]))
        >>> jaxnorm.ibn_a_inference(x, stats).round(3).tolist()
        [[[-1.0, -1.0], [1.0, -1.0]]]

    Source:
        Pan et al. 2018 (arXiv:1807.09441), section 3.2, IBN-a.
    """
    arrays, axis, size = _checked(x, scale, bias, where, ratio=ratio, axis=axis, who=who)
    options: dict[str, Any] = dict(axis=axis, epsilon=epsilon, dtype=dtype, who=who)

    def by_part(stats: Stats, *arrays: jax.Array | None) -> jax.Array:
        first, others = _parts(arrays, axis, size)
        by_instance, _ = instance_norm(**first, batch_axis=batch_axis, **options)
        by_stats = batch_norm_inference(stats=stats, **others, **options)
        return jnp.concatenate([by_instance, by_stats], axis)

    return placed_by_compiler(by_part, arrays[0], axis)(stats, *arrays)


def _checked(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    *,
    ratio: float,
    axis: int | Sequence[int],
    who: str,
) -> tuple[tuple[jax.Array, *tuple[jax.Array | None, ...]], int, int]:
    """The four arrays, the feature axis, and how many features are normalized by instance."""
    x = checks.input_array(x, who)
    along = feature_axis(axis, x.ndim, who)
    arrays = (
        x,
        checks.feature_array(scale, x.shape, (along,), who, "scale"),
        checks.feature_array(bias, x.shape, (along,), who, "bias"),
        checked_mask(where, x.shape, who),
    )
    return arrays, along, instance_features(x.shape[along], ratio, who)


def _parts(
    arrays: Sequence[jax.Array | None], axis: int, size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of the first `size` features and those of the others, by argument."""
    names, axes = ("x", "scale", "bias", "where"), (axis, 0, 0, axis)
    halves = [_divided(array, size, along) for array, along in zip(arrays, axes, strict=True)]
    first, others = (dict(zip(names, half, strict=True)) for half in zip(*halves, strict=True))
    return first, others


def _divided(value: jax.Array | None, size: int, axis: int) -> Sequence[jax.Array | None]:
    """The first `size` features and the others; what is the same for all features, twice."""
    if value is None or value.shape[axis] == 1:
        return value, value
    return jnp.split(value, [size], axis)


def instance_features(features: int, ratio: float, who: str) -> int:
    """How many of `features` are normalized by instance.

    Raises:
        ValueError: none, or all of them.
    """
    size = round(ratio * features)
    if not 0 < size < features:
        raise ValueError(
            f"{who}: ratio={ratio} of {features} features gives {size} to instance norm and "
            f"{features - size} to batch norm, but both need some. Use ratio=0.5 and 2 features or "
            f"more, or one of the two norms."
        )
    return size


def ibn_b(
    x: ArrayLike,
    shortcut: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "ibn_b",
) -> tuple[jax.Array, Moments]:
    """Instance norm of a residual sum.

        y = instance_norm(x + shortcut)

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32: the residual branch.
        shortcut: array of the shape of `x`, what the branch is added to; None for nothing, as in
            the stem.
        scale, bias, axis, batch_axis, where, epsilon, axis_name, axis_index_groups, dtype, who: as
            in `instance_norm`.

    Returns:
        The result, of the shape of `x`, and the `Moments` of each example and feature of the sum.

    Raises:
        TypeError, ValueError, NameError: as `instance_norm`; also for a shortcut of another shape.

    Numerics:
        The sum is taken in the wider dtype of the two, as without a norm; the rest as
        `instance_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0], [2.0]]])
        >>> jaxnorm.ibn_b(x, shortcut=2 * x)[0].round(3).tolist()
        [[[-1.0], [1.0]]]

    Source:
        Pan et al. 2018 (arXiv:1807.09441), section 3.2, IBN-b.
    """
    return instance_norm(
        residual_sum(x, shortcut, who),
        scale,
        bias,
        axis=axis,
        batch_axis=batch_axis,
        where=where,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )


def residual_sum(x: ArrayLike, shortcut: ArrayLike | None, who: str) -> jax.Array:
    """`x + shortcut`, in the wider dtype of the two; float32 of two integers.

    Raises:
        ValueError: they differ in shape, and one would be spread.
    """
    x = checks.any_array(x, who)
    if shortcut is None:
        return checks.input_array(x, who)
    shortcut = checks.any_array(shortcut, who, "the shortcut")
    if shortcut.shape != x.shape:
        raise ValueError(
            f"{who}: a shortcut of shape {shortcut.shape} cannot be added to a residual branch of "
            f"shape {x.shape}. Bring it to that shape, for example by a 1 x 1 convolution."
        )
    dtype = precision.promote_inexact(x.dtype, shortcut.dtype)
    x, shortcut = checks.input_array(x, who), checks.input_array(shortcut, who)
    return x.astype(dtype) + shortcut.astype(dtype)


@dataclasses.dataclass(eq=False, repr=False)
class IBNa(BatchNorm):
    """IBN-a: instance norm for the first features, batch norm with running statistics for the rest.

    For `jaxnorm.linen` and `jaxnorm.nnx`. Variables: `scale` and `bias`, with one entry per
    feature, and `mean`, `var` and, with some options, `updates`, with one entry per feature of the
    batch norm: the last features - round(ratio * features).

    Args:
        ratio: of the features, round(ratio * features) are normalized by instance.
        axis: the feature axis, one.
        batch_axis: the axis or axes of examples.
        use_running_average: True normalizes the batch norm's features by the running statistics
            (inference), False by the batch's (training). Must be given here or at the call.
        momentum, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
            axis_name, axis_index_groups, unbound_axis, use_fast_variance, zero_centered_scale,
            debias, running_var, update_stats, skip_nonfinite, update_every, ghost_batch_size: as in
            `BatchNorm`.

    Raises:
        TypeError, ValueError, NameError: as `BatchNorm`; ValueError also for several feature axes,
            and for a ratio that leaves a part without features.

    Source:
        Pan et al. 2018 (arXiv:1807.09441), section 3.2, IBN-a.

    Differs:
        From the authors' code: one scale and one bias for both parts; the number of instance
        features is rounded, not cut.
    """

    _: dataclasses.KW_ONLY
    ratio: float = 0.5
    batch_axis: int | Sequence[int] = 0

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return (feature_axis(self.axis, ndim, who),)

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        others = features[0] - instance_features(features[0], self.ratio, who)
        return self._stats_slots((others,), is_complex) | self._affine_slots(features)

    def _transform(
        self,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        *,
        initializing: bool,
        use_running_average: bool,
        update_stats: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        stored = self._stored(values, x, who)
        scale, bias = self._affine(values, x)
        options: dict[str, Any] = dict(ratio=self.ratio, axis=self.axis, where=mask)
        options |= dict(batch_axis=self.batch_axis, epsilon=self.epsilon, dtype=dtype, who=who)
        if use_running_average:
            return ibn_a_inference(x, stored, scale, bias, **options), {}
        options |= dict(shift=self._shift(stored.mean, stored.var))
        options |= self._mapped_axes(initializing, who)
        y, batch = self._by_batches(ibn_a, initializing)(x, scale, bias, **options)
        if initializing or not update_stats:
            return y, {}
        return y, self._moved(values, stored, batch, who)


@dataclasses.dataclass(eq=False, repr=False)
class IBNb(Affine):
    """IBN-b: instance norm after a residual sum, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A call `layer(x, shortcut)` normalizes `x + shortcut`, in a residual block between the sum and
    the activation; in the stem, in the place of the batch norm, `layer(x)`:

        y = conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))      stem = relu(ibn_b(conv(image)))
        y = relu(ibn_b(norm3(y), shortcut=x))

    Variables, with one entry per feature: `scale` and `bias` in `params` (NNX: `nnx.Param`).

    Args:
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input and parameters.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        axis: the feature axis or axes.
        axis_name: name or names of mapped axes over which the examples extend. Not used while
            initializing.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        batch_axis: the axis or axes of examples.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.

    Raises:
        TypeError, ValueError, NameError: as `ibn_b`.

    Source:
        Pan et al. 2018 (arXiv:1807.09441), section 3.2, IBN-b.
    """

    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    axis: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    _: dataclasses.KW_ONLY
    batch_axis: int | Sequence[int] = 0

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.axis, ndim, who)

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
        scale, bias = self._affine(values, x)
        options: dict[str, Any] = dict(axis=self.axis, batch_axis=self.batch_axis, where=mask)
        options |= dict(epsilon=self.epsilon, dtype=dtype, who=who)
        y, _ = ibn_b(x, None, scale, bias, **options, **self._mapped_axes(initializing, who))
        return y, {}
