"""Switchable normalization (Luo et al. 2018, arXiv:1806.10779).

    mean = sum_k w_k mean_k,   var = sum_k v_k var_k          k = instance, layer, batch
    y = (x - mean) / sqrt(var + epsilon) * scale + bias
    w = softmax(mean_weight),   v = softmax(var_weight)

Instance statistics are those of one feature of one example, over space; layer statistics those of
one example, over space and features; batch statistics those of one feature, over space and
examples. A layer learns by six numbers which to use. The last two are pooled from the first, so
that `x` is read no more often than for one of them.

When to use: convolutional networks for a task of which it is not known what suits it, or whose
layers want different things, also with few examples per batch. Two of the three statistics are the
example's own in inference too, so that the layer cannot be folded into weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, devices
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.moments import Moments, Stats, moments_with_rest, pool_along
from jaxnorm.core.normalize import normalize, normalize_with_stats
from jaxnorm.core.rules import recomputed
from jaxnorm.core.standardize import stats_along
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.instance_norm import example_axes
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Initializer, Slot, Values


def switchable_norm(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    shift: ArrayLike | None = 0.0,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "switchable_norm",
) -> tuple[jax.Array, Moments]:
    """Normalizes by a mixture of instance, layer and batch statistics (training).

        mean = sum_k softmax(mean_weight)_k mean_k,   var = sum_k softmax(var_weight)_k var_k
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32.
        mean_weight: shape (3,): the logits of instance, layer and batch mean, in this order.
        var_weight: shape (3,): those of the variances.
        scale: one factor per feature, or None for 1.
        bias: one summand per feature, or None for 0.
        axis: the feature axis or axes: `scale` and `bias` have the shape of `x` along them, in
            increasing order.
        batch_axis: the axis or axes of examples; all others are space.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.
        shift: an estimate of the batch's mean, as in `batch_norm`.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the batch extends: the batch statistics are pooled over them, those of an example never.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and the batch's `Moments`, one entry per feature, for
        `update_running`.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: axes out of range, named twice, or of features and examples both; weights,
            parameters or a mask that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider and rounds once. The means are mixed by their differences,
        which keeps the digits at means of many standard deviations. Statistics without evidence are
        (0, 1). For the backward pass `x` and statistics of each example and feature are kept.
        In float32, results and gradients are right for values up to 1e12, and with `epsilon=0` for
        standard deviations from 1e-12.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0], [3.0]], [[20.0], [60.0]]])
        >>> only_instance = jnp.array([0.0, -jnp.inf, -jnp.inf])
        >>> y, batch = jaxnorm.switchable_norm(x, only_instance, only_instance)
        >>> y[..., 0].round(3).tolist(), batch.mean.tolist()
        ([[-1.0, 1.0], [-1.0, 1.0]], [21.0])

    Source:
        Luo et al. 2018 (arXiv:1806.10779), equations 3 to 5.
    """
    over = devices(axis_name, axis_index_groups, who)
    options: dict[str, Any] = dict(axis=axis, batch_axis=batch_axis, where=where)
    options |= dict(epsilon=epsilon, dtype=dtype, who=who)
    pooling = dict(shift=shift, over=over)
    return _normalized(x, None, mean_weight, var_weight, scale, bias, pooling=pooling, **options)


def switchable_norm_inference(
    x: ArrayLike,
    stats: Stats,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = 0,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "switchable_norm_inference",
) -> jax.Array:
    """Normalizes by a mixture of instance, layer and given statistics (inference).

    The formula is that of `switchable_norm`, with given statistics in the place of the batch's.

    Args:
        x: array such as `[batch, height, width, features]`; float, bfloat16 or complex; integers
            become float32.
        stats: mean and variance of each feature: running statistics.
        mean_weight, var_weight, scale, bias, axis, batch_axis, where, epsilon, dtype, who: as in
            `switchable_norm`.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `switchable_norm`; also for statistics that are none or do not
            fit.

    Numerics:
        As `switchable_norm`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> only_batch = jnp.array([-jnp.inf, -jnp.inf, 0.0])
        >>> stats = jaxnorm.Stats(mean=jnp.array([1.0]), var=jnp.array([4.0]))
        >>> x = jnp.array([[[1.0], [3.0]]])
        >>> y = jaxnorm.switchable_norm_inference(x, stats, only_batch, only_batch)
        >>> y[0, :, 0].round(3).tolist()
        [0.0, 1.0]

    Source:
        Luo et al. 2018 (arXiv:1806.10779), section 3, "Inference".
    """
    stats_along(stats, jnp.shape(x), ax.canonical_axes(axis, jnp.ndim(x), who), who)
    options: dict[str, Any] = dict(axis=axis, batch_axis=batch_axis, where=where)
    options |= dict(epsilon=epsilon, dtype=dtype, who=who)
    return _normalized(x, stats, mean_weight, var_weight, scale, bias, pooling={}, **options)[0]


def _normalized(
    x: ArrayLike,
    stats: Stats | None,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    axis: int | Sequence[int],
    batch_axis: int | Sequence[int],
    where: ArrayLike | None,
    pooling: dict[str, Any],
    who: str,
    **options: Any,
) -> tuple[jax.Array, Moments]:
    """The result, by given statistics or the batch's, and the evidence of the batch."""
    x = checks.input_array(x, who)
    features = ax.canonical_axes(axis, x.ndim, who)
    examples = example_axes(batch_axis, features, x.shape, who)
    mean_weight = _logits(mean_weight, x, who, "mean_weight")
    var_weight = _logits(var_weight, x, who, "var_weight")
    scale = checks.feature_array(scale, x.shape, features, who, "scale")
    bias = checks.feature_array(bias, x.shape, features, who, "bias")
    where = checked_mask(where, x.shape, who)
    kept = sorted(features + examples)
    space = ax.other_axes(kept, x.ndim)
    each, rest = moments_with_rest(lax.stop_gradient(x), space, where)
    # The derivative is that of a normalization, which keeps only `x` and statistics. Its result is
    # dropped, and not computed under `jit`; its epsilon does not matter.
    _, each = normalize(x, axes=space, where=where, evidence=each, epsilon=1.0, who=who)

    # From here on arrays have the axes of examples and features.
    of_features, of_examples = (tuple(kept.index(a) for a in axes) for axes in (features, examples))

    def along(axes: tuple[int, ...], value: Any) -> Any:
        """Arrays with these axes, with all."""
        return jax.tree.map(lambda leaf: ax.lay_along(leaf, axes, len(kept)), value)

    batch = pool_along(each, of_examples, rest=rest, who=who, **pooling)

    def from_evidence(x, where, each, batch, mean_weight, var_weight, scale, bias):
        mixed = _mixture(
            each.stats(),
            along(of_examples, pool_along(each, of_features, who=who).stats()),
            along(of_features, batch),
            jax.nn.softmax(mean_weight),
            jax.nn.softmax(var_weight),
        )
        scale, bias = (
            None if leaf is None else jnp.zeros_like(each.var, dtype=leaf.dtype) + leaf
            for leaf in along(of_features, (scale, bias))
        )
        return normalize_with_stats(
            x, mixed, scale, bias, axis=kept, where=where, who=who, **options
        )

    # Rematerialized, so that of what is mixed nothing is kept for the backward pass.
    stats = batch.stats() if stats is None else stats
    given = x, where, each, stats, mean_weight, var_weight, scale, bias
    return recomputed(from_evidence, *given), batch


