"""Dataflow: which layer's output feeds which layer's input, read off the traced program.

The program is written out flat: what `jax.jit` and `jax.checkpoint` wrap, the branches of a
condition and the body of a scan stand in one list of steps, in their order, and each array that
goes from step to step has a number. Layers are marked, so that a layer's call is a step where it
begins, with its input and its variables, and one where it ends.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxnorm.core import precision
from jaxnorm.tools.adapter.marks import (
    RUN_ONCE,
    WITH_RULES,
    arrays_in,
    has_marks,
    inner_programs,
    mark,
    mark_p,
    opened,
    scan_inputs,
)
from jaxnorm.tools.adapter.models import LayerCall, Model, Path, Run

BEGINS, ENDS = "begins", "ends"
RETURNED = "the model's output"
FIXED, CARRIED, SLICED = "fixed", "carried", "sliced"
"""What the body of a scan gets: the same in each step, what the last step made, or a slice."""


class Step(NamedTuple):
    """One operation of the flat program.

    Attributes:
        name: of the operation, as in JAX.
        inputs, outputs: the arrays by their numbers.
        params: the options of the operation.
        inside: the name of the innermost function with `jax.jit` that it lies in, or "".
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    inside: str = ""

    def __str__(self) -> str:
        if self.name == RETURNED:
            return self.name
        within = f" of {self.inside}" if self.inside else ""
        return f"'{self.name}'{within}"


@dataclasses.dataclass(eq=False)
class Place:
    """Where in the flat program a layer is called once.

    Attributes:
        call: the call, with the shapes of its input and variables in the place of their values.
        begins, ends: the numbers of its first and last step.
    """

    call: LayerCall
    begins: int
    ends: int


