"""What the papers say, in float64 NumPy. Shares no code with the library."""

import numpy as np


def batch_norm(x, scale=None, bias=None, *, axis=(-1,), where=None, epsilon=1e-5):
    """Ioffe & Szegedy 2015, Algorithm 1, with a mask or weights: returns y, count, mean, var."""
    x = np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    axis = sorted(a % x.ndim for a in axis)
    others = tuple(a for a in range(x.ndim) if a not in axis)
    count, mean, var = weighted_moments(x, others, where)
    used = np.where(count > 0, var, 1)
    y = (x - mean) / np.sqrt(used + epsilon)
    features = [x.shape[a] if a in axis else 1 for a in range(x.ndim)]
    if scale is not None:
        y = y * np.asarray(scale).reshape(features)
    if bias is not None:
        y = y + np.asarray(bias).reshape(features)
    return y, count.squeeze(others), mean.squeeze(others), var.squeeze(others)


def weighted_moments(x, axes, where=None):
    """Count, mean and biased variance over `axes`, which stay with size 1.

    Weighted: n = sum w, mean = sum w x / n, var = sum w |x - mean|^2 / n; 0 where n is.
    """
    weight = np.broadcast_to(1.0 if where is None else np.asarray(where, np.float64), x.shape)
    count = weight.sum(axes, keepdims=True)
    some = np.where(count > 0, count, 1)
    mean = (weight * np.where(weight > 0, x, 0)).sum(axes, keepdims=True) / some
    square = np.where(weight > 0, np.abs(x - mean) ** 2, 0)
    return count, mean, (weight * square).sum(axes, keepdims=True) / some


def standardized(x, axes, *, where=None, epsilon, use_mean=True):
    """(x - mean) / sqrt(var + epsilon) over `axes`; about the origin without the mean.

    Of what has no valid element, the mean is 0 and the variance 1.
    """
    x = np.asarray(x, np.float64)
    count, mean, var = weighted_moments(x, axes, where)
    if not use_mean:
        mean, var = 0.0, weighted_moments(x**2, axes, where)[1]
    return (x - mean) / np.sqrt(np.where(count > 0, var, 1) + epsilon)


def scaled(y, params, axes=(-1,), zero_centered_scale=False):
    """y * scale + bias, or y * (1 + scale) + bias, the parameters lying along `axes`."""
    axes = [a % y.ndim for a in axes]
    shape = [size if a in axes else 1 for a, size in enumerate(y.shape)]
    if "scale" in params:
        y = y * (np.asarray(params["scale"], np.float64).reshape(shape) + zero_centered_scale)
    if "bias" in params:
        y = y + np.asarray(params["bias"], np.float64).reshape(shape)
    return y


def of_batch_norm(x, params, where=None, *, epsilon=1e-5, **_):
    """Ioffe & Szegedy 2015, Algorithm 1."""
    axes = tuple(range(x.ndim - 1))
    return scaled(standardized(x, axes, where=where, epsilon=epsilon), params)


def of_layer_norm(
    x, params, where=None, *, reduction_axes=(-1,), feature_axes=(-1,), epsilon=1e-6, **_
):
    """Ba, Kiros & Hinton 2016, equations 3 and 4."""
    y = standardized(x, tuple(reduction_axes), where=where, epsilon=epsilon)
    return scaled(y, params, feature_axes)


def of_rms_norm(x, params, where=None, *, zero_centered_scale=False, epsilon=1e-6, **_):
    """Zhang & Sennrich 2019, equation 4."""
    y = standardized(x, (-1,), where=where, epsilon=epsilon, use_mean=False)
    return scaled(y, params, zero_centered_scale=zero_centered_scale)


def of_group_norm(
    x, params, where=None, *, num_groups=32, group_size=None, reduction_axes=None, epsilon=1e-6, **_
):
    """Wu & He 2018, equation 7: each group of channels by itself."""
    size = group_size or x.shape[-1] // num_groups
    spatial = range(1, x.ndim - 1) if reduction_axes is None else reduction_axes[:-1]
    where = None if where is None else np.broadcast_to(where, x.shape)
    groups = [
        standardized(
            x[..., i : i + size],
            (*spatial, -1),
            where=None if where is None else where[..., i : i + size],
            epsilon=epsilon,
        )
        for i in range(0, x.shape[-1], size)
    ]
    return scaled(np.concatenate(groups, -1), params)


def of_instance_norm(x, params, where=None, *, epsilon=1e-6, **_):
    """Ulyanov, Vedaldi & Lempitsky 2016, section 2."""
    axes = tuple(range(1, x.ndim - 1))
    return scaled(standardized(x, axes, where=where, epsilon=epsilon), params)
