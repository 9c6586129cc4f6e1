"""All singular values of a function's Jacobian at a point, by writing it down."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.diagnose.real import real_array

LIMIT = 2 * 10**7
"""A Jacobian of more numbers is not written down: 160 MB in float64."""


def jacobian_singular_values(
    function: Callable[[jax.Array], jax.Array], x: ArrayLike
) -> np.ndarray:
    """How much a function stretches small changes of its input, in each of its directions.

        J = dy / dx at x, [y.size, x.size];  J = U diag(s) V'

    Args:
        function: of one array, returning one array; a normalization, a layer, a part of a network.
            What else it takes is bound before: `lambda x: model.apply(variables, x)`.
        x: floating point array of any shape, with its batch where the function looks at it.

    Returns:
        The singular values s, largest first: float64 `[min(x.size, y.size)]`. A normalization by
        the moments of its input has zeros among them: the mean and the scale of each group of
        values do not come through. All are NaN where the Jacobian is not finite.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: the function does not return one floating point array, or the Jacobian has more
            than 2e7 numbers.

    Numerics: the derivatives are in the dtype of `x`, so that in float32 what is 0 comes as some
        1e-7 of the largest; the decomposition is in float64. It runs on NumPy and not inside
        `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> from jaxnorm.diagnose import jacobian_singular_values
        >>> x = jnp.array([[-1.0, 1.0, -1.0, 1.0]]) * 0.5  # a std of 0.5
        >>> found = jacobian_singular_values(jaxnorm.layer_norm, x)
        >>> found.round(3).tolist()  # 1 / std, but for the mean and the scale
        [2.0, 2.0, 0.0, 0.0]

    Source: Saxe et al. 2014, arXiv 1312.6120, for what they say of learning.

    Differs: from `report_norms`, which finds the largest and the smallest for each norm of a model,
        in float64, without the Jacobian and without the directions that a norm removes by design.
    """
    who = "jacobian_singular_values"
    x = real_array(x, who)

    # JAX keeps no weak reference to functions of NumPy.
    def called(x: jax.Array) -> jax.Array:
        return function(x)

    y = jax.eval_shape(called, x)
    if not isinstance(y, jax.ShapeDtypeStruct) or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"{who}: the function returns {y}, which is not one floating point array. Pick it: "
            f"lambda x: function(x)[0]."
        )
    if x.size * y.size > LIMIT:
        raise ValueError(
            f"{who}: a Jacobian of {y.size} x {x.size} numbers is over the limit of {LIMIT}. Take "
            f"fewer examples or a part of the features: x[:8]."
        )
    jacobian = np.asarray(jax.jacobian(called)(x)).astype(np.float64)
    if not np.isfinite(jacobian).all():
        return np.full(min(x.size, y.size), np.nan)
    return np.linalg.svd(jacobian.reshape(y.size, x.size), compute_uv=False)
