"""What rounding may do to a result, said by the float64 oracle itself, and exact derivatives.

A computation in a dtype with unit roundoff u is right if its result is that of an input which
differs by a few u of each number. So what is allowed is how much the oracle's result changes where
inputs, parameters and statistics change by u, in random directions and one by one, times
`ROUNDINGS`: from input to result a number is rounded about a dozen times (two sums, two
differences, square, division, epsilon, root, reciprocal, product, scale, bias), in sums of a few
dozen numbers a few times more. At last the result is rounded to its own dtype, once.

Where a variance is taken about a shift, in one pass, rounding grows with the square of the distance
of shift and mean, in standard deviations, up to `NEAR` of them (of covariances `NEAR_JOINTLY`).
"""

import jax
import jax.numpy as jnp
import numpy as np

ROUNDINGS = 16
NEAR, NEAR_JOINTLY = 8, 2
NODES = np.arange(-3, 4)
STENCILS = {
    1: np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60]),
    2: np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90]),
}


def as_wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def unit(*dtypes):
    """The unit roundoff of the coarsest of these dtypes."""
    return max(float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes)


def rounded(value, dtype):
    """What one rounding of `value` to a dtype may change."""
    return unit(dtype) * np.abs(value) + float(jnp.finfo(dtype).smallest_subnormal)


def perturbed(rng, u, function, *arrays):
    """The result of a function of arrays, and how much it changes where these change by u."""
    exact = function(*arrays)
    u = max(u, float(np.finfo(np.float64).eps))  # half of it would be rounded away here

    def change(moved):
        return jax.tree.map(lambda a, b: np.abs(a - b), function(*moved), exact)

    def at_random(array):
        return array + u * np.abs(array) * rng.choice([-1, 1], np.shape(array))

    changes = [change(jax.tree.map(at_random, arrays)) for _ in range(5)]
    for i, array in enumerate(arrays):
        longer = jax.tree.map(lambda a: (1 + u) * a, array)
        changes.append(change((*arrays[:i], longer, *arrays[i + 1 :])))
    return exact, jax.tree.map(lambda *each: np.max(each, 0), *changes)


def differences(function, step, order=1):
    """The derivative at 0 of a function of a number, by central differences of sixth order."""
    values = np.stack([function(step * node) for node in NODES])
    return np.tensordot(STENCILS[order], values, 1) / step**order


def assert_within(found, expected, allowed, what):
    found, expected, allowed = np.broadcast_arrays(as_wide(found), expected, allowed)
    off = ~(np.abs(found - expected) <= allowed)  # NaN is off
    if off.any():
        excess = np.where(off, np.nan_to_num(np.abs(found - expected) / allowed, nan=np.inf), 0)
        at = np.unravel_index(np.argmax(excess), off.shape)
        raise AssertionError(
            f"{what}: {off.sum()} of {off.size} off, the worst at {tuple(map(int, at))}: found "
            f"{found[at]}, expected {expected[at]} up to {allowed[at]:.3g}."
        )
