"""NNX modules that wrap a layer and normalize its weights: the shell, and one class per method."""

import dataclasses
from typing import Any, dataclass_transform

from flax import nnx

from jaxnorm import methods
from jaxnorm.methods.weight_spec import first_value
from jaxnorm.nnx.shell import VARIABLE_TYPES, ClassT


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def wrapper(cls: ClassT) -> ClassT:
    """Makes `cls` a dataclass that takes the layer and, by keyword only, the rest.

    A spec's fields may stand in any position, for Linen. Repeated in `cls` they are keyword-only.
    """
    for field in dataclasses.fields(cls):
        if field.name != "layer_instance":
            cls.__annotations__.setdefault(field.name, field.type)
    return dataclasses.dataclass(kw_only=True, repr=False, eq=False)(cls)


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class WeightShell(nnx.Module):
    """Calls the wrapped layer with other weights than are stored, and leaves the stored ones alone.

    The variables that belong to a weight stand in dictionaries, under the weight's path in the
    layer: `scales[path]` and `batch_stats[*path, name]`.

    Args:
        layer_instance: the layer whose weights are normalized. Its weights must not be replaced by
            others afterwards, though their values may.
        rngs: random keys for the initializers.
    """

    layer_instance: nnx.Module = dataclasses.field(kw_only=False)
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self: Any, rngs: nnx.Rngs) -> None:
        self._check_options(self._who)
        params = dict(nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)))
        selects = nnx.filterlib.to_predicate(getattr(self, "variable_filter", ...))
        self.paths = tuple(
            path
            for path, param in params.items()
            if selects(path, param) and not self._leaves_whole(param.shape, self._weight(path))
        )
        if not self.paths:
            fix = ", or name a part of its path: variable_filter=nnx.PathContains('kernel')"
            raise ValueError(
                f"{self._who}: found no weight to normalize among {sorted(map(_text, params))}. "
                f"Wrap a layer that has one{fix if hasattr(self, 'variable_filter') else ''}."
            )
        scales, batch_stats = {}, {}
        for path in self.paths:
            w, who = params[path][...], self._weight(path)
            variables = {
                name: VARIABLE_TYPES[slot.collection](first_value(slot, rngs.params))
                for name, slot in self._slots(w, who).items()
            }
            values = {name: variable[...] for name, variable in variables.items()}
            for name, value in self._transform(values, w, who, update_stats=True)[1].items():
                variables[name][...] = value
            for name, variable in variables.items():
                if isinstance(variable, nnx.Param):
                    scales[path] = variable
                else:
                    batch_stats[(*path, name)] = variable
        self.scales = nnx.data(scales or None)
        self.batch_stats = nnx.data(batch_stats or None)
        # Used once. Kept, a function would tell layers apart that are otherwise alike, and most
        # are closures, which cannot be pickled.
        for name in {"variable_filter", "scale_init", "promote_dtype"} & set(vars(self)):
            delattr(self, name)

    @property
    def _who(self) -> str:
        return f"{type(self).__name__}({type(self.layer_instance).__name__})"

    def _weight(self, path: tuple[Any, ...]) -> str:
        return f"{self._who}, '{_text(path)}'"

    def _variables(self: Any, path: tuple[Any, ...]) -> dict[str, nnx.Variable]:
        """The variables that belong to a weight, by name."""
        stats = (self.batch_stats or {}).items()
        found = {key[-1]: variable for key, variable in stats if key[:-1] == path}
        return found | ({"scale": self.scales[path]} if self.scales else {})

    def _call_layer(self: Any, args: Any, kwargs: Any, *, update_stats: bool = False) -> Any:
        """Calls a copy of the layer that has other weights and shares all other variables."""
        graph, state = nnx.split(self.layer_instance)
        shared = dict(nnx.to_flat_state(state))
        view = dict(shared)
        for path in self.paths:
            variables = self._variables(path)
            values = {name: variable[...] for name, variable in variables.items()}
            used, changed = self._transform(
                values, shared[path][...], self._weight(path), update_stats=update_stats
            )
            view[path] = shared[path].replace(used)
            for name, value in changed.items():
                variables[name][...] = value
        layer = nnx.merge(graph, nnx.from_flat_state(view))
        y = layer(*args, **kwargs)
        self._adopt(layer, shared)
        return y

    def _adopt(self: Any, layer: nnx.Module, shared: dict[Any, Any]) -> None:
        """Gives the layer the variables that its copy created during the call (`Module.sow`)."""
        after = nnx.to_flat_state(nnx.state(layer))
        created = {path: variable for path, variable in after if path not in shared}
        if created:
            nnx.update(self.layer_instance, nnx.from_flat_state(created))


