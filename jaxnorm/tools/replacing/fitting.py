"""Whether another method fits in the place of a batch norm, and which variables it has there."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxnorm.core import precision
from jaxnorm.core.axes import sizes
from jaxnorm.methods import AdaBN, IBNb, InstanceNorm
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Slot
from jaxnorm.tools.adapter.kinds import calls_as_its_kind
from jaxnorm.tools.adapter.models import Arrays, LayerCall, Model, Path
from jaxnorm.tools.replacing.replacements import To

STATISTICS = ("mean", "var")


def misfit(model: Model, to: To, layer: Any, calls: Sequence[LayerCall], path: Path) -> str | None:
    """Why this method cannot stand in the place of a layer of `model`, or None if it can."""
    if not calls:
        return "it is not called in the example call, so its input is not known"
    if not calls_as_its_kind(layer):
        return (
            f"{type(layer).__name__} has a __call__ of its own, which {to.method} would not do. "
            f"Let it hold a batch norm, self.norm, in the place of being one"
        )
    who = f"{to.method} '{'/'.join(path)}'"
    try:
        for call in calls:
            _try(to.spec(layer), call, who)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"{who}: ")
    if any(_single(to.spec(layer), call.x) for call in calls):
        return (
            f"{to.method} would normalize each value by itself in an input of shape "
            f"{calls[0].x.shape}, which has no spatial axes. Use to('LayerNorm') or to('GroupNorm')"
        )
    new = sorted(set(slots_of(to, layer, calls[0])) - set(calls[0].values))
    if new and _stacked(model, path, calls[0], "batch_stats") is None:
        return (
            f"{to.method} has variables {new} besides, and those of the layer are stacked along "
            f"another axis than the first, where these would be. Stack the layers along axis 0"
        )
    return None


def slots_of(to: To, layer: Any, call: LayerCall) -> dict[str, Slot]:
    """The variables of the new layer, as they are inside its call."""
    spec, x = to.spec(layer), call.x
    features = sizes(x.shape, spec._feature_axes(x.ndim, to.method))
    if hasattr(layer, "num_features"):
        # An NNX layer with several feature axes may keep its variables flat.
        given = layer.num_features
        features = tuple(given) if isinstance(given, Sequence) else (given,)
    return spec._slots(features, precision.is_complex(x.dtype), to.method)


def kept_of(slots: dict[str, Slot], call: LayerCall) -> set[str]:
    """The names of variables that the new layer takes over; of the statistics all or none."""
    fitting = {
        name
        for name, slot in slots.items()
        if name in call.values and call.values[name].shape == slot.shape
    }
    if fitting.issuperset(STATISTICS):
        return fitting
    return {name for name in fitting if slots[name].collection == "params"}


def initial(model: Model, slots: dict[str, Slot], path: Path, call: LayerCall) -> Arrays:
    """The initial values of variables of a layer of `model`, stacked as those it has are."""
    values = {}
    for name, (collection, shape, dtype, init) in slots.items():
        stacked = _stacked(model, path, call, collection)
        assert stacked is not None
        value = init(jax.random.key(0), (*stacked, *shape), dtype)
        values[model.place(path, name, collection)] = value
    return values


def _try(spec: Any, call: LayerCall, who: str) -> None:
    """Calls the new layer as the old one is called, without values.

    Raises:
        TypeError, ValueError: as the new layer does.
    """
    spec._check_options(who)
    features = sizes(call.x.shape, spec._feature_axes(call.x.ndim, who))
    slots = spec._slots(features, precision.is_complex(call.x.dtype), who)
    mode: dict[str, Any] = {}
    dtype = spec.dtype
    if isinstance(spec, RunningStats):
        mode = dict(use_running_average=False, update_stats=False)
    if isinstance(spec, AdaBN):
        mode["domain"] = None

    def transform(values: Any, x: jax.Array, mask: Any) -> jax.Array:
        return spec._transform(values, x, mask, dtype, who, initializing=True, **mode)[0]

    jax.eval_shape(
        transform,
        {name: jax.ShapeDtypeStruct(slot.shape, slot.dtype) for name, slot in slots.items()},
        call.x,
        call.arguments.get("mask"),
    )


def _single(spec: Any, x: Any) -> bool:
    """Whether the method would find one value of each feature in an example."""
    if not isinstance(spec, InstanceNorm | IBNb):
        return False
    features = sizes(x.shape, spec._feature_axes(x.ndim, type(spec).__name__))
    return x.size == x.shape[0] * math.prod(features)


def _stacked(model: Model, path: Path, call: LayerCall, collection: str) -> tuple[int, ...] | None:
    """The leading sizes of stored variables that one layer does not see; None if they do not lead.

    Those of the collection, or if the layer has none there, of any.
    """
    keys = {name: model.key(path, name) for name in call.values}
    stored = {name: key for name, key in keys.items() if key is not None}
    same = {name: key for name, key in stored.items() if model.collection(key) == collection}
    for name, key in (same or stored).items():
        inside, outside = call.values[name].shape, model.arrays[key].shape
        leading = outside[: len(outside) - len(inside)]
        return leading if outside == (*leading, *inside) else None
    return None
