"""Whether the numbers of an array can be those of a variable, and what a user should know of them.

NaN and infinite values are copied and said, as the source may have been trained so far. Refused is
what no layer can have: numbers of another kind, too large ones, negative counts and variances.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

COUNTS = ("updates", "step", "pending_batches")
"""What names of variables that count begin with: whole numbers, in whatever dtype they are."""
VARIANCES = "var"
"""What names of variances begin with."""


class Fit(NamedTuple):
    """An array in the dtype of a variable.

    Attributes:
        values: in that dtype; meaningless if there is a problem.
        problem: why the variable cannot have these values, or None.
        notes: what is worth knowing.
    """

    values: np.ndarray
    problem: str | None
    notes: tuple[str, ...] = ()


def fit(leaf: np.ndarray, dtype: Any, role: str, epsilon: float) -> Fit:
    """An array of the source in the dtype of the variable `role` of a layer with this epsilon."""
    if not role.startswith(COUNTS) and not _same_kind(leaf.dtype, dtype):
        return Fit(leaf, "numbers of another kind")
    with np.errstate(over="ignore", invalid="ignore"):
        values = leaf.astype(dtype, copy=False)
    for bad, says in _impossible(leaf, values, role, epsilon):
        if bad.any():
            return Fit(values, f"{bad.sum()} of {leaf.size} {says}")
    return Fit(values, None, tuple(_notes(leaf, values, role)))


def _impossible(
    leaf: np.ndarray, values: np.ndarray, role: str, epsilon: float
) -> Iterator[tuple[np.ndarray, str]]:
    """Which values the variable cannot have, and why."""
    if role.startswith(COUNTS):
        yield ~(_wide(leaf) >= 0), "counts are negative or NaN"
    if jnp.issubdtype(values.dtype, jnp.integer):
        info, wide = jnp.iinfo(values.dtype), _wide(leaf)
        outside = (wide < info.min) | (wide > info.max)
        yield outside, f"values do not fit into {values.dtype}, from {info.min} to {info.max}"
        yield wide % 1 != 0, f"values are no whole numbers, as {values.dtype} holds"
    elif jnp.issubdtype(values.dtype, jnp.inexact):
        lost = np.isfinite(leaf) & ~np.isfinite(values)
        largest = float(jnp.finfo(values.dtype).max)
        yield lost, f"values do not fit into {values.dtype}, which ends at {largest:.3g}"
    if role.startswith(VARIANCES):
        wide = _wide(leaf)
        # A difference of means of squares may round to a little less than 0, which epsilon hides.
        negative = (wide < 0) & (wide <= -epsilon)
        yield negative, "variances are negative. If 0 is meant, np.maximum(var, 0)"


def _notes(leaf: np.ndarray, values: np.ndarray, role: str) -> Iterator[str]:
    if _is_narrower(values.dtype, leaf.dtype):
        yield f"{leaf.dtype} of the source was rounded to the model's {values.dtype}"
    if role.startswith(COUNTS) and (rounded := np.count_nonzero(_wide(leaf) != _wide(values))):
        yield f"{rounded} of {leaf.size} counts were rounded to the model's {values.dtype}"
    if unknown := leaf.size - np.count_nonzero(np.isfinite(leaf)):
        yield f"{unknown} of {leaf.size} values are NaN or infinite"
    if role.startswith(VARIANCES) and (negative := np.count_nonzero(_wide(leaf) < 0)):
        yield f"{negative} of {leaf.size} variances are negative, by less than epsilon"


def _wide(leaf: np.ndarray) -> np.ndarray:
    """Integers as they are, others in a dtype in which NumPy compares with any number."""
    return leaf if leaf.dtype.kind in "iu" else leaf.astype(np.float64)


def _same_kind(new: Any, old: Any) -> bool:
    """Whether both are integers, or both floating point, or the old can hold complex numbers."""
    if jnp.issubdtype(new, jnp.inexact) != jnp.issubdtype(old, jnp.inexact):
        return False
    return jnp.issubdtype(old, jnp.complexfloating) or not jnp.issubdtype(new, jnp.complexfloating)


def _is_narrower(new: Any, old: Any) -> bool:
    """Whether not every number of the old floating point dtype is one of the new."""
    if not (jnp.issubdtype(new, jnp.inexact) and jnp.issubdtype(old, jnp.inexact)):
        return False
    new, old = jnp.finfo(new), jnp.finfo(old)
    return new.nmant < old.nmant or new.maxexp < old.maxexp
