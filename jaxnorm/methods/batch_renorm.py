"""Batch renormalization (Ioffe 2017, arXiv:1702.03275).

    r = clip(sigma_B / sigma, 1 / rmax, rmax),   d = clip((mean_B - mean) / sigma, -dmax, dmax)
    y = ((x - mean_B) / sigma_B * r + d) * scale + bias

with mean_B and sigma_B = sqrt(var_B + epsilon) of the batch, mean and sigma the running ones, and
with r and d as constants for the derivative. Without the clips, y = (x - mean) / sigma * scale +
bias: what is trained is what inference computes, and still differentiated through the batch.

When to use: batches of few examples, or of examples that depend on each other, where batch norm's
training and inference are two different functions. Start with rmax=1, dmax=0, which is batch norm,
until the running statistics mean something; `paper_rmax` and `paper_dmax` do so. Its errors are
still those of a batch: group norm has none of them, at some cost in accuracy with large batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, devices
from jaxnorm.core.fused import evidence_by_plan
from jaxnorm.core.masks import checked_mask
from jaxnorm.core.moments import Moments, Stats, shift_along
from jaxnorm.core.normalize import normalize
from jaxnorm.core.running import all_finite, check_running, update_running
from jaxnorm.core.standardize import Plan, apply_affine, stats_along
from jaxnorm.methods.batch_norm import BatchNorm
from jaxnorm.methods.spec import COUNT, Slot, Values

Schedule = Callable[[ArrayLike], ArrayLike]
"""A number for each training step, as Optax's schedules are."""


def batch_renorm(
    x: ArrayLike,
    running: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    rmax: ArrayLike,
    dmax: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    shift: ArrayLike | None = 0.0,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    who: str = "batch_renorm",
) -> tuple[jax.Array, Moments]:
    """Normalizes by the batch, corrected within limits to what inference will do (training).

        r = clip(sigma_B / sigma, 1 / rmax, rmax),   d = clip((mean_B - mean) / sigma, -dmax, dmax)
        y = ((x - mean_B) / sigma_B * r + d) * scale + bias

    with sigma = sqrt(var + epsilon), of the batch (B) and running. Inference is
    `batch_norm_inference`, by the running statistics.

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32, for which the
            magnitude of d is limited.
        running: the running statistics before this batch, one entry per feature, as
            `update_renorm` moves them; a mean of None is 0. No derivative passes through them.
        scale: one factor per feature (gamma), or None for 1.
        bias: one summand per feature (beta), or None for 0.
        rmax: limit of r, 1 or more; a number or a traced value.
        dmax: limit of d, 0 or more; a number or a traced value. `rmax=1, dmax=0` is batch norm.
        axis, where, epsilon, shift, axis_name, axis_index_groups, dtype, who: as in `batch_norm`;
            a good `shift` is the running mean.

    Returns:
        The result, of the shape of `x`, and the batch's `Moments`, one entry per feature, for
        `update_renorm`. A feature without evidence is normalized by the running statistics, within
        the limits.

    Raises:
        TypeError: as `batch_norm`, and for `running` that are no `Stats` or limits that are none.
        ValueError: as `batch_norm`; `running` that do not fit; a number `rmax` below 1 or `dmax`
            below 0.
        NameError: `axis_name` is not bound.

    Numerics:
        As `batch_norm`: one rounding, `x` and statistics kept for the backward pass, all
        derivatives. The batch's moments are taken once.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[4.0], [8.0]])
        >>> running = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.array([4.0]))
        >>> y, _ = jaxnorm.batch_renorm(x, running, rmax=3.0, dmax=5.0)
        >>> y.round(3).tolist(), jaxnorm.batch_norm_inference(x, running).round(3).tolist()
        ([[2.0], [4.0]], [[2.0], [4.0]])

    Source:
        Ioffe 2017 (arXiv:1702.03275), Algorithm 1.
    """
    x = checks.input_array(x, who)
    axis = ax.canonical_axes(axis, x.ndim, who)
    where = checked_mask(where, x.shape, who)
    scale = checks.feature_array(scale, x.shape, axis, who, "scale")
    bias = checks.feature_array(bias, x.shape, axis, who, "bias")
    stats_along(running, x.shape, axis, who)  # for what it refuses
    epsilon = checks.static_epsilon(epsilon, who)
    _check_limits(rmax, dmax, who)
    over = devices(axis_name, axis_index_groups, who)

    axes = ax.other_axes(axis, x.ndim)
    plan = Plan(axes, epsilon, over, x.dtype)
    along = shift_along(shift, x, axes, who)
    kept = evidence_by_plan(plan, lax.stop_gradient(x), where, along)
    batch = jax.tree.map(lambda leaf: leaf.squeeze(axes), kept)
    r, d = _corrections(batch.stats(), lax.stop_gradient(running), rmax, dmax, epsilon)
    return normalize(
        x,
        apply_affine(r, scale, None),
        apply_affine(d, scale, bias),
        axes=axes,
        axis=axis,
        where=where,
        epsilon=epsilon,
        evidence=batch,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        who=who,
    )


