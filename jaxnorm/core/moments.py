"""Evidence and estimates: `Moments` merge exactly, `Stats` are what a normalization uses.

How evidence is pooled is one formula, in `pooling.py`. About the origin (RMS norm) there is no
mean, `mean=None`, and the variance is the mean of |x|^2.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.devices import AxisName, Devices, devices, placed, placement
from jaxnorm.core.pooling import Parts, pooled, pooled_given, reciprocal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
    """An estimate of mean and variance: what a normalization uses, and what a layer stores.

    Estimates can be blended (`ema`), corrected (`bessel`) and frozen. They carry no count, so they
    cannot be merged: for that, keep the evidence, `Moments`.

    Attributes:
        mean: float32 or wider, or complex; any shape. None about the origin.
        var: float32 or wider, of the shape of `mean`.
    """

    mean: jax.Array | None
    var: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Evidence about a distribution: how many values were seen, their mean and their variance.

    Moments of disjoint data merge exactly, with `merge` and `pool`, however unequal their counts; a
    count of 0 is allowed and changes nothing.

    Attributes:
        count: number of values behind each entry; float32 or wider, of the shape of `var`.
        mean: their mean; float32 or wider, or complex. None about the origin.
        var: their biased variance, the mean of |x - mean|^2, or of |x|^2 about the origin; float32
            or wider.
    """

    count: jax.Array
    mean: jax.Array | None
    var: jax.Array

    def stats(self, ddof: int = 0) -> Stats:
        """The estimate that this evidence supports.

        Args:
            ddof: degrees of freedom taken off the count in the variance's denominator: 0 for the
                biased variance, by which a batch is normalized, 1 for Bessel's correction.

        Returns:
            `Stats`, with mean 0 and variance 1 wherever the count does not exceed `ddof`.

        Example:
            >>> import jax.numpy as jnp, jaxnorm
            >>> evidence = jaxnorm.moments(jnp.array([1.0, 2.0, 3.0, 6.0]), axes=0)
            >>> float(evidence.stats().var), round(float(evidence.stats(ddof=1).var), 3)
            (3.5, 4.667)
        """
        known = jnp.asarray(self.count) > ddof
        correction = self.count * reciprocal(self.count - ddof) if ddof else jnp.ones_like(self.var)
        return Stats(
            mean=None
            if self.mean is None
            else jnp.where(known, self.mean, jnp.zeros_like(self.mean)),
            var=jnp.where(known, self.var * correction, jnp.ones_like(self.var)),
        )


def harmless(x: jax.Array, where: jax.Array | None) -> jax.Array | None:
    """Which elements of `x` may take part; None for all, which is the case without a mask.

    Under the mask (where it is False) NaN, infinities and huge numbers may not. Huge is what could
    overflow when it is normalized and multiplied with itself: 0 times the resulting infinity would
    be NaN. Other masked elements may, since a layer normalizes them as well.
    """
    if where is None:
        return None
    limit = float(jnp.finfo(precision.accumulation_dtype(x.dtype)).max) ** 0.25

    def moderate(part: jax.Array) -> jax.Array:
        largest = min(limit, float(jnp.finfo(part.dtype).max))
        return (part >= -largest) & (part <= largest)

    return where | (moderate(x.real) & moderate(x.imag) if jnp.iscomplexobj(x) else moderate(x))


def clean(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """`x` with 0 in place of the elements that are not `harmless`."""
    selected = harmless(x, where)
    return x if selected is None else jnp.where(selected, x, jnp.zeros_like(x))


def moments_keeping_axes(
    x: jax.Array,
    axes: tuple[int, ...],
    where: jax.Array | None,
    over: Devices | None,
    use_mean: bool,
    shift: jax.Array | None = None,
    epsilon: float = 0.0,
) -> Moments:
    """`moments` after the door: `axes` canonical and kept as size 1, as in `shift`."""

    def look():
        wide = clean(x, where).astype(precision.accumulation_dtype(x.dtype))
        real = precision.real_dtype(wide.dtype)
        count = 1.0 if where is None else where.astype(real)
        if not use_mean:
            return count, None, precision.abs_square(wide)
        return count, wide, 0.0

    parts = Parts(x.shape, axes, over)
    return Moments(*pooled(look, parts, shift if use_mean else None, epsilon))


def shift_along(
    shift: ArrayLike | None, x: jax.Array, axes: tuple[int, ...], who: str
) -> jax.Array | None:
    """A checked estimate of the mean of `x` along `axes`, which it has with size 1."""
    if shift is None:
        return None
    if jnp.ndim(shift) == 0:
        return jnp.full((1,) * x.ndim, shift, precision.accumulation_dtype(x.dtype))
    kept = ax.other_axes(axes, x.ndim)
    checked = checks.feature_array(shift, x.shape, kept, who, "shift", "axes")
    if checked is None:
        return None
    lies = (None if axis in axes else names for axis, names in enumerate(placement(x)))
    return placed(ax.lay_along(checked, kept, x.ndim), tuple(lies))


def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    *,
    where: ArrayLike | None = None,
    use_mean: bool = True,
    shift: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    keepdims: bool = False,
) -> Moments:
    """Count, mean and biased variance of `x` along `axes`, pooled over devices if asked.

    Args:
        x: array of any shape; float, bfloat16, or complex. Integers are refused.
        axes: the axes that are reduced.
        where: boolean mask with as many axes as `x`, each of the size of `x` or 1; True counts.
            NaN and infinities under the mask reach neither the result nor its derivatives.
        use_mean: False takes the variance about the origin, the mean of |x|^2, and no mean.
        shift: an estimate of the mean, such as a running mean: a number, or an array of the shape
            of the result. It decides what the moments cost, not what they are: within 8 standard
            deviations of the mean, one pass over the data and one collective suffice, otherwise
            three. None takes two, and so do fewer than 32768 numbers on one device.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over which
            the evidence is pooled, weighted by the number of valid elements on each device.
        axis_index_groups: groups of indices along `axis_name`; each pools on its own.
        keepdims: whether reduced axes stay, with size 1.

    Returns:
        `Moments` of the shape of `x` without `axes`, in float32 or wider. Count, mean and variance
        are 0 where nothing is valid.

    Raises:
        TypeError: `x` is neither floating point nor complex, or the mask is floating point.
        ValueError: axes out of range or named twice, a mask that does not fit.
        NameError: `axis_name` is not bound.

    Numerics:
        Accumulates in float32 or wider. The variance keeps its digits at means of many standard
        deviations, where E[x^2] - E[x]^2 loses them all.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [5.0, jnp.nan]])
        >>> seen = jaxnorm.moments(x, axes=0, where=jnp.array([[True], [True], [False]]))
        >>> seen.count.tolist(), seen.mean.tolist(), seen.var.tolist()
        ([2.0, 2.0], [2.0, 20.0], [1.0, 100.0])

    Source:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for the merge
        of two parts.
    """
    who = "moments"
    x = checks.inexact_array(x, who)
    axes = ax.canonical_axes(axes, x.ndim, who, "axes")
    where = checks.boolean_mask(where, x.shape, who)
    over = devices(axis_name, axis_index_groups, who)
    kept = _jitted_moments(x, axes, where, over, use_mean, shift_along(shift, x, axes, who))
    return kept if keepdims else jax.tree.map(lambda leaf: leaf.squeeze(axes), kept)


