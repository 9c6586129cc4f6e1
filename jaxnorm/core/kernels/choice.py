"""Which form of a normalization a program gets on which device, and why."""

import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple

from jaxnorm.core.kernels.layout import Layout
from jaxnorm.core.standardize import Plan

PLATFORMS = ("cpu", "tpu", "cuda")
"""Platforms for which there are kernels."""

Direction = Literal["forward", "backward"]


class Choice(NamedTuple):
    """A decision.

    Attributes:
        form: the module of the kernel, with `forward` and `backward`; None for the specification.
        why: the reason, in words.
    """

    form: ModuleType | None
    why: str


def choose(
    platform: str,
    plan: Plan,
    layout: Layout | None,
    dtype: Any,
    divided: bool,
    direction: Direction = "forward",
) -> Choice:
    """The form that serves an input of this layout and dtype best.

    Args:
        platform: where it will run.
        plan: what is static about the normalization.
        layout: how kernels see the input, None if they do not.
        dtype: of the input.
        divided: whether the compiler divides the program between devices.
        direction: the normalization, or its gradients.
    """
    if layout is None:
        return Choice(None, "neither rows nor slabs of examples")
    if divided:
        return Choice(None, "the compiler divides the program between devices, and not kernels")
    serve = {"cpu": _on_cpu, "tpu": _on_tpu, "cuda": _on_gpu}[platform]
    return serve(layout, (dtype, plan.dtype), direction, plan.kernels == "always")


def _on_cpu(layout: Layout, dtypes: Any, direction: Direction, always: bool) -> Choice:
    del dtypes, direction
    if layout.kind == "slabs" and layout.shape[1] == 1 and not always:
        return Choice(None, "one position has no sums that could come first")
    return Choice(_module(f"{layout.kind}_cpu"), "fewer arrays are written out")


def _on_tpu(layout: Layout, dtypes: Any, direction: Direction, always: bool) -> Choice:
    """Alone, a kernel is always ahead. Within models the compiler may be, which fuses more.

    It fuses norms into convolutions, and sums of the backward pass into the products around them.
    """
    fits = _module("fits")
    fit = fits.rows_fit if layout.kind == "rows" else fits.slabs_fit
    if reason := fit(layout.shape, *dtypes):
        return Choice(None, reason)
    if not always:
        if layout.kind == "slabs":
            return Choice(None, "the compiler fuses it into convolutions, which a kernel prevents")
        if layout.shape[1] % fits.LANES:
            return Choice(None, f"{layout.shape[1]} features are no multiple of {fits.LANES}")
        if direction == "backward":
            return Choice(None, "the compiler fuses its sums into the products around them")
    return Choice(_module(f"{layout.kind}_tpu"), "reads what it normalizes once")


def _on_gpu(layout: Layout, dtypes: Any, direction: Direction, always: bool) -> Choice:
    del direction
    if layout.kind == "slabs":
        return Choice(None, "slabs do not stay in a multiprocessor, so a kernel gains nothing")
    if not always:
        return Choice(None, "kernels for GPUs have not been measured, see use_kernels('always')")
    rows_gpu = _module("rows_gpu")
    if reason := rows_gpu.fit(layout.shape, *dtypes):
        return Choice(None, reason)
    return Choice(rows_gpu, "reads what it normalizes once")


def _module(name: str) -> ModuleType:
    # When it is needed: Pallas takes longer to import than the rest of the library.
    return importlib.import_module(f"jaxnorm.core.kernels.{name}")
