"""What the norms and their gradients are, in float64, and how far a peer is from that."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from benchmarks.cases import EPSILON, FOR_IMAGES, GROUPS, Case

# Small shapes on which results are compared; the features are a multiple of the groups.
TOKENS, IMAGES = (4, 6, 64), (4, 6, 6, 64)
OFFSET = 1e4
"""The mean, in standard deviations, at which a variance of float32 shows whether it is stable."""


class Errors(NamedTuple):
    """Largest distances from float64, over the largest expected value.

    Attributes:
        output: of the normalized array.
        gradient: of the gradient with respect to the input.
        offset: of the normalized array, for an input far from zero; None if none was tried.
    """

    output: float
    gradient: float
    offset: float | None = None


def draw(shape: tuple[int, ...], seed: int, offset: float = 0.0) -> np.ndarray:
    """Standard normal numbers around `offset`, the same in every process."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) + np.float32(offset)


def small_shape(method: str) -> tuple[int, ...]:
    """Of the input on which results of a method are compared."""
    return IMAGES if method in FOR_IMAGES else TOKENS


def normalized(method: str, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output for scale 1 and bias 0, and the gradient of the input for that of the output."""
    features = x.shape[-1]
    parts = GROUPS if method == "GroupNorm" else features
    x, dy = (a.astype(np.float64).reshape(*a.shape[:-1], parts, -1) for a in (x, dy))
    last = x.ndim - 1
    axes = {
        "BatchNorm": (*range(last - 1), last),
        "LayerNorm": (last - 1, last),
        "RMSNorm": (last - 1, last),
        "GroupNorm": (*range(1, last - 1), last),
        "InstanceNorm": (*range(1, last - 1), last),
    }[method]

    def mean(a):
        return a.mean(axes, keepdims=True)

    centered = x if method == "RMSNorm" else x - mean(x)
    rstd = 1 / np.sqrt(mean(centered**2) + EPSILON)
    y = centered * rstd
    dx = dy - y * mean(dy * y)
    if method != "RMSNorm":
        dx = dx - mean(dy)
    shape = (*x.shape[:-2], features)
    return y.reshape(shape), (rstd * dx).reshape(shape)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value; infinite where not a number."""
    error = np.max(np.abs(found.astype(np.float64) - expected)) / np.max(np.abs(expected))
    return float(error) if np.isfinite(error) else float("inf")


def errors_of(method: str, dtype: str, run) -> Errors:
    """Errors of a peer.

    `run` takes the input and the gradient of the output as float32 arrays of NumPy, rounds both to
    `dtype`, and returns what it took for both, the output and the gradient of the input, all as
    float32 with the features last.
    """
    shape = small_shape(method)
    x, dy, y, dx = run(draw(shape, 0), draw(shape, 1))
    expected_y, expected_dx = normalized(method, x, dy)
    output, gradient = distance(y, expected_y), distance(dx, expected_dx)
    if method == "RMSNorm" or dtype != "float32":
        return Errors(output, gradient)
    x, dy, y, _ = run(draw(shape, 0, OFFSET), draw(shape, 1))
    return Errors(output, gradient, distance(y, normalized(method, x, dy)[0]))


# What rounding alone explains, over the largest value: about ten units in the last place.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}
OFFSET_TOLERANCE = 1e-2


def agrees(errors: Errors, dtype: str) -> bool:
    """Whether output and gradient are right to rounding."""
    return max(errors.output, errors.gradient) < TOLERANCE[dtype]


def is_stable(errors: Errors) -> bool:
    """Whether the variance survives a large mean."""
    return errors.offset is None or errors.offset < OFFSET_TOLERANCE


@lru_cache(maxsize=1)  # one case is drawn once for both steps
def example(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Input and gradient of the output, for timing."""
    return draw(case.shape, 0), draw(case.shape, 1)
