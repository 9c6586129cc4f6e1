"""Marks: values named inside a model, and read out of it whatever it is wrapped in.

A value inside `jax.lax.scan`, `jax.checkpoint`, `jax.vmap` or an inner `jax.jit` cannot be put into
a list outside: it is a tracer of an inner program. A mark is the identity with a name; it stays in
the program, where `harvest` finds it, and lets the value travel out with the results.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from jaxnorm.core import rules

Label = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:
    """One place where values were marked.

    Attributes:
        label: what the mark was called; hashable.
        values: the values, with one leading axis for each `jax.lax.scan` that the place lies in,
            the outermost first, and then one for each `jax.vmap` that any of them depends on.
        lifted: how many leading axes there are.
        inside: the operation around the place out of which nothing can be read, such as `"while"`,
            of which it is not known how often it runs; then there are no values. Otherwise None.
    """

    label: Label = dataclasses.field(metadata=dict(static=True))
    values: tuple[jax.Array, ...]
    lifted: int = dataclasses.field(metadata=dict(static=True))
    inside: str | None = dataclasses.field(default=None, metadata=dict(static=True))


mark_p = jex.Primitive("jaxnorm_mark")
mark_p.multiple_results = True


def mark(label: Label, *values: jax.Array) -> tuple[jax.Array, ...]:
    """The values themselves, in a place that `harvest` finds by its label."""
    return tuple(mark_p.bind(*map(jnp.asarray, values), label=label, lifted=0))


@mark_p.def_impl
def _identity(*values: jax.Array, **_: Any) -> list[jax.Array]:
    return list(values)


@mark_p.def_abstract_eval
def _abstract(*values: Any, **_: Any) -> list[Any]:
    return list(values)


def _batched(values: Any, axes: Any, *, label: Label, lifted: int) -> Any:
    (size,) = {v.shape[axis] for v, axis in zip(values, axes, strict=True) if axis is not None}
    leading = [
        jnp.broadcast_to(v, (size, *v.shape)) if axis is None else jnp.moveaxis(v, axis, 0)
        for v, axis in zip(values, axes, strict=True)
    ]
    marked = mark_p.bind(*leading, label=label, lifted=lifted + 1)
    return marked, [0] * len(marked)


def _differentiated(values: Any, tangents: Any, **params: Any) -> Any:
    """Where a model differentiates, the values are marked, and the derivatives are not."""
    return mark_p.bind(*values, **params), list(tangents)


batching.primitive_batchers[mark_p] = _batched
ad.primitive_jvps[mark_p] = _differentiated
mlir.register_lowering(mark_p, lambda _, *values, **__: values)


def harvest(
    fun: Callable[..., Any], *, every_branch: bool = False
) -> Callable[..., tuple[Any, list[Marked]]]:
    """`fun` with all that was marked while it ran, in the order of its program.

    A place inside a branch of `jax.lax.cond` that was not taken gives zeros, or with `every_branch`
    the values that it would have. What is marked inside a function with a derivative of its own
    (`jax.custom_jvp`, `jax.custom_vjp`) is read, but the result has the derivative of its body.
    Text and other objects that `fun` returns are handed through.

    Inside a `jax.lax.while_loop` or another program of which it is not known how often it runs, a
    place has no values, and says what it lies in.
    """

    def harvesting(*args: Any) -> tuple[Any, list[Marked]]:
        returned: list[Any] = []

        def arrays_of(*args: Any) -> list[Any]:
            returned[:] = [fun(*args)]
            return arrays_in(returned)

        closed = jax.make_jaxpr(arrays_of)(*args)
        found = _Found(every_branch)
        arrays = iter(_evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), found))
        out = jax.tree.map(lambda leaf: next(arrays) if is_array(leaf) else leaf, returned[0])
        return out, list(found)

    return harvesting


def arrays_in(out: Any) -> list[Any]:
    """The arrays and numbers in what a model returns, without text and other objects."""
    return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]


def is_array(leaf: Any) -> bool:
    """Whether JAX takes a leaf for an array: numbers, but no text."""
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


class _Found(list[Marked]):
    """What was marked in a program so far."""

    def __init__(self, every_branch: bool):
        super().__init__()
        self.every_branch = every_branch

    def inside(self) -> "_Found":
        """For a program inside."""
        return _Found(self.every_branch)


def inner_programs(equation: Any) -> list[Any]:
    """The programs inside an equation of a program."""
    found = []
    for leaf in itertools.chain.from_iterable(
        value if isinstance(value, tuple | list) else (value,) for value in equation.params.values()
    ):
        if isinstance(leaf, jex.ClosedJaxpr | jex.Jaxpr):
            found.append(leaf)
    return found


def opened(program: Any) -> tuple[Any, Sequence[Any]]:
    """A program and its constants."""
    return (program.jaxpr, program.consts) if hasattr(program, "consts") else (program, ())


def labels(program: Any) -> Iterator[Label]:
    """What is marked in a program, and in those inside it, by the labels."""
    for equation in opened(program)[0].eqns:
        if equation.primitive is mark_p:
            yield equation.params["label"]
        for inner in inner_programs(equation):
            yield from labels(inner)


def has_marks(program: Any) -> bool:
    """Whether anything is marked in a program, or in one inside it."""
    return next(labels(program), None) is not None


def why_unread(operation: str) -> str:
    """Why a layer inside this operation cannot be handled."""
    return (
        f"lies inside '{operation}', out of which nothing can be read. Use jax.lax.scan or "
        f"nn.scan, or call the layer outside"
    )


RUN_ONCE = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Equations whose only inner program runs once, on all their arguments."""
WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", rules.NAME)
"""The same, with a derivative of their own."""


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: _Found) -> list[Any]:
    """What a program returns; what was marked in it is appended to `found`."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _run(equation, inputs, found)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _run(equation: Any, inputs: list[Any], found: _Found) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if equation.primitive is mark_p:
        found.append(Marked(params["label"], tuple(inputs), params["lifted"]))
        return inputs
    programs = inner_programs(equation)
    marked = dict.fromkeys(label for program in programs for label in labels(program))
    if marked and (name in RUN_ONCE or name in WITH_RULES):
        jaxpr, consts = opened(programs[0])
        return _evaluate(jaxpr, consts, inputs, found)
    if marked and name == "scan":
        return _run_scan(params, inputs, found)
    if marked and name == "cond":
        return _run_cond(params, inputs, found)
    found.extend(Marked(label, (), 0, inside=name) for label in marked)
    options = equation.primitive.get_bind_params(params)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **options)
    return outputs if equation.primitive.multiple_results else [outputs]


def scan_inputs(params: Any, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a `jax.lax.scan` reads in each step, what it carries on, what it takes one by one."""
    if "ft_in" in params:  # jax 0.12
        fixed, carry, xs = params["ft_in"].update(inputs).unpack()
        return list(fixed), list(carry), list(xs)
    n_fixed, n_carry = params["num_consts"], params["num_carry"]
    first, end = n_fixed, n_fixed + n_carry
    return list(inputs[:first]), list(inputs[first:end]), list(inputs[end:])


