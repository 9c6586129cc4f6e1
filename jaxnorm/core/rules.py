"""Functions with a derivative rule of their own, as one JAX primitive that can be looked into.

`jax.custom_jvp` and `jax.checkpoint` say the same, but `jax.experimental.jet` and `sparsify` fail
on them. A primitive of our own passes both: `jet` takes the specification, of which it knows all
operations, and what only evaluates a program evaluates it.

Where it cannot be taken, JAX's own are: under `shard_map` and on explicit meshes, where types say
how arrays lie, for sums over mapped axes, and for symbolic sizes. `jet` takes none of these.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import jet
from jax.interpreters import ad, batching, mlir

from jaxnorm.core.devices import placement
from jaxnorm.core.plain import is_plain

NAME = "jaxnorm_rule"
"""Of the primitive, in programs."""

Leaves = Sequence[Any]
"""Arrays; among tangents, None stands for 0."""


class Rule(NamedTuple):
    """A function of arrays with a rule for its tangent.

    Attributes:
        function: of arrays, in the form that runs.
        specification: the same in plain operations.
        tangent: of primals and tangents, gives the results and their tangents.
    """

    function: Callable[..., Any]
    specification: Callable[..., Any]
    tangent: Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]


def serves(*arrays: Any) -> bool:
    """Whether the primitive can be taken for these operands."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return False
    leaves = jax.tree.leaves(arrays)
    known = all(isinstance(size, int) for leaf in leaves for size in leaf.shape)
    return known and not any(any(placement(leaf)) for leaf in leaves)


def call(rule: Rule, *leaves: jax.Array) -> list[jax.Array]:
    """The function, differentiated by its rule."""
    return _rule_p.bind(*leaves, call_jaxpr=jax.make_jaxpr(rule.function)(*leaves), rule=rule)


