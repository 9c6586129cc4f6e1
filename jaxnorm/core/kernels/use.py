"""`use_kernels`: whether kernels may take the place of the specification."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, get_args

import jax

Use = Literal["automatic", "always", "never"]

VARIABLE = "JAXNORM_KERNELS"
"""Environment variable with the use outside of any `use_kernels`."""

_use = jax.make_user_context(default_value=None)  # functions traced under another are traced anew


@contextlib.contextmanager
def use_kernels(use: Use) -> Iterator[None]:
    """Whether kernels may take the place of the specification, in what is traced inside.

    Results and derivatives are the same either way, up to rounding; speed and memory differ. For a
    whole program, set the environment variable `JAXNORM_KERNELS` to one of these words.

    Args:
        use: `"automatic"`, the default, takes a kernel where it is expected to help, as
            docs/kernels.md says; `"always"` wherever one can serve; `"never"` none. Threads that
            are started inside begin with the default.

    Raises:
        ValueError: `use` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> with jaxnorm.use_kernels("never"):
        ...     y = jax.jit(jaxnorm.layer_norm)(jnp.array([[1.0, 3.0]]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0]]
    """
    with _use(_checked(use, "use_kernels: use")):
        yield


def current_use() -> Use:
    """What was asked for where a function is traced."""
    return _use.value or _checked(os.environ.get(VARIABLE) or "automatic", VARIABLE)


def _checked(use: str, what: str) -> Use:
    for known in get_args(Use):
        if isinstance(use, str) and use == known:
            return known
    raise ValueError(
        f"{what}={use!r} is none of {', '.join(map(repr, get_args(Use)))}. "
        f"Take the default: 'automatic'."
    )
