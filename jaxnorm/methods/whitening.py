"""PCA and ZCA whitening of data (Kessy, Lewin & Strimmer 2018, arXiv:1512.00809).

    cov + epsilon I = V diag(l) V^T
    ZCA:  y = V diag(l)^(-1/2) V^T (x - mean)
    PCA:  y = diag(l)^(-1/2) V^T (x - mean)

Both make the features uncorrelated and of variance 1. ZCA changes the data as little as that
allows, so that an image stays an image; PCA turns it, and orders the new features by the variance
that stood behind them.

When to use: to prepare data, before training, by the statistics of a training set; the same
statistics then prepare what is predicted for. Inside a network, where the statistics change with
the weights, see `decorrelated_batch_norm.py` and `iter_norm.py`. With fewer examples than features
most directions are unknown: there epsilon, or smaller groups of features, decide what comes out.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core import axes as ax
from jaxnorm.core import checks
from jaxnorm.core.covariance import JointStats, joint_input, joint_stats, joint_stats_along
from jaxnorm.core.feature_groups import feature_axis
from jaxnorm.core.matrix_roots import eigenvalues_and_vectors, square_roots, symmetric
from jaxnorm.core.whitened import apply_matrix

Kind = Literal["zca", "pca"]


def whitening_matrix(stats: JointStats, *, kind: Kind = "zca", epsilon: float = 1e-5) -> jax.Array:
    """The matrix W with W (cov + epsilon I) W^T = I, for each group of features.

        zca: W = V diag(l)^(-1/2) V^T,   pca: W = diag(l)^(-1/2) V^T

    Args:
        stats: `JointStats`, from `comoments(x).stats()`.
        kind: `"zca"` for the symmetric matrix, `"pca"` for the principal axes as rows, by
            decreasing variance, each with the sign that makes its largest entry positive.
        epsilon: added to the diagonal of the covariance.

    Returns:
        `[groups, group size, group size]`, float32 or wider.

    Raises:
        TypeError: `stats` are no `JointStats`, or epsilon is no number.
        ValueError: an unknown kind, a negative epsilon, or statistics that do not fit each other.

    Numerics:
        All derivatives of the ZCA matrix are right, also at equal eigenvalues. The PCA matrix has
        none there: its axes are then a choice, and its derivatives are NaN or infinite. Variances
        below the rounding of the largest, k 1e-7 of it in float32, are taken for that much:
        whitened data varies less there. Standardize features of very different scale first.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> stats = jaxnorm.JointStats(jnp.zeros((1, 2)), jnp.array([[[1.0, 0.0], [0.0, 4.0]]]))
        >>> jaxnorm.whitening_matrix(stats, epsilon=0).tolist()
        [[[1.0, 0.0], [0.0, 0.5]]]
        >>> jaxnorm.whitening_matrix(stats, kind="pca", epsilon=0).tolist()
        [[[0.0, 0.5], [1.0, 0.0]]]

    Source:
        Kessy, Lewin & Strimmer 2018 (arXiv:1512.00809), Table 1.
    """
    return _matrices(stats, kind, epsilon, "whitening_matrix")[0]


def coloring_matrix(stats: JointStats, *, kind: Kind = "zca", epsilon: float = 1e-5) -> jax.Array:
    """The inverse of `whitening_matrix`: it gives white noise the covariance cov + epsilon I.

        zca: V diag(l)^(1/2) V^T,   pca: V diag(l)^(1/2)

    Args:
        stats, kind, epsilon: as in `whitening_matrix`.

    Returns:
        `[groups, group size, group size]`, float32 or wider.

    Raises:
        TypeError, ValueError: as `whitening_matrix`.

    Numerics:
        As `whitening_matrix`; no inverse is computed, so that it is as exact.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> stats = jaxnorm.JointStats(jnp.zeros((1, 2)), jnp.array([[[1.0, 0.0], [0.0, 4.0]]]))
        >>> jaxnorm.coloring_matrix(stats, epsilon=0).tolist()
        [[[1.0, 0.0], [0.0, 2.0]]]

    Source:
        Kessy, Lewin & Strimmer 2018 (arXiv:1512.00809), Table 1.
    """
    return _matrices(stats, kind, epsilon, "coloring_matrix")[1]


def whiten(
    x: ArrayLike, stats: JointStats, *, kind: Kind = "zca", axis: int = -1, epsilon: float = 1e-5
) -> jax.Array:
    """Makes features uncorrelated and of variance 1, by given statistics.

        y = W (x - mean)

    Args:
        x: array of any shape; float or bfloat16; integers become float32.
        stats: `JointStats` of the features, in one group or several: of a data set,
            `comoments(x).stats()` or `merge_comoments(...).stats()`.
        kind: `"zca"` or `"pca"`, see `whitening_matrix`.
        axis: the feature axis.
        epsilon: added to the diagonal of the covariance.

    Returns:
        Array of the shape and dtype of `x`. Under PCA the features of each group are its principal
        components, by decreasing variance.

    Raises:
        TypeError: `x` is complex, holds no numbers, or floats of 8 bits, or `stats` are no
            `JointStats`.
        ValueError: an unknown kind, an axis out of range, statistics that do not fit.

    Numerics:
        Computes in float32 or wider, matrix products included, and rounds once. Derivatives as in
        `whitening_matrix`: those by `x` are right for both kinds.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        >>> jaxnorm.whiten(x, jaxnorm.comoments(x).stats(), epsilon=0).round(3).tolist()
        [[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]

    Source:
        Kessy, Lewin & Strimmer 2018 (arXiv:1512.00809), Table 1.

    Differs:
        From scikit-learn's `PCA(whiten=True)`: epsilon is added to the variances, the covariance
        is biased unless `stats(ddof=1)` is taken, and no components are dropped.
    """
    who = "whiten"
    x = joint_input(x, who)
    axis = feature_axis(axis, x.ndim, who)
    stats = joint_stats_along(stats, x.shape, axis, who)
    matrix, _ = _matrices(stats, kind, epsilon, who)
    return apply_matrix(x, stats.mean, matrix, axis).astype(x.dtype)


def color(
    y: ArrayLike, stats: JointStats, *, kind: Kind = "zca", axis: int = -1, epsilon: float = 1e-5
) -> jax.Array:
    """The inverse of `whiten`: gives white features the mean and covariance of `stats`.

        x = W^(-1) y + mean

    Args:
        y: array of any shape; float or bfloat16; integers become float32.
        stats, kind, axis, epsilon: as in `whiten`.

    Returns:
        Array of the shape and dtype of `y`.

    Raises:
        TypeError, ValueError: as `whiten`.

    Numerics:
        As `whiten`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
        >>> stats = jaxnorm.comoments(x).stats()
        >>> back = jaxnorm.color(jaxnorm.whiten(x, stats, kind="pca"), stats, kind="pca")
        >>> bool(jnp.allclose(back, x, atol=1e-5))
        True

    Source:
        Kessy, Lewin & Strimmer 2018 (arXiv:1512.00809), Table 1.
    """
    who = "color"
    y = joint_input(y, who)
    axis = feature_axis(axis, y.ndim, who)
    stats = joint_stats_along(stats, y.shape, axis, who)
    _, matrix = _matrices(stats, kind, epsilon, who)
    centred = apply_matrix(y, jnp.zeros_like(stats.mean), matrix, axis)
    mean = ax.lay_along(stats.mean.reshape(-1), (axis,), y.ndim)
    return (centred + mean.astype(centred.dtype)).astype(y.dtype)


def _matrices(
    stats: JointStats, kind: Kind, epsilon: float, who: str
) -> tuple[jax.Array, jax.Array]:
    """The whitening matrix and its inverse."""
    cov = joint_stats(stats, who).cov
    epsilon = checks.static_epsilon(epsilon, who)
    if kind == "zca":
        root, inverse = square_roots(cov, epsilon)
        return inverse, root
    if kind == "pca":
        return _pca_matrices(cov, epsilon)
    raise ValueError(f"{who}: kind={kind!r} is unknown. Use kind='zca' or kind='pca'.")


@partial(jax.jit, static_argnums=1, inline=True)
def _pca_matrices(cov: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    values, vectors = eigenvalues_and_vectors(symmetric(cov), epsilon)
    values, axes = jnp.flip(values, -1), jnp.flip(vectors, -1).mT
    largest = jnp.argmax(jnp.abs(axes), axis=-1, keepdims=True)
    axes = axes * jnp.sign(jnp.take_along_axis(axes, largest, axis=-1))
    deviations = jnp.sqrt(values)
    return axes / deviations[..., :, None], axes.mT * deviations[..., None, :]
