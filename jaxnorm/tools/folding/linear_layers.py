"""Flax's convolutions and dense layers, as folding sees them: which axes of a kernel are features.

The output of such a layer is linear in its kernel, and some axes of the kernel are axes of the
output: along these each entry of the output has a part of the kernel, and a bias, for itself.
"""

import dataclasses
from typing import Any

import jax
from flax import linen, nnx

from jaxnorm.tools.adapter.models import LayerCall
from jaxnorm.tools.replacing.frozen import Frozen

CONVOLUTIONS = (linen.Conv, linen.ConvLocal, linen.ConvTranspose, nnx.Conv, nnx.ConvTranspose)
DENSE = (linen.Dense, nnx.Linear)
GENERAL = (linen.DenseGeneral, nnx.LinearGeneral)
EINSUM = (linen.Einsum, nnx.Einsum)
LINEAR = (*CONVOLUTIONS, *DENSE, *GENERAL, *EINSUM)


def kept_axes(call: LayerCall, output_ndim: int) -> dict[int, int] | None:
    """By the axes of a layer's output those of its kernel, in the order of the output.

    The layer's bias has the shape of the kernel along them. All axes count from the front. None if
    it is not known.
    """
    layer, ndim = call.layer, call.values["kernel"].ndim
    if isinstance(layer, EINSUM):
        return _axes_of_einsum(
            call.arguments.get("einsum_str") or layer.einsum_str, ndim, output_ndim
        )
    last_output, last = output_ndim - 1, ndim - 1
    if isinstance(layer, GENERAL):
        is_linen = isinstance(layer, linen.DenseGeneral)
        batch = _count(layer.batch_dims if is_linen else layer.batch_axis)
        features = _count(layer.features if is_linen else layer.out_features)
        kept = {axis: axis for axis in range(batch)}
        return kept | {output_ndim - i: ndim - i for i in range(features, 0, -1)}
    if isinstance(layer, linen.ConvLocal):
        places = ndim - 2  # a kernel for each place of the output
        return {last_output - i: ndim - 2 - i for i in range(places, 0, -1)} | {last_output: last}
    if getattr(layer, "transpose_kernel", False):
        return {last_output: last - 1}
    return {last_output: last}


def _count(sizes: Any) -> int:
    return 1 if isinstance(sizes, int) else len(sizes)


def _axes_of_einsum(equation: Any, ndim: int, output_ndim: int) -> dict[int, int] | None:
    operands, output = equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    if "..." in kernel:
        return None
    first, _, rest = output.partition("...")
    places = dict(enumerate(first))
    places |= {output_ndim - len(rest) + i: letter for i, letter in enumerate(rest)}
    return {axis: kernel.index(letter) for axis, letter in places.items() if letter in kernel}


def pads_with_zeros(layer: Any) -> bool:
    """Whether a layer is a convolution that reads zeros around its input."""
    if not isinstance(layer, linen.Conv | linen.ConvLocal | nnx.Conv):
        return False
    if isinstance(layer.padding, str):
        wide = max(jax.tree.leaves(layer.kernel_size)) > 1
        return wide and layer.padding in ("SAME", "SAME_LOWER", "CAUSAL")
    return any(jax.tree.leaves(layer.padding))


class Skipped(linen.Module):
    """What stands in the place of a norm that was folded: a cast to the dtype of its result.

    Attributes:
        dtype: that of the norm's result.
        folded_for: the domain whose statistics were folded, for a norm that has several.
        use_running_average, domain: the norm's options; a call can say otherwise.
        frozen: whether the norm never trains, whatever a call says.
    """

    dtype: Any
    folded_for: str | None
    use_running_average: bool | None
    domain: str | None
    frozen: bool

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        **_: Any,
    ) -> jax.Array:
        """Returns `x`, if the norm would do what was folded; other arguments are ignored."""
        _check_call(self, use_running_average, domain)
        return x.astype(self.dtype)


class NNXSkipped(nnx.Module):
    """The twin of `Skipped`."""

    def __init__(self, dtype: Any, folded_for: str | None, domain: str | None, frozen: bool):
        """Takes what `Skipped` does."""
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
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: str | None = None,
        **_: Any,
    ) -> jax.Array:
        """Returns `x`, if the norm would do what was folded; other arguments are ignored."""
        _check_call(self, use_running_average, domain)
        return x.astype(self.dtype)


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

    dtype: Any
    folded_for: str | None

    def __call__(self, norm: Any) -> Skipped:
        """What stands in the place of the norm in one call of the model."""
        frozen = isinstance(norm, Frozen) and norm.statistics
        norm = norm.layer if isinstance(norm, Frozen) else norm
        mode, domain = norm.use_running_average, _default_domain(norm)
        return Skipped(self.dtype, self.folded_for, mode, domain, frozen, parent=None)


def _default_domain(norm: Any) -> str | None:
    """The domain of calls that name none, of a norm that has several."""
    return (norm.domain or norm.domains[0]) if hasattr(norm, "domains") else None


def skipped(norm: Any, dtype: Any, domain: str | None) -> Any:
    """What stands in the place of `norm`, folded for a domain, in its framework."""
    if isinstance(norm, linen.Module):
        return Skip(dtype, domain)
    frozen = getattr(norm, "frozen_statistics", False)
    return NNXSkipped(dtype, domain, _default_domain(norm), frozen)


def with_bias(layer: Any, bias: jax.Array) -> Any:
    """A layer of the same options with a bias; in Linen the function that makes it at each call."""
    if isinstance(layer, linen.Module):
        return _biased
    new = nnx.clone(layer)
    new.bias = nnx.Param(bias)
    if isinstance(new, nnx.Einsum):
        new.bias_shape = bias.shape
    else:
        new.use_bias = True
    return new


def _biased(layer: Any) -> Any:
    return layer.clone(use_bias=True, parent=None, name=None)
