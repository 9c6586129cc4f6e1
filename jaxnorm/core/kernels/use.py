"""`use_kernels`: whether kernels may take the place of the specification."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

Use = Literal["automatic", "always", "never"]

VARIABLE = "JAXNORM_KERNELS"
"""Environment variable with the use outside of any `use_kernels`."""

_use: ContextVar[Use | None] = ContextVar("use", default=None)


@contextlib.contextmanager
def use_kernels(use: Use) -> Iterator[None]:
    """Whether kernels may take the place of the specification, in what is traced inside.

    Results and derivatives are the same either way, up to rounding; speed and memory differ. What
    `jax.jit` has traced before keeps its kernels. For a whole program, set the environment variable
    `JAXNORM_KERNELS` to one of these words.

    Args:
        use: `"automatic"`, the default, takes a kernel where whole models were measured to be
            faster with it; `"always"` wherever one can serve; `"never"` none.

    Raises:
        ValueError: `use` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> with jaxnorm.use_kernels("never"):
        ...     y = jax.jit(jaxnorm.layer_norm)(jnp.array([[1.0, 3.0]]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0]]
    """
    token = _use.set(_checked(use, "use_kernels: use"))
    try:
        yield
    finally:
        _use.reset(token)


def current_use() -> Use:
    """What was asked for where a function is traced."""
    return _use.get() or _checked(os.environ.get(VARIABLE, "automatic"), VARIABLE)


def _checked(use: str, what: str) -> Use:
    for known in get_args(Use):
        if use == known:
            return known
    raise ValueError(
        f"{what}={use!r} is none of {', '.join(map(repr, get_args(Use)))}. "
        f"Take the default: 'automatic'."
    )
