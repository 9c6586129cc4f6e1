"""Norms that are neither Flax's nor this library's, found by their variables and what they compute.

A user's own batch norm or RMS norm is no layer that a tool knows, and yet its scale should not
decay, and no report should say that there is no norm. A module of the user's is taken for a norm if

- it has variables `mean` and `var` (or as in `STATISTICS`) of its own, or
- all its parameters are a `scale` (or as in `SCALES`) and others of the same shape, no module below
  it has any, and its call takes a root, as a standard deviation does. A layer that only scales
  takes none.

Nothing is read or exchanged there, since it is not known what else its call does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxnorm.tools.adapter import linen_model, nnx_model
from jaxnorm.tools.adapter.marks import inner_programs, mark, mark_p, opened
from jaxnorm.tools.adapter.models import Model, Path, Run

Shape = tuple[int, ...]

STATISTICS = (
    ("mean", "var"),
    ("mean", "cov"),
    ("mean", "variance"),
    ("running_mean", "running_var"),
    ("moving_mean", "moving_var"),
    ("moving_mean", "moving_variance"),
)
SCALES = ("scale", "weight", "gamma", "g")
ROOTS = ("sqrt", "rsqrt", "cbrt", "pow", "jaxnorm_normalize")
"""Operations of a program; the last is that of this library's functions."""

BEGINS, ENDS = "begins", "ends"
"""Marks around a module's call."""


class Lookalike(NamedTuple):
    """A module with variables like those of a norm.

    Attributes:
        params: the names of its parameters that are like a norm's.
        has_statistics: whether it stores a mean and a variance.
        kind: the name of its class; None if the example call misses it.
    """

    params: frozenset[str]
    has_statistics: bool
    kind: str | None

    @property
    def why(self) -> str:
        """Why nothing can be done with it."""
        if self.kind is None:
            return "not called in the example call. Call the model as in training, train=True"
        return (
            f"{self.kind} is a norm by its variables, but none of Flax or this library: it is not "
            f"known what else it does"
        )


def lookalikes(model: Model, run: Run) -> dict[Path, Lookalike]:
    """What looks like a norm and is no layer that tools know, by path.

    In Linen also what `run` does not call; of it the variables alone decide.
    """
    modules, with_root, inside = _seen(model, run)
    own = _own_variables(model, inside)
    if isinstance(model, nnx_model.NNXModel):
        own = {path: variables for path, variables in own.items() if path in modules}

    def is_param(key: Path) -> bool:
        return model.collection(key) == "params"

    parents = {path[:size] for path in own for size in range(len(path))}
    found = {}
    for path, variables in own.items():
        here = modules.get(path, [])
        if any(map(_is_known, here)):
            continue
        params = {key[-1]: size for key, size in variables.items() if is_param(key)}
        shape = _shape_of_statistics({key[-1]: size for key, size in variables.items()})
        has_statistics = shape is not None
        if shape is None and path not in parents:
            shape = _shape_of_scale(params)
            if here and shape is not None and path not in with_root:
                is_nnx = isinstance(here[0], nnx.Module)
                shape = shape if is_nnx and _takes_a_root(here[0], shape) else None
        if shape is not None:
            mine = frozenset(name for name in params if params[name] == shape)
            kind = _class_of(here[0]).__name__ if here else None
            found[path] = Lookalike(mine, has_statistics, kind)
    return found


def modules_of(model: Model, run: Run) -> dict[Path, list[Any]]:
    """The modules at each path: in Linen those that `run` calls, in NNX all."""
    return _seen(model, run).modules


class _Seen(NamedTuple):
    """What is seen of a model's modules.

    Attributes:
        modules: at each path, see `modules_of`.
        with_root: the paths of the Linen modules whose calls take a root.
        shapes: of the variables of Linen modules inside of their calls, by path and name; in
            `nn.scan` those that are stored have axes besides.
    """

    modules: dict[Path, list[Any]]
    with_root: set[Path]
    shapes: dict[Path, dict[str, Shape]]


def _seen(model: Model, run: Run) -> _Seen:
    if isinstance(model, nnx_model.NNXModel):
        return _Seen({path: [module] for path, module in model.modules().items()}, set(), {})
    shapes: dict[Path, dict[str, Shape]] = {}
    modules: dict[Path, list[Any]] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        path = tuple(context.module.path)
        if not isinstance(context.module, linen_model.Rewired):
            modules.setdefault(path, []).append(context.module)
            values = linen_model.own_values(context.module)
            shapes[path] = {name: jnp.shape(value) for name, value in values.items()}
        mark((BEGINS, path))
        out = next_fun(*args, **kwargs)
        mark((ENDS, path))
        return out

    def noting(model: Any) -> Any:
        with linen.intercept_methods(note):
            return run(model)

    def running(arrays: Any) -> None:
        model.run(arrays, noting, lambda call: call.proceed(call.x))

    with_root = set(_around_roots(jax.make_jaxpr(running)(model.arrays), []))
    return _Seen(modules, with_root, shapes)


def _own_variables(
    model: Model, inside: Mapping[Path, Mapping[str, Shape]]
) -> dict[Path, dict[Path, Shape]]:
    """The shapes of each module's variables, those of modules below it left out."""
    own: dict[Path, dict[Path, Shape]] = {}
    for key, leaf in model.arrays.items():
        path = model.owner(key)
        own.setdefault(path, {})[key] = inside.get(path, {}).get(key[-1], jnp.shape(leaf))
    return own


def _shape_of_statistics(variables: Mapping[str, Shape]) -> Shape | None:
    """The shape of a mean that stands beside a variance, if there are both."""
    return next((variables[a] for a, b in STATISTICS if {a, b} <= variables.keys()), None)


def _shape_of_scale(params: Mapping[str, Shape]) -> Shape | None:
    """The shape of a scale that is a parameter, if all parameters have it."""
    for name in SCALES:
        shape = params.get(name, ())
        is_matrix = name == "weight" and len(shape) > 1
        if shape and not is_matrix and set(params.values()) == {shape}:
            return shape
    return None


def _class_of(module: Any) -> type:
    """The class of a module as its author wrote it, without `nn.jit` and the like around it."""
    return next(c for c in type(module).__mro__ if c.__module__ != "flax.linen.transforms")


def _is_known(module: Any) -> bool:
    """Whether a module is a layer of Flax or this library, or of a subclass that is watched."""
    watched = isinstance(module, (*linen_model.WATCHED, *nnx_model.WATCHED))
    return watched or _class_of(module).__module__.partition(".")[0] in ("flax", "jaxnorm")


def _around_roots(program: Any, around: Sequence[Path]) -> Iterator[Path]:
    """The paths of modules in whose calls a program takes roots; `around` it are others."""
    begun = list(around)
    for equation in opened(program)[0].eqns:
        if equation.primitive is mark_p:
            what, path = equation.params["label"]
            if what == BEGINS:
                begun.append(path)
            else:
                begun.remove(path)
        elif equation.primitive.name in ROOTS:
            yield from begun
        for inner in inner_programs(equation):
            yield from _around_roots(inner, begun)


def _takes_a_root(module: nnx.Module, shape: Shape) -> bool:
    """Whether the call of a module with a scale takes a root, of an input that the scale fits."""
    graph, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    def called(state: Any, x: Any) -> None:
        module: Any = nnx.merge(graph, state)
        module(x)

    try:
        with jax.numpy_rank_promotion("allow"):
            program = jax.make_jaxpr(called)(state, x)
    except Exception:  # the user's code, which may want any other input
        return True
    return bool(list(_around_roots(program, [()])))