@jax.jit(static_argnums=(1, 3, 4), inline=True)
def _jitted_moments(
    x: jax.Array,
    axes: tuple[int, ...],
    where: jax.Array | None,
    over: Devices | None,
    use_mean: bool,
    shift: jax.Array | None,
) -> Moments:
    return moments_keeping_axes(x, axes, where, over, use_mean, shift)


def pool(
    stacked: Moments,
    axes: int | Sequence[int] | None = None,
    *,
    shift: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Pools `Moments` along axes of their arrays, over devices, or both.

    Args:
        stacked: evidence whose parts lie along `axes`, on the devices of `axis_name`, or both.
        axes: axes to pool, which disappear; None for none of them.
        shift, axis_name, axis_index_groups: as in `moments`.

    Returns:
        `Moments` of everything together.

    Raises:
        ValueError: an axis out of range or named twice.
        NameError: `axis_name` is not bound.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> batches = jnp.arange(8.0).reshape(2, 4)
        >>> each = jax.vmap(lambda batch: jaxnorm.moments(batch, axes=0))(batches)
        >>> float(jaxnorm.pool(each, axes=0).var), float(batches.var())
        (5.25, 5.25)
    """
    who = "pool"
    over = devices(axis_name, axis_index_groups, who)
    each = _full(stacked, who)
    axes = () if axes is None else ax.canonical_axes(axes, each.var.ndim, who, "axes")
    shift = shift_along(shift, each.var, axes, who)
    parts = Parts(each.var.shape, axes, over)
    together = Moments(*pooled_given(each.count, each.mean, each.var, parts, shift))
    return jax.tree.map(lambda leaf: leaf.squeeze(axes), together)


def _full(evidence: Moments, who: str) -> Moments:
    """Arrays of one shape: a count given by hand may be one number for all features."""
    checks.of_kind(
        Moments, evidence, who, "Evidence comes from jaxnorm.moments(x, axes); Stats have no count."
    )
    mean = None if evidence.mean is None else jnp.asarray(evidence.mean)
    whole = jnp.asarray(evidence.var) if mean is None else mean
    real = precision.real_dtype(whole.dtype)
    count, var = (
        jnp.broadcast_to(jnp.asarray(leaf, real), whole.shape)
        for leaf in (evidence.count, evidence.var)
    )
    return Moments(count, mean, var)


def merge(*parts: Moments) -> Moments:
    """`Moments` of several disjoint sets of data together, exactly.

    Args:
        *parts: evidence of the same shape, at least one.

    Returns:
        `Moments` of that shape. The order of `parts` matters only by rounding.

    Raises:
        TypeError: a part is no `Moments`.
        ValueError: no evidence, of different shapes, or some about the origin and some not.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> first = jaxnorm.moments(jnp.array([0.0]), axes=0)
        >>> second = jaxnorm.moments(jnp.array([3.0, 3.0, 6.0]), axes=0)
        >>> together = jaxnorm.merge(first, second)
        >>> float(together.count), float(together.mean), float(together.var)
        (4.0, 3.0, 4.5)
    """
    parts = tuple(_full(part, "merge") for part in parts)
    shapes = {part.var.shape for part in parts}
    if len(shapes) != 1:
        found = f"found the shapes {sorted(shapes)}" if parts else "found none"
        raise ValueError(
            f"merge: needs evidence of one shape, {found}. Each part must come from "
            f"jaxnorm.moments(x, axes) over the same features."
        )
    without_mean = sum(part.mean is None for part in parts)
    if without_mean not in (0, len(parts)):
        raise ValueError(
            f"merge: {without_mean} of {len(parts)} parts are about the origin and have no mean. "
            f"Take all with the same choice: jaxnorm.moments(x, axes, use_mean=True)."
        )
    return pool(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), axes=0)
