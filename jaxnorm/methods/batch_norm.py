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
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, devices
from jaxnorm.core.moments import Moments, Stats
from jaxnorm.core.normalize import normalize, normalize_with_stats
from jaxnorm.core.running import check_averaging, update_running
from jaxnorm.methods.spec import Initializer, Slot, Values


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "batch_norm",
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature by its mean and variance over the batch (training).

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of any shape, `[batch, features]`, `[batch, height, width, features]`, ...; float,
            bfloat16, or complex.
        scale: one factor per feature (gamma), or None for 1.
        bias: one summand per feature (beta), or None for 0.
        axis: the feature axis or axes; mean and variance are taken over all others. `scale`, `bias`
            and the moments have the shape of `x` along them, in increasing order.
        where: boolean mask with as many axes as `x`, each of the size of `x` or 1; False does not
            count. See `normalize` for what happens to masked elements.
        epsilon: added to the variance, inside the root.
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
        TypeError: `x` is neither floating point nor complex, the mask is floating point, or `dtype`
            cannot hold the result.
        ValueError: axis out of range or named twice; a mask or parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider and rounds once. The variance keeps its digits at means of many
        standard deviations. For the backward pass `x` and per-feature statistics are kept. All
        derivatives of every order, forward and reverse, are those of the formula.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, batch = jaxnorm.batch_norm(x, scale=jnp.array([1.0, 2.0]))
        >>> y.round(3).tolist(), batch.mean.tolist()
        ([[-1.0, -2.0], [1.0, 2.0]], [2.0, 20.0])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 1.
    """
    x = checks.inexact_array(x, who)
    return normalize(
        x,
        scale,
        bias,
        axes=ax.other_axes(ax.canonical_axes(axis, x.ndim, who), x.ndim),
        axis=axis,
        where=where,
        epsilon=epsilon,
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
        x: array of any shape; float, bfloat16, or complex.
        stats: mean and variance of each feature: running statistics, or exact ones of a data set,
            `merge(...).stats(ddof=1)`.
        scale, bias, axis, epsilon, dtype, who: as in `batch_norm`.
        where: boolean mask with as many axes as `x`, each of the size of `x` or 1. Where it is
            False, NaN, infinities and huge numbers are taken for 0.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm`; ValueError also for statistics that do not fit.

    Numerics:
        Computes in float32 or wider and rounds once; keeps only the inputs for the backward pass.

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
class BatchNorm:
    """Batch normalization with running statistics, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A drop-in for Flax's `BatchNorm`: the same arguments, variables, defaults and results.

    Variables, each with one entry per feature: `scale` and `bias` in `params`; `mean` and `var` in
    `batch_stats` (NNX: `nnx.Param`, `nnx.BatchStat`), and `updates`, int32, if `debias` is set or
    `momentum` is None; a checkpoint of Flax has none, so add it to go on training with these
    options. With several feature axes the shapes are in increasing order of axes. Statistics are
    float32, float64 if `param_dtype` is; the mean is complex if the input is. They never change
    dtype or structure, and no gradient flows into them.

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
        use_fast_variance: accepted for Flax's sake; the variance is always right.
        debias: free the running average from the pull of its start at (0, 1).
        running_var: `"biased"` stores the variance by which batches are normalized, as Flax does,
            `"unbiased"` with Bessel's correction, as the paper and PyTorch do.
        update_stats: whether training moves the running statistics; also an argument of the call.
        skip_nonfinite: leave the running statistics alone on a batch with a NaN or infinite mean or
            variance.

    Raises:
        TypeError: integer input; a floating point mask; an epsilon that is no number; a result that
            `dtype` cannot hold; complex input for real statistics; statistics stored in less than
            float32.
        ValueError: contradicting options, missing `use_running_average`, an input or a mask of the
            wrong shape, axes out of range or named twice.
        NameError: `axis_name` is not bound.

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithms 1 and 2, section 3.2 for convolutions.

    Differs:
        From Flax: the variance keeps its digits at large means; devices and masks are weighted by
        counts; NaN under the mask does no harm; float64 and complex input do not change the dtype
        of the statistics; the gradient by running statistics is 0, also in inference (differentiate
        `batch_norm_inference` for it). Refused where Flax guesses: integer input, masks that are
        floating point or lack axes, an axis named twice, a momentum outside 0 to 1, an epsilon that
        is traced. Training on one value per feature warns. From the paper: the running variance is
        biased by default, as in Flax.
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
    _: dataclasses.KW_ONLY
    debias: bool = False
    running_var: Literal["biased", "unbiased"] = "biased"
    update_stats: bool = True
    skip_nonfinite: bool = False

    def _check_options(self, who: str) -> None:
        check_averaging(self.momentum, self.debias, who)
        if self.running_var not in ("biased", "unbiased"):
            raise ValueError(
                f"{who}: running_var={self.running_var!r} is unknown. "
                f"Use running_var='biased' or running_var='unbiased'."
            )
        if self.axis_index_groups is not None and self.axis_name is None:
            devices(None, self.axis_index_groups, who)

    def _mode(
        self, use_running_average: bool | None, update_stats: bool | None, who: str
    ) -> tuple[bool, bool]:
        """Whether a call uses the running statistics and whether it moves them.

        What the call says goes before what the layer says.

        Raises:
            ValueError: nothing says which statistics to use, or the two contradict each other.
        """
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            raise ValueError(
                f"{who}: use_running_average is missing, so it is not known whether this is "
                f"training or inference. Pass use_running_average=False to train and True for "
                f"inference, to the call or to the constructor."
            )
        if frozen and update_stats:
            raise ValueError(
                f"{who}: update_stats=True contradicts use_running_average=True: the running "
                f"statistics move only when the batch's are used. Drop one of the two."
            )
        return frozen, not frozen and (self.update_stats if update_stats is None else update_stats)

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        return ax.canonical_axes(self.axis, ndim, who)

    def _slots(self, features: tuple[int, ...], is_complex: bool) -> dict[str, Slot]:
        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        real = precision.promote(precision.real_dtype(self.param_dtype), jnp.float32)
        mean_dtype = precision.promote(real, jnp.complex64) if is_complex else real
        slots = {
            "mean": Slot("batch_stats", features, mean_dtype, zeros),
            "var": Slot("batch_stats", features, real, ones),
        }
        if self.debias or self.momentum is None:
            slots["updates"] = Slot("batch_stats", features, jnp.int32, zeros)
        if self.use_scale:
            slots["scale"] = Slot("params", features, self.param_dtype, self.scale_init)
        if self.use_bias:
            slots["bias"] = Slot("params", features, self.param_dtype, self.bias_init)
        return slots

    def _transform(
        self,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        *,
        use_running_average: bool,
        update_stats: bool,
        initializing: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One call, by the running statistics or by the batch's.

        Args:
            values: the variables of `slots`, by name.
            x, mask: as in `batch_norm`.
            dtype: dtype of the result.
            who: the layer's name for errors.
            use_running_average, update_stats: as above.
            initializing: whether the variables were only now created. Statistics do not move then,
                and mapped axes need not exist.

        Returns:
            The result, and the new statistics if they move.
        """
        scale, bias = values.get("scale"), values.get("bias")
        old = lax.stop_gradient(Stats(values["mean"], values["var"]))
        _check_kind(x, old, who)
        options: dict[str, Any] = dict(axis=self.axis, where=mask, epsilon=self.epsilon)
        options |= dict(dtype=dtype, who=who)
        if use_running_average:
            return batch_norm_inference(x, old, scale, bias, **options), {}
        if not initializing:
            options |= dict(axis_name=self.axis_name, axis_index_groups=self.axis_index_groups)
        y, batch = batch_norm(x, scale, bias, **options)
        if initializing:
            return y, {}
        if mask is None:
            self._warn_of_single_values(x.size // max(batch.mean.size, 1), who)
        if not update_stats:
            return y, {}
        _check_width(old, who)
        new, updates = update_running(
            old,
            lax.stop_gradient(batch),
            momentum=self.momentum,
            updates=values.get("updates"),
            debias=self.debias,
            ddof=int(self.running_var == "unbiased"),
            skip_nonfinite=self.skip_nonfinite,
        )
        changed = {"mean": new.mean, "var": new.var}
        return y, changed if updates is None else changed | {"updates": updates}

    def _warn_of_single_values(self, local_count: int, who: str) -> None:
        over = devices(self.axis_name, self.axis_index_groups, who)
        if local_count == 1 and (over is None or over.parts == 1):
            warnings.warn(
                f"{who}: trains on one value per feature, which is its own mean: the output is the "
                f"bias whatever the input, and the running variance decays to 0. Use larger "
                f"batches, or use_running_average=True.",
                stacklevel=2,
            )


def _check_kind(x: jax.Array, stats: Stats, who: str) -> None:
    if precision.is_complex(x.dtype) and not precision.is_complex(stats.mean.dtype):
        raise TypeError(
            f"{who}: the input is {x.dtype}, but the running mean is stored as {stats.mean.dtype} "
            f"and would lose the imaginary part. Create the layer for complex input: initialize a "
            f"Linen module with a complex example, or an NNX module with dtype=jnp.complex64."
        )


def _check_width(stats: Stats, who: str) -> None:
    for name, leaf in (("mean", stats.mean), ("var", stats.var)):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"{who}: the running {name} is stored as {leaf.dtype}, in which a moving average "
                f"stops moving. Store the statistics in float32: {name}.astype(jnp.float32)."
            )
