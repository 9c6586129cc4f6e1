"""How a normalization is seen by kernels: as rows, or as slabs."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import jax


class Layout(NamedTuple):
    """An input of any shape as `[rows, features]` or `[examples, positions, features]`.

    Rows are normalized over their features (layer and RMS norm), slabs over their positions and
    over the features of each group (group and instance norm).

    Attributes:
        shape: of the input as the kernels see it, two or three numbers.
        groups: how many groups the features of a slab are divided into; 1 for rows.
    """

    shape: tuple[int, ...]
    groups: int = 1

    @property
    def kind(self) -> str:
        """`"rows"` or `"slabs"`, which are also the names of the kernels."""
        return "rows" if len(self.shape) == 2 else "slabs"

    def keeping_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape`, of which this is the layout, with all its axes of rows or positions."""
        remaining = [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]
        features = max(axis for axis, size in enumerate(remaining) if size == self.shape[-1])
        if self.kind == "rows":
            return (*shape[:features], self.shape[-1])
        of_one = remaining[0] // self.shape[0]
        examples = max(axis for axis, size in enumerate(remaining) if size == of_one)
        return (self.shape[0], *(shape[examples:features] or (1,)), self.shape[-1])


def layout_of(
    axes: Sequence[int], shape: tuple[int, ...], *params: jax.Array | None
) -> Layout | None:
    """The layout of an input of `shape`, or None where there is none.

    Args:
        axes: the axes along which moments are taken.
        shape: of the input.
        params: scale and bias, with size 1 along the axes of the input where they are shared.
    """
    if 0 in shape:
        return None
    varies = [_varies_along(param, shape) for param in params if param is not None]
    if len({*varies}) > 1 or None in varies:
        return None
    reduced = [axis in axes for axis in range(len(shape))]
    features = _first_feature_axis(reduced, shape) if not varies else varies[0]
    before = _runs(reduced[:features], shape[:features])
    within = _runs(reduced[features:], shape[features:])
    if [run.reduced for run in before] == [False] and [run.reduced for run in within] == [True]:
        return Layout((before[0].size, within[0].size))
    if [run.reduced for run in before] not in ([False, True], [False]):
        return None
    examples, positions = before[0].size, math.prod(run.size for run in before[1:])
    width = math.prod(run.size for run in within)
    match [run.reduced for run in within]:
        case [True]:
            return Layout((examples, positions, width))
        case [False] if len(before) == 2:
            return Layout((examples, positions, width), width)
        case [False, True]:
            return Layout((examples, positions, width), within[0].size)
    return None


class _Run(NamedTuple):
    """Neighbouring axes that are all reduced, or all kept."""

    reduced: bool
    size: int


def _runs(reduced: Sequence[bool], shape: Sequence[int]) -> list[_Run]:
    # An axis of size 1 belongs to any run.
    axes = [(is_reduced, size) for is_reduced, size in zip(reduced, shape, strict=True) if size > 1]
    runs = groupby(axes, key=lambda axis: axis[0])
    return [_Run(key, math.prod(size for _, size in group)) for key, group in runs]


def _varies_along(param: jax.Array, shape: tuple[int, ...]) -> int | None:
    """The axis from which on `param` has the sizes of `shape`, or None if it has others."""
    first = next((axis for axis, size in enumerate(param.shape) if size > 1), len(shape))
    return first if param.shape[first:] == shape[first:] else None


def _first_feature_axis(reduced: Sequence[bool], shape: tuple[int, ...]) -> int:
    """Without parameters: the last run of axes, and the one before it where groups are reduced."""
    runs_before = min(len(_runs(reduced, shape)) - 1, 2)
    features = len(shape)
    while features and len(_runs(reduced[:features], shape[:features])) > runs_before:
        features -= 1
    return features
