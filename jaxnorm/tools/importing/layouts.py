"""How features lie: channels first in most other frameworks, last in ours."""

import math
from typing import Any

import numpy as np

from jaxnorm.core.axes import canonical_axes
from jaxnorm.tools.importing.targets import TargetLayer


def inputs_of_dense(kernel: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """A kernel [inputs, outputs] with its inputs in our order, if they were a flattened image.

    Raises:
        ValueError: `channels_first` is not the shape of as many inputs.
    """
    shape = _image(target, kernel.shape[0], who)
    if shape is None:
        return kernel
    return np.moveaxis(kernel.reshape(*shape, -1), 0, -2).reshape(kernel.shape)


def inputs_first(kernel: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """The way back from `inputs_of_dense`."""
    shape = _image(target, kernel.shape[0], who)
    if shape is None:
        return kernel
    channels, *spatial = shape
    return np.moveaxis(kernel.reshape(*spatial, channels, -1), -2, 0).reshape(kernel.shape)


def _image(
    target: TargetLayer, size: int, who: str, what: str = "inputs of this dense layer"
) -> tuple[int, ...] | None:
    """The shape of an image of this size, as the user says it."""
    shape = target.channels_first
    if shape is None or shape is False:
        return None
    if shape is True or math.prod(shape) != size:
        raise ValueError(
            f"{who}: channels_first={{{target.name!r}: {shape}}} does not say how the {size} "
            f"{what} lie. Give the shape of the image before it is flattened, (channels, height, "
            f"width)."
        )
    return shape


def has_axes_of(weight: np.ndarray, target: TargetLayer) -> bool:
    """Whether a weight of another layout has the axes of one layer.

    Where those of several layers lie in one array, nothing says which axis counts the layers.
    """
    is_matrix = target.kind in ("Dense", "DenseGeneral")
    return weight.ndim == (2 if is_matrix else len(target.shapes.get("kernel", ())))


def axes_of_dense_general(leaf: np.ndarray, target: TargetLayer, role: str) -> np.ndarray:
    """A kernel [inputs, outputs] or a bias [outputs] with the axes that a layer has for these.

    An array of another shape stays as it is, and does not fit.
    """
    if target.kind != "DenseGeneral" or role not in target.shapes or is_batched(target.layer):
        return leaf
    shape = target.shapes[role]
    layer = target.layer
    outputs = layer.features if hasattr(layer, "features") else layer.out_features
    several = len(outputs) if isinstance(outputs, tuple | list) else 1
    parts = (shape,) if role == "bias" else (shape[:-several], shape[-several:])
    return leaf.reshape(shape) if leaf.shape == tuple(map(math.prod, parts)) else leaf


def is_batched(layer: Any) -> bool:
    """Whether a dense layer has a kernel for each index of some axes (Linen, NNX)."""
    return bool(getattr(layer, "batch_dims", None) or getattr(layer, "batch_axis", None))


def feature_sizes(target: TargetLayer) -> tuple[int, ...]:
    """The sizes of a norm's feature axes, also where it keeps its arrays flat."""
    layer, sizes = target.layer, target.x.shape
    axes = getattr(layer, "feature_axes", getattr(layer, "axis", -1))
    return tuple(sizes[axis] for axis in canonical_axes(axes, len(sizes), target.kind))


def features_of_norm(leaf: np.ndarray, target: TargetLayer, role: str) -> np.ndarray:
    """A norm's array in our order of feature axes, and flat if the model's is."""
    if leaf.ndim > 1 and target.channels_first:
        leaf = np.moveaxis(leaf, 0, -1)
    is_flat = leaf.ndim > 1 and target.shapes.get(role) == (leaf.size,)
    return leaf.reshape(-1) if is_flat and leaf.shape == feature_sizes(target) else leaf


def features_first(leaf: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """The way back from `features_of_norm`.

    Raises:
        ValueError: features of equal sizes, of which it is not said whether channels come first;
            or an image of as many is said that they are not.
    """
    if not target.channels_first:
        alike = leaf.ndim > 1 and np.moveaxis(leaf, -1, 0).shape == leaf.shape
        if alike and target.channels_first is None:
            raise ValueError(
                f"{who}: the features {leaf.shape} of '{target.name}' may be wanted channels "
                f"first or as in the model. Say channels_first={{{target.name!r}: True}} or False."
            )
        return leaf
    if target.channels_first is not True:
        shape = _image(target, leaf.size, who, "features of this norm")
        assert shape is not None
        channels, *spatial = shape
        leaf = leaf.reshape(*spatial, channels)
    return np.moveaxis(leaf, -1, 0)


def unsaid_order(leaf: np.ndarray, target: TargetLayer, role: str) -> str | None:
    """Why it must be said whether channels come first in a norm's array; None if it need not."""
    shape = target.shapes.get(role)
    if leaf.ndim < 2 or shape is None or target.channels_first is not None:
        return None
    moved, sizes = np.moveaxis(leaf, 0, -1).shape, feature_sizes(target)
    if sizes not in (moved, leaf.shape) or shape not in (sizes, (leaf.size,)):
        return None
    if moved != leaf.shape and sizes == leaf.shape:
        return None
    return (
        f"its features {tuple(leaf.shape)} may lie channels first or as in the model. Say "
        f"channels_first={{{target.name!r}: True}} or False"
    )
