"""What stands in a folded model in the place of a layer and of the norm behind it.

The layer does the work of both. What it makes is good for nothing but to be handed to the norm: a
call of the model that goes another way, by a flag of Python for example, would have a norm too much
or one too few. So the layer hands over a `FoldedOutput`, which only the norm's place takes.
"""

import dataclasses
import functools
from typing import Any, NoReturn

import jax
from flax import linen, nnx

from jaxnorm.tools.adapter.models import Unfinished, finished
from jaxnorm.tools.replacing.frozen import Frozen, reduced_by


class NotHandedOver(ValueError):
    """A call uses a folded layer without its norm, or a folded norm without its layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedOutput(Unfinished):
    """What a folded layer makes, on its way to the norms whose work it did.

    Has shape and dtype, and can be cast. All else is an error.

    Attributes:
        array: the array.
        layer: the path of the layer.
        norms: the paths of the norms, in their order.
    """

    array: jax.Array
    layer: str = dataclasses.field(metadata=dict(static=True))
    norms: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """That of the array."""
        return self.array.ndim

    @property
    def dtype(self) -> Any:
        """That of the array."""
        return self.array.dtype

    def astype(self, dtype: Any) -> "FoldedOutput":
        """The same in another dtype."""
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def __getattr__(self, name: str) -> Any:
        is_use = hasattr(jax.Array, name) and not name.startswith("_")
        return self.misused() if is_use else object.__getattribute__(self, name)

    def misused(self, *_: Any, **__: Any) -> NoReturn:
        """Raises, in the place of all that can be done with an array."""
        raise NotHandedOver(
            f"folded layer '{self.layer}': this call does not hand its output straight to the norm "
            f"'{self.norms[0]}', whose work is done in it, as the example call of fold did. Call "
            f"the model alike, or fold it by an example of this call: fold(model, x, train=False)."
        )


_USES = (
    *("jax_array", "array", "bool", "float", "int", "complex", "index", "len", "iter", "getitem"),
    *("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"),
    *(
        side + operation
        for operation in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
        for side in ("", "r")
    ),
)
for _use in _USES:
    setattr(FoldedOutput, f"__{_use}__", FoldedOutput.misused)


def _taken(x: Any, norm: str, dtype: Any) -> Any:
    """What a folded norm returns for what its layer hands over."""
    if not isinstance(x, FoldedOutput) or x.norms[0] != norm:
        raise NotHandedOver(
            f"folded norm '{norm}': its input does not come straight from the layer that does its "
            f"work, as in the example call of fold. Call the model alike, or fold it by an example "
            f"of this call: fold(model, x, train=False)."
        )
    x = x.astype(dtype)
    return dataclasses.replace(x, norms=x.norms[1:]) if x.norms[1:] else x.array


class FoldedLayer(linen.Module):
    """A Linen layer that hands over what it makes.

    Attributes:
        layer: the layer, as the model makes it, with a bias.
        layer_path: its path.
        norms: those of the norms.
    """

    layer: linen.Module
    layer_path: str
    norms: tuple[str, ...]

    def setup(self) -> None:
        """Variables are named as without this wrapper."""
        self.still = self.layer.clone()
        linen.share_scope(self, self.still)

    def __call__(self, *args: Any, **kwargs: Any) -> FoldedOutput:
        """Calls the layer."""
        return FoldedOutput(self.still(*args, **kwargs), self.layer_path, self.norms)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A function of a Linen layer, with its options of the moment, that makes the folded one."""

    path: str
    norm: str

    def __call__(self, layer: Any) -> FoldedLayer:
        """What stands in the place of the layer in one call of the model."""
        if isinstance(layer, FoldedLayer):
            return layer.clone(norms=(*layer.norms, self.norm), parent=None, name=None)
        layer = layer.clone(use_bias=True, parent=None, name=None)
        return FoldedLayer(layer, self.path, (self.norm,), parent=None)


def folded_layer(layer: Any, path: str, norm: str, bias: jax.Array) -> Any:
    """What stands in the place of `layer`, in its framework, when a norm is folded into it."""
    if isinstance(layer, linen.Module):
        return Fold(path, norm)
    new: Any = nnx.clone(layer)
    if new.bias is None:
        new.bias = nnx.Param(bias)
    if isinstance(layer, nnx.Einsum):
        new.bias_shape = bias.shape
    else:
        new.use_bias = True
    if not hasattr(layer, "folded_as"):
        object.__setattr__(new, "__class__", _folded(type(new)))
    _, norms = getattr(layer, "folded_as", ((), ()))
    new.folded_as = (path, (*norms, norm))
    return new