def _mixture(
    instance: Stats, layer: Stats, batch: Stats, mean_shares: jax.Array, var_shares: jax.Array
) -> Stats:
    """The means and variances of three kinds, weighted by shares that sum to 1."""

    def as_wide(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        dtype = precision.promote(*(leaf.dtype for leaf in leaves))
        return tuple(leaf.astype(dtype) for leaf in leaves)

    batch_mean = jnp.zeros_like(batch.var) if batch.mean is None else batch.mean
    assert instance.mean is not None
    assert layer.mean is not None
    *means, shares = as_wide(instance.mean, layer.mean, batch_mean, mean_shares)
    *variances, var_shares = as_wide(instance.var, layer.var, batch.var, var_shares)
    # By differences: shares sum to 1 only up to rounding, of which a large mean would make much.
    mean = means[2] + shares[0] * (means[0] - means[2]) + shares[1] * (means[1] - means[2])
    var = sum(var_shares[k] * variances[k] for k in range(3))
    return Stats(mean, jnp.asarray(var))


def _logits(weight: ArrayLike, x: jax.Array, who: str, what: str) -> jax.Array:
    """Three logits, in what computes with `x`."""
    weight = jnp.asarray(weight)
    checks.not_narrow(weight, who, what, f"{what}.astype(jnp.float32)")
    if weight.shape != (3,):
        raise ValueError(
            f"{who}: {what} has shape {weight.shape}, but weighs the statistics of instance, layer "
            f"and batch. Use three numbers: jnp.ones(3)."
        )
    wide = precision.promote(weight.dtype, precision.real_dtype(x.dtype), jnp.float32)
    return weight.astype(wide)


@dataclasses.dataclass(eq=False, repr=False)
class SwitchableNorm(Affine, RunningStats):
    """Switchable normalization with running statistics, for `jaxnorm.linen` and `jaxnorm.nnx`.

    Variables: `scale` and `bias`, with one entry per feature, `mean_weight` and `var_weight`, of
    shape (3,), in `params`; `mean`, `var` and, with some options, `updates` in `batch_stats`, as
    those of `BatchNorm` (NNX: `nnx.Param`, `nnx.BatchStat`).

    Args:
        use_running_average: True takes the running statistics for the batch's (inference), False
            the batch's (training). Must be given here or at the call.
        axis: the feature axis or axes.
        momentum: weight of the OLD value in the running average; None for the cumulative average.
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input, `scale` and `bias`.
        param_dtype: dtype of the parameters.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        axis_name: name or names of mapped axes over which the batch extends. Not used while
            initializing.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        batch_axis: the axis or axes of examples.
        weight_init: initializer of `mean_weight` and `var_weight`, ones: all three alike.
        zero_centered_scale, debias, running_var, update_stats, skip_nonfinite, update_every,
            ghost_batch_size: as in `BatchNorm`.

    Raises:
        TypeError, ValueError, NameError: as `BatchNorm`; ValueError also for an axis that is both
            of features and of examples.

    Source:
        Luo et al. 2018 (arXiv:1806.10779), equations 3 to 5.

    Differs:
        From the paper: running averages in the place of averages over many batches after training,
        which can be had with `momentum=None`. From the authors' code: the instance variance is
        biased, as the others, and the running variance starts at 1, not at 0.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    _: dataclasses.KW_ONLY
    batch_axis: int | Sequence[int] = 0
    weight_init: Initializer = jax.nn.initializers.ones

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.axis, ndim, who)

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        real = precision.real_dtype(self.param_dtype)
        weight = Slot("params", (3,), real, self.weight_init)
        return (
            self._stats_slots(features, is_complex)
            | self._affine_slots(features)
            | {"mean_weight": weight, "var_weight": weight}
        )

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
        parameters = values["mean_weight"], values["var_weight"], *self._affine(values, x)
        options: dict[str, Any] = dict(axis=self.axis, batch_axis=self.batch_axis, where=mask)
        options |= dict(epsilon=self.epsilon, dtype=dtype, who=who)
        if use_running_average:
            return switchable_norm_inference(x, stored, *parameters, **options), {}
        options |= dict(shift=self._shift(stored.mean, stored.var))
        options |= self._mapped_axes(initializing, who)
        y, batch = self._by_batches(switchable_norm, initializing)(x, *parameters, **options)
        if initializing or not update_stats:
            return y, {}
        return y, self._moved(values, stored, batch, who)