def with_tangent(
    function: Callable[..., Any],
    specification: Callable[..., Any],
    tangent: Callable[[Any, Sequence[Any], Sequence[Any]], tuple[Any, Any]],
) -> Callable[..., Any]:
    """A function of `(static, *args)`, pytrees of arrays, with a rule for its tangent.

    Args:
        function: in the form that runs.
        specification: the same in plain operations.
        tangent: of `static`, the arguments and their tangents, gives the result and its tangent. A
            tangent of 0 is None; for an argument of several arrays, so are those of its leaves.

    Returns:
        The function. `static` is hashable, and its attribute `over` tells over which mapped axes it
        sums, or None.
    """

    def of_symbolic_zeros(static: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
        def or_none(one: Any) -> Any:
            return None if isinstance(one, SymbolicZero) else one

        leaves, structure = jax.tree.flatten(tangents)
        return tangent(static, primals, jax.tree.unflatten(structure, map(or_none, leaves)))

    by_jax = jax.custom_jvp(function, nondiff_argnums=(0,))
    by_jax.defjvp(of_symbolic_zeros, symbolic_zeros=True)

    def derived(static: Any, *args: Any) -> Any:
        if is_plain():
            return specification(static, *args)
        if static.over is not None or not serves(*args):
            return by_jax(static, *args)
        leaves, structure = jax.tree.flatten(args)
        of_results: list[Any] = []

        def flat(function: Callable[..., Any], *leaves: Any) -> list[Any]:
            results = function(static, *jax.tree.unflatten(structure, leaves))
            of_results[:] = [jax.tree.structure(results)]
            return jax.tree.leaves(results)

        def flat_tangent(primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves]:
            pairs = (jax.tree.unflatten(structure, each) for each in (primals, tangents))
            results, of_them = tangent(static, *pairs)
            return jax.tree.leaves(results), jax.tree.leaves(of_them)

        rule = Rule(partial(flat, function), partial(flat, specification), flat_tangent)
        results = call(rule, *leaves)
        return jax.tree.unflatten(of_results[0], results)

    return derived


def recomputed(function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """The result of a function, of which the backward pass keeps the arguments alone.

    Args:
        function: of pytrees; it captures no arrays.
        *args: its arguments.
    """
    if is_plain():
        return function(*args)
    if not serves(*args):
        return jax.checkpoint(function, prevent_cse=False)(*args)
    leaves, structure = jax.tree.flatten(args)

    def flat(*leaves: Any) -> list[jax.Array]:
        return [function(*jax.tree.unflatten(structure, leaves))]

    return call(_rematerializing(flat), *leaves)[0]


def _rematerializing(function: Callable[..., list[jax.Array]]) -> Rule:
    def tangent(primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves]:
        def linear(primals: Leaves, given: Leaves) -> Any:
            of_moving, some = _of_some(function, primals, [one is not None for one in tangents])
            return jax.jvp(of_moving, some, tuple(given))[1]

        given = [one for one in tangents if one is not None]
        linear = jax.checkpoint(linear, prevent_cse=False)
        return call(_rematerializing(function), *primals), linear(list(primals), given)

    return Rule(function, function, tangent)


def _of_some(
    function: Callable[..., Any], leaves: Leaves, chosen: Sequence[bool]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function of the chosen leaves, the others being fixed; and these leaves."""

    def of_chosen(*some: Any) -> Any:
        rest = iter(some)
        pairs = zip(leaves, chosen, strict=True)
        return function(*(next(rest) if yes else leaf for leaf, yes in pairs))

    return of_chosen, tuple(leaf for leaf, yes in zip(leaves, chosen, strict=True) if yes)


# The primitive


def _evaluate(*leaves: Any, call_jaxpr: Any, rule: Rule) -> list[Any]:
    del rule
    from jax.extend.core import jaxpr_as_fun  # imports Pallas, and is not needed before

    return jaxpr_as_fun(call_jaxpr)(*leaves)


def _types(*types: Any, call_jaxpr: Any, rule: Rule) -> Any:
    del types, rule
    return call_jaxpr.out_avals


def _differentiate(primals: Leaves, tangents: Leaves, *, call_jaxpr: Any, rule: Rule):
    del call_jaxpr
    return rule.tangent(primals, [None if type(one) is ad.Zero else one for one in tangents])


def _transpose(gradients: Leaves, *leaves: Any, call_jaxpr: Any, rule: Rule) -> list[Any]:
    """Of a function that is linear in some operands, such as inference in its input."""
    linear = [ad.is_undefined_primal(leaf) for leaf in leaves]
    function, some = _of_some(rule.specification, leaves, linear)
    types = (jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in some)
    found = iter(jax.linear_transpose(function, *types)([*map(ad.instantiate_zeros, gradients)]))
    return [next(found) if is_linear else None for is_linear in linear]


def _batch(leaves: Leaves, axes: Sequence[int | None], *, call_jaxpr: Any, rule: Rule):
    reached = _reached(call_jaxpr, [axis is not None for axis in axes])
    in_axes, out_axes = tuple(axes), [0 if one else None for one in reached]

    def tangent(primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves]:
        moving = [None if one is None else axis for one, axis in zip(tangents, axes, strict=True)]
        mapped = jax.vmap(rule.tangent, ([*axes], moving), (out_axes, out_axes))
        return mapped([*primals], tangents)

    function, specification = (
        jax.vmap(one, in_axes, out_axes) for one in (rule.function, rule.specification)
    )
    return call(Rule(function, specification, tangent), *leaves), out_axes


def _reached(call_jaxpr: Any, mapped: Sequence[bool]) -> list[bool]:
    """Which results depend on operands that are mapped."""
    jaxpr = getattr(call_jaxpr, "jaxpr", call_jaxpr)
    found = {var for var, yes in zip(jaxpr.invars, mapped, strict=True) if yes}

    def is_found(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in found  # what has a value is a literal

    for equation in jaxpr.eqns:
        if any(map(is_found, equation.invars)):
            found.update(equation.outvars)
    return [*map(is_found, jaxpr.outvars)]


def _taylor(primals: Leaves, series: Sequence[Leaves], *, call_jaxpr: Any, rule: Rule):
    """By the specification. What is boolean has no series."""
    del call_jaxpr
    chosen = [jnp.issubdtype(primal.dtype, jnp.inexact) for primal in primals]
    function, some = _of_some(rule.specification, primals, chosen)
    terms = [each for each, yes in zip(series, chosen, strict=True) if yes]
    return jet.jet(function, some, terms, factorial_scaled=False)


_rule_p: Any = type(lax.add_p)(NAME)
_rule_p.multiple_results = True
_rule_p.def_impl(_evaluate)
_rule_p.def_abstract_eval(_types)
ad.primitive_jvps[_rule_p] = _differentiate
ad.primitive_transposes[_rule_p] = _transpose
batching.primitive_batchers[_rule_p] = _batch
mlir.register_lowering(_rule_p, mlir.lower_fun(_evaluate, multiple_results=True))
jet.jet_rules[_rule_p] = _taylor