@functools.cache
def _folded(cls: type) -> type:
    """The class of NNX layers like `cls` that hand over what they make."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> FoldedOutput:
        return FoldedOutput(cls.__call__(self, *args, **kwargs), *self.folded_as)

    return _with_call(cls, __call__, _folded)


def as_folded_model(model: nnx.Module) -> nnx.Module:
    """An NNX model in which layers were folded, whose call returns nothing but arrays."""
    if not hasattr(type(model), "returns_arrays"):
        object.__setattr__(model, "__class__", _returns_arrays(type(model)))
    return model


@functools.cache
def _returns_arrays(cls: type) -> type:
    """The class of NNX models like `cls` that raise for what a folded layer could not hand over."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return finished(cls.__call__(self, *args, **kwargs))

    return _with_call(cls, __call__, _returns_arrays, returns_arrays=True)


def _with_call(cls: type, call: Any, make: Any, **body: Any) -> type:
    functools.update_wrapper(call, cls.__call__)
    body |= {"__call__": call, "__doc__": cls.__doc__, "__reduce_ex__": reduced_by(make, cls)}
    return type(f"Folded{cls.__name__}", (cls,), body)


class Skipped(linen.Module):
    """What stands in the place of a norm that was folded: a cast to the dtype of its result.

    Attributes:
        norm: the path of the norm.
        dtype: that of the norm's result.
        folded_for: the domain whose statistics were folded, for a norm that has several.
        use_running_average, domain: the norm's options; a call can say otherwise.
        frozen: whether the norm never trains, whatever a call says.
    """

    norm: str
    dtype: Any
    folded_for: str | None
    use_running_average: bool | None
    domain: str | None
    frozen: bool

    def __call__(
        self,
        x: FoldedOutput,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        **_: Any,
    ) -> Any:
        """Returns what `x` holds, if the norm would do what was folded; ignores other arguments."""
        _check_call(self, use_running_average, domain)
        return _taken(x, self.norm, self.dtype)


class NNXSkipped(nnx.Module):
    """The twin of `Skipped`."""

    def __init__(
        self, norm: str, dtype: Any, folded_for: str | None, domain: str | None, frozen: bool
    ):
        """Takes what `Skipped` does."""
        self.norm = norm
        self.dtype = dtype
        self.folded_for = folded_for
        self.use_running_average = True  # until `train()`
        self.domain = domain
        self.frozen = frozen

    def set_view(self, use_running_average: bool | None = None, domain: str | None = None) -> None:
        """Changes options; `nnx.view(model, ...)` calls it for all layers of a model.

        Args:
          use_running_average: True for inference, False for training; None leaves it as it is.
          domain: that of calls that name none; None leaves it as it is.
        """
        # Indented by two in "Args": `nnx.view_info` reads no other width.
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if domain is not None:
            self.domain = domain

    def __call__(
        self,
        x: FoldedOutput,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        **_: Any,
    ) -> Any:
        """Returns what `x` holds, if the norm would do what was folded; ignores other arguments."""
        _check_call(self, use_running_average, domain)
        return _taken(x, self.norm, self.dtype)


def _check_call(skipped: Any, use_running_average: bool | None, domain: str | None) -> None:
    if use_running_average is None:
        use_running_average = skipped.use_running_average
    if use_running_average is False and not skipped.frozen:
        raise ValueError(
            "folded norm: called for training (use_running_average=False), but it was folded with "
            "its stored statistics and cannot train. Call this model for inference, train=False, "
            "or model.eval() in NNX, and train the model that was given to fold."
        )
    domain = domain or skipped.domain
    if domain != skipped.folded_for:
        raise ValueError(
            f"folded norm: called for domain={domain!r}, but it was folded for "
            f"{skipped.folded_for!r}. Fold the model for each domain, by an example call for it: "
            f"fold(model, x, domain={domain!r})."
        )


@dataclasses.dataclass(frozen=True)
class Skip:
    """A function of a Linen norm, with its options of the moment, that makes the `Skipped` one."""

    norm: str
    dtype: Any
    folded_for: str | None

    def __call__(self, norm: Any) -> Skipped:
        """What stands in the place of the norm in one call of the model."""
        frozen = isinstance(norm, Frozen) and norm.statistics
        norm = norm.layer if isinstance(norm, Frozen) else norm
        mode, domain = norm.use_running_average, _default_domain(norm)
        return Skipped(self.norm, self.dtype, self.folded_for, mode, domain, frozen, parent=None)


def _default_domain(norm: Any) -> str | None:
    """The domain of calls that name none, of a norm that has several."""
    return (norm.domain or norm.domains[0]) if hasattr(norm, "domains") else None


def skipped(norm: Any, path: str, dtype: Any, domain: str | None) -> Any:
    """What stands in the place of `norm`, folded for a domain, in its framework."""
    if isinstance(norm, linen.Module):
        return Skip(path, dtype, domain)
    frozen = getattr(norm, "frozen_statistics", False)
    return NNXSkipped(path, dtype, domain, _default_domain(norm), frozen)
