"""What a batch norm can be replaced by: a small vocabulary for `replace`.

    to("GroupNorm", num_groups=8)    frozen()    ghost(16)    synchronized("batch")

Each word is a function of the old layer that makes the new one. Options of the same name carry
over, so that `to` names only those that change.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.nnx.nn import dtypes

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.core.devices import AxisName
from jaxnorm.methods import METHODS, GroupNorm, IBNb, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.methods.spec import Spec
from jaxnorm.tools.adapter.kinds import keeps_statistics, spec_of
from jaxnorm.tools.replacing.frozen import Freeze, Frozen, reduced_by

SPECS = {method.name: method.spec for method in METHODS if issubclass(method.spec, Spec)}
PER_EXAMPLE = (LayerNorm, RMSNorm, GroupNorm, InstanceNorm, IBNb)
"""Methods whose `axis_name` would be that of parts of an example, not that of the batch."""


@dataclasses.dataclass(frozen=True)
class To:
    """Another method in the place of a batch norm; a function of the layer that makes the new one.

    Attributes:
        method: its name.
        options: those that do not carry over, or are to be others.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    def spec(self, layer: Any) -> Any:
        """The options of the new layer: those given, those of the old layer, defaults."""
        kind = SPECS[self.method]
        old = spec_of(layer)
        has = {field.name for field in dataclasses.fields(kind)}
        carried = {
            field.name: _hashable(getattr(old, field.name))
            for field in dataclasses.fields(old)
            if field.name in has
        }
        if issubclass(kind, PER_EXAMPLE):
            for name in ("axis_name", "axis_index_groups", "unbound_axis"):
                carried.pop(name, None)
        for name in ("feature_axes", "reduction_axes"):
            # The axes of layer norm and its like are the features'; those of group norm are not.
            if "feature_axes" in has and name in has:
                carried[name] = _hashable(old.axis)
        return kind(**carried | dict(self.options))

    def __call__(self, layer: Any) -> Any:
        """An unbound Linen module, or an NNX module with the variables that `layer` has too."""
        if isinstance(layer, Frozen):
            layer = layer.layer
        spec = self.spec(layer)
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        if isinstance(layer, nn.Module):
            new = getattr(jaxnorm.linen, self.method)(**options, parent=None)
            return new if _called_alike(type(new)) else CalledLikeBatchNorm(new, parent=None)
        if layer.promote_dtype is not dtypes.promote_dtype:
            options["promote_dtype"] = layer.promote_dtype
        new = getattr(jaxnorm.nnx, self.method)(layer.num_features, **options, rngs=nnx.Rngs(0))
        for name, variable in vars(layer).items():
            # With what a user says of a variable: its type, its sharding.
            if isinstance(variable, nnx.Variable) and isinstance(vars(new).get(name), nnx.Variable):
                setattr(new, name, variable.copy())
        if not _called_alike(type(new)):
            object.__setattr__(new, "__class__", _called_like_batch_norm(type(new)))
        return new


By = To | Freeze


def to(method: str, **options: Any) -> To:
    """Another method: `to("GroupNorm", num_groups=8)`.

    Args:
        method: the name of a class of `jaxnorm.linen` and `jaxnorm.nnx` that normalizes
            activations.
        **options: of that class. Those that are not given are the old layer's where it has some of
            the same name, such as `epsilon`, `momentum`, `dtype` or `use_scale`, otherwise the
            defaults. `axis` goes on as `feature_axes` where these are called so. `axis_name` does
            not carry over to methods that normalize each example by itself.

    Returns:
        What `replace` takes.

    Raises:
        ValueError: no method of this name.
        TypeError: the method has no such option.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> norm = nnx.BatchNorm(4, epsilon=1e-3, rngs=nnx.Rngs(0))
        >>> new = tools.replace(norm, tools.to("GroupNorm", num_groups=2), jnp.ones((2, 4))).model
        >>> new.num_groups, new.epsilon
        (2, 0.001)
    """
    who = "to"
    if method not in SPECS:
        raise ValueError(
            f"{who}: found no method {method!r} that normalizes activations. Use one of "
            f"{sorted(SPECS)}."
        )
    known = [field.name for field in dataclasses.fields(SPECS[method])]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{who}: {method} has no options {unknown}. Use some of {known}.")
    return To(method, tuple((name, _hashable(value)) for name, value in options.items()))


