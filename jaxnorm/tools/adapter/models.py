"""A model with its variables, of either framework, as the tools see it.

A tool takes a model with its variables, an `nnx.Module`, or a Linen module bound to them,
`model.bind(variables)`, and gives back one of the same kind. What is between, running the model,
watching its layers, exchanging variables and layers, is said once, here, and done in
`linen_model.py` and `nnx_model.py`.
"""

import abc
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.tools.adapter.marks import arrays_in, harvest, mark

Path = tuple[str, ...]
Arrays = dict[Path, Any]
"""The arrays of a model by the names on the way to them; a pytree."""


class LayerCall(NamedTuple):
    """One call of a layer, as it happens inside a model.

    Attributes:
        path: the names on the way to the layer. A layer that `nn.scan` runs for many has one path.
        layer: the Linen or NNX module, for its options.
        x: the layer's input.
        arguments: all other arguments, by name, those not given left out.
        values: the layer's own variables as they are inside, by name.
        proceed: runs the layer as the model does, on the given input.
        inside: the operation around it out of which nothing can be read, such as `"while"`; known
            only after the run.
    """

    path: Path
    layer: Any
    x: Any
    arguments: Mapping[str, Any]
    values: Mapping[str, jax.Array]
    proceed: Callable[[Any], Any]
    inside: str | None = None


class Unfinished(abc.ABC):
    """What a layer of a rebuilt model returns, if only another layer of it may take that."""

    @abc.abstractmethod
    def misused(self) -> Any:
        """Raises: it went somewhere else."""


def finished(out: Any) -> Any:
    """What a rebuilt model returns, in which nothing is `Unfinished`."""
    for leaf in jax.tree.leaves(out, is_leaf=lambda leaf: isinstance(leaf, Unfinished)):
        if isinstance(leaf, Unfinished):
            leaf.misused()
    return out


Hook = Callable[[LayerCall], Any]
"""What stands in the place of a layer's call: takes the call, returns the layer's result."""

Run = Callable[[Any], Any]
"""What is done with a model: takes a Linen module bound to its variables, or an NNX module."""


class Model(abc.ABC):
    """A model, and its arrays by their paths.

    Attributes:
        arrays: all variables. In Linen a path begins with the collection.
        who: the tool that it was given to, for errors.
    """

    arrays: Arrays
    who: str

    @abc.abstractmethod
    def key(self, path: Path, name: str) -> Path | None:
        """Where in `arrays` the variable `name` of the layer at `path` is; None if it has none."""

    @abc.abstractmethod
    def place(self, path: Path, name: str, collection: str) -> Path:
        """Where in `arrays` a new variable of the layer at `path` belongs."""

    @abc.abstractmethod
    def owner(self, key: Path) -> Path:
        """The path of the module that a variable belongs to."""

    @abc.abstractmethod
    def collection(self, key: Path) -> str:
        """The collection of a variable, `"params"`, `"batch_stats"`, ...; in NNX by its type."""

    @abc.abstractmethod
    def run(self, arrays: Arrays, run: Run, hook: Hook) -> Any:
        """What `run` returns for the model with these arrays, each layer's call given to `hook`.

        A pure function of `arrays`: nothing that the model changes is kept. In NNX the model is in
        inference (`eval`); in Linen `run` says so.
        """

    @abc.abstractmethod
    def rebuilt(self, arrays: Arrays, layers: Mapping[Path, Any] | None = None) -> Any:
        """A model of the user's kind with these arrays, and with other layers in some places.

        It shares nothing with the model that the user gave. The new layers are unbound Linen
        modules that stand for the old ones wherever these are called, or NNX modules; the arrays
        of their variables are among `arrays`, at the path of the layer. In Linen a function of the
        layer may stand in the place of a module: what the model makes anew at each call, such as
        `BatchNorm(use_running_average=not train)`, has other options at each.
        """

    @abc.abstractmethod
    def optimized(self, values: Mapping[Path, Any]) -> Any:
        """The tree of parameters that optimizers take, with these values in the place of arrays.

        `variables["params"]`, or `nnx.as_pure(nnx.state(model, nnx.Param))`.
        """

    def known_layers(self, run: Run) -> dict[Path, Any]:
        """The layers by their paths: in Linen those that `run` calls, in NNX all."""
        layers: dict[Path, Any] = {}

        def note(call: LayerCall) -> Any:
            layers.setdefault(call.path, call.layer)
            return call.proceed(call.x)

        def running(arrays: Arrays) -> None:
            self.run(arrays, run, note)

        jax.eval_shape(running, self.arrays)
        return layers

    def params_of(self, path: Path) -> dict[str, Path]:
        """Where in `arrays` the parameters of the layer at `path` are, by name."""
        params = [key for key in self.arrays if self.collection(key) == "params"]
        keys = {key[-1]: self.key(path, key[-1]) for key in params}
        return {name: key for name, key in keys.items() if key in params}

    def layers(self, run: Run) -> dict[Path, list[LayerCall]]:
        """The calls of each layer that `run` calls, in their order, with shapes for arrays."""
        noted: list[LayerCall] = []

        def note(call: LayerCall) -> Any:
            (x,) = mark((len(noted),), call.x)
            noted.append(
                call._replace(x=_shape(call.x), values=jax.tree.map(_shape, dict(call.values)))
            )
            return call.proceed(x)

        # Flax runs the body of a scan more often than the program does: the program is asked.
        watched = harvest(lambda arrays: arrays_in(self.run(arrays, run, note)))
        _, found = jax.eval_shape(watched, self.arrays)
        calls: dict[Path, list[LayerCall]] = {}
        for place in found:
            call = noted[place.label[0]]._replace(inside=place.inside)
            calls.setdefault(call.path, []).append(call)
        return calls


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def model_of(model: Any, who: str) -> Model:
    """The model that a user gave to the tool `who`.

    Raises:
        TypeError: it is neither an NNX module nor a Linen module.
        ValueError: it is a Linen module without variables, or with some that contain themselves.
    """
    from flax import linen, nnx

    from jaxnorm.tools.adapter.linen_model import LinenModel
    from jaxnorm.tools.adapter.nnx_model import NNXModel

    if isinstance(model, nnx.Module):
        return NNXModel(model, who)
    if not isinstance(model, linen.Module):
        raise TypeError(
            f"{who}: found {type(model).__name__}, but needs a model with its variables. Give an "
            f"nnx.Module, or a Linen module bound to them: {who}(model.bind(variables), ...)."
        )
    if model.scope is None:
        raise ValueError(
            f"{who}: the Linen module {type(model).__name__} has no variables here. Bind them: "
            f"{who}({type(model).__name__.lower()}.bind(variables), ...)."
        )
    try:
        return LinenModel(model, who)
    except RecursionError as error:
        raise ValueError(
            f"{who}: a dictionary among the variables of {type(model).__name__} contains itself. "
            f"Bind arrays in a tree: {who}(model.bind({{'params': params}}), ...)."
        ) from error


def called(
    layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The input of a layer's call and its other arguments by name."""
    bound = inspect.signature(type(layer).__call__).bind(layer, *args, **kwargs)
    _, (_, x), *others = bound.arguments.items()
    return x, dict(others)


def fresh(arrays: Arrays) -> Arrays:
    """Copies of arrays, so that donating the copy leaves the original alive."""
    return {path: _copy(leaf) for path, leaf in arrays.items()}


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
