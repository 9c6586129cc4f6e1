"""Which form of each normalization a program takes on a platform: a kernel or the specification.

Use it to see what a model gets on the devices it is meant for, without having them, and why.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from jaxnorm.core import rules
from jaxnorm.core.kernels import choice, primitives
from jaxnorm.core.kernels.primitives import SPECIFICATION


class NormKernel(NamedTuple):
    """The form of one normalization.

    Attributes:
        shape: of its input.
        dtype: of its input, by name.
        axes: along which moments are taken; of group norm, with the features divided into groups.
        kernel: name of the kernel, for example "rows_tpu"; None for the specification.
        why: the reason, in words.
        backward: the same for its gradients, if they are taken.
        why_backward: the reason for that.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...] | None
    kernel: str | None
    why: str
    backward: str | None
    why_backward: str


def norm_kernels(
    function: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    devices: int = 1,
    **kwargs: Any,
) -> tuple[NormKernel, ...]:
    """The form that each normalization in a function takes, in the order of their calls.

    Args:
        function: what would be given to `jax.jit`, for example a model's forward pass or a whole
            training step; it is traced and not run.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`.
        platform: `"cpu"`, `"tpu"` or `"cuda"`, also called `"gpu"`; None for the default backend's.
            It need not be there.
        devices: on how many devices one call runs. On more than one the compiler divides the
            program, but for what is inside `jax.shard_map`.
        **kwargs: further arguments of `function`; those without arrays are given as they are.

    Returns:
        One `NormKernel` for each normalization by the moments of its input. Those by given
        statistics, and normalizations of weights, have one form only and are left out.

    Raises:
        ValueError: `platform` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> from jaxnorm.diagnose import norm_kernels
        >>> x = jax.ShapeDtypeStruct((4096, 768), jnp.bfloat16)
        >>> [one.kernel for one in norm_kernels(jaxnorm.layer_norm, x, platform="cpu")]
        ['rows_cpu']
    """
    who = "norm_kernels"
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    if platform not in choice.PLATFORMS:
        raise ValueError(
            f"{who}: platform={platform!r} is none of {', '.join(map(repr, choice.PLATFORMS))}. "
            f"Name the platform that the program is for: platform='tpu'."
        )

    arrays = {name: value for name, value in kwargs.items() if _holds_arrays(value)}
    flags = {name: value for name, value in kwargs.items() if name not in arrays}
    jaxpr = jax.make_jaxpr(partial(function, **flags))(*args, **arrays).jaxpr
    return tuple(_found(jaxpr, platform, devices > 1))


def _holds_arrays(value: Any) -> bool:
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))


def _found(jaxpr: Jaxpr, platform: str, divided: bool) -> Iterator[NormKernel]:
    for equation in jaxpr.eqns:
        inner = [getattr(one, "jaxpr", one) for one in jaxprs_in_params(equation.params)]
        within = divided and equation.primitive.name != "shard_map"
        if equation.primitive is primitives.normalize.primitive:
            yield _by_choice(equation, platform, divided)
        elif (why := _specification(equation, inner)) is not None:
            x: Any = equation.invars[0].aval
            yield NormKernel(x.shape, x.dtype.name, None, None, why, None, why)
        else:
            for one in inner:
                yield from _found(one, platform, within)


def _by_choice(equation: JaxprEqn, platform: str, divided: bool) -> NormKernel:
    plan = equation.params["plan"]
    values = [one.aval for one in equation.invars]
    (inputs,) = jax.tree.unflatten(equation.params["structure"], values)
    x = inputs.x
    seen = primitives.layout(plan, inputs)

    def form(direction: choice.Direction) -> tuple[str | None, str]:
        found = choice.choose(platform, plan, seen, x.dtype, divided, direction)
        return found.form and found.form.__name__.rpartition(".")[2], found.why

    return NormKernel(x.shape, x.dtype.name, plan.axes, *form("forward"), *form("backward"))


def _specification(equation: JaxprEqn, inner: list[Jaxpr]) -> str | None:
    """Why it was taken, if the equation is a normalization by it."""
    ruled = equation.primitive.name in ("custom_jvp_call", rules.NAME)
    if not ruled or not inner or not inner[0].eqns:
        return None
    scope = str(inner[0].eqns[0].source_info.name_stack)
    _, found, reason = scope.rpartition(SPECIFICATION)
    return reason.partition("/")[0].rstrip(")") if found else None  # of "vmap(...)"