class Dataflow:
    """A traced program, written out flat.

    Attributes:
        steps: all operations that the outputs need, in their order.
        outputs: the numbers of the arrays that the program returns.
        places: the calls of layers, in their order.
    """

    def __init__(self, jaxpr: Any, keys: Sequence[Path], calls: Sequence[LayerCall]):
        self.steps: list[Step] = []
        self._shapes: list[Any] = []
        self._known: dict[int, Path] = {}
        inputs = [self._array(var) for var in jaxpr.invars]
        self._known = dict(zip(inputs, keys, strict=True))
        self.outputs = self._write_out(jaxpr, inputs, "")
        self.steps = _used(self.steps, self.outputs)
        self._made_by = {out: i for i, step in enumerate(self.steps) for out in step.outputs}
        self._used_by: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            for array in dict.fromkeys(step.inputs):
                self._used_by.setdefault(array, []).append(i)
        self.places = self._find(calls)

    def maker(self, array: int) -> Step | None:
        """The step that an array comes from; None for inputs and constants of the program."""
        return self.steps[self._made_by[array]] if array in self._made_by else None

    def users(self, array: int) -> list[Step]:
        """The steps that read an array, and one named `RETURNED` if the model returns it."""
        returned = Step(RETURNED, (array,), (), {})
        return [self.steps[i] for i in self._used_by.get(array, ())] + [
            returned for output in self.outputs if output == array
        ]

    def shape(self, array: int) -> Any:
        """Shape and dtype of an array."""
        return self._shapes[array]

    def place(self, step: Step | None) -> Place | None:
        """The call that begins or ends with a step, if one does."""
        if step is None or step.name != mark_p.name:
            return None
        return next(
            p for p in self.places if self.steps[p.begins] is step or self.steps[p.ends] is step
        )

    def source(self, place: Place) -> tuple[list[int], Step | None]:
        """The array that a layer gets, those it is a mere cast of, and the step before them."""
        arrays = [self.steps[place.begins].inputs[0]]
        while self._only_hands_on(step := self.maker(arrays[-1])):
            assert step is not None
            arrays.append(step.inputs[0])
        return arrays, step

    def _only_hands_on(self, step: Step | None) -> bool:
        """Whether a step leaves values as they are; a cast to fewer digits rounds them."""
        if step is None:
            return False
        if step.name == "convert_element_type":
            before, after = (self.shape(a).dtype for a in (step.inputs[0], step.outputs[0]))
            return precision.promote(before, after) == after
        return step.name in ("name", "sharding_constraint")

    def variable(self, place: Place, name: str) -> int:
        """The number of a layer's variable, as the layer sees it."""
        names = sorted(place.call.values)
        return self.steps[place.begins].inputs[1 + names.index(name)]

    def origin(self, array: int) -> Path | Step | None:
        """The stored variable that an array is, whole or one slice of it for each step of a scan.

        Otherwise the step that computes it, or None for constants.
        """
        if array in self._known:
            return self._known[array]
        step = self.maker(array)
        if step is None or not self._hands_variables_on(step):
            return step
        return self.origin(step.inputs[0])

    def others_that_use(self, key: Path, place: Place) -> list[Step]:
        """The steps outside of a layer's call that compute with a stored variable.

        Of other layers that do, only the steps with which their calls begin.
        """
        inside = {i for other in self.places for i in range(other.begins + 1, other.ends + 1)}
        return [
            step
            for i, step in enumerate(self.steps)
            if i not in inside
            and i != place.begins
            and step.name != "scan"
            and not self._hands_variables_on(step)
            and any(self.origin(array) == key for array in step.inputs)
        ]

    def inside(self, place: Place, step: Step) -> bool:
        """Whether a step is a part of a layer's call."""
        return place.begins < self._made_by[step.outputs[0]] < place.ends

    def depends(self, array: int, key: Path, place: Place) -> bool:
        """Whether an array depends on a stored variable by what a layer's call does with it."""
        waiting, seen = [array], {array}
        while waiting:
            array = waiting.pop()
            if self.origin(array) == key:
                return True
            step = self.maker(array)
            if step is not None and self.inside(place, step):
                waiting += set(step.inputs) - seen
                seen |= set(step.inputs)
        return False

    def rounding_after(self, places: Sequence[Place]) -> float:
        """The largest machine epsilon among the dtypes of all that depends on calls of layers."""
        reached = {array for place in places for array in self.steps[place.ends].outputs}
        for step in self.steps:
            if reached & set(step.inputs):
                reached |= set(step.outputs)
        return self.rounding(*reached)

    def rounding(self, *arrays: int) -> float:
        """The largest machine epsilon among the floating dtypes of arrays."""
        dtypes = {self.shape(array).dtype for array in arrays}
        floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
        return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)

    def _hands_variables_on(self, step: Step) -> bool:
        """Whether a variable goes into a scan, is repeated by `jax.vmap` for a mark, or frozen."""
        if step.name == "stop_gradient":
            return True
        if step.name == "scan":
            return step.params.get("gives") in (FIXED, SLICED)
        if step.name != "broadcast_in_dim":
            return False
        before = self.shape(step.inputs[0]).ndim
        return step.params["broadcast_dimensions"] == tuple(range(1, before + 1))

    def _array(self, var: Any) -> int:
        self._shapes.append(var.aval)
        return len(self._shapes) - 1

    def _write_out(self, jaxpr: Any, inputs: Sequence[int], inside: str) -> tuple[int, ...]:
        """Appends the steps of a program; returns the numbers of what it returns."""
        numbers: dict[Any, int] = {var: self._array(var) for var in jaxpr.constvars}
        numbers |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> int:
            return self._array(atom) if isinstance(atom, jex.Literal) else numbers[atom]

        for equation in jaxpr.eqns:
            arrays = [read(atom) for atom in equation.invars]
            numbers |= zip(equation.outvars, self._equation(equation, arrays, inside), strict=True)
        return tuple(map(read, jaxpr.outvars))

    def _equation(self, equation: Any, inputs: list[int], inside: str) -> Sequence[int]:
        name, params = equation.primitive.name, equation.params
        programs = inner_programs(equation)
        if name in RUN_ONCE or name in WITH_RULES:
            if name in ("jit", "pjit"):
                inside = params["name"].removeprefix("_")
            return self._write_out(opened(programs[0])[0], inputs, inside)
        if name == "cond":
            results = [self._write_out(opened(p)[0], inputs[1:], inside) for p in programs]
            inputs = [inputs[0], *(array for result in results for array in result)]
        elif name == "scan":
            inputs = self._scan(params, inputs, inside)
        elif any(map(has_marks, programs)):
            # Not followed: layers in it are seen, but not where their arrays come from.
            for program in programs:
                jaxpr = opened(program)[0]
                heads = tuple(self._array(var) for var in jaxpr.invars)
                self.steps.append(Step(name, tuple(inputs), heads, params, inside))
                inputs = [*inputs, *self._write_out(jaxpr, heads, inside)]
        outputs = tuple(self._array(var) for var in equation.outvars)
        self.steps.append(Step(name, tuple(inputs), outputs, params, inside))
        return outputs

    def _scan(self, params: Any, inputs: list[int], inside: str) -> list[int]:
        """Writes out the body of a scan; returns what it ends with."""
        jaxpr = opened(params["jaxpr"])[0]
        fixed, carry, xs = scan_inputs(params, inputs)
        kinds = [FIXED] * len(fixed) + [CARRIED] * len(carry) + [SLICED] * len(xs)
        heads = [self._array(var) for var in jaxpr.invars]
        for kind, array, head in zip(kinds, [*fixed, *carry, *xs], heads, strict=True):
            self.steps.append(Step("scan", (array,), (head,), {"gives": kind}, inside))
        return list(self._write_out(jaxpr, heads, inside))

    def _find(self, calls: Sequence[LayerCall]) -> list[Place]:
        begun: dict[int, list[int]] = {}
        places = []
        for i, step in enumerate(self.steps):
            if step.name == mark_p.name:
                what, number = step.params["label"]
                if what == BEGINS:
                    begun.setdefault(number, []).append(i)
                else:
                    places.append(Place(calls[number], begun[number].pop(), i))
        return sorted(places, key=lambda place: place.begins)


def _used(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """The steps without which the outputs could not be computed: traces have others too.

    A layer that makes its output without its input is called nevertheless.
    """
    needed, used, calls = set(outputs), [], set()
    for step in reversed(steps):
        what, number = step.params["label"] if step.name == mark_p.name else ("", 0)
        if needed & set(step.outputs) or (what == BEGINS and number in calls):
            needed |= set(step.inputs)
            used.append(step)
            calls |= {number} if what == ENDS else set()
    return used[::-1]


def dataflow(model: Model, run: Run) -> Dataflow:
    """Traces `run` on a model, with all calls of its layers marked."""
    calls: list[LayerCall] = []

    def hook(call: LayerCall) -> Any:
        number = len(calls)
        shapes = {name: _shape(value) for name, value in call.values.items()}
        calls.append(call._replace(x=_shape(call.x), values=shapes))
        # Marked together with the input: what is not used further is no part of a program.
        variables = [call.values[name] for name in sorted(call.values)]
        x, *_ = mark((BEGINS, number), call.x, *variables)
        parts, form = jax.tree.flatten(call.proceed(x))  # a folded layer's has a wrapper
        return form.unflatten(mark((ENDS, number), *parts))

    closed = jax.make_jaxpr(lambda arrays: arrays_in(model.run(arrays, run, hook)))(model.arrays)
    keys = [path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(model.arrays)[0]]
    return Dataflow(closed.jaxpr, keys, calls)


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))