def _text(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class StatelessWeightShell(WeightShell):
    """Wrappers whose weights depend on the stored parameters alone."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with these arguments and its normalized weights."""
        return self._call_layer((x, *args), kwargs)


@wrapper
class WeightNorm(methods.WeightNorm, StatelessWeightShell):
    """Weight normalization; a drop-in for `flax.nnx.WeightNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> rngs = nnx.Rngs(0)
        >>> layer = jaxnorm.nnx.WeightNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
        >>> layer.scales[("kernel",)].tolist()
        [1.0, 1.0]
        >>> layer(jnp.ones((1, 3))).shape
        (1, 2)
    """

    variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel")
    promote_dtype: Any = None
    """Accepted for Flax's sake, which does not use it either."""


@wrapper
class SpectralNorm(methods.SpectralNorm, WeightShell):
    """Spectral normalization; a drop-in for `flax.nnx.SpectralNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> rngs = nnx.Rngs(0)
        >>> layer = jaxnorm.nnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
        >>> y = layer(jnp.ones((1, 3)))
        >>> layer.eval()
        >>> layer.batch_stats[("kernel", "u")].shape, layer(jnp.ones((1, 3))).shape
        ((1, 2), (1, 2))
    """

    update_stats: dataclasses.InitVar[bool] = True

    def __post_init__(self, rngs: nnx.Rngs, update_stats: bool) -> None:
        super().__post_init__(rngs)
        # The name that `train()` and `eval()` set.
        self.use_running_average = not update_stats

    def __call__(self, x: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its normalized weights.

        Args:
            x: input of the layer.
            update_stats: True runs the power iteration and stores `u` and `sigma` (training), False
                divides by the stored `sigma` (inference); None for the layer's choice, which
                `train()`, `eval()` and `nnx.view` set.
            **kwargs: other arguments of the layer.

        Returns:
            What the layer returns.
        """
        update_stats = not self.use_running_average if update_stats is None else update_stats
        return self._call_layer((x,), kwargs, update_stats=update_stats)

    def set_view(
        self, use_running_average: bool | None = None, update_stats: bool | None = None
    ) -> None:
        """Changes options; `nnx.view(model, ...)` calls it for all layers of a model.

        Args:
          use_running_average: True for inference, False for training; None leaves it as it is.
          update_stats: False for inference, which is what leaves `u` and `sigma` alone.
        """
        # Indented by two in "Args": `nnx.view_info` reads no other width.
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.use_running_average = not update_stats


@wrapper
class WeightStandardization(methods.WeightStandardization, StatelessWeightShell):
    """Weight standardization.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> rngs = nnx.Rngs(0)
        >>> layer = jaxnorm.nnx.WeightStandardization(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
        >>> bool(abs(layer(jnp.ones((1, 3)))).max() < 1e-4)
        True
    """

    variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel")


@wrapper
class ScaledWeightStandardization(methods.ScaledWeightStandardization, StatelessWeightShell):
    """Scaled weight standardization.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxnorm
        >>> rngs = nnx.Rngs(0)
        >>> linear = nnx.Linear(3, 2, rngs=rngs)
        >>> layer = jaxnorm.nnx.ScaledWeightStandardization(linear, gain=1.7, rngs=rngs)
        >>> layer.scales[("kernel",)].tolist(), layer(jnp.ones((1, 3))).shape
        ([1.0, 1.0], (1, 2))
    """

    variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel")
