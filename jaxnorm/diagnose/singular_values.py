"""The largest and the smallest singular value of a norm's Jacobian, without the Jacobian.

The Jacobian J of x -> y at a batch is only multiplied, forward and backward. The roots of the
largest and the smallest eigenvalue of J'J say how much the norm stretches a change of its input,
at most and at least.

A norm that takes its statistics from its input removes some directions by design: it does not
answer to a change of a group's mean, nor of its scale, so that J is 0 there, up to epsilon. The
smallest singular value is that over all directions orthogonal to these.

Everything is in float64, in which J'J keeps what float32 would lose.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from jaxnorm.diagnose.norm_groups import Groups, acts_by_position, removed_groups
from jaxnorm.methods import RMSNorm

DENSE = 256
"""Up to this size the matrix J'J is written down."""
BASIS = 5 * 10**7
"""More numbers than these are not spent on the directions that are removed."""
RESTARTS = 40
"""After so many restarts of Lanczos' method a singular value is given up."""


class Map(NamedTuple):
    """What a norm does to its input.

    Attributes:
        spec: the method with its options.
        values: its variables by name.
        x: the input.
        mask: which elements count, or how much, or None.
        mode: what else its call says.
    """

    spec: Any
    values: Mapping[str, np.ndarray]
    x: np.ndarray
    mask: np.ndarray | None
    mode: Mapping[str, Any]


def singular_range(norm: Map, who: str) -> tuple[float | None, float | None]:
    """The largest and the smallest singular value of a norm's Jacobian.

    Returns:
        None for the largest where the input is not finite; None for the smallest where nothing is
        left beside the removed directions, where these are not known, or where the search did not
        come to an end.
    """
    by_stored = norm.mode.get("use_running_average", False)
    if by_stored and acts_by_position(norm.spec):
        norm = _at_one_position(norm, who)
    if not all(np.isfinite(leaf).all() for leaf in (norm.x, *norm.values.values())):
        return None, None
    groups = removed_groups(norm.spec, norm.x.shape, by_stored, who)
    removed = None if groups is None else _removed(norm, groups)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batches too small to train on
        gram = _gram_of(norm, who)
        largest = _extreme(gram, norm.x.size, "LA")
        if removed is None or norm.x.size <= sum(q.any(1).sum() for _, q in removed):
            return largest, None
        return largest, _extreme(_beside(gram, removed, norm.x.size), norm.x.size, "SA")


def _at_one_position(norm: Map, who: str) -> Map:
    features = norm.spec._feature_axes(norm.x.ndim, who)
    first = tuple(slice(None) if axis in features else slice(0, 1) for axis in range(norm.x.ndim))
    return norm._replace(x=np.zeros_like(norm.x[first]), mask=None)


Apply = Callable[[np.ndarray], np.ndarray]


class _Options:
    """A spec as a static argument: equal to one of the same method with equal options."""

    def __init__(self, spec: Any, mode: Mapping[str, Any], who: str):
        self.spec, self.mode, self.who = spec, dict(mode), who

    def __hash__(self) -> int:
        return hash(type(self.spec))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Options)
        alike = type(self.spec) is type(other.spec) and self.mode == other.mode
        return alike and vars(self.spec) == vars(other.spec)


def _gram_of(norm: Map, who: str) -> Apply:
    """The product of J'J with each row."""

    def wide(leaf: np.ndarray) -> jax.Array:
        whole = np.issubdtype(leaf.dtype, np.integer)
        return jnp.asarray(leaf if whole else leaf.astype(np.float64))

    values = {name: wide(leaf) for name, leaf in norm.values.items()}
    mask = None if norm.mask is None else jnp.asarray(norm.mask)
    options = _Options(norm.spec, norm.mode, who)
    shape = norm.x.shape
    apply = functools.partial(_gram, options, values, wide(norm.x), mask)
    return lambda rows: np.asarray(apply(jnp.asarray(rows.reshape(-1, *shape)))).reshape(rows.shape)


