"""Which method a layer is, ours or Flax's, and its options in our words."""

import dataclasses
import inspect
from typing import Any

from flax import linen, nnx

from jaxnorm.methods import METHODS, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.methods.running_covariance import RunningCovariance
from jaxnorm.methods.running_stats import RunningStats
from jaxnorm.methods.spec import Spec

FLAX = {
    linen.BatchNorm: BatchNorm,
    linen.LayerNorm: LayerNorm,
    linen.RMSNorm: RMSNorm,
    linen.GroupNorm: GroupNorm,
    linen.InstanceNorm: InstanceNorm,
    nnx.BatchNorm: BatchNorm,
    nnx.LayerNorm: LayerNorm,
    nnx.RMSNorm: RMSNorm,
    nnx.GroupNorm: GroupNorm,
    nnx.InstanceNorm: InstanceNorm,
}
"""Flax's layers, and the methods that they are."""


def method_of(layer: Any) -> type[Spec] | None:
    """The method of a normalization layer, ours or Flax's; None if it is none of these."""
    for kind, spec in FLAX.items():
        if isinstance(layer, kind):
            return spec
    # In the order of inheritance: some methods inherit the options of others.
    for base in type(layer).__mro__:
        for method in METHODS:
            named = base.__name__ == method.name
            if named and issubclass(base, method.spec) and issubclass(method.spec, Spec):
                return method.spec
    return None


def spec_of(layer: Any) -> Any:
    """The options of a normalization layer, ours or Flax's, as a spec of its own; or None."""
    method = method_of(layer)
    if method is None:
        return None
    # Not by getattr, which for an initializer that NNX dropped finds a method of the class.
    own = vars(layer)
    fields = dataclasses.fields(method)
    return method(**{field.name: own[field.name] for field in fields if field.name in own})


def calls_as_its_kind(layer: Any) -> bool:
    """Whether a layer is called as Flax's or ours is; a user's subclass may do more in a call."""
    return inspect.unwrap(type(layer).__call__).__module__.partition(".")[0] in ("flax", "jaxnorm")


def keeps_statistics(spec: Any) -> bool:
    """Whether a method normalizes by stored statistics of the data in inference."""
    if isinstance(spec, InstanceNorm):
        return spec.track_running_stats
    return isinstance(spec, RunningStats | RunningCovariance)
