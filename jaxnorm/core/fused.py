"""The derivative rule of moments + standardize + affine, equal to the specification.

The specification, differentiated by JAX, keeps several arrays of the size of `x` for the backward
pass and reduces over it five times. With xhat = (x - mean) rstd, a = scale rstd, rstd = 1 /
sqrt(var + epsilon) and averages over the valid elements, the tangent is the linear map

    dy = a dx + xhat (dscale - a <xhat dx>) + (dbias - a <dx>)

Written with this bracketing, its transpose needs two reductions, which are at once the gradients of
bias and scale: it is the closed form of the paper's backward pass,

    dbias = sum dy,   dscale = sum dy xhat,   dx = a (dy - dbias / n - xhat dscale / n)

About the origin (`use_mean=False`) the terms <dx> and dbias / n are absent.

Three choices make it small, fast and whole:

- A rule for the tangent (`custom_jvp`), not for the gradient: JAX transposes and differentiates the
  map again, so that forward mode and every order work, and so that collectives inside it are
  transposed rightly in whatever mapped context it runs.
- The map is rematerialized (`jax.checkpoint`): what is kept for the backward pass is `x` in its own
  dtype and statistics, not xhat.
- Tangents that are zero stay symbolic: no work for an input that needs no gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxnorm.core import precision
from jaxnorm.core.moments import Moments, Stats, clean, harmless, moments_keeping_axes
from jaxnorm.core.pooling import Parts, reciprocal
from jaxnorm.core.standardize import Plan, apply_affine, apply_stats

Hint = jax.Array | Moments | None
"""What is known of the moments beforehand: an estimate of the mean, the moments, or nothing."""


def _evidence(plan: Plan, x: jax.Array, where: jax.Array | None, hint: Hint) -> Moments:
    """The moments of `x` in the cheapest way that is right."""
    if isinstance(hint, Moments):
        return hint
    options = plan.over, plan.use_mean, hint, plan.epsilon
    return moments_keeping_axes(x, plan.axes, where, *options)


evidence_by_plan = jax.jit(_evidence, static_argnums=0, inline=True)
"""The moments alone, for what must know them before scale and bias; a hint for the rest."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(
    plan: Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    hint: Hint = None,
) -> tuple[jax.Array, Moments]:
    evidence = _evidence(plan, x, where, hint)
    y = apply_stats(clean(x, where), evidence.stats(), plan.epsilon)
    return apply_affine(y, scale, bias).astype(plan.dtype), evidence


def _rule(plan: Plan, primals, tangents):
    # By the function itself, whose derivatives of higher order are then this rule's as well.
    y, evidence = _normalize(plan, *primals)
    x, scale, _, where, _ = primals
    stats = evidence.stats()
    rstd = lax.rsqrt(stats.var + plan.epsilon)
    # None stands for the tangent of an absent parameter, and from here on for any zero tangent.
    dx, dscale, dbias = (None if isinstance(t, SymbolicZero) else t for t in tangents[:3])
    tangent = jax.checkpoint(partial(_tangent, plan), prevent_cse=False)
    known = (x, scale, where, stats.mean, rstd, reciprocal(evidence.count))
    dy, dmean, dvar = tangent(known, (dx, dscale, dbias))
    return (y, evidence), (dy, Moments(jnp.zeros_like(evidence.count), dmean, dvar))


_normalize.defjvp(_rule, symbolic_zeros=True)


def _tangent(plan: Plan, known, tangents):
    """The linear map from the tangents of (x, scale, bias) to those of (y, mean, var)."""
    x, scale, where, mean, rstd, share = known
    dx, dscale, dbias = tangents
    computed = precision.accumulation_dtype(x.dtype)
    xhat = _selected(x, harmless(x, where)).astype(computed)
    xhat = (xhat if mean is None else xhat - mean) * rstd

    parameters = (p for p in (scale, dscale, dbias) if p is not None)
    wide = precision.promote(computed, *(p.dtype for p in parameters))
    slope = None if dscale is None else dscale.astype(wide)
    shift = None if dbias is None else dbias.astype(wide)
    dmean = None if mean is None else jnp.zeros_like(mean)
    dvar = jnp.zeros_like(rstd)
    terms = []
    if dx is not None:
        dx = _selected(dx, harmless(x, where)).astype(computed)
        valid = _selected(dx, where)
        parts = Parts(x.shape, plan.axes, plan.over)
        factor = rstd.astype(wide) if scale is None else rstd.astype(wide) * scale.astype(wide)
        products = precision.real_product(xhat, valid)
        if mean is None:
            (along,) = parts.sum(products)
        else:
            along, total = parts.sum(products, valid)
            dmean = total * share
            shift = _plus(shift, -factor * dmean.astype(wide))
        along *= share
        dvar = 2 * along / rstd
        slope = _plus(slope, -factor * along.astype(wide))
        terms.append(factor * dx.astype(wide))
    if slope is not None:
        terms.append(xhat.astype(wide) * slope)
    if shift is not None:
        # Spread by the addition: under `shard_map` its transpose sums before it communicates.
        terms.append(jnp.zeros_like(xhat, dtype=wide) + shift)
    return sum(terms[1:], terms[0]).astype(plan.dtype), dmean, dvar


def _selected(value: jax.Array, where: jax.Array | None) -> jax.Array:
    return value if where is None else jnp.where(where, value, jnp.zeros_like(value))


def _plus(value: jax.Array | None, term: jax.Array) -> jax.Array:
    return term if value is None else value + term


normalize_fused = jax.jit(_normalize, static_argnums=0, inline=True)
"""`normalize_plainly` with the derivative rule above, and with a hint of the moments."""


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

    def plainly(x, stats, scale, bias):
        y = apply_stats(clean(x, where), stats, plan.epsilon)
        return apply_affine(y, scale, bias).astype(plan.dtype)

    return jax.checkpoint(plainly, prevent_cse=False)(x, stats, scale, bias)
