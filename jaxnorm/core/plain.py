"""`plain`: the specification alone, in operations that every transformation of programs knows."""

import contextlib
from collections.abc import Iterator

import jax

_plain = jax.make_user_context(default_value=False)  # functions traced under another: traced anew


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Traces normalizations as plain operations: sums, products, roots.

    Without it they bring derivative rules of their own, are rematerialized for the backward pass,
    and choose between ways of summing. JAX's own transformations take that, and so does Taylor mode
    (`jax.experimental.jet`) outside of `shard_map`, explicit meshes and `axis_name`. Interpreters
    and exporters of other libraries may know plain operations only. Results and derivatives are the
    same, up to rounding; a backward pass keeps more, a training step may read its input more often,
    and no kernels are used.

    What was compiled outside is compiled anew when it is called inside. Threads that are started
    inside begin without.

    `decorrelated_batch_norm`, and ZCA in `whiten` and `color`, keep the derivative rule of their
    root: eigenvectors alone have none where eigenvalues are equal. `iter_norm` needs no such rule.

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