def _run_scan(params: Any, inputs: list[Any], found: _Found) -> list[Any]:
    jaxpr, consts = opened(params["jaxpr"])
    fixed, carry, xs = scan_inputs(params, inputs)
    n_carry = len(carry)
    places = found.inside()

    def body(carry: Any, x: Any) -> Any:
        inside = found.inside()
        out = _evaluate(jaxpr, consts, [*fixed, *carry, *x], inside)
        places[:] = inside
        return out[:n_carry], (out[n_carry:], [place.values for place in inside])

    carry, (ys, marked) = lax.scan(
        body, carry, xs, length=params["length"], reverse=params["reverse"]
    )
    for place, values in zip(places, marked, strict=True):
        found.append(dataclasses.replace(place, values=values, lifted=place.lifted + 1))
    return [*carry, *ys]


def _run_cond(params: Any, inputs: list[Any], found: _Found) -> list[Any]:
    index, *operands = inputs
    branches = [opened(branch) for branch in params["branches"]]

    def inside(branch: int) -> tuple[list[Any], list[Marked]]:
        places = found.inside()
        jaxpr, consts = branches[branch]
        return _evaluate(jaxpr, consts, operands, places), places

    everywhere = range(len(branches))
    if found.every_branch:
        for i in everywhere:
            found.extend(inside(i)[1])
        return lax.switch(index, [lambda i=i: inside(i)[0] for i in everywhere])
    places = [_places_of(lambda i=i: inside(i)[1]) for i in everywhere]

    def run(branch: int) -> Any:
        out, here = inside(branch)
        marked = [
            [place.values for place in (here if i == branch else places[i])] for i in everywhere
        ]
        return out, jax.tree.map(_zeros_for_shape, marked)

    out, marked = lax.switch(index, [lambda i=i: run(i) for i in everywhere])
    for branch_places, branch_values in zip(places, marked, strict=True):
        for place, values in zip(branch_places, branch_values, strict=True):
            found.append(dataclasses.replace(place, values=tuple(values)))
    return out


def _places_of(marking: Callable[[], list[Marked]]) -> list[Marked]:
    """What is marked, with shapes in the place of values."""
    places: list[Marked] = []

    def values() -> list[tuple[jax.Array, ...]]:
        places[:] = marking()
        return [place.values for place in places]

    shapes = jax.eval_shape(values)
    return [dataclasses.replace(p, values=s) for p, s in zip(places, shapes, strict=True)]


def _zeros_for_shape(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
