"""The NNX shell: turns the slots of a spec into NNX variables."""

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm.core import checks, precision
from jaxnorm.core.axes import sizes

ClassT = TypeVar("ClassT", bound=type)

VARIABLE_TYPES = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def module(cls: ClassT) -> ClassT:
    """Makes `cls` a dataclass that takes `num_features` and, by keyword only, the rest.

    A spec's fields may stand in any position, for Linen. In NNX a second position would invite
    `BatchNorm(6, nnx.Rngs(0))`, which must not pass for an option. Fields that Flax takes by
    position are declared again in `cls`, with `kw_only=False`.
    """
    cls = dataclasses.dataclass(kw_only=True, repr=False, eq=False)(cls)
    initialize: Any = cls.__init__
    named_here = vars(cls)["__annotations__"]
    positional = [
        field.name
        for field in dataclasses.fields(cls)
        if not field.kw_only and (field.name == "num_features" or field.name in named_here)
    ]
    parameters = [
        p if p.name in ("self", *positional) else p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(initialize).parameters.values()
    ]

    @functools.wraps(initialize)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if len(args) > len(positional):
            raise TypeError(
                f"{cls.__name__}: takes {', '.join(positional)} as positional arguments, found "
                f"{len(args)}. Name the others: {cls.__name__}(num_features, rngs=rngs)."
            )
        initialize(self, **dict(zip(positional, args, strict=False)), **options)

    vars(init)["__signature__"] = inspect.Signature(parameters)
    setattr(cls, "__init__", init)  # noqa: B010 (its type changes)
    return cls


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class Shell(nnx.Module):
    """What all NNX modules of this library share.

    Args:
        num_features: size of the input along its feature axis; along several, their sizes in
            increasing order of axes, or their product, for variables that are flat.
        rngs: random keys for the initializers.
        promote_dtype: called as in Flax, with the input, the variables and `dtype`, it may cast
            the input and the parameters before anything else; statistics stay as they are. By
            default nothing is cast before the result.
        scale_metadata, bias_metadata: metadata of the variables `scale` and `bias`.
    """

    _promotes: ClassVar[tuple[str, ...]] = ("scale", "bias")
    """The variables by whose dtypes Flax's layer infers that of the result."""

    num_features: int | Sequence[int] = dataclasses.field(kw_only=False)
    promote_dtype: Callable[..., Any] | None = None
    rngs: dataclasses.InitVar[nnx.Rngs]
    scale_metadata: dataclasses.InitVar[Mapping[str, Any] | None] = None
    bias_metadata: dataclasses.InitVar[Mapping[str, Any] | None] = None

    def __post_init__(
        self: Any,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] | None,
        bias_metadata: Mapping[str, Any] | None,
    ) -> None:
        self._check_options(self._who)
        options = {field.name for field in dataclasses.fields(self)}
        if bias_metadata is not None and "use_bias" not in options:
            raise TypeError(
                f"{self._who}: bias_metadata={dict(bias_metadata)} was given for no bias. Drop it."
            )
        metadata = {"scale": scale_metadata or {}, "bias": bias_metadata or {}}
        self.scale, self.bias = nnx.data(None), nnx.data(None)
        # NNX creates variables before it sees an input: the dtypes say whether it will be complex.
        dtypes = (dtype for dtype in (self.dtype, self.param_dtype) if dtype is not None)
        is_complex = any(precision.is_complex(dtype) for dtype in dtypes)
        for name, (collection, shape, dtype, init) in self._slots(
            self._features(), is_complex, self._who
        ).items():
            key = rngs.params() if collection == "params" else None
            variable = VARIABLE_TYPES[collection]
            # `scale`, or `scale_target` of a domain's own.
            tags = metadata.get(name.partition("_")[0], {})
            setattr(self, name, variable(init(key, shape, dtype), **tags))
        # Used once. Kept, an initializer would tell layers apart that are otherwise alike, and
        # most are closures, which cannot be pickled.
        for field in dataclasses.fields(self):
            if field.name.endswith("_init"):
                delattr(self, field.name)

    @property
    def _who(self: Any) -> str:
        return f"{type(self).__name__}(num_features={self.num_features})"

    def _features(self) -> tuple[int, ...]:
        given = self.num_features
        return tuple(given) if isinstance(given, Sequence) else (operator.index(given),)

    def _variables(self) -> dict[str, nnx.Variable]:
        return {name: v for name, v in vars(self).items() if isinstance(v, nnx.Variable)}

    def _feature_sizes(self: Any, x: jax.Array) -> tuple[int, ...]:
        """The sizes of `x` along the feature axes, of which `num_features` may be the product."""
        axes = self._feature_axes(x.ndim, self._who)
        found = sizes(x.shape, axes)
        if self._features() not in (found, (math.prod(found),)):
            raise ValueError(
                f"{self._who}: the input of shape {x.shape} has "
                f"{checks.describe_features(x.shape, axes)}. Set "
                f"num_features={found[0] if len(found) == 1 else found}, or say where the features "
                f"are: {self._axis_option}=..."
            )
        return found

    def _normalize(self: Any, x: ArrayLike, mask: ArrayLike | None, **mode: Any) -> jax.Array:
        """One call: normalizes, and stores what changed."""
        given = checks.any_array(x, self._who)
        features, flat = self._feature_sizes(given), self._features()
        variables = self._variables()
        values = {name: variable[...] for name, variable in variables.items()}
        if flat != features:
            values = {
                name: value.reshape(features) if value.shape == flat else value
                for name, value in values.items()
            }
        if self.promote_dtype is not None:
            given, values = self._promoted(given, values)
        array = checks.input_array(given, self._who)
        dtype = self.dtype
        if dtype is None:
            dtypes = (values[name].dtype for name in self._promotes if name in values)
            dtype = precision.promote_inexact(given.dtype, *dtypes)
        y, changed = self._transform(
            values, array, mask, dtype, self._who, initializing=False, **mode
        )
        for name, value in changed.items():
            shape = variables[name].shape
            variables[name][...] = value if value.shape == shape else value.reshape(shape)
        return y

    def _promoted(self: Any, x: jax.Array, values: dict[str, jax.Array]):
        arrays = (x, *(values.get(name) for name in self._promotes))
        x, *cast = self.promote_dtype(arrays, dtype=self.dtype)
        params = {
            name: value
            for name, value in zip(self._promotes, cast, strict=True)
            if name in ("scale", "bias") and value is not None
        }
        return x, values | params


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class StatelessShell(Shell):
    """NNX modules that know nothing but their parameters."""

    def __call__(self: Any, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(x, mask)


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class ModalShell(Shell):
    """NNX modules that are in training or in inference, as the layer or the call says."""

    def _chosen(
        self: Any, use_running_average: bool | None, update_stats: bool | None
    ) -> dict[str, bool]:
        """Whether this call uses the running statistics, and whether it moves them."""
        frozen, moves = self._mode(use_running_average, update_stats, self._who)
        return dict(use_running_average=frozen, update_stats=moves)

    def set_view(
        self: Any, use_running_average: bool | None = None, update_stats: bool | None = None
    ) -> None:
        """Changes options; `nnx.view(model, ...)` calls it for all layers of a model.

        Args:
          use_running_average: True for inference, False for training; None leaves it as it is.
          update_stats: whether training moves the running statistics; None leaves it as it is.
        """
        # Indented by two in "Args": `nnx.view_info` reads no other width.
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class RunningStatsShell(ModalShell):
    """NNX modules with running statistics in variables of type `nnx.BatchStat`."""

    def __call__(
        self: Any,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training moves the running statistics.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            use_running_average: True for inference, False for training; None for the layer's
                choice, which `train()`, `eval()` and `nnx.view` set.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.
            update_stats: whether training moves the running statistics; None for the layer's
                choice.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(x, mask, **self._chosen(use_running_average, update_stats))
