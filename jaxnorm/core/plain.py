"""`plain`: the specification alone, in operations that every transformation of programs knows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

_plain = jax.make_user_context(default_value=False)  # functions traced under another: traced anew


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Traces normalizations as plain operations: sums, products, roots.

    Without it they bring derivative rules of their own, are rematerialized for the backward pass,
    and choose between ways of summing. What reads programs and knows only plain operations fails
    on these: `jax.experimental.jet` on a mesh or inside other layers' rules, interpreters and
    exporters of other libraries. Results and derivatives are the same, up to rounding; a backward
    pass keeps more, a training step reads its input more often, and kernels are not used.

    Trace inside: a function that was compiled outside of it is compiled anew when it is called
    inside. Threads that are started inside begin without.

    The roots of `decorrelated_batch_norm`, `whiten` and `color` keep their derivative rule, which
    eigenvectors do not have. Use `iter_norm`, which is Newton's iteration.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 3.0]])
        >>> with jaxnorm.plain():
        ...     program = str(jax.make_jaxpr(jaxnorm.layer_norm)(x))
        >>> any(name in program for name in ("custom_jvp", "checkpoint", "cond"))
        False
    """
    with _plain(True):
        yield


def is_plain() -> bool:
    """Whether plain operations were asked for where a function is traced."""
    return _plain.value


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps the inputs alone."""
    return function if is_plain() else jax.checkpoint(function, prevent_cse=False)
