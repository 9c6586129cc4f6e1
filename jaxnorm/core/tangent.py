"""The tangent of one normalization: a linear map, which is differentiated again as it stands.

With xhat = (x - mean) rstd, a = scale rstd, rstd = 1 / sqrt(var + epsilon) and averages <> by the
weights of the mask,

    dy = a dx + xhat (dscale - a <xhat dx>) + (dbias - a <dx>)

Written with this bracketing, its transpose needs two reductions, which are at once the gradients of
bias and scale: it is the closed form of the paper's backward pass,

    dbias = sum dy,   dscale = sum dy xhat,   dx = a (dy - dbias / n - xhat dscale / n)

About the origin (`use_mean=False`) the terms <dx> and dbias / n are absent.
"""

import jax
import jax.numpy as jnp

from jaxnorm.core import precision
from jaxnorm.core.masks import harmless, weighted
from jaxnorm.core.pooling import Parts
from jaxnorm.core.standardize import Plan


def tangent(plan: Plan, known, tangents):
    """The linear map from the tangents of (x, scale, bias) to those of (y, mean, var)."""
    x, scale, where, mean, rstd, share = known
    dx, dscale, dbias = tangents
    computed, may = precision.accumulation_dtype(x.dtype), harmless(x, where)
    xhat = _selected(x, may).astype(computed)
    xhat = (xhat if mean is None else xhat - mean) * rstd

    parameters = (p for p in (scale, dscale, dbias) if p is not None)
    wide = precision.promote(computed, *(p.dtype for p in parameters))
    slope = None if dscale is None else dscale.astype(wide)
    shift = None if dbias is None else dbias.astype(wide)
    dmean = None if mean is None else jnp.zeros_like(mean)
    dvar = jnp.zeros_like(rstd)
    terms = []
    if dx is not None:
        dx = _selected(dx, may).astype(computed)
        valid = weighted(dx, where)
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


def _selected(value: jax.Array, which: jax.Array | None) -> jax.Array:
    return value if which is None else jnp.where(which, value, jnp.zeros_like(value))


def _plus(value: jax.Array | None, term: jax.Array) -> jax.Array:
    return term if value is None else value + term
