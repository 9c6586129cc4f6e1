"""Each method in float64 NumPy, for any options of a random draw: `oracle(draw, x, ...)`.

Put together from what the papers' oracles share. Statistics are taken of `seen`, which is `x`, or
is held where `x` moves; what is a constant for the derivative by definition (r and d of batch
renorm, singular vectors) is taken of `base`.
"""

import batch_family_oracles as family
import numpy as np
import weight_oracles
import whitening_oracles as whitening


def estimates(seen, axes, weights, use_mean=True):
    """Mean and variance over `axes`; (0, 1) without evidence."""
    if use_mean:
        return family.known(*family.moments(seen, axes, weights))
    count, square, _ = family.moments(seen**2, axes, weights)
    return 0.0, np.where(count > 0, square, 1)


def standardized(x, mean, var, epsilon):
    return (x - mean) / np.sqrt(var + epsilon)


def batch_norm(draw, x, seen, base, weights, running):
    over = family.others(x.ndim, draw.features)
    return standardized(x, *estimates(seen, over, weights), draw.epsilon)


def layer_norm(draw, x, seen, base, weights, running):
    stats = estimates(seen, draw.reduced, weights, use_mean=draw.method != "RMSNorm")
    return standardized(x, *stats, draw.epsilon)


def instance_norm(draw, x, seen, base, weights, running):
    over = family.others(x.ndim, (0, *draw.features))
    return standardized(x, *estimates(seen, over, weights), draw.epsilon)


def group_norm(draw, x, seen, base, weights, running):
    (axis,) = draw.features

    def split(array):
        """The features of a group along a new last axis."""
        array = np.moveaxis(array, axis, -1)
        return array.reshape(*array.shape[:-1], draw.groups, -1)

    kept = [a for a in range(x.ndim) if a != axis]
    over = (*(kept.index(a) for a in draw.reduced if a != axis), x.ndim)
    y = standardized(split(x), *estimates(split(seen), over, split(weights)), draw.epsilon)
    return np.moveaxis(y.reshape(*y.shape[:-2], -1), -1, axis)


def batch_renorm(draw, x, seen, base, weights, running):
    over = family.others(x.ndim, draw.features)
    mean, var = (family.laid(value, x.ndim, draw.features) for value in running)
    base_mean, base_var = estimates(base, over, weights)
    sigma, base_sigma = np.sqrt(var + draw.epsilon), np.sqrt(base_var + draw.epsilon)
    rmax, dmax = draw.options["rmax"], draw.options["dmax"]
    r = np.clip(base_sigma / sigma, 1 / rmax, rmax)
    d = np.clip((base_mean - mean) / sigma, -dmax, dmax)
    return standardized(x, *estimates(seen, over, weights), draw.epsilon) * r + d


def switchable_norm(draw, x, seen, base, weights, running, params):
    space = family.others(x.ndim, (0, *draw.features))
    instance = estimates(seen, space, weights)
    layer = estimates(seen, family.others(x.ndim, (0,)), weights)
    batch = estimates(seen, family.others(x.ndim, draw.features), weights)
    return _mixed(draw, x, (instance, layer, batch), params)


def _mixed(draw, x, kinds, params):
    shares = [family.softmax(params[name]) for name in ("mean_weight", "var_weight")]
    mean, var = (
        sum(share * kind[i] for share, kind in zip(shares[i], kinds, strict=True)) for i in (0, 1)
    )
    return standardized(x, mean, var, draw.epsilon)


def ibn_a(draw, x, seen, base, weights, running):
    (axis,) = draw.features
    size = round(draw.options["ratio"] * x.shape[axis])
    first, rest = (
        [np.split(array, [size], axis)[part] for array in (x, seen, base, weights)]
        for part in (0, 1)
    )
    parts = instance_norm(draw, *first, None), batch_norm(draw, *rest, None)
    return np.concatenate(parts, axis)


def whitened(draw, x, seen, base, weights, running):
    (axis,) = draw.features
    _, mean, cov = whitening.comoments(seen, axis=axis, groups=draw.groups, where=weights)
    if not weights.any():
        cov = np.broadcast_to(np.eye(cov.shape[-1]), cov.shape)
    return _whitened_by(draw, x, (mean, cov))


def _whitened_by(draw, x, stats):
    steps = draw.options.get("n_steps")

    def matrix_of(cov):
        if steps is None:
            return whitening.zca(cov, draw.epsilon)
        return whitening.newton(cov, draw.epsilon, steps)

    (axis,) = draw.features
    return whitening.whiten(x, matrix_of, axis=axis, groups=draw.groups, stats=stats)


def weight_norm(draw, w, seen, base, weights, running):
    inputs = family.others(w.ndim, draw.features)
    return w / np.sqrt((seen**2).sum(inputs, keepdims=True) + draw.epsilon)


def weight_standardization(draw, w, seen, base, weights, running):
    inputs = family.others(w.ndim, draw.features)
    mean, var = seen.mean(inputs, keepdims=True), seen.var(inputs, keepdims=True)
    if draw.method == "WeightStandardization":
        return standardized(w, mean, var, draw.epsilon)
    fan_in = np.prod([w.shape[a] for a in inputs])
    return (w - mean) / np.sqrt(np.maximum(fan_in * var, draw.epsilon))


def spectral_norm(draw, w, seen, base, weights, running):
    steps = draw.options["n_steps"]
    size = np.abs(base).max()
    # Epsilon is added to the squares of small weights once their entries are near 1.
    near_one = base / size if size < 2**-8 else base
    _, u, _, v = weight_oracles.spectral_norm(
        near_one, draw.first_vector, n_steps=steps, epsilon=draw.epsilon
    )
    return w / (v @ seen.reshape(-1, seen.shape[-1]) @ u)


