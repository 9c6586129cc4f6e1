"""A Linen module bound to its variables, as the tools see it."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm.linen.shell import Shell
from jaxnorm.linen.weights import WeightShell
from jaxnorm.tools.adapter.models import (
    Arrays,
    Hook,
    LayerCall,
    Model,
    Path,
    Run,
    called,
    finished,
    fresh,
)
from jaxnorm.tools.adapter.traces import Exchanged, Watched, traced_apart

NORMS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm, Shell)
LINEAR = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
WATCHED = (*NORMS, *LINEAR)


class LinenModel(Model):
    """A Linen module bound to its variables, as the tools see it."""

    def __init__(self, bound: nn.Module, who: str):
        self.who = who
        assert bound.scope is not None
        self._rngs = {name: _key(rng) for name, rng in bound.scope.rngs.items()}
        self._module, variables = bound.unbind()
        self._boxes = _flat(variables)
        self.arrays = {path: meta.unbox(leaf) for path, leaf in self._boxes.items()}
        # Optax takes trees for different whose containers are.
        self._immutable = {name for name, c in variables.items() if isinstance(c, FrozenDict)}

    def key(self, path: Path, name: str) -> Path | None:
        """See `Model`."""
        for collection in {key[0]: None for key in self.arrays}:
            if (collection, *path, name) in self.arrays:
                return (collection, *path, name)
        return None

    def place(self, path: Path, name: str, collection: str) -> Path:
        """See `Model`."""
        return (collection, *path, name)

    def owner(self, key: Path) -> Path:
        """See `Model`."""
        return key[1:-1]

    def collection(self, key: Path) -> str:
        """See `Model`."""
        return key[0]

    def optimized(self, values: Mapping[Path, Any]) -> Any:
        """See `Model`."""
        params = {key: values[key] for key in self.arrays if self.collection(key) == "params"}
        return self._variables(params).get("params", {})

    def _variables(self, arrays: Arrays) -> dict[str, Any]:
        boxed = {
            path: meta.replace_boxed(self._boxes[path], leaf) if path in self._boxes else leaf
            for path, leaf in arrays.items()
        }
        return {
            name: FrozenDict(collection) if name in self._immutable else collection
            for name, collection in unflatten_dict(boxed).items()
        }

    def run(self, arrays: Arrays, run: Run, hook: Hook) -> Any:
        """See `Model`."""
        this_run = object()
        in_progress: set[int] = set()

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            watched = isinstance(layer, WATCHED) and not isinstance(layer, WeightShell)
            # Of a run inside `run`, of another model, Flax tells the outer one too.
            elsewhere = _RUNNING.run is not this_run
            # `super().__call__` of a user's subclass comes here too.
            again = id(layer) in in_progress
            # A model may initialize other modules, whose variables are its own parameters.
            unseen = context.method_name != "__call__" or again or elsewhere
            unseen = unseen or layer.is_initializing()
            if unseen or not watched or _is_replaced(layer):
                return next_fun(*args, **kwargs)
            x, arguments = called(layer, args, kwargs)
            call = LayerCall(
                path=tuple(layer.path),
                layer=layer,
                x=x,
                arguments=arguments,
                values=own_values(layer),
                proceed=lambda x: next_fun(x, **arguments),
            )
            in_progress.add(id(layer))
            try:
                return hook(call)
            finally:
                in_progress.discard(id(layer))

        before, _RUNNING.run = getattr(_RUNNING, "run", None), this_run
        try:
            with nn.intercept_methods(intercept), traced_apart(Watched()):
                # Some layers write although nobody keeps it: a scan with a fixed set of
                # collections.
                out, _ = nn.apply(run, self._module, mutable=True)(
                    self._variables(arrays), rngs=self._rngs
                )
            return out
        finally:
            _RUNNING.run = before

    def rebuilt(self, arrays: Arrays, layers: Mapping[Path, Any] | None = None) -> nn.Module:
        """See `Model`."""
        makers = {
            path: Given(layer) if isinstance(layer, nn.Module) else layer
            for path, layer in (layers or {}).items()
        }
        module = _rewired(self._module, makers) if makers else self._module
        rngs = {name: jnp.copy(key) for name, key in self._rngs.items()}
        return module.bind(self._variables(fresh(arrays)), rngs=rngs)


def _key(rng: Any) -> jax.Array:
    """The key of a scope's random numbers, which Flax keeps lazily."""
    return rng.as_jax_rng() if hasattr(rng, "as_jax_rng") else rng


