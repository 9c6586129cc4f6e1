"""Whether a layer makes the product with its stored kernel, adds its stored bias, and no more.

A layer of one of Flax's kinds may still do something else: a subclass may read its kernel in its
own way (`param`), and an option may exchange the product or the cast (`dot_general`,
`conv_general_dilated`, `promote_dtype`). So the traced program is asked, from the layer's output
back to its kernel.
"""

import jax.numpy as jnp

from jaxnorm.tools.adapter.models import Path
from jaxnorm.tools.folding.dataflow import Dataflow, Place, Step

PRODUCTS = ("dot_general", "conv_general_dilated")
MOVES = (
    "broadcast_in_dim",
    "copy",
    "expand_dims",
    "name",
    "reshape",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
"""What leaves each value as it is."""
SUMS = ("pad", "reduce_sum", "slice")
"""What Flax's layers do with a product before they add the bias: linear in the kernel as well."""


def product_rounding(
    flow: Dataflow, place: Place, kernel: Path, bias: Path | None
) -> float | Step | str:
    """The largest machine epsilon in the product that a layer makes with these variables.

    If it does more: the step that changes the output or the kernel, or what is wrong in words.
    """
    output = flow.steps[place.ends].inputs[0]
    array, needs_bias = output, bias is not None
    while (step := flow.maker(array)) is not None and step.name not in PRODUCTS:
        added = step.name == "add" and needs_bias
        if added and (rest := _rest(flow, step, bias)) is not None:
            array, needs_bias = rest, False
        elif step.name in MOVES or _casts(flow, step) or (step.name in SUMS and not needs_bias):
            array = step.inputs[0]
        else:
            return step
    if step is None or not flow.inside(place, step):
        return "it does not make its output itself"
    if needs_bias:
        return "it does not add its stored bias"
    left, right, *_ = step.inputs
    changes = [_change(flow, place, operand, kernel) for operand in (left, right)]
    if None not in changes:
        return next((change for change in changes if isinstance(change, Step)), changes[0] or "")
    if flow.depends((right, left)[changes.index(None)], kernel, place):
        return "its kernel is in both factors of its product"
    return flow.rounding(left, right, *step.outputs, output)


def _rest(flow: Dataflow, step: Step, bias: Path | None) -> int | None:
    """What a step adds the stored bias to; None if it adds something else."""
    for array, other in (step.inputs, step.inputs[::-1]):
        while flow.origin(array) != bias:
            before = flow.maker(array)
            if before is None or not (before.name in MOVES or _casts(flow, before)):
                break
            array = before.inputs[0]
        else:
            return other
    return None


def _change(flow: Dataflow, place: Place, array: int, kernel: Path) -> Step | str | None:
    """The step by which an array is not the stored kernel; None if it is.

    Cast or laid out otherwise it still is, and so it is with a factor for each of its entries that
    does not depend on it, such as the mask of a convolution: it commutes with that of a norm.
    """
    while flow.origin(array) != kernel:
        step = flow.maker(array)
        if step is None or not flow.inside(place, step):
            return "it makes no product with its stored kernel"
        if step.name == "mul":
            first, second = step.inputs
            if not flow.depends(second, kernel, place):
                array = first
            elif not flow.depends(first, kernel, place):
                array = second
            else:
                return step
        elif step.name in MOVES or _casts(flow, step):
            array = step.inputs[0]
        else:
            return step
    return None


def _casts(flow: Dataflow, step: Step) -> bool:
    """Whether a step casts between floating dtypes that are no codes of a few values."""
    if step.name != "convert_element_type":
        return False
    dtypes = [flow.shape(array).dtype for array in (step.inputs[0], step.outputs[0])]
    return all(jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1 for dtype in dtypes)
