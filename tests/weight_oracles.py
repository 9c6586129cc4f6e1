"""What the papers on weights say, in float64 NumPy. Shares no code with the library."""

import numpy as np


def _inputs(w, axis):
    outputs = {a % w.ndim for a in axis}
    return tuple(a for a in range(w.ndim) if a not in outputs)


def _laid(value, w, axis):
    outputs = {a % w.ndim for a in axis}
    return np.asarray(value, np.float64).reshape(
        [w.shape[a] if a in outputs else 1 for a in range(w.ndim)]
    )


def weight_norm(v, scale=1.0, *, axis=(-1,), epsilon=1e-12):
    """Salimans & Kingma 2016, equation 2."""
    v = np.asarray(v, np.float64)
    norm = np.sqrt((v**2).sum(_inputs(v, axis), keepdims=True) + epsilon)
    return v / norm * (scale if np.ndim(scale) == 0 else _laid(scale, v, axis))


def weight_standardization(w, *, axis=(-1,), epsilon=1e-5):
    """Qiao et al. 2019, equation 5."""
    w = np.asarray(w, np.float64)
    inputs = _inputs(w, axis)
    return (w - w.mean(inputs, keepdims=True)) / np.sqrt(w.var(inputs, keepdims=True) + epsilon)


def scaled_weight_standardization(w, gain=1.0, *, axis=(-1,), epsilon=1e-4):
    """Brock, De & Smith 2021, equation 1, with the least variance of their code."""
    w = np.asarray(w, np.float64)
    inputs = _inputs(w, axis)
    fan_in = np.prod([w.shape[a] for a in inputs])
    spread = np.sqrt(np.maximum(fan_in * w.var(inputs, keepdims=True), epsilon))
    standard = (w - w.mean(inputs, keepdims=True)) / spread
    return standard * (gain if np.ndim(gain) == 0 else _laid(gain, w, axis))


def spectral_norm(w, u, *, n_steps=1, epsilon=1e-12):
    """Miyato et al. 2018, Algorithm 1: the weight, u, sigma, and v."""
    w, u = np.asarray(w, np.float64), np.asarray(u, np.float64)
    matrix = w.reshape(-1, w.shape[-1])
    for _ in range(n_steps):
        v = matrix @ u
        v = v / np.sqrt(v @ v + epsilon)
        u = matrix.T @ v
        u = u / np.sqrt(u @ u + epsilon)
    sigma = v @ matrix @ u
    return w / sigma, u, sigma, v