@jax.jit(static_argnums=0)
def _gram(
    options: _Options,
    values: Mapping[str, jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
    rows: jax.Array,
) -> jax.Array:
    def normalized(x: jax.Array) -> jax.Array:
        y, _ = options.spec._transform(
            values, x, mask, x.dtype, options.who, initializing=False, **options.mode
        )
        return y

    _, forward = jax.linearize(normalized, x)
    backward = jax.linear_transpose(forward, x)
    return jax.vmap(lambda row: backward(forward(row))[0])(rows)


def _extreme(apply: Apply, size: int, which: str) -> float | None:
    """The root of the largest (`"LA"`) or smallest (`"SA"`) eigenvalue of a symmetric matrix."""
    if size <= DENSE:
        values = np.linalg.eigvalsh(apply(np.eye(size)))
        return float(np.sqrt(max(values[-1 if which == "LA" else 0], 0.0)))
    start = np.random.default_rng(0).normal(size=size)
    if not apply(start[None]).any():
        return 0.0
    product = _Product(apply, size)
    options: dict[str, Any] = dict(k=1, ncv=32, tol=1e-4, maxiter=RESTARTS, v0=start)
    try:
        values = eigsh(product, which=which, return_eigenvectors=False, **options)
    except ArpackNoConvergence:
        return None
    return float(np.sqrt(max(np.min(values), 0.0)))


class _Product(LinearOperator):
    """A matrix of which only the product with a vector is known."""

    def __init__(self, apply: Apply, size: int):
        super().__init__(np.dtype(np.float64), (size, size))
        self._apply = apply

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._apply(x.reshape(1, -1))[0]


Removed = list[tuple[np.ndarray, np.ndarray]]
"""Positions `[groups, elements]` and orthonormal directions `[groups, elements, directions]`."""


def _removed(norm: Map, groups: Groups) -> Removed | None:
    """The directions in which an input may change without the result: mean and scale.

    A group x of several features, decorrelated by symmetric whitening to y, may become y S for any
    symmetric S; of one feature that is any multiple of x - mean.
    """
    x = norm.x.astype(np.float64).ravel()
    mask = np.ones(x.shape, bool)
    if norm.mask is not None:
        mask = np.broadcast_to(norm.mask, norm.x.shape).ravel()
    removed = []
    for positions in groups:
        part, valid = x[positions], mask[positions]
        count, values, features = part.shape
        pairs = features * (features + 1) // 2
        if part.size * (pairs + features) > BASIS:
            return None
        total = valid.sum(1, keepdims=True)
        weight = valid / np.where(total > 0, total, 1)
        about_origin = isinstance(norm.spec, RMSNorm)
        centred = part - (0 if about_origin else (part * weight).sum(1, keepdims=True))
        white = _whitened(centred, weight)
        directions = []
        for i in range(features):
            for j in range(i, features):
                both = np.zeros_like(white)
                both[:, :, i] += white[:, :, j]
                both[:, :, j] += white[:, :, i]
                directions.append(both)
            if not about_origin:
                directions.append(np.zeros_like(white))
                directions[-1][:, :, i] = 1
        basis = np.stack(directions, -1).reshape(count, values * features, -1)
        u, size, _ = np.linalg.svd(basis, full_matrices=False)
        known = size > 1e-9 * np.maximum(size[:, :1], 1e-300)
        removed.append((positions.reshape(count, -1), u * known[:, None]))
    return removed


def _whitened(centred: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Each group times the inverse root of its covariance; 0 along what it does not spread."""
    variances, axes = np.linalg.eigh(np.swapaxes(centred * weight, 1, 2) @ centred)
    known = variances > 1e-12 * np.maximum(variances[:, -1:], 1e-300)
    roots = np.where(known, np.where(known, variances, 1) ** -0.5, 0)
    return centred @ (axes * roots[:, None]) @ np.swapaxes(axes, 1, 2)


def _beside(apply: Apply, removed: Removed, size: int) -> Apply:
    """The matrix beside the removed directions, along which a middling eigenvalue takes its place.

    That of a random vector: between the others, so that it is neither the smallest nor the largest.
    """

    def beside(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        for positions, directions in removed:
            part = rows[:, positions][..., None]
            along = directions @ (np.swapaxes(directions, 1, 2) @ part)
            rows[:, positions] -= along[..., 0]
        return rows

    some = beside(np.random.default_rng(1).normal(size=(1, size)))
    middle = float((some * apply(some)).sum() / (some * some).sum())
    return lambda rows: beside(apply(beside(rows))) + middle * (rows - beside(rows))
