"""What the papers on whitening say, in float64 NumPy. Shares no code with the library."""

import numpy as np


def comoments(x, *, axis=-1, groups=1, where=None):
    """Count, mean and covariance of each group of features, one example and one group at a time."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    weights = np.ones(x.shape[:-1])
    if where is not None:
        weights = weights * np.moveaxis(np.asarray(where, np.float64), axis, -1)[..., 0]
    size = x.shape[-1] // groups
    rows, weights = x[weights > 0].reshape(-1, groups, size), weights[weights > 0]
    count = weights.sum()
    mean, cov = np.zeros((groups, size)), np.zeros((groups, size, size))
    for g in range(groups if count else 0):
        mean[g] = weights @ rows[:, g] / count
        for row, weight in zip(rows[:, g] - mean[g], weights, strict=True):
            cov[g] += weight * np.outer(row, row) / count
    return np.full(groups, count), mean, cov


def zca(cov, epsilon):
    """D L^(-1/2) D^T: Huang et al. 2018, Algorithm 1, for one group."""
    values, vectors = np.linalg.eigh(cov + epsilon * np.eye(len(cov)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def pca(cov, epsilon):
    """L^(-1/2) D^T, by decreasing variance, the largest entry of each axis positive."""
    values, vectors = np.linalg.eigh(cov + epsilon * np.eye(len(cov)))
    order = np.argsort(-values)
    axes = [v * np.sign(v[np.argmax(np.abs(v))]) for v in vectors.T[order]]
    return np.diag(values[order] ** -0.5) @ np.stack(axes)


def newton(cov, epsilon, n_steps):
    """Huang et al. 2019, Algorithm 1, steps 3 to 8, for one group."""
    sigma = cov + epsilon * np.eye(len(cov))
    trace = np.trace(sigma)
    p = np.eye(len(cov))
    for _ in range(n_steps):
        p = (3 * p - p @ p @ p @ (sigma / trace)) / 2
    return p / np.sqrt(trace)


def whiten(x, matrix_of, scale=None, bias=None, *, axis=-1, groups=1, where=None, stats=None):
    """Whitens by the batch, or by `stats` (mean, cov); the affine map after it."""
    count, mean, cov = comoments(x, axis=axis, groups=groups, where=where)
    if stats is not None:
        mean, cov = stats
    elif count[0] == 0:
        cov = np.broadcast_to(np.eye(cov.shape[-1]), cov.shape)
    last = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    size = last.shape[-1] // groups
    parts = [
        (last[..., g * size : (g + 1) * size] - mean[g]) @ matrix_of(cov[g]).T
        for g in range(groups)
    ]
    y = np.concatenate(parts, -1)
    y = y if scale is None else y * np.asarray(scale, np.float64)
    y = y if bias is None else y + np.asarray(bias, np.float64)
    return np.moveaxis(y, -1, axis)


def decorrelated_batch_norm(x, scale=None, bias=None, *, epsilon=1e-5, **options):
    return whiten(x, lambda cov: zca(cov, epsilon), scale, bias, **options)


def iter_norm(x, scale=None, bias=None, *, epsilon=1e-5, n_steps=5, **options):
    return whiten(x, lambda cov: newton(cov, epsilon, n_steps), scale, bias, **options)


def root_derivative(matrix, tangent):
    """Of S^(1/2), by writing R X + X R = dS as one linear system of k^2 unknowns."""
    size = len(matrix)
    values, vectors = np.linalg.eigh(matrix)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    system = np.kron(root, np.eye(size)) + np.kron(np.eye(size), root)
    return np.linalg.solve(system, tangent.reshape(-1)).reshape(size, size)


def of_decorrelated_batch_norm(x, params, mask=None, *, num_groups, group_size):
    """As a layer with groups of `group_size` features."""
    groups = x.shape[-1] // group_size
    return decorrelated_batch_norm(
        x, params.get("scale"), params.get("bias"), groups=groups, where=mask
    )


def of_iter_norm(x, params, mask=None, *, num_groups, group_size):
    """As a layer with groups of `group_size` features."""
    groups = x.shape[-1] // group_size
    return iter_norm(x, params.get("scale"), params.get("bias"), groups=groups, where=mask)
