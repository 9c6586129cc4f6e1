"""Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022).

    mean = sum x / n,   var = sum |x - mean|^2 / n          over the spatial axes of one feature of
    y = (x - mean) / sqrt(var + epsilon) * scale + bias     one example

When to use: style transfer and image generation, where contrast and colour of one image should not
matter. For recognition it throws away what helps; see `ibn` for the two together.
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
from jaxnorm.core.moments import Moments
from jaxnorm.core.normalize import normalize, normalize_with_stats
from jaxnorm.core.pooling import reciprocal
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Initializer, Slot, Values


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "instance_norm",
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature of each example by its mean and variance over space.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        axis: the feature axis or axes: `scale` and `bias` have the shape of `x` along them, in
            increasing order.
        batch_axis: the axis or axes of examples. Mean and variance are taken over all others.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.
        axis_name: name or names of mapped axes over which the examples extend.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and the `Moments` of each example and feature, of the shape
        of `x` along these axes.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: axes out of range or named twice, an axis that is both of features and of
            examples, a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        As `normalize`: float32 or wider, one rounding, right at means of many standard deviations,
        `x` and statistics kept for the backward pass.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0], [3.0]], [[20.0], [60.0]]])
        >>> y, seen = jaxnorm.instance_norm(x)
        >>> y[..., 0].round(3).tolist(), seen.mean[..., 0].tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [2.0, 40.0])

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016 (arXiv:1607.08022), section 2.
    """
    x = checks.input_array(x, who)
    features = ax.canonical_axes(axis, x.ndim, who)
    batch = example_axes(batch_axis, features, x.shape, who)
    return normalize(
        x,
        scale,
        bias,
        axes=ax.other_axes((*features, *batch), x.ndim),
        axis=features,
        where=where,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )


def example_axes(
    batch_axis: int | Sequence[int], features: tuple[int, ...], shape: tuple[int, ...], who: str
) -> tuple[int, ...]:
    """Canonical axes of examples, none of which is one of `features`."""
    examples = ax.canonical_axes(batch_axis, len(shape), who, "batch_axis")
    both = sorted({*features} & {*examples})
    if both:
        raise ValueError(
            f"{who}: axis {both[0]} of an input of shape {shape} cannot be both a feature axis "
            f"and the axis of examples. Name the features' by axis=..., the examples' by "
            f"batch_axis=..."
        )
    return examples


@dataclasses.dataclass(eq=False, repr=False)
class InstanceNorm(Affine, RunningStats):
    """Instance normalization, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `InstanceNorm`: the same arguments, variables, defaults and results. The
    first axis of the input is that of examples. An input without spatial axes, `[batch, features]`,
    becomes the bias, since each value is its own mean.

    Variables, each of the shape of the input along the feature axes: `scale` and `bias` in `params`
    (NNX: `nnx.Param`), and with `track_running_stats` `mean`, `var` and perhaps `updates` in
    `batch_stats` (NNX: `nnx.BatchStat`), of the dtypes that `BatchNorm` has.

    Args:
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        feature_axes: the axes along which `scale` and `bias` differ; not the first.
        axis_name: name or names of mapped axes over which the examples extend. Not used while
            initializing.
        axis_index_groups: groups of indices along `axis_name`; each holds examples of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        use_fast_variance: accepted for Flax's sake; the variance is always right.
        track_running_stats: keep running averages of the examples' means and variances, by which
            inference normalizes, as in PyTorch. Training normalizes by the examples' own.
        use_running_average: with running statistics, True for inference and False for training,
            here or at the call; without them it says nothing.
        momentum: weight of the OLD value in the running average; None for the cumulative average.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.
        debias, running_var, update_stats, skip_nonfinite, update_every: of running statistics, as
            in `BatchNorm`; a step averages over the examples of all `update_every` batches.
        ghost_batch_size: refused, since no examples are normalized together.

    Raises:
        TypeError: input of 8-bit floats; a complex mask; an epsilon that is no number; a result
            that `dtype` cannot hold.
        ValueError: the first axis as feature axis, missing `use_running_average` with running
            statistics, contradicting options, an input or a mask of the wrong shape, axes out of
            range or named twice.
        NameError: `axis_name` is not bound.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016 (arXiv:1607.08022), section 2.

    Differs:
        From Flax as `LayerNorm` does, and: running statistics, as an option. From PyTorch: no
        running statistics, but scale and bias, by default; `momentum` is the weight of the old
        value; the running variance is biased unless `running_var="unbiased"`.
    """

    _axis_option = "feature_axes"

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    feature_axes: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    _: dataclasses.KW_ONLY
    track_running_stats: bool = False
    use_running_average: bool | None = None
    momentum: float | None = 0.99

    def _check_options(self, who: str) -> None:
        super()._check_options(who)
        if self.update_every > 1 and not self.track_running_stats:
            raise ValueError(
                f"{who}: update_every={self.update_every} batches for one step of the running "
                f"statistics, but there are none. Drop it, or set track_running_stats=True."
            )
        if self.ghost_batch_size is not None:
            raise ValueError(
                f"{who}: ghost_batch_size={self.ghost_batch_size} would group examples, but each "
                f"is normalized by itself. Drop it."
            )

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        axes = ax.canonical_axes(self.feature_axes, ndim, who, "feature_axes")
        if 0 in axes:
            fix = ", or name another: feature_axes=-1." if ndim > 1 else "."
            raise ValueError(
                f"{who}: feature_axes={self.feature_axes} include the first axis of an input with "
                f"{ndim} axes, which is that of examples. Add one for the batch: x[None]{fix}"
            )
        return axes

    def _mode(
        self, use_running_average: bool | None, update_stats: bool | None, who: str
    ) -> tuple[bool, bool]:
        if not self.track_running_stats:
            return False, False
        return super()._mode(use_running_average, update_stats, who)

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        stats = self._stats_slots(features, is_complex) if self.track_running_stats else {}
        return stats | self._affine_slots(features)

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
        scale, bias = self._affine(values, x)
        options: dict[str, Any] = dict(axis=self._feature_axes(x.ndim, who), where=mask)
        options |= dict(epsilon=self.epsilon, dtype=dtype, who=who)
        if use_running_average:
            stored = self._stored(values, x, who)
            return normalize_with_stats(x, stored, scale, bias, **options), {}
        y, each = instance_norm(x, scale, bias, **options, **self._mapped_axes(initializing, who))
        if initializing or not update_stats:
            return y, {}
        average = _average(each, ddof=int(self.running_var == "unbiased"))
        return y, self._moved(values, self._stored(values, x, who), average, who, ddof=0)

    def _merged(self, pending: Moments, batch: Moments) -> Moments:
        """The average over the examples of both, as `_average` takes it of one batch."""
        count = pending.count + batch.count
        share = batch.count * reciprocal(count)

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + share.astype(old.dtype) * (new - old)

        assert pending.mean is not None
        assert batch.mean is not None
        return Moments(count, average(pending.mean, batch.mean), average(pending.var, batch.var))


def _average(each: Moments, ddof: int) -> Moments:
    """The mean of the examples' estimates; the count is that of examples with an estimate.

    Not their merge: the differences between the examples' means are no part of the variance by
    which an example is normalized.
    """
    known = (each.count > ddof).astype(each.var.dtype)
    share = known * reciprocal(known.sum(0, keepdims=True))
    estimates = jax.tree.map(lambda leaf: (leaf * share).sum(0), each.stats(ddof))
    return Moments(known.sum(0), estimates.mean, estimates.var)
