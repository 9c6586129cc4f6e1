"""Batch renorm, AdaBN, switchable norm and IBN-Net as their papers say, in float64 NumPy."""

import numpy as np
from oracles import weighted_moments as moments


def known(count, mean, var):
    """Mean 0 and variance 1 where nothing was seen."""
    return np.where(count > 0, mean, 0), np.where(count > 0, var, 1)


def others(ndim, axes):
    return tuple(a for a in range(ndim) if a not in [b % ndim for b in axes])


def laid(value, ndim, axes):
    """An array of features along the feature axes; None is kept."""
    return None if value is None else np.expand_dims(np.asarray(value), others(ndim, axes))


def affine(y, scale, bias, axes=(-1,)):
    scale, bias = laid(scale, y.ndim, axes), laid(bias, y.ndim, axes)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def batch_renorm(
    x, running, scale=None, bias=None, *, rmax, dmax, axis=(-1,), where=None, epsilon=1e-5
):
    """Ioffe 2017, Algorithm 1, by running statistics (mean, var)."""
    x = np.asarray(x)
    mean, var = known(*moments(x, others(x.ndim, axis), where))
    running_mean, running_var = (laid(value, x.ndim, axis) for value in running)
    sigma_batch, sigma = np.sqrt(var + epsilon), np.sqrt(running_var + epsilon)
    r = np.maximum(np.minimum(sigma_batch / sigma, rmax), 1 / rmax)
    d = np.maximum(np.minimum((mean - running_mean) / sigma, dmax), -dmax)
    return affine((x - mean) / sigma_batch * r + d, scale, bias, axis)


def renorm_state(start, batches, average, epsilon=1e-5):
    """The last lines of Algorithm 1: (mean, var) after batches [batch, feature] of (mean, var).

    `average(start, values)` averages the means and the sigmas.
    """
    means, variances = zip(*batches, strict=True)
    sigma = average(np.sqrt(start[1] + epsilon), np.sqrt(np.stack(variances) + epsilon))
    return average(start[0], np.stack(means)), sigma**2 - epsilon


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum()


def switchable_norm(
    x,
    mean_weight,
    var_weight,
    scale=None,
    bias=None,
    *,
    axis=(-1,),
    batch_axis=(0,),
    where=None,
    epsilon=1e-5,
    running=None,
):
    """Luo et al. 2018, equation 3, each kind of statistics from the input itself."""
    x = np.asarray(x)
    features = [a % x.ndim for a in axis]
    space = others(x.ndim, (*features, *(a % x.ndim for a in batch_axis)))
    instance = known(*moments(x, space, where))
    layer = known(*moments(x, others(x.ndim, batch_axis), where))
    batch = known(*moments(x, others(x.ndim, features), where))
    if running is not None:
        batch = tuple(laid(value, x.ndim, features) for value in running)
    (m_in, v_in), (m_ln, v_ln), (m_bn, v_bn) = instance, layer, batch
    w, v = softmax(mean_weight), softmax(var_weight)
    mean = w[0] * m_in + w[1] * m_ln + w[2] * m_bn
    var = v[0] * v_in + v[1] * v_ln + v[2] * v_bn
    return affine((x - mean) / np.sqrt(var + epsilon), scale, bias, features)


def instance_norm(x, scale=None, bias=None, *, where=None, epsilon=1e-5):
    """Features last, examples first."""
    mean, var = known(*moments(x, tuple(range(1, x.ndim - 1)), where))
    return affine((x - mean) / np.sqrt(var + epsilon), scale, bias)


def ibn_a(x, scale=None, bias=None, *, size, where=None, epsilon=1e-5, running=None):
    """Pan et al. 2018, IBN-a: instance norm for the first `size` of the last axis."""
    x = np.asarray(x)
    where = np.broadcast_to(True if where is None else where, x.shape)
    first, rest = x[..., :size], x[..., size:]
    mean, var = known(*moments(rest, tuple(range(x.ndim - 1)), where[..., size:]))
    if running is not None:
        mean, var = running
    by_instance = instance_norm(first, where=where[..., :size], epsilon=epsilon)
    y = np.concatenate([by_instance, (rest - mean) / np.sqrt(var + epsilon)], -1)
    return affine(y, scale, bias)


def ibn_b(x, shortcut=None, scale=None, bias=None, *, where=None, epsilon=1e-5):
    """Pan et al. 2018, IBN-b."""
    x = np.asarray(x) if shortcut is None else np.asarray(x) + np.asarray(shortcut)
    return instance_norm(x, scale, bias, where=where, epsilon=epsilon)


# As rows of `subjects.py` want them: what the first training step of a layer returns.


def of_batch_renorm(x, params, mask=None, rmax=1.0, dmax=0.0):
    """By running statistics at their start; by default with the limits of the first step."""
    running = np.zeros(x.shape[-1]), np.ones(x.shape[-1])
    scale, bias = params["scale"], params["bias"]
    return batch_renorm(x, running, scale, bias, rmax=rmax, dmax=dmax, where=mask)


def of_adabn(x, params, mask=None, *, domains, separate_affine=False):
    """Batch norm of the first domain."""
    mean, var = known(*moments(x, others(x.ndim, (-1,)), mask))
    return affine((x - mean) / np.sqrt(var + 1e-5), params["scale"], params["bias"])


def of_switchable_norm(x, params, mask=None):
    names = ("mean_weight", "var_weight", "scale", "bias")
    return switchable_norm(x, *(params[name] for name in names), where=mask)


def of_ibn_a(x, params, mask=None, ratio=0.5):
    size = round(ratio * x.shape[-1])
    return ibn_a(x, params["scale"], params["bias"], size=size, where=mask)


def of_ibn_b(x, params, mask=None):
    return ibn_b(x, None, params["scale"], params["bias"], where=mask)