def _flat(variables: Mapping[str, Any]) -> dict[Path, Any]:
    return flatten_dict({**variables}, is_leaf=lambda _, leaf: isinstance(leaf, meta.AxisMetadata))


def own_values(layer: nn.Module) -> dict[str, jax.Array]:
    """The variables of a module that is called, by name, those of its submodules left out."""
    return {
        name: meta.unbox(leaf)
        for collection in layer.variables.values()
        for name, leaf in collection.items()
        if not isinstance(leaf, Mapping)
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A function of any layer that makes the given one, and hides it: Flax adopts what it finds.

    Equal only to itself, since modules with lists among their options have no hash.
    """

    layer: nn.Module

    def __call__(self, _: nn.Module) -> nn.Module:
        """The layer."""
        return self.layer


@dataclasses.dataclass(frozen=True)
class Chained:
    """A function of a layer that makes one, and of this another."""

    first: Callable[[nn.Module], nn.Module]
    second: Callable[[nn.Module], nn.Module]

    def __call__(self, layer: nn.Module) -> nn.Module:
        """The last of the three."""
        return self.second(self.first(layer))


def _rewired(module: nn.Module, makers: Mapping[Path, Any]) -> nn.Module:
    """The module with other layers in some places; a rewired one is rewired anew, not wrapped."""
    if not isinstance(module, Rewired):
        return Rewired(Given(module), FrozenDict(makers))
    before = module.layers
    chained = {
        path: Chained(before[path], make) if path in before else make
        for path, make in makers.items()
    }
    return Rewired(module.model, FrozenDict({**before, **chained}))


class Rewired(nn.Module):
    """A module in which other layers stand in the place of some.

    Its variables are those of the module, under the same names. Methods other than `__call__` are
    reached by `call`: `rewired.apply(variables, "encode", x, method="call")`.

    Attributes:
        model: the module, hidden: adopted as a part, it would have another path.
        layers: by the path of a layer, the function of it, bound and with its options of the
            moment, that makes the unbound module that is called in its place.
    """

    model: Given
    layers: Mapping[Path, Callable[[nn.Module], nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.call("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        hidden = vars(self).get("model")
        if hidden is not None and callable(getattr(type(hidden.layer), name, None)):
            raise AttributeError(
                f"{name}: layers of this {type(hidden.layer).__name__} were exchanged, and its "
                f"methods are called by name. Use module.apply(variables, {name!r}, ..., "
                f"method='call')."
            )
        return super().__getattr__(name)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the module, by name."""
        own = len(self.path)
        running: set[Path] = set()

        def maker(layer: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
            path = tuple(layer.path)[own:]
            # The new layer's own call comes here too, as it has the path of the old.
            return None if path in running else self.layers.get(path)

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            make = maker(context.module)
            if make is None or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            path = tuple(context.module.path)[own:]
            running.add(path)
            try:
                new = make(context.module).clone(parent=context.module.scope)
                return new(*args, **kwargs)
            finally:
                running.remove(path)

        assert self.scope is not None
        # In the very scope of this wrapper, without which variables would have other names.
        model = self.model.layer.clone(parent=self.scope.rewound(), name=None)
        makers = getattr(_RUNNING, "makers", ())
        _RUNNING.makers = (*makers, maker)
        try:
            exchanged = Exchanged(tuple(self.path), self.layers)
            with nn.intercept_methods(intercept), traced_apart(exchanged):
                return finished(getattr(model, method)(*args, **kwargs))
        finally:
            _RUNNING.makers = makers


_RUNNING = threading.local()
"""Which run is in progress, and the rewired modules that are called, as functions that say what
replaces a layer."""


def _is_replaced(layer: nn.Module) -> bool:
    """Whether another layer is about to be called in the place of this one."""
    return any(maker(layer) for maker in getattr(_RUNNING, "makers", ()))
