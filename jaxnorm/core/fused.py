"""The derivative rule of moments + standardize + affine, equal to the specification.

The specification, differentiated by JAX, keeps several arrays of the size of `x` for the backward
pass and reduces over it five times. The linear map in `tangent.py` keeps `x`, and its transpose
reduces twice.

Four choices make it small, fast and whole:

- A rule for the tangent (`rules.py`), not for the gradient: JAX transposes and differentiates the
  map again, so that forward mode and every order work, and so that collectives inside it are
  transposed rightly in whatever mapped context it runs.
- The map is rematerialized (`jax.checkpoint`), or one primitive: what is kept for the backward pass
  is `x` in its own dtype and statistics, not xhat.
- Tangents that are zero stay symbolic: no work for an input that needs no gradient.
- Where nothing speaks against it, value, map and transpose are primitives, so that a kernel can
  take their place on the devices that it serves (`kernels/primitives.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core import axes as ax
from jaxnorm.core import rules
from jaxnorm.core.devices import all_varying, placement
from jaxnorm.core.kernels import primitives as kernels
from jaxnorm.core.masks import clean
from jaxnorm.core.moments import Moments, Stats, moments_keeping_axes
from jaxnorm.core.pooling import reciprocal
from jaxnorm.core.standardize import Plan, apply_affine, apply_stats, normalize_plainly
from jaxnorm.core.tangent import tangent

Hint = jax.Array | Moments | None
"""What is known of the moments beforehand: an estimate of the mean, the moments, or nothing."""


def _evidence(plan: Plan, x: jax.Array, where: jax.Array | None, hint: Hint) -> Moments:
    """The moments of `x` in the cheapest way that is right."""
    if isinstance(hint, Moments):
        return hint
    return moments_keeping_axes(x, plan.axes, where, plan.over, plan.use_mean, hint)


evidence_by_plan = jax.jit(_evidence, static_argnums=0, inline=True)
"""The moments alone, for what must know them before scale and bias; a hint for the rest."""


def _without_kernels(plan: Plan, x, scale, bias, where, hint: Hint) -> str | None:
    """Why the specification is taken on all devices; None if they may differ."""
    arrays = [one for one in (x, scale, bias) if one is not None]
    if plan.kernels == "never":
        return "kernels are not wanted"
    if where is not None:
        return "a mask"
    if plan.over is not None:
        return "statistics of several devices"
    if hint is not None:
        return "moments or an estimate of them are given"
    if any(jnp.iscomplexobj(one) or one.dtype.itemsize > 4 for one in arrays):
        return "complex numbers, or wider than float32"
    if not all(isinstance(size, int) for size in x.shape):
        return "symbolic sizes"
    if any(placement(x)):
        return "explicit mesh axes"
    if kernels.layout(plan, kernels.Inputs(x, scale, bias)) is None:
        return "neither rows nor slabs of examples"
    return None


def _fastest(
    plan: Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    hint: Hint,
) -> tuple[jax.Array, Moments]:
    why_not = _without_kernels(plan, x, scale, bias, where, hint)
    if why_not is None:
        y, mean, var = kernels.normalize(plan, kernels.Inputs(x, scale, bias))
        count = jnp.full_like(var, ax.extent(x.shape, plan.axes))
        return y, Moments(count, mean, var)
    with jax.named_scope(f"{kernels.SPECIFICATION}{why_not}"):
        evidence = _evidence(plan, x, where, hint)
        y = apply_stats(clean(x, where), evidence.stats(), plan.epsilon)
        return apply_affine(y, scale, bias).astype(plan.dtype), evidence


def _specified(plan: Plan, x, scale, bias, where, hint: Hint) -> tuple[jax.Array, Moments]:
    del hint
    return normalize_plainly(plan, x, scale, bias, where)


def _tangent(plan: Plan, primals, tangents):
    # By the function itself, whose derivatives of higher order are then this rule's as well.
    y, evidence = _normalize(plan, *primals)
    x, scale, bias, where, _ = primals
    # None stands for the tangent of an absent parameter, and from here on for any zero tangent.
    dx, dscale, dbias = tangents[:3]
    if _without_kernels(plan, *primals) is None:
        rstd = lax.rsqrt(evidence.var + plan.epsilon)
        known = kernels.Known(kernels.Inputs(x, scale, bias), evidence.mean, rstd)
        dy, dmean, dvar = kernels.push(plan, known, kernels.Inputs(dx, dscale, dbias))
    else:
        stats = evidence.stats()
        rstd = lax.rsqrt(stats.var + plan.epsilon)
        known = (x, scale, where, stats.mean, rstd, reciprocal(evidence.count))
        linear = jax.checkpoint(partial(tangent, plan), prevent_cse=False)
        dy, dmean, dvar = linear(known, (dx, dscale, dbias))
    return (y, evidence), (dy, Moments(jnp.zeros_like(evidence.count), dmean, dvar))


_normalize = rules.with_tangent(_fastest, _specified, _tangent)


@partial(jax.jit, static_argnums=0, inline=True)
def normalize_fused(
    plan: Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    hint: Hint = None,
) -> tuple[jax.Array, Moments]:
    """`normalize_plainly` with the derivative rule above, and with a hint of the moments."""
    if _without_kernels(plan, x, scale, bias, where, hint) is None:
        # Under `shard_map`, what gradients sum over devices is summed by the transpose of this.
        x, scale, bias = all_varying(x, scale, bias)
    return _normalize(plan, x, scale, bias, where, hint)


@partial(jax.jit, static_argnums=0, inline=True)
def normalize_by(
    plan: Plan,
    x: jax.Array,
    stats: Stats,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
) -> jax.Array:
    """Standardize by given statistics, scale and shift; only the inputs are kept for backward."""

    return rules.recomputed(partial(_plainly_by, plan), x, stats, scale, bias, where)


def _plainly_by(plan: Plan, x, stats: Stats, scale, bias, where) -> jax.Array:
    y = apply_stats(clean(x, where), stats, plan.epsilon)
    return apply_affine(y, scale, bias).astype(plan.dtype)