TRAINING = {
    "WeightNorm": weight_norm,
    "WeightStandardization": weight_standardization,
    "ScaledWeightStandardization": weight_standardization,
    "SpectralNorm": spectral_norm,
    "BatchNorm": batch_norm,
    "AdaBN": batch_norm,
    "LayerNorm": layer_norm,
    "RMSNorm": layer_norm,
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
    "IBNb": instance_norm,
    "BatchRenorm": batch_renorm,
    "DecorrelatedBatchNorm": whitened,
    "IterNorm": whitened,
    "SwitchableNorm": switchable_norm,
    "IBNa": ibn_a,
}


def by_running(draw, x, seen, weights, running, params):
    """What inference normalizes by the running statistics, before the affine map."""
    if draw.whitens:
        size = x.shape[draw.features[0]] // draw.groups
        return _whitened_by(draw, x, (running[0].reshape(-1, size), running[1]))
    if draw.method == "IBNa":
        (axis,) = draw.features
        size = x.shape[axis] - len(running[0])
        first, rest = np.split(x, [size], axis)
        of_first = [np.split(array, [size], axis)[0] for array in (seen, seen, weights)]
        stats = (family.laid(value, x.ndim, (axis,)) for value in running)
        y = instance_norm(draw, first, *of_first, None)
        return np.concatenate([y, standardized(rest, *stats, draw.epsilon)], axis)
    stats = tuple(family.laid(value, x.ndim, draw.features) for value in running)
    if draw.method == "SwitchableNorm":
        kinds = [
            estimates(seen, family.others(x.ndim, axes), weights)
            for axes in ((0, *draw.features), (0,))
        ]
        return _mixed(draw, x, (*kinds, stats), params)
    return standardized(x, *stats, draw.epsilon)


def evidence(draw, x, weights):
    """Count, mean and variance (covariance) that move the running statistics."""
    if draw.whitens:
        (axis,) = draw.features
        count, mean, cov = whitening.comoments(x, axis=axis, groups=draw.groups, where=weights)
        return count, mean.reshape(-1), cov
    if draw.method == "InstanceNorm":
        over = family.others(x.ndim, (0, *draw.features))
        count, mean, var = (a.squeeze(over) for a in family.moments(x, over, weights))
        ddof = int(draw.options.get("running_var") == "unbiased")
        var = var * np.where(count > ddof, count / np.where(count > ddof, count - ddof, 1), 0)
        known = count > ddof
        total = known.sum(0)
        mean, var = (np.where(known, a, 0).sum(0) / np.maximum(total, 1) for a in (mean, var))
        return total, mean, var
    if draw.method == "IBNa":
        (axis,) = draw.features
        size = round(draw.options["ratio"] * x.shape[axis])
        x, weights = (np.split(array, [size], axis)[1] for array in (x, weights))
    over = family.others(x.ndim, draw.features)
    return tuple(array.squeeze(over) for array in family.moments(x, over, weights))


def moved(draw, old, seen, updates):
    """The running statistics after one step by the evidence `seen`, and the count of steps."""
    count, *new = seen
    options = draw.options
    ddof = 1 if options.get("running_var") == "unbiased" else 0
    if draw.method == "InstanceNorm":
        ddof = 0  # taken off in each example
    elif ddof:
        new[1] = new[1] * _along(count / np.where(count > 1, count - 1, 1), new[1])
    moves = count > ddof
    momentum = options.get("momentum", draw.momentum)
    if momentum is None:
        take = 1 / (updates + 1)
    elif options.get("debias"):
        take = (1 - momentum) / (1 - momentum ** (updates + 1))
    else:
        take = 1 - momentum
    take = np.broadcast_to(take, count.shape)
    if draw.method == "BatchRenorm":
        old, new = [(m, np.sqrt(v + draw.epsilon)) for m, v in (old, new)]
    result = []
    for one, other in zip(old, new, strict=True):
        share = _along(np.where(moves, take, 0), one)
        result.append(one + share * (np.where(share > 0, other, one) - one))
    if draw.method == "BatchRenorm":
        result[1] = np.maximum(result[1] ** 2 - draw.epsilon, 0)
    return result, updates + moves


def _along(per_count, array):
    """One value a count (of a feature, or of a group) along an array of statistics."""
    if per_count.shape == array.shape:
        return per_count
    if array.ndim == 1:
        return np.repeat(per_count, len(array) // len(per_count))
    return per_count[:, None, None]


def oracle(draw, x, params, weights, running, *, seen=None, base=None, inference=False):
    """What a layer returns, each batch of what is normalized together by itself."""
    seen, base = (x if other is None else other for other in (seen, base))
    y = np.zeros(x.shape)
    for label in np.unique(draw.labels):
        own = np.flatnonzero(draw.labels == label)
        arrays = [np.take(array, own, draw.split) for array in (x, seen, base, weights)]
        if inference:
            part = by_running(draw, *arrays[:2], arrays[3], running, params)
        elif draw.method == "SwitchableNorm":
            part = switchable_norm(draw, *arrays, running, params)
        else:
            part = TRAINING[draw.method](draw, *arrays, running)
        y[draw.at(own)] = part
    scale = params.get("scale")
    if scale is not None:
        scale = scale + draw.options.get("zero_centered_scale", False)
    return family.affine(y, scale, params.get("bias"), draw.features)