def frozen(*, statistics: bool = True, affine: bool = True) -> Freeze:
    """The same layer, but what is frozen does not move, whatever a call or `train()` says.

    Args:
        statistics: whether it normalizes by its stored statistics, which then never move.
        affine: whether no gradient reaches its scale and bias. Weight decay still moves them: see
            `decay_mask`.

    Returns:
        What `replace` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> new = tools.replace(norm, tools.frozen(), jnp.ones((2, 1))).model
        >>> new.train()
        >>> new(jnp.array([[0.0], [2.0]])).round(3).tolist()  # by mean 0 and variance 1
        [[0.0], [2.0]]
    """
    return Freeze(statistics, affine)


def ghost(size: int) -> To:
    """Batch norm of `size` examples at a time, see `jaxnorm.ghost_batches`.

    Args:
        size: how many examples are normalized together; must divide the batch.

    Returns:
        What `replace` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[0.0], [2.0], [10.0], [12.0]])
        >>> tools.replace(norm, tools.ghost(2), x).model(x).round(3).tolist()
        [[-1.0], [1.0], [-1.0], [1.0]]
    """
    return to("BatchNorm", ghost_batch_size=size)


def synchronized(
    axis_name: AxisName, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> To:
    """Batch norm over the devices along a mapped axis, or within groups of them.

    Args:
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`).
        axis_index_groups: groups of indices along them; each is a batch of its own.

    Returns:
        What `replace` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> new = tools.replace(norm, tools.synchronized("device"), jnp.ones((2, 1))).model
        >>> new.axis_name
        'device'
    """
    return to("BatchNorm", axis_name=axis_name, axis_index_groups=axis_index_groups)


def unsynchronized() -> To:
    """Batch norm of each device by itself.

    Returns:
        What `replace` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> norm = nnx.BatchNorm(1, axis_name="device", rngs=nnx.Rngs(0))
        >>> tools.replace(norm, tools.unsynchronized(), jnp.ones((2, 1))).model.axis_name
    """
    return to("BatchNorm", axis_name=None, axis_index_groups=None)


def _hashable(value: Any) -> Any:
    """Lists as tuples: Linen asks modules for a hash."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _called_alike(cls: type) -> bool:
    """Whether a layer can be called the way a batch norm is."""
    second = list(inspect.signature(cls.__call__).parameters)[2]
    return second == "use_running_average"


class CalledLikeBatchNorm(nn.Module):
    """A Linen layer that is called as a batch norm was, with arguments it may have no use for.

    Attributes:
        layer: the layer.
    """

    layer: nn.Module

    def setup(self) -> None:
        """Variables are named as without this wrapper."""
        nn.share_scope(self, self.layer)

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Calls the layer."""
        mode = dict(use_running_average=use_running_average, update_stats=update_stats)
        return self.layer(x, mask=mask, **_mode_for(self.layer, mode))


@functools.cache
def _called_like_batch_norm(cls: type) -> type:
    """The class of NNX layers like `cls` that are called as a batch norm was."""

    def __call__(
        self: Any,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        mode = dict(use_running_average=use_running_average, update_stats=update_stats)
        return cls.__call__(self, x, mask=mask, **_mode_for(self, mode))

    reduce_ex = reduced_by(_called_like_batch_norm, cls)
    body = {"__call__": __call__, "__doc__": cls.__doc__, "__reduce_ex__": reduce_ex}
    return type(cls.__name__, (cls,), body)


def _mode_for(layer: Any, mode: dict[str, Any]) -> dict[str, Any]:
    """The choice between training and inference, for a layer that knows the two."""
    return mode if keeps_statistics(spec_of(layer)) else {}
