"""A normalization layer that does not move: by stored statistics, without gradients to its affine.

It behaves like the layer it is made of, has the same variables under the same names, and can be
called the same way. What does not move is not said by flags of the model, which `train()` and the
arguments of a call change, but by the layer itself.

When to use: fine-tuning on batches that are too small for statistics of their own (detection,
segmentation), where the backbone's batch norms keep those of the pretraining.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxnorm.tools.adapter.kinds import keeps_statistics, method_of, spec_of
from jaxnorm.tools.adapter.models import called

AFFINE = ("scale", "bias")
MODE = ("use_running_average", "update_stats")
"""Arguments by which a call chooses between training and inference."""


@dataclasses.dataclass(frozen=True)
class Freeze:
    """What is frozen of a layer; a function of a layer that makes the frozen one.

    Attributes:
        statistics: whether it normalizes by its stored statistics, which never move.
        affine: whether no gradient reaches its scale and bias.
    """

    statistics: bool = True
    affine: bool = False

    def __call__(self, layer: Any) -> Any:
        """An unbound Linen module, or an NNX module that is not `layer`, but has its variables."""
        if isinstance(layer, nnx.Module):
            new: Any = nnx.clone(layer)
            if not hasattr(layer, "frozen_statistics"):
                object.__setattr__(new, "__class__", _frozen(type(new)))
            new.frozen_statistics = self.statistics or getattr(layer, "frozen_statistics", False)
            new.frozen_affine = self.affine or getattr(layer, "frozen_affine", False)
            return new
        # A layer that is replaced twice comes here as it was made the first time.
        before = layer if isinstance(layer, Frozen) else Frozen(layer, False, False, parent=None)
        return Frozen(
            before.layer.clone(parent=None, name=None),
            self.statistics or before.statistics,
            self.affine or before.affine,
            parent=None,
        )

    def __str__(self) -> str:
        what = [name for name in ("statistics", "affine") if getattr(self, name)]
        return f"frozen {' and '.join(what)}"


def frozen_layer(layer: Any, *, statistics: bool = True, affine: bool = False) -> Any:
    """What stands in the place of `layer` in a model, and behaves like it but for what is frozen.

    Args:
        layer: a normalization layer, ours or Flax's. It is not changed.
        statistics: whether it normalizes by its stored statistics, which never move, whatever the
            call or `train()` says.
        affine: whether no gradient reaches its scale and bias. An optimizer may move them still, by
            weight decay: see `decay_mask`.

    Returns:
        What `Model.rebuilt` takes: an NNX module, or for Linen, where a model makes its layers anew
        at each call, the function of a layer that makes the frozen one.

    Raises:
        TypeError: it is no normalization layer, or it has no statistics.
    """
    who = "frozen_layer"
    if method_of(layer) is None:
        raise TypeError(
            f"{who}: found {type(layer).__name__}, but can freeze normalization layers only, ours "
            f"or Flax's. Freeze others by the optimizer: optax.multi_transform."
        )
    if statistics and not keeps_statistics(spec_of(layer)):
        raise TypeError(
            f"{who}: {type(layer).__name__} keeps no statistics that could be frozen. Use "
            f"statistics=False."
        )
    freeze = Freeze(statistics, affine)
    return freeze(layer) if isinstance(layer, nnx.Module) else freeze


def has_frozen_affine(layer: Any) -> bool:
    """Whether a layer is one that was frozen, and no gradient reaches its scale and bias."""
    if isinstance(layer, nnx.Module):
        return getattr(layer, "frozen_affine", False)
    return isinstance(layer, Frozen) and layer.affine


def _without_mode(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in MODE}


class Frozen(nn.Module):
    """A Linen layer of which something is frozen.

    Attributes:
        layer: the layer, as the model makes it.
        statistics: whether its statistics are.
        affine: whether its scale and bias are.
    """

    layer: nn.Module
    statistics: bool = True
    affine: bool = False

    def setup(self) -> None:
        """Variables are named as without this wrapper."""
        mode: dict[str, Any] = {"use_running_average": True} if self.statistics else {}
        self.still = self.layer.clone(**mode)
        nn.share_scope(self, self.still)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Calls the layer."""
        x, arguments = called(self.still, args, kwargs)
        if self.statistics:
            arguments = _without_mode(arguments)

        def normalized(layer: Any, x: Any) -> Any:
            return layer(x, **arguments)

        if self.affine and not self.is_initializing():
            fixed = nn.map_variables(normalized, "params", jax.lax.stop_gradient)
            return fixed(self.still, x)
        return normalized(self.still, x)


@functools.cache
def _frozen(cls: type) -> type:
    """The class of NNX layers like `cls` of which something is frozen."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        x, arguments = called(self, args, kwargs)
        if self.frozen_statistics:
            arguments = _without_mode(arguments)
        return cls.__call__(_as_frozen(self), x, **arguments)

    functools.update_wrapper(__call__, cls.__call__)
    body = {"__call__": __call__, "__doc__": cls.__doc__, "__reduce_ex__": reduced_by(_frozen, cls)}
    return type(f"Frozen{cls.__name__}", (cls,), body)


def reduced_by(make: Callable[[type], type], cls: type) -> Callable[[Any, Any], Any]:
    """How pickle takes NNX layers of the class `make(cls)`, which has no name to be found by.

    As layers of the class `cls`, whose class is made anew when they are read.
    """

    def reduce_ex(self: Any, _: Any) -> tuple[Any, ...]:
        layer = object.__new__(cls)
        vars(layer).update(vars(self))
        return _made_anew, (make, layer)

    return reduce_ex


def _made_anew(make: Callable[[type], type], layer: Any) -> Any:
    object.__setattr__(layer, "__class__", make(type(layer)))
    return layer


def _as_frozen(layer: Any) -> Any:
    """The same layer with the same statistics, as it is to be for one call."""
    new = object.__new__(type(layer))
    vars(new).update(vars(layer))
    if layer.frozen_statistics:
        vars(new)["use_running_average"] = True
    for name in AFFINE if layer.frozen_affine else ():
        if isinstance(variable := vars(layer).get(name), nnx.Variable):
            fixed = jax.lax.stop_gradient(variable.get_raw_value())
            vars(new)[name] = variable.replace(fixed)
    return new
