"""Flax's convolutions and dense layers, as folding sees them: which axes of a kernel are features.

The output of such a layer is linear in its kernel, and some axes of the kernel are axes of the
output: along these each entry of the output has a part of the kernel, and a bias, for itself.
"""

from typing import Any

import jax
from flax import linen, nnx

from jaxnorm.tools.adapter.models import LayerCall

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
