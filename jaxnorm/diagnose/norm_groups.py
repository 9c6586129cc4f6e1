"""Which elements of its input a norm takes together: the groups over which its statistics run.

Groups are positions in the flattened input, `[groups, values, features]`: batch norm has a group
for each feature, layer norm one for each example. The last axis are features that are decorrelated,
in whitening; for all others it has size 1.
"""

import math
from typing import Any

import numpy as np

from jaxnorm.core import axes as ax
from jaxnorm.core.feature_groups import group_shape
from jaxnorm.methods import (
    BatchNorm,
    GroupNorm,
    IBNa,
    IBNb,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    SwitchableNorm,
)
from jaxnorm.methods.group_norm import reduced_axes
from jaxnorm.methods.ibn import instance_features
from jaxnorm.methods.running_covariance import RunningCovariance

Groups = list[np.ndarray]


def statistic_groups(spec: Any, shape: tuple[int, ...], who: str) -> Groups | None:
    """The groups of values behind each statistic that a batch has; None if they are not known.

    Of several kinds of statistics the smallest groups, those of one example.
    """
    if isinstance(spec, SwitchableNorm):
        return [_keeping(_positions(shape), _examples_and_features(spec, len(shape), who))]
    return _groups(spec, shape, who)


def removed_groups(spec: Any, shape: tuple[int, ...], by_stored: bool, who: str) -> Groups | None:
    """The groups in which the result knows neither the mean of the input nor its scale.

    Args:
        spec: the method with its options.
        shape: of the input.
        by_stored: whether it normalizes by stored statistics, which no input moves.
        who: the name for errors.
    """
    if isinstance(spec, SwitchableNorm):
        # Its three kinds of statistics have no more in common than mean and scale of everything.
        whole = _by_ghost_batch(spec, _positions(shape))
        return [] if by_stored else [whole.reshape(len(whole), -1, 1)]
    if isinstance(spec, IBNa) and by_stored:
        return _groups(spec, shape, who)[:1]
    return [] if by_stored else _groups(spec, shape, who)


def acts_by_position(spec: Any) -> bool:
    """Whether stored statistics make it the same map at each position of each example."""
    if isinstance(spec, IBNa | SwitchableNorm):
        return False
    return isinstance(spec, BatchNorm | RunningCovariance | InstanceNorm)


def _groups(spec: Any, shape: tuple[int, ...], who: str) -> Any:
    positions, ndim = _positions(shape), len(shape)
    if isinstance(spec, LayerNorm | RMSNorm):
        reduced = ax.canonical_axes(spec.reduction_axes, ndim, who, "reduction_axes")
        return [_keeping(positions, ax.other_axes(reduced, ndim))]
    if isinstance(spec, GroupNorm):
        (axis,) = ax.canonical_axes(spec.axis, ndim, who)
        reduced = reduced_axes(spec.reduction_axes, axis, ndim, who, "reduction_axes")
        groups, size = group_shape(shape[axis], spec.num_groups, spec.group_size, who)
        split = positions.reshape(*shape[:axis], groups, size, *shape[axis + 1 :])
        kept = [a + (a > axis) for a in ax.other_axes(reduced, ndim)]
        return [_keeping(split, (*kept, axis))]
    if isinstance(spec, InstanceNorm | IBNb):
        return [_keeping(positions, _examples_and_features(spec, ndim, who))]
    if isinstance(spec, IBNa):
        (axis,) = spec._feature_axes(ndim, who)
        first = instance_features(shape[axis], spec.ratio, who)
        by_instance, by_batch = np.split(positions, [first], axis)
        return [
            _keeping(by_instance, _examples_and_features(spec, ndim, who)),
            _by_feature(spec, by_batch, who),
        ]
    if isinstance(spec, BatchNorm):
        return [_by_feature(spec, positions, who)]
    if isinstance(spec, RunningCovariance):
        (axis,) = spec._feature_axes(ndim, who)
        groups, size = group_shape(shape[axis], spec.num_groups, spec.group_size, who)
        last = np.moveaxis(positions, axis, -1).reshape(shape[0], -1, groups, size)
        parts = _by_ghost_batch(spec, last)
        return [np.moveaxis(parts, 3, 1).reshape(len(parts) * groups, -1, size)]
    return None


def _positions(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def _keeping(positions: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    """A group for each index along these axes."""
    first = np.moveaxis(positions, kept, range(len(kept)))
    return first.reshape(math.prod(first.shape[: len(kept)]), -1, 1)


def _examples_and_features(spec: Any, ndim: int, who: str) -> tuple[int, ...]:
    examples = ax.canonical_axes(getattr(spec, "batch_axis", 0), ndim, who, "batch_axis")
    return tuple(sorted({*examples, *spec._feature_axes(ndim, who)}))


def _by_feature(spec: Any, positions: np.ndarray, who: str) -> np.ndarray:
    """A group for each feature, and for each ghost batch if there are such."""
    parts = _by_ghost_batch(spec, positions)
    features = spec._feature_axes(positions.ndim, who)
    return _keeping(parts, (0, *(axis + 1 for axis in features)))


def _by_ghost_batch(spec: Any, positions: np.ndarray) -> np.ndarray:
    """With a first axis of batches that are normalized each by itself."""
    size = spec.ghost_batch_size
    if size is None or len(positions) % size or 0 in spec._feature_axes(positions.ndim, "report"):
        return positions[None]
    return positions.reshape(-1, size, *positions.shape[1:])
