"""What the papers say, in float64 NumPy. Shares no code with the library."""

import numpy as np


def batch_norm(x, scale=None, bias=None, *, axis=(-1,), where=None, epsilon=1e-5):
    """Ioffe & Szegedy 2015, Algorithm 1, with a mask: returns y, count, mean, var."""
    x = np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    axis = sorted(a % x.ndim for a in axis)
    others = tuple(a for a in range(x.ndim) if a not in axis)
    valid = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    count = valid.sum(others, keepdims=True)
    some = np.maximum(count, 1)
    mean = np.where(valid, x, 0).sum(others, keepdims=True) / some
    var = (np.where(valid, np.abs(x - mean), 0) ** 2).sum(others, keepdims=True) / some
    used = np.where(count > 0, var, 1)
    y = (x - mean) / np.sqrt(used + epsilon)
    features = [x.shape[a] if a in axis else 1 for a in range(x.ndim)]
    if scale is not None:
        y = y * np.asarray(scale).reshape(features)
    if bias is not None:
        y = y + np.asarray(bias).reshape(features)
    return y, count.squeeze(others), mean.squeeze(others), var.squeeze(others)


ORACLES = {"BatchNorm": batch_norm}
