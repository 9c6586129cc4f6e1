"""An NNX module, as the tools see it."""

import functools
import operator
import threading
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxnorm.nnx.shell import VARIABLE_TYPES, Shell
from jaxnorm.tools.adapter.models import Arrays, Hook, LayerCall, Model, Path, Run, called, fresh
from jaxnorm.tools.adapter.traces import Watched, traced_apart

NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, Shell)
LINEAR = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
WATCHED = (*NORMS, *LINEAR)


class NNXModel(Model):
    """An NNX module, as the tools see it."""

    def __init__(self, model: nnx.Module, who: str):
        self.who = who
        self._graph, state = nnx.split(nnx.clone(model))
        flat = dict(nnx.to_flat_state(state))
        self._places = {tuple(map(str, path)): path for path in flat}
        self._variables = {name: flat[path] for name, path in self._places.items()}
        # Plain arrays, such as the mask of a convolution, are part of a state as well.
        self.arrays = {
            name: v.get_raw_value() if isinstance(v, nnx.Variable) else v
            for name, v in self._variables.items()
        }

    def key(self, path: Path, name: str) -> Path | None:
        """See `Model`."""
        return (*path, name) if (*path, name) in self.arrays else None

    def place(self, path: Path, name: str, collection: str) -> Path:
        """See `Model`."""
        return (*path, name)

    def owner(self, key: Path) -> Path:
        """See `Model`."""
        return key[:-1]

    def collection(self, key: Path) -> str:
        """See `Model`."""
        for name, kind in VARIABLE_TYPES.items():
            if isinstance(self._variables[key], kind):
                return name
        return type(self._variables[key]).__name__

    def optimized(self, values: Mapping[Path, Any]) -> Any:
        """See `Model`."""
        return nnx.from_flat_state(
            {
                self._places[key]: values[key]
                for key in self.arrays
                if self.collection(key) == "params"
            }
        )

    def known_layers(self, run: Run) -> dict[Path, Any]:
        """See `Model`."""
        return {path: part for path, part in self.modules().items() if isinstance(part, WATCHED)}

    def modules(self) -> dict[Path, nnx.Module]:
        """All modules of the model, by their paths."""
        whole = self._merged(self.arrays)
        return {tuple(map(str, path)): module for path, module in nnx.iter_modules(whole)}

    def _merged(self, arrays: Arrays) -> Any:
        flat = {
            self._places[name]: v.replace(leaf) if isinstance(v, nnx.Variable) else leaf
            for name, leaf in arrays.items()
            for v in [self._variables[name]]
        }
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def run(self, arrays: Arrays, run: Run, hook: Hook) -> Any:
        """See `Model`."""
        model = self._merged(arrays)
        model.eval()
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, WATCHED):
                object.__setattr__(layer, "__class__", _watched(type(layer)))
                setattr(layer, _WATCHED_AS, tuple(map(str, path)))
        before, _CURRENT.hook = getattr(_CURRENT, "hook", None), hook
        try:
            with traced_apart(Watched()):
                return run(model)
        finally:
            _CURRENT.hook = before

    def rebuilt(self, arrays: Arrays, layers: Mapping[Path, Any] | None = None) -> Any:
        """See `Model`."""
        arrays = fresh(arrays)
        model = self._merged({name: arrays.get(name, leaf) for name, leaf in self.arrays.items()})
        if not layers:
            return model
        # By identity: a layer may stand in several places, of which each must get the new one.
        new_layers = {}
        for parts, layer in nnx.iter_modules(model):
            path = tuple(map(str, parts))
            if path in layers:
                new = nnx.clone(layers[path])
                for name, variable in vars(new).items():
                    if isinstance(variable, nnx.Variable):
                        variable.set_raw_value(arrays[(*path, name)])
                new_layers[id(layer)] = new
        if id(model) in new_layers:
            return new_layers[id(model)]
        for _, node in list(nnx.iter_graph(model)):
            _exchange(node, new_layers)
        return model


def _exchange(node: Any, new: Mapping[int, Any]) -> None:
    """Puts the new in the place of the children of a node that have these identities."""
    put: Any
    if isinstance(node, list | dict | nnx.List | nnx.Dict):
        items = node.items() if isinstance(node, dict | nnx.Dict) else enumerate(node)
        put = operator.setitem
    elif isinstance(node, nnx.Pytree):
        items, put = vars(node).items(), setattr
    else:
        return
    for key, child in list(items):
        # Tuples are no nodes that could be changed: theirs are exchanged with them.
        parts, form = jax.tree.flatten(child, is_leaf=lambda part: not isinstance(part, tuple))
        if any(id(part) in new for part in parts):
            child = form.unflatten([new.get(id(part), part) for part in parts])
            # Without saying so, a tuple among the attributes of a module would be an option.
            put(node, key, nnx.data(child) if put is setattr else child)


_WATCHED_AS = "watched_as"
"""The attribute of a watched layer with its path."""

_CURRENT = threading.local()
"""The hook of the run in progress."""


@functools.cache
def _watched(cls: type) -> type:
    """The class whose calls go to the hook; otherwise the same."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, arguments = called(self, args, kwargs)
        return _CURRENT.hook(
            LayerCall(
                path=getattr(self, _WATCHED_AS),
                layer=self,
                x=x,
                arguments=arguments,
                values={
                    name: v[...] for name, v in vars(self).items() if isinstance(v, nnx.Variable)
                },
                proceed=lambda x: cls.__call__(self, x, **arguments),
            )
        )

    functools.update_wrapper(__call__, cls.__call__)
    return type(cls.__name__, (cls,), {"__call__": __call__})
