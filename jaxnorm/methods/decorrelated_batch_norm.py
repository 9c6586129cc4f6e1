"""Decorrelated batch normalization (Huang, Yang, Lang & Deng 2018, arXiv:1804.08450).

    mean = sum x / m,   cov = sum (x - mean)(x - mean)^T / m        over all axes but the features'
    y = (cov + epsilon I)^(-1/2) (x - mean) * scale + bias          in each group of features

Batch norm makes the variance of each feature 1; this makes the features of a group uncorrelated as
well, by the inverse square root of their covariance (ZCA whitening, which turns nothing). In
inference the root is taken of the running covariance.

When to use: in place of batch norm where its faster, better conditioned training is worth an
eigendecomposition of each group's covariance per step. A group must be much smaller than the number
of examples in a batch (times the spatial positions), or its small eigenvalues are noise, which
whitening amplifies: groups of 16 are common. `iter_norm.py` does with matrix products alone, and
leaves what is hardly known as it is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core.covariance import Comoments, JointStats
from jaxnorm.core.devices import AxisName
from jaxnorm.core.whitened import normalize_jointly, normalize_jointly_with_stats
from jaxnorm.methods.running_covariance import RunningCovariance
from jaxnorm.methods.spec import Initializer


def decorrelated_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    num_groups: int | None = 1,
    group_size: int | None = None,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    shift: ArrayLike | None = 0.0,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "decorrelated_batch_norm",
) -> tuple[jax.Array, Comoments]:
    """Makes the features of each group uncorrelated and of variance 1 over the batch (training).

        y = (cov + epsilon I)^(-1/2) (x - mean) * scale + bias

    Args:
        x: array of any shape, `[batch, features]`, `[batch, height, width, features]`, ...; float
            or bfloat16; integers become float32.
        scale: one factor per feature (gamma), or None for 1.
        bias: one summand per feature (beta), or None for 0.
        axis: the feature axis; mean and covariance are taken over all others.
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        where: which examples count, by booleans or weights, or None for all; of the shape of `x`,
            but of size 1 along `axis`. See `normalize`.
        epsilon: added to the diagonal of the covariance.
        shift: an estimate of the mean, a number or one for each feature, as in `batch_norm`.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the batch extends; devices are weighted by their numbers of valid examples.
        axis_index_groups: groups of indices along `axis_name`; each is a batch of its own.
        dtype: dtype of the result; None for that of `x`, made complex if a parameter is.
        who: the name that error messages give to the caller.

    Returns:
        The result, of the shape of `x`, and the batch's `Comoments`, to be blended into running
        statistics with `update_running_covariance` or merged into those of a data set with
        `merge_comoments`. Where nothing is valid, the mean is taken for 0 and the covariance for I.

    Raises:
        TypeError: `x` is complex, holds no numbers, or floats of 8 bits, the mask is complex, or
            `dtype` cannot hold the result.
        ValueError: axis out of range; groups that do not divide the features; a mask that does not
            fit or differs between features; parameters that do not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider, matrix products included, and rounds once. The covariance
        keeps its digits at means of many standard deviations. The root is taken by
        eigendecomposition, yet all its derivatives are finite and right, also at equal eigenvalues.
        Rounding errors in directions without variance are multiplied by epsilon^(-1/2), and again
        in each derivative: with features that are alike or constant choose epsilon above 1e-4.
        Variances below the rounding of a group's largest are not whitened, see `whitening_matrix`.
        In float32, results and gradients are right for values up to 1e12, and with `epsilon=0` for
        standard deviations from 1e-12.
        For the backward pass `x` and matrices of group size are kept.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        >>> y, batch = jaxnorm.decorrelated_batch_norm(x, epsilon=0)
        >>> y.round(3).tolist(), batch.mean.tolist()
        ([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0]])

    Source:
        Huang et al. 2018 (arXiv:1804.08450), Algorithm 1.
    """
    return normalize_jointly(
        x,
        scale,
        bias,
        n_steps=None,
        axis=axis,
        num_groups=num_groups,
        group_size=group_size,
        where=where,
        epsilon=epsilon,
        shift=shift,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )


def decorrelated_batch_norm_inference(
    x: ArrayLike,
    stats: JointStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "decorrelated_batch_norm_inference",
) -> jax.Array:
    """Whitens each group of features by given statistics (inference).

    Args:
        x: array of any shape; float or bfloat16; integers become float32.
        stats: mean and covariance of each group, which also says how features are grouped: running
            statistics, or exact ones of a data set, `merge_comoments(...).stats(ddof=1)`.
        scale, bias, axis, epsilon, dtype, who: as in `decorrelated_batch_norm`.
        where: which examples count, by booleans or weights, or None for all; of the shape of `x`,
            but of size 1 along `axis`. See `normalize`.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `decorrelated_batch_norm`; also for statistics that do not fit.

    Numerics:
        As `decorrelated_batch_norm`. The matrix is computed anew from the covariance in each call;
        see `whitening_matrix` to compute it once.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        >>> population = jaxnorm.comoments(x).stats()
        >>> jaxnorm.decorrelated_batch_norm_inference(x[:1], population, epsilon=0).tolist()
        [[-1.0, -1.0]]

    Source:
        Huang et al. 2018 (arXiv:1804.08450), inference.
    """
    return normalize_jointly_with_stats(
        x,
        stats,
        scale,
        bias,
        n_steps=None,
        axis=axis,
        where=where,
        epsilon=epsilon,
        dtype=dtype,
        who=who,
    )


@dataclasses.dataclass(eq=False, repr=False)
class DecorrelatedBatchNorm(RunningCovariance):
    """Decorrelated batch normalization, for `jaxnorm.linen` and `jaxnorm.nnx`.

    As `BatchNorm`, with a running covariance in place of the running variance.

    Variables: `scale` and `bias`, one entry per feature, in `params`; in `batch_stats` `mean`,
    `[features]`, and `cov`, `[groups, group size, group size]` (NNX: `nnx.Param`, `nnx.BatchStat`);
    and `updates`, `[groups]`, if `debias` is set or `momentum` is None. Statistics are float32,
    float64 if `param_dtype` is. They never change dtype or structure, and no gradient flows into
    them. With `update_every` above 1 there are also `pending_count`, `pending_mean`, `pending_cov`
    and `pending_batches`. Counts, and what a checkpoint has in other dtypes, are as in `BatchNorm`.

    Args:
        use_running_average: True whitens by the running statistics (inference), False by the
            batch's (training). Must be given here or at the call.
        axis: the feature axis; mean and covariance are taken over all others.
        momentum: weight of the OLD value in the running average; None for the cumulative average,
            in which all batches weigh the same.
        epsilon: added to the diagonal of the covariance.
        dtype: dtype of the result; None infers it from input and parameters.
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
        num_groups: number of groups of neighbouring features.
        group_size: features in a group; give either this or `num_groups`, and None for the other.
        zero_centered_scale: store the scale minus 1; `scale_init` is then zeros.
        debias: free the running average from the pull of its start at (0, I).
        running_var: `"biased"` stores the covariance by which batches are whitened, `"unbiased"`
            with Bessel's correction.
        update_stats: whether training moves the running statistics; also an argument of the call.
        skip_nonfinite: leave the running statistics alone on a batch with a NaN or infinite mean or
            covariance.
        update_every: how many batches make one step of the running statistics: the k micro-batches
            of gradient accumulation. The step is that of one batch of all their examples. Still
            each of them is normalized by its own statistics. A batch without valid elements, or
            one that `skip_nonfinite` leaves out, is one of the k, without evidence; a call with
            `update_stats=False` is none.
        ghost_batch_size: how many examples are normalized together, see `ghost_batches`; None for
            the whole batch. The running statistics get the evidence of all. Not used while
            initializing.

    Raises:
        TypeError: complex input, or floats of 8 bits; a complex mask; an epsilon that is no number;
            a result that `dtype` cannot hold; statistics stored in 8 bits or as integers.
        ValueError: contradicting options, groups that do not divide the features, missing
            `use_running_average`, an input or a mask of the wrong shape, several feature axes.
        NameError: `axis_name` is not bound.

    Source:
        Huang et al. 2018 (arXiv:1804.08450), Algorithm 1.

    Differs:
        From the authors' code: inference applies the root to the running covariance, where
        theirs averages whitening matrices. An average of covariances is a covariance, which can be
        corrected, checked and whitened in other ways; an average of roots is no root of it. All
        features are one group unless told otherwise. Devices and masks are weighted by counts.
        Training on no more examples than a group has features warns.
    """

    use_running_average: bool | None = None
    axis: int = -1
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

    def _by_batch(
        self, x: jax.Array, *affine: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, Comoments]:
        return decorrelated_batch_norm(x, *affine, **options)

    def _by_stats(
        self, x: jax.Array, stats: JointStats, *affine: jax.Array | None, **options: Any
    ) -> jax.Array:
        return decorrelated_batch_norm_inference(x, stats, *affine, **options)
