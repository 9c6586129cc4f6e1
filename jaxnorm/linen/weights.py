"""Linen modules that wrap a layer and normalize its weights: the shell, one class per method."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxnorm import methods
from jaxnorm.linen.shell import Shell, StatsNotMutableError
from jaxnorm.methods.spec import Slot
from jaxnorm.methods.spectral_norm import spectral_norm_inference
from jaxnorm.methods.weight_spec import first_value

_KERNELS = frozenset({"kernel"})


class WeightShell(Shell):
    """Calls the wrapped layer with other weights than are stored.

    The variables that belong to a weight stand beside the layer, under the weight's path, such as
    `Dense_0/kernel/scale`. A box (`nn.with_partitioning`) is a part of the path, as in Flax:
    `Dense_0/kernel/value/scale`. Where a weight was boxed or unboxed since, they are found as well.
    """

    layer_instance: nn.Module

    variable_filter = None
    collection_name = "batch_stats"

    def _call_layer(self: Any, args: Any, kwargs: Any, *, update_stats: bool = False) -> Any:
        """Calls the layer, with the weights of which each is a function of the stored one."""
        self._check(update_stats)
        found: dict[str, bool] = {}
        stored = []

        def enter(variables: Any) -> Any:
            """The layer's view of its variables."""
            leaves, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_box)
            pairs = [self._pair(path, leaf, update_stats, found) for path, leaf in leaves]
            stored.append(structure.unflatten([first for first, _ in pairs]))
            return structure.unflatten([second for _, second in pairs])

        def leave(variables: Any) -> Any:
            """What is stored; Flax asks before and after the view, and only while initializing."""
            return stored.pop(0) if stored else variables

        call = nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            trans_in_fn=enter,
            trans_out_fn=leave,
            init=self.is_initializing(),
        )
        y = call(self.layer_instance)
        if not any(found.values()):
            fix = ", or name a part of its path: variable_filter={'kernel'}"
            raise ValueError(
                f"{self._who}: found no weight to normalize among {sorted(found)}. "
                f"Wrap a layer that has one{fix if self.variable_filter else ''}."
            )
        return y

    def _check(self: Any, update_stats: bool) -> None:
        self._check_options(self._who)
        if isinstance(self.variable_filter, str):
            raise TypeError(
                f"{self._who}: variable_filter={self.variable_filter!r} would be read letter by "
                f"letter. Use variable_filter={{{self.variable_filter!r}}}."
            )
        mutable = self.is_initializing() or self.is_mutable_collection(self.collection_name)
        if update_stats and not mutable:
            raise StatsNotMutableError(self._who, self.collection_name)

    def _pair(
        self: Any, path: Any, boxed: Any, update_stats: bool, found: dict[str, bool]
    ) -> tuple[Any, Any]:
        """A weight as it is stored, and as the layer is called with it."""
        name, *others = (f"{self.layer_instance.name}/{one}" for one in _names(path[1:], boxed))
        who = f"{self._who}, '{name}'"
        w = nn.unbox(boxed)
        selected = not self.variable_filter or any(part in name for part in self.variable_filter)
        found[name] = selected and not self._leaves_whole(w.shape, who)
        if not found[name]:
            return boxed, boxed

        slots = self._slots(w, who)
        places = {
            key: self._place(slot, [f"{one}/{key}" for one in (name, *others)])
            for key, slot in slots.items()
        }
        values = {key: self._variable(places[key], slot) for key, slot in slots.items()}
        changed = {}
        if self.is_initializing():
            w, changed = self._start(values, w, who)
            update_stats = False
        used, moved = self._transform(values | changed, w, who, update_stats=update_stats)
        for key, value in (changed | moved).items():
            self.put_variable(self.collection_name, places[key], value)
        return nn.meta.replace_boxed(boxed, w), nn.meta.replace_boxed(boxed, used)

    def _place(self: Any, slot: Slot, names: list[str]) -> str:
        """The first of these names under which there is a variable; to create one, the first."""
        collection = "params" if slot.collection == "params" else self.collection_name
        there = (name for name in names if self.has_variable(collection, name))
        return next(there, names[0])

    def _variable(self: Any, name: str, slot: Slot) -> Any:
        if slot.collection == "params":
            return self.param(name, slot.init, slot.shape, slot.dtype)
        keys = functools.partial(self.make_rng, "params")
        return self.variable(self.collection_name, name, first_value, slot, keys).value

    def _start(self: Any, values: Any, w: jax.Array, who: str) -> tuple[jax.Array, dict[str, Any]]:
        """The weight that is stored at initialization, and its statistics."""
        return w, self._transform(values, w, who, update_stats=True)[1]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _names(path: Any, boxed: Any) -> list[str]:
    """The path of a weight as text: as it is, without its box, and in one of Flax's."""
    inside_box, _ = jax.tree_util.tree_flatten_with_path(boxed)[0][0]
    whole, bare = (
        jax.tree_util.keystr(keys, simple=True, separator="/") for keys in (path + inside_box, path)
    )
    return [whole, bare, f"{bare}/value"]


