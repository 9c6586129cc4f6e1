"""Which batch norm of a model can be folded into which layer, and of the others, why they cannot.

A norm and a layer are a pair if the layer's output goes to the norm and nowhere else, the norm
scales features of the layer's kernel by stored statistics, and the kernel is stored as well and
belongs to this layer alone.
"""

import dataclasses
import inspect
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from jaxnorm.core.axes import sizes
from jaxnorm.methods import AdaBN, BatchNorm, BatchRenorm, IBNa, InstanceNorm, SwitchableNorm
from jaxnorm.methods.running_covariance import RunningCovariance
from jaxnorm.tools.adapter.kinds import calls_as_its_kind, keeps_statistics, spec_of
from jaxnorm.tools.adapter.models import LayerCall, Model, Path
from jaxnorm.tools.adapter.norms import NORMS
from jaxnorm.tools.folding.dataflow import Dataflow, Place, Step
from jaxnorm.tools.folding.linear_layers import LINEAR, kept_axes, pads_with_zeros
from jaxnorm.tools.folding.product import product_rounding

FIXED_BY_FEATURE = (BatchNorm, BatchRenorm, AdaBN, InstanceNorm)
"""The methods that, if they keep statistics, scale and shift each feature by stored numbers."""

REASONS = {
    IBNa: "instance norm, a part of it, goes by the input",
    SwitchableNorm: "a part of it goes by the input",
    RunningCovariance: "it mixes features by a matrix, which is not done here",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A norm and the layer that it goes into.

    Attributes:
        norm, layer: where they are called.
        kernel_axes: the axes of the layer's kernel that its output has, in the order of the output.
        norm_axes: which of these are the norm's features, by their places in `kernel_axes`.
        stacked: how many axes the stored variables have before those that a call sees.
        keys: where in the model's arrays the variables are: `kernel`, the layer's `bias`, and the
            norm's `mean`, `var`, `scale` and `offset`, as far as there are any.
        dtype: that of the norm's result.
        rounding: the largest machine epsilon among the dtypes of the variables, the layer's product
            and the norm's result.
        domain: that of the call, for a norm that has several.
    """

    norm: Place
    layer: Place
    kernel_axes: tuple[int, ...]
    norm_axes: tuple[int, ...]
    stacked: int
    keys: dict[str, Path]
    dtype: Any
    rounding: float
    domain: str | None


class Pairing:
    """The pairs of a model by the paths of the norms, and the reasons why other norms are none."""

    def __init__(self, model: Model, flow: Dataflow, wanted: Collection[Path]):
        self._model, self._flow = model, flow
        self._calls: dict[Path, list[Place]] = {}
        for place in flow.places:
            self._calls.setdefault(place.call.path, []).append(place)
        self.pairs: dict[Path, Pair] = {}
        self.left = {path: NOT_CALLED for path in _with_statistics(model) - self._calls.keys()}
        for path, places in self._calls.items():
            if isinstance(places[0].call.layer, NORMS):
                found = self._pair(places) if path in wanted else "it was not asked for"
                if isinstance(found, Pair):
                    self.pairs[path] = found
                else:
                    self.left[path] = found

    def _pair(self, places: list[Place]) -> Pair | str:
        """The pair that a norm is part of, or why it is part of none."""
        norm = places[0]
        if reason := _own_call(norm) or _own_methods(norm) or _not_fixed(norm.call):
            return reason
        if len(places) > 1:
            return f"it is called {len(places)} times"
        layer = self._layer_before(norm)
        if isinstance(layer, str):
            return layer
        calls = len(self._calls[layer.call.path])
        if calls > 1:
            return f"{_name(layer)} is called {calls} times"
        kept = kept_axes(layer.call, norm.call.x.ndim)
        axes = spec_of(norm.call.layer)._feature_axes(norm.call.x.ndim, _name(norm))
        if kept is None or not set(axes) <= kept.keys():
            return (
                f"its features lie along axes {axes}, those that {_name(layer)} makes along "
                f"{tuple(kept or ())}"
            )
        return self._stored(norm, layer, kept, axes)

    def _layer_before(self, norm: Place) -> Place | str:
        """The layer whose output a norm gets, and nothing else does."""
        flow = self._flow
        arrays, maker = flow.source(norm)
        layer = flow.place(maker)
        if layer is None or not isinstance(layer.call.layer, LINEAR):
            return (
                f"its input comes from {self._described(maker)}, not straight from a convolution "
                f"or dense layer{self._why_not_after(norm)}"
            )
        if reason := _own_call(layer):
            return reason
        begin = flow.steps[norm.begins]
        for array in arrays:
            others = [
                step
                for step in flow.users(array)
                if step is not begin and not set(step.outputs) & set(arrays)
            ]
            if others:
                used = ", ".join(dict.fromkeys(map(self._described, others)))
                return f"what {_name(layer)} makes is also used by {used}"
        return layer

    def _why_not_after(self, norm: Place) -> str:
        """For a norm before a convolution, why it does not go into that one, if it pads."""
        users = self._flow.users(self._flow.steps[norm.ends].outputs[0])
        after = self._flow.place(users[0]) if len(users) == 1 else None
        if after is None or not pads_with_zeros(after.call.layer):
            return ""
        return f"; nor does it go into {_name(after)} after it, whose padding is not normalized"

    def _stored(
        self, norm: Place, layer: Place, kept: dict[int, int], axes: tuple[int, ...]
    ) -> Pair | str:
        """The pair, if all its variables are stored, and those of the layer are its own."""
        keys: dict[str, Path] = {}
        stacked = set()
        names = {name: (layer, name) for name in ("kernel", "bias")}
        names |= {role: (norm, name) for role, name in _norm_variables(norm.call).items()}
        for role, (place, name) in names.items():
            if name not in place.call.values:
                continue
            key = self._flow.origin(self._flow.variable(place, name))
            if not isinstance(key, tuple) or isinstance(key, Step):
                return (
                    f"{_name(place)} has no stored {name}: it is computed by {self._described(key)}"
                )
            if key != self._model.key(place.call.path, name):
                return (
                    f"{_name(place)} has no {name} of its own: it is that of another, "
                    f"'{'/'.join(key)}'"
                )
            if others := self._flow.others_that_use(key, place):
                used = ", ".join(dict.fromkeys(map(self._described, others)))
                return f"the {name} of {_name(place)} is also used by {used}"
            keys[role] = key
            stacked.add(self._model.arrays[key].ndim - place.call.values[name].ndim)
        if len(stacked) > 1:
            return f"it and {_name(layer)} are not repeated alike: one has variables for each step"
        rounding = product_rounding(self._flow, layer, keys["kernel"], keys.get("bias"))
        if isinstance(rounding, Step | str):
            return f"{_name(layer)} does more than its kind: {self._more(rounding)}"
        outputs = list(kept)
        dtype = self._flow.shape(self._flow.steps[norm.ends].outputs[0]).dtype
        dtypes = [dtype, *(self._model.arrays[key].dtype for key in keys.values())]
        return Pair(
            norm=norm,
            layer=layer,
            kernel_axes=tuple(kept.values()),
            norm_axes=tuple(outputs.index(axis) for axis in axes),
            stacked=stacked.pop(),
            keys=keys,
            dtype=dtype,
            rounding=max(rounding, *(float(jnp.finfo(dtype).eps) for dtype in dtypes)),
            domain=_domain(norm.call),
        )

    def _more(self, product: Step | str) -> str:
        return (
            product if isinstance(product, str) else f"its kernel or output goes through {product}"
        )

    def _described(self, step: Step | None) -> str:
        place = self._flow.place(step)
        if place is not None:
            return _name(place)
        return "the model's input" if step is None else str(step)


NOT_CALLED = "it is not called here"


def _name(place: Place) -> str:
    return f"'{'/'.join(place.call.path)}'"


def _with_statistics(model: Model) -> set[Path]:
    """The paths of the layers that keep a running mean."""
    means = [key for key in model.arrays if key[-1] == "mean"]
    return {
        path
        for key in means
        for path in (key[:-1], key[1:-1])
        if model.key(path, "mean") == key and model.collection(key) == "batch_stats"
    }


def _own_call(place: Place) -> str | None:
    """Why it is not known what a layer does: it is a user's subclass, with a call of its own."""
    if calls_as_its_kind(place.call.layer):
        return None
    kind = type(place.call.layer).__name__
    return f"{kind} has a __call__ of its own, so that it is not known what {_name(place)} does"


def _own_methods(place: Place) -> str | None:
    """Why it is not known what a norm does: a user's subclass has other parts of its call."""
    layer = place.call.layer
    kinds = [kind for kind in type(layer).__mro__ if _is_known(kind)]
    own = [
        name
        for kind in type(layer).__mro__
        if not _is_known(kind)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("__")
        if any(hasattr(known, name) for known in kinds)
    ]
    if not own:
        return None
    return (
        f"{type(layer).__name__} has a {own[0]} of its own, so that it is not known what "
        f"{_name(place)} does"
    )


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("builtins", "flax", "jaxnorm")


def _not_fixed(call: LayerCall) -> str | None:
    """Why a norm is no fixed scale and shift of each feature, if it is none."""
    spec = spec_of(call.layer)
    if type(spec) not in FIXED_BY_FEATURE or not keeps_statistics(spec):
        reasons = (reason for kind, reason in REASONS.items() if isinstance(spec, kind))
        return next(reasons, "it goes by the input, not by stored statistics")
    frozen = call.arguments.get("use_running_average")
    frozen = call.layer.use_running_average if frozen is None else frozen
    if not frozen:
        return "it is in training: call the model for inference, for example with train=False"
    if call.arguments.get("mask") is not None:
        return "it is called with a mask"
    return None


def _domain(call: LayerCall) -> str | None:
    """The domain by which a norm that has several is called."""
    spec = spec_of(call.layer)
    if not isinstance(spec, AdaBN):
        return None
    return call.arguments.get("domain") or spec.domain or spec.domains[0]


def _norm_variables(call: LayerCall) -> dict[str, str]:
    """The names of a norm's variables by what they are."""
    spec = spec_of(call.layer)
    names = {name: name for name in ("mean", "var", "scale", "bias")}
    if isinstance(spec, AdaBN) and (domain := _domain(call)):
        features = sizes(call.x.shape, spec._feature_axes(call.x.ndim, "AdaBN"))
        slots = BatchNorm._slots(spec, features, False, "AdaBN")
        names |= spec._names(slots, domain)
    return {"offset" if role == "bias" else role: name for role, name in names.items()}
