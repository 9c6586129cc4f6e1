"""Inverse square roots of covariance matrices, by eigenvalues or by Newton's iteration.

    R = S^(1/2),   W = S^(-1/2)          S symmetric, with eigenvalues of 0 or more

The eigenvectors of S have no derivative where two eigenvalues are equal; its roots have. The
derivative of R R = S says what it is, for all S whose eigenvalues are positive:

    R dR + dR R = dS,   dW = -W dR W

This is a Sylvester equation, R X + X R = C, which is solved by dividing in the eigenbasis of R by
sums of its eigenvalues, never by their differences. The derivative of the solution X solves the
same equation with another right side:

    R dX + dX R = dC - dR X - X dR

`jax.lax.custom_linear_solve` does that, in both modes. A `custom_jvp` would not: JAX forgets it
where it transposes, and with it that X depends on R. So no derivative of any order passes through
eigenvectors.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core import precision

multiply = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
"""Matrix product whose factors are not rounded to bfloat16 or TF32 on the way."""


def symmetric(matrix: jax.Array) -> jax.Array:
    """The symmetric part of [..., k, k]."""
    return (matrix + matrix.mT) / 2


def eigenvalues_and_vectors(matrix: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [..., k] of S + epsilon I for symmetric S, increasing, and eigenvectors.

    Those of S below what rounding can tell from 0, beside the largest, are taken for that much:
    taken for 0, their directions would be blown up. In float32 that is k 1e-7 of the largest.
    """
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    resolved = matrix.shape[-1] * float(jnp.finfo(matrix.dtype).eps) * values[..., -1:]
    return jnp.maximum(jnp.maximum(values, resolved), 0) + epsilon, vectors


@partial(jax.jit, static_argnames="epsilon", inline=True)
def square_roots(matrix: jax.Array, epsilon: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The square root of S + epsilon I and its inverse, for S = `matrix`, [..., k, k].

    Only the symmetric part of S counts. All derivatives of every order are finite and right, also
    at equal eigenvalues and, with an epsilon, at eigenvalues of 0.
    """
    matrix = symmetric(matrix)
    values, vectors = eigenvalues_and_vectors(lax.stop_gradient(matrix), epsilon)
    return _square_roots(matrix, jnp.sqrt(values), vectors)


def inverse_square_root(matrix: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """(S + epsilon I)^(-1/2) for S = `matrix`, [..., k, k]: the second of `square_roots`."""
    return square_roots(matrix, epsilon)[1]


@jax.custom_jvp
def _square_roots(
    matrix: jax.Array, values: jax.Array, vectors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The roots of `matrix`, by the eigenvalues of the first and their eigenvectors."""
    del matrix  # known by its eigenvectors; here for its derivative
    root, inverse = (
        multiply(vectors * each[..., None, :], vectors.mT) for each in (values, 1 / values)
    )
    return root, inverse


@_square_roots.defjvp
def _square_roots_rule(primals, tangents):
    _, values, vectors = primals
    dmatrix, *_ = tangents
    root, inverse = _square_roots(*primals)
    droot = _solve_sylvester(root, dmatrix, values, vectors)
    return (root, inverse), (droot, -multiply(multiply(inverse, droot), inverse))


def _solve_sylvester(
    root: jax.Array, right: jax.Array, values: jax.Array, vectors: jax.Array
) -> jax.Array:
    """X of R X + X R = C, by the eigenvalues and eigenvectors of R."""

    def left(solution: jax.Array) -> jax.Array:
        return multiply(root, solution) + multiply(solution, root)

    def solve(_, right: jax.Array) -> jax.Array:
        turned = multiply(multiply(vectors.mT, right), vectors)
        solved = turned / (values[..., :, None] + values[..., None, :])
        return multiply(multiply(vectors, solved), vectors.mT)

    return lax.custom_linear_solve(left, right, solve, symmetric=True)


@partial(jax.jit, static_argnames=("n_steps", "epsilon"), inline=True)
def newton_inverse_square_root(matrix: jax.Array, n_steps: int, epsilon: float = 0.0) -> jax.Array:
    """Towards (S + epsilon I)^(-1/2) for S = `matrix`, [..., k, k], by `n_steps` of Newton.

    With N = (S + epsilon I) / trace the iteration of Huang et al. 2019 (arXiv:1904.03441),
    Algorithm 1, is P <- (3 P - P^3 N) / 2 from P = I. Here it runs with the product Q = P N beside
    it, at the same cost. The iterates are the same, but rounding errors do not grow.
    """
    matrix = symmetric(matrix)
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    matrix = matrix + epsilon * identity
    # Derivatives divide by the square of the trace, which a power of two keeps inside of float32.
    spread = jnp.sqrt(lax.stop_gradient(jnp.trace(matrix, axis1=-2, axis2=-1)))[..., None, None]
    factor = precision.towards_one(spread, 2**-8, 2**8)
    matrix = matrix * factor * factor
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    inverse, root = identity, matrix / trace  # P and Q
    for _ in range(n_steps):
        step = (3 * identity - multiply(inverse, root)) / 2
        inverse, root = multiply(step, inverse), multiply(root, step)
    return inverse * lax.rsqrt(trace) * factor