class StatelessWeightShell(WeightShell):
    """Wrappers whose weights depend on the stored parameters alone."""

    @nn.compact
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with these arguments and its normalized weights."""
        return self._call_layer(args, kwargs)


class WeightNorm(methods.WeightNorm, StatelessWeightShell):
    """Weight normalization; a drop-in for `flax.linen.WeightNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.WeightNorm(nn.Dense(2))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> variables["params"]["layer_instance/kernel/scale"].tolist()
        [1.0, 1.0]
        >>> layer.apply(variables, jnp.ones((1, 3))).shape
        (1, 2)
    """

    variable_filter: Iterable[str] | None = _KERNELS

    def _start(self, values: Any, w: jax.Array, who: str) -> tuple[jax.Array, dict[str, Any]]:
        """As Flax, which stores the normalized weight; but a scale of 0 leaves its direction."""
        if self.keep_init:
            return w, {}
        scale = values.get("scale")
        if scale is not None:
            scale = nn.unbox(scale)
            scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
        axis, epsilon = self.feature_axes, self.epsilon
        return methods.weight_norm(w, scale, axis=axis, epsilon=epsilon, who=who), {}


class SpectralNorm(methods.SpectralNorm, WeightShell):
    """Spectral normalization; a drop-in for `flax.linen.SpectralNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jaxnorm import linen as jnn
        >>> layer, x = jnn.SpectralNorm(nn.Dense(2)), jnp.ones((1, 3))
        >>> variables = layer.init(jax.random.key(0), x, update_stats=False)
        >>> y, updated = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        >>> jax.tree.map(jnp.shape, updated["batch_stats"])
        {'layer_instance/kernel/sigma': (), 'layer_instance/kernel/u': (1, 2)}
        >>> variables = {"params": variables["params"], **updated}
        >>> layer.apply(variables, x, update_stats=False).shape
        (1, 2)
    """

    collection_name: str = "batch_stats"

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its normalized weights.

        Args:
            *args, **kwargs: arguments of the layer.
            update_stats: True runs the power iteration and stores `u` and `sigma` (training), False
                divides by the stored `sigma` (inference).

        Returns:
            What the layer returns.
        """
        return self._call_layer(args, kwargs, update_stats=update_stats)

    def _start(self, values: Any, w: jax.Array, who: str) -> tuple[jax.Array, dict[str, Any]]:
        """As Flax, which stores the normalized weight; so sigma is 1, that of the stored one."""
        _, changed = self._transform(values, w, who, update_stats=True)
        normalized = spectral_norm_inference(w, changed["sigma"], who=who)
        return normalized, {"u": changed["u"]}


class WeightStandardization(methods.WeightStandardization, StatelessWeightShell):
    """Weight standardization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.WeightStandardization(nn.Conv(4, (3, 3), use_bias=False))
        >>> x = jnp.ones((1, 5, 5, 2))
        >>> y, _ = layer.init_with_output(jax.random.key(0), x)
        >>> bool(abs(y[0, 1, 1]).max() < 1e-4)
        True
    """

    variable_filter: Iterable[str] | None = _KERNELS


class ScaledWeightStandardization(methods.ScaledWeightStandardization, StatelessWeightShell):
    """Scaled weight standardization.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jaxnorm import linen as jnn
        >>> layer = jnn.ScaledWeightStandardization(nn.Dense(2), gain=1.7)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> variables["params"]["layer_instance/kernel/scale"].tolist()
        [1.0, 1.0]
    """

    variable_filter: Iterable[str] | None = _KERNELS