def _corrections(
    batch: Stats, running: Stats, rmax: ArrayLike, dmax: ArrayLike, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """r and d of the paper: what takes the batch's normalization to that by running statistics."""
    assert batch.mean is not None
    mean = jnp.zeros_like(running.var) if running.mean is None else running.mean
    real = precision.promote(batch.var.dtype, running.var.dtype)
    wide = precision.promote(real, batch.mean.dtype, mean.dtype)
    rmax, dmax = jnp.asarray(rmax).astype(real), jnp.asarray(dmax).astype(real)
    sigma_batch = jnp.sqrt(batch.var.astype(real) + epsilon)
    sigma = jnp.sqrt(running.var.astype(real) + epsilon)
    shift = (batch.mean.astype(wide) - mean.astype(wide)) / sigma.astype(wide)
    return jnp.clip(sigma_batch / sigma, 1 / rmax, rmax), _limited(shift, dmax)


def _limited(value: jax.Array, largest: jax.Array) -> jax.Array:
    """`value` with its magnitude clipped: for complex numbers the disc, not a square."""
    if not jnp.iscomplexobj(value):
        return jnp.clip(value, -largest, largest)
    magnitude = jnp.abs(value)
    factor = largest / jnp.where(magnitude > largest, magnitude, jnp.ones_like(magnitude))
    factor = jnp.where(magnitude > largest, factor, jnp.ones_like(factor))
    return value * factor.astype(value.dtype)


def _check_limits(rmax: Any, dmax: Any, who: str) -> None:
    """Raises TypeError for no numbers, ValueError for such that allow not even batch norm."""
    numbers: Any = (int, float, np.generic)
    for name, value, least in (("rmax", rmax, 1), ("dmax", dmax, 0)):
        if value is None or isinstance(value, str):
            raise TypeError(
                f"{who}: {name}={value!r} must be a number, or in a layer a schedule of the step. "
                f"Use rmax=3.0, dmax=5.0."
            )
        if isinstance(value, numbers) and not value >= least:
            raise ValueError(
                f"{who}: {name}={value} must be {least} or more: rmax=1, dmax=0 correct nothing, "
                f"larger limits correct more. Use rmax=3.0, dmax=5.0, or a schedule from 1 and 0."
            )


def update_renorm(
    old: Stats,
    batch: Moments,
    *,
    epsilon: float = 1e-5,
    momentum: ArrayLike | None = 0.99,
    updates: jax.Array | None = None,
    debias: bool = False,
    skip_nonfinite: bool = False,
) -> tuple[Stats, jax.Array | None]:
    """One step of the running statistics of batch renormalization: sigma is averaged, not var.

        mean += (1 - momentum) (mean_B - mean),   sigma += (1 - momentum) (sigma_B - sigma)

    Args:
        old: the running estimate, starting at `Stats(0, 1)`. Its variance stands for
            sigma = sqrt(var + epsilon), so that it can be used as any other.
        batch: evidence of the newest batch, of the same shape.
        epsilon: that of `batch_renorm`.
        momentum, updates, debias, skip_nonfinite: as in `update_running`.

    Returns:
        The new `Stats` and `updates`, as `update_running` does.

    Raises:
        TypeError, ValueError: as `update_running`.

    Numerics:
        The new variance is 0 or more, and that of an entry that does not move is the old one to the
        last bit.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> old = jaxnorm.Stats(mean=jnp.zeros(1), var=jnp.ones(1))
        >>> batch = jaxnorm.moments(jnp.array([[1.0], [7.0]]), axes=0)  # of mean 4 and sigma 3
        >>> new, _ = jaxnorm.update_renorm(old, batch, epsilon=0.0, momentum=0.5)
        >>> new.mean.tolist(), new.var.tolist()
        ([2.0], [4.0])

    Source:
        Ioffe 2017 (arXiv:1702.03275), Algorithm 1, the last two lines.
    """
    epsilon = checks.static_epsilon(epsilon, "update_renorm")
    new, updates = update_running(
        *_by_deviation(old, batch, epsilon),
        momentum=momentum,
        updates=updates,
        debias=debias,
        skip_nonfinite=skip_nonfinite,
    )
    return Stats(new.mean, _variance(new.var, old.var, epsilon)), updates


def _by_deviation(stored: Stats, batch: Moments, epsilon: float) -> tuple[Stats, Moments]:
    """Both with sigma in the place of the variance, to be averaged."""
    for kind, value in ((Stats, stored), (Moments, batch)):
        checks.of_kind(kind, value, "update_renorm", "Use update_renorm(stats, evidence).")
    check_running("update_renorm", mean=stored.mean, var=stored.var)
    return (
        Stats(stored.mean, jnp.sqrt(stored.var + epsilon)),
        Moments(batch.count, batch.mean, jnp.sqrt(batch.var + epsilon)),
    )


def _variance(deviation: jax.Array, old_var: jax.Array, epsilon: float) -> jax.Array:
    """The variance that stands for `deviation`; the old one, exactly, where that has not moved."""
    moved = deviation != jnp.sqrt(old_var + epsilon)
    return jnp.where(moved, jnp.maximum(jnp.square(deviation) - epsilon, 0), old_var)


def paper_rmax(step: ArrayLike) -> jax.Array:
    """The paper's limit of r: 1 for 5000 steps, then linearly to 3 at step 40000.

    Args:
        step: number of training steps so far.

    Returns:
        A float32 scalar.

    Example:
        >>> import jaxnorm
        >>> [float(jaxnorm.paper_rmax(step)) for step in (0, 5_000, 22_500, 40_000, 90_000)]
        [1.0, 1.0, 2.0, 3.0, 3.0]

    Source:
        Ioffe 2017 (arXiv:1702.03275), section 4.
    """
    return _ramp(step, begin=5_000, end=40_000, first=1.0, last=3.0)


def paper_dmax(step: ArrayLike) -> jax.Array:
    """The paper's limit of d: 0 for 5000 steps, then linearly to 5 at step 25000.

    Args:
        step: number of training steps so far.

    Returns:
        A float32 scalar.

    Example:
        >>> import jaxnorm
        >>> [float(jaxnorm.paper_dmax(step)) for step in (0, 5_000, 15_000, 25_000, 90_000)]
        [0.0, 0.0, 2.5, 5.0, 5.0]

    Source:
        Ioffe 2017 (arXiv:1702.03275), section 4.
    """
    return _ramp(step, begin=5_000, end=25_000, first=0.0, last=5.0)


def _ramp(step: ArrayLike, begin: int, end: int, first: float, last: float) -> jax.Array:
    """Linear from `first` at step `begin` to `last` at step `end`, constant before and after."""
    passed = (jnp.asarray(step, jnp.float32) - begin) / (end - begin)
    return first + (last - first) * jnp.clip(passed, 0, 1)


@dataclasses.dataclass(eq=False, repr=False)
class BatchRenorm(BatchNorm):
    """Batch renormalization with running statistics, for `jaxnorm.linen` and `jaxnorm.nnx`.

    Variables: those of `BatchNorm`, with the same names, shapes and dtypes, and `step` in
    `batch_stats` (NNX: `nnx.BatchStat`), a float32 scalar that counts the training calls that moved
    the statistics, up to 2**24; with `update_every` these are every k-th, and r, d and their limits
    go by the same running statistics and `step` in all k. A checkpoint of `BatchNorm` can be loaded
    in Linen: where `step` is missing, inference does without, and training starts the schedules
    anew and adds it. To train on inside `jax.lax.scan`, which wants a state that stays alike, add
    it before: `jnp.zeros(())`.

    Args:
        rmax: limit of r: a number, 1 or more, or a schedule of `step`, as Optax's are. 1 together
            with `dmax=0` is batch norm. Schedules get an int32, in an average of states the
            nearest one.
        dmax: limit of d: a number, 0 or more, or a schedule of `step`.
        running_var: `"biased"`, of the kind that the batch's is compared with.
        use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
            bias_init, scale_init, axis_name, axis_index_groups, unbound_axis, use_fast_variance,
            zero_centered_scale, debias, update_stats, skip_nonfinite, update_every,
            ghost_batch_size: as in `BatchNorm`.

    Raises:
        TypeError, ValueError, NameError: as `BatchNorm`; TypeError also for limits that are neither
            numbers nor schedules, ValueError for a number `rmax` below 1 or `dmax` below 0, and for
            `running_var="unbiased"`.

    Source:
        Ioffe 2017 (arXiv:1702.03275), Algorithm 1; section 4 for the schedules and the momentum.

    Differs:
        From the paper: `var` is stored, such that sqrt(var + epsilon) is the paper's running sigma;
        the statistics start at (0, 1). From Keras's `renorm`: limits from the start, where Keras
        has none. From the module for Flax that circulates in copies (sbx, CrossQ, purejaxql): it
        averages the variance, here as in the paper sigma is averaged. It normalizes by the mean
        `mean - d sqrt(var) / r` and the variance `var / r^2`, and adds epsilon to the latter, so
        that r and d are not those of Algorithm 1 where the variance is not far above epsilon, which
        is 1e-3 there. Its limits jump from (1, 0) to (3, 5) after a warm-up, 100,000 steps or
        1,000; these are ramps by default. Inference is the same. `import_flax` takes its state.
    """

    _: dataclasses.KW_ONLY
    rmax: float | Schedule = paper_rmax
    dmax: float | Schedule = paper_dmax

    def _check_options(self, who: str) -> None:
        super()._check_options(who)
        _check_limits(self.rmax, self.dmax, who)
        if self.running_var == "unbiased":
            raise ValueError(
                f"{who}: running_var='unbiased' would put a wrong factor into the ratio of the "
                f"batch's sigma and the running one. Use running_var='biased'."
            )

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        step = Slot("batch_stats", (), COUNT, jax.nn.initializers.zeros)
        return super()._slots(features, is_complex, who) | {"step": step}

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
        if use_running_average:
            mode = dict(initializing=initializing, update_stats=update_stats)
            return super()._transform(values, x, mask, dtype, who, use_running_average=True, **mode)
        stored = self._stored(values, x, who)
        # Schedules may look a step up in a table; an average of states holds fractions of steps.
        step = jnp.round(_step(values)).astype(jnp.int32)
        rmax, dmax = (limit(step) if callable(limit) else limit for limit in (self.rmax, self.dmax))
        y, batch = self._by_batches(batch_renorm, initializing)(
            x,
            stored,
            *self._affine(values, x),
            rmax=rmax,
            dmax=dmax,
            axis=self.axis,
            where=mask,
            epsilon=self.epsilon,
            shift=self._shift(stored.mean, stored.var),
            dtype=dtype,
            who=who,
            **self._mapped_axes(initializing, who),
        )
        if initializing or not update_stats:
            return y, {}
        return y, self._moved(values, stored, batch, who)

    def _blended(
        self, values: Values, stored: Stats, batch: Moments, ddof: int | None
    ) -> dict[str, jax.Array]:
        changed = super()._blended(values, *_by_deviation(stored, batch, self.epsilon), ddof)
        var = _variance(changed["var"], stored.var, self.epsilon)
        step = _step(values)
        return changed | {"var": var, "step": step + self._moves(batch).astype(step.dtype)}

    def _moves(self, batch: Moments) -> jax.Array:
        """Whether a batch moves any statistics, and so counts as a step."""
        moves = (batch.count > 0).any()
        if self.skip_nonfinite:
            moves &= all_finite(batch)
        return moves


def _step(values: Values) -> jax.Array:
    """How many steps the schedules have gone; none where a checkpoint does not say."""
    return values["step"] if "step" in values else jnp.zeros((), COUNT)
