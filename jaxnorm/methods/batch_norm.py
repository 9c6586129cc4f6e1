"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167).

    mean = sum x / m,   var = sum |x - mean|^2 / m          over all axes but the features'
    y = (x - mean) / sqrt(var + epsilon) * scale + bias

In training a feature is normalized by its mean and variance over the batch and all spatial axes,
and running averages of these are kept; in inference it is normalized by the running averages.

When to use: convolutional and fully connected networks with 16 or more examples per normalized
batch, where inference can use fixed statistics and so costs nothing once folded into the weights.
With fewer examples, or batches whose examples depend on each other, the batch's statistics are too
noisy, and methods that do not look across examples do better.
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
from jaxnorm.core.moments import Moments, Stats
from jaxnorm.core.normalize import normalize, normalize_with_stats
from jaxnorm.methods.affine import Affine
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Initializer, Slot, Values


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    shift: ArrayLike | None = 0.0,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "batch_norm",
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature by its mean and variance over the batch (training).

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of any shape, `[batch, features]`, `[batch, height, width, features]`, ...; float,
            bfloat16 or complex; integers become float32.
        scale: one factor per feature (gamma), or None for 1.
        bias: one summand per feature (beta), or None for 0.
        axis: the feature axis or axes; mean and variance are taken over all others. `scale`, `bias`
            and the moments have the shape of `x` along them, in increasing order.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.
        epsilon: added to the variance, inside the root.
        shift: an estimate of the mean, a number or one for each feature: the running mean, if there
            is one. It decides what the moments cost, not what they are: see `normalize`.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the batch extends; devices are weighted by their numbers of valid elements.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and the batch's `Moments`, one entry per feature, to be
        blended into running statistics with `update_running` or merged into those of a data set
        with `merge`.

    Raises:
        TypeError: `x` holds no numbers, or floats of 8 bits, the mask is complex, or `dtype` cannot
            hold the result.
        ValueError: axis out of range or named twice; a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider and rounds once. The variance keeps its digits at means of many
        standard deviations. For the backward pass `x` and per-feature statistics are kept. All
        derivatives of every order, forward and reverse, are those of the formula.
        In float32, results and gradients are right for values up to 1e12, and with `epsilon=0` for
        standard deviations from 1e-12.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, batch = jaxnorm.batch_norm(x, scale=jnp.array([1.0, 2.0]))
        >>> y.round(3).tolist(), batch.mean.tolist()
        ([[-1.0, -2.0], [1.0, 2.0]], [2.0, 20.0])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 1.
    """
    x = checks.input_array(x, who)
    return normalize(
        x,
        scale,
        bias,
        axes=ax.other_axes(ax.canonical_axes(axis, x.ndim, who), x.ndim),
        axis=axis,
        where=where,
        epsilon=epsilon,
        shift=shift,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )


def batch_norm_inference(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "batch_norm_inference",
) -> jax.Array:
    """Normalizes each feature by given statistics (inference).

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32.
        stats: mean and variance of each feature: running statistics, or exact ones of a data set,
            `merge(...).stats(ddof=1)`.
        scale, bias, axis, epsilon, dtype, who: as in `batch_norm`.
        where: which elements count, by booleans or weights, or None for all; of the shape of `x`,
            or of size 1 along some axes. See `normalize`.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm`; ValueError also for statistics that do not fit.

    Numerics:
        Computes in float32 or wider and rounds once; keeps only the inputs for the backward pass.
        In float32, results and gradients are right for values up to 1e12, and with `epsilon=0` for
        standard deviations from 1e-12.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> batches = jnp.array([[[0.0], [8.0]], [[-12.0], [4.0]]])
        >>> seen = jaxnorm.merge(*(jaxnorm.batch_norm(batch)[1] for batch in batches))
        >>> population = seen.stats()
        >>> population.mean.tolist(), population.var.tolist()
        ([0.0], [56.0])
        >>> jaxnorm.batch_norm_inference(batches[0], population).shape
        (2, 1)

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 2, steps 8 to 11.
    """
    return normalize_with_stats(
        x,
        stats,
        scale,
        bias,
        axis=axis,
        where=where,
        epsilon=epsilon,
        dtype=dtype,
        who=who,
    )


@dataclasses.dataclass(eq=False, repr=False)
class BatchNorm(Affine, RunningStats):
    """Batch normalization with running statistics, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `BatchNorm`: the same arguments, variables, defaults and results.

    Variables, each with one entry per feature: `scale` and `bias` in `params`; `mean` and `var` in
    `batch_stats` (NNX: `nnx.Param`, `nnx.BatchStat`), and `updates`, if `debias` is set or
    `momentum` is None; a checkpoint of Flax has none, so add it to go on training with these
    options. With several feature axes the shapes are in increasing order of axes. Statistics are
    float32, float64 if `param_dtype` is; the mean is complex if the input is. They never change
    dtype or structure, and no gradient flows into them.

    Counts are float32 too, so that averages of whole states (weight averages, target networks)
    keep their types; what fractions they then hold is taken as it is. They stop at 2**24. Counts
    that a checkpoint has as integers, and statistics in bfloat16 or float16, of a model that was
    cast as a whole, are accepted: they are computed in float32 and stored as found, narrow ones
    with a warning of what stops moving.

    With `update_every` above 1 there are also `pending_count`, `pending_mean` and `pending_var`,
    what the batches since the last step were like, and `pending_batches`, a scalar, how many they
    were; right after a step the counts are 0. In Linen a checkpoint without these serves as well:
    training starts them at 0 and adds them. To train on inside `jax.lax.scan`, which wants a state
    that stays alike, add them before, from `layer.init`.

    Args:
        use_running_average: True normalizes by the running statistics (inference), False by the
            batch's (training). Must be given here or at the call.
        axis: the feature axis or axes; mean and variance are taken over all others.
        momentum: weight of the OLD value in the running average; None for the cumulative average,
            in which all batches weigh the same.
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: initializer of `bias`, zeros.
        scale_init: initializer of `scale`, ones.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the batch extends. Not used while initializing.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        unbound_axis: in training where an axis of `axis_name` is not mapped, `"error"` raises
            NameError, `"local"` leaves it out, and with the last one also `axis_index_groups`.
        use_fast_variance: accepted for Flax's sake; the variance is always right.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.
        debias: free the running average from the pull of its start at (0, 1).
        running_var: `"biased"` stores the variance by which batches are normalized, as Flax does,
            `"unbiased"` with Bessel's correction, as the paper and PyTorch do.
        update_stats: whether training moves the running statistics; also an argument of the call.
        skip_nonfinite: leave the running statistics alone on a batch with a NaN or infinite mean or
            variance.
        update_every: how many batches make one step of the running statistics: the k micro-batches
            of gradient accumulation. The step is that of one batch of all their examples. Still
            each of them is normalized by its own statistics. A batch without valid elements, or
            one that `skip_nonfinite` leaves out, is one of the k, without evidence; a call with
            `update_stats=False` is none.
        ghost_batch_size: how many examples are normalized together, see `ghost_batches`; None for
            the whole batch. The running statistics get the evidence of all. Not used while
            initializing.

    Raises:
        TypeError: input of 8-bit floats; a complex mask; an epsilon that is no number; a result
            that `dtype` cannot hold; complex input for real statistics; statistics stored in 8 bits
            or as integers; an `update_every` that is no integer.
        ValueError: contradicting options, missing `use_running_average`, an input or a mask of the
            wrong shape, axes out of range or named twice.
        NameError: `axis_name` is not bound.

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithms 1 and 2, section 3.2 for convolutions.

    Differs:
        From Flax: the variance keeps its digits at large means; devices and masks are weighted by
        counts; NaN under the mask does no harm; float64 and complex input do not change the dtype
        of the statistics; the gradient by running statistics is 0, also in inference (differentiate
        `batch_norm_inference` for it). A mask of numbers between 0 and 1 holds weights, where Flax
        knows counted and not counted. Refused where Flax guesses: masks whose axes fit in several
        ways, an axis named twice, a momentum outside 0 to 1, an epsilon that is traced. Training on
        one value per feature warns. From the paper: the running variance is biased by default, as
        in Flax.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.axis, ndim, who)

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        return self._stats_slots(features, is_complex) | self._affine_slots(features)

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
        stored = self._stored(values, x, who)
        options: dict[str, Any] = dict(axis=self.axis, where=mask, epsilon=self.epsilon)
        options |= dict(dtype=dtype, who=who)
        if use_running_average:
            return batch_norm_inference(x, stored, scale, bias, **options), {}
        options |= dict(shift=self._shift(stored.mean, stored.var))
        options |= self._mapped_axes(initializing, who)
        y, batch = self._by_batches(batch_norm, initializing)(x, scale, bias, **options)
        if initializing:
            return y, {}
        if mask is None:
            self._warn_of_single_values(x, batch.var.size, who)
        return y, self._moved(values, stored, batch, who) if update_stats else {}
