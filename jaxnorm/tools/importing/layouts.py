"""How features lie: channels first in most other frameworks, last in ours."""

import math

import numpy as np

from jaxnorm.tools.importing.targets import TargetLayer


def inputs_of_dense(kernel: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """A kernel [inputs, outputs] with its inputs in our order, if they were a flattened image.

    Raises:
        ValueError: `channels_first` is not the shape of as many inputs.
    """
    shape = _image(kernel, target, who)
    if shape is None:
        return kernel
    return np.moveaxis(kernel.reshape(*shape, -1), 0, -2).reshape(kernel.shape)


def inputs_first(kernel: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """The way back from `inputs_of_dense`."""
    shape = _image(kernel, target, who)
    if shape is None:
        return kernel
    channels, *spatial = shape
    return np.moveaxis(kernel.reshape(*spatial, channels, -1), -2, 0).reshape(kernel.shape)


def _image(kernel: np.ndarray, target: TargetLayer, who: str) -> tuple[int, ...] | None:
    shape = target.channels_first
    if shape is None or shape is False:
        return None
    if shape is True or math.prod(shape) != kernel.shape[0]:
        raise ValueError(
            f"{who}: channels_first={{{target.name!r}: {shape}}} does not say how the "
            f"{kernel.shape[0]} inputs of this dense layer lie. Give the shape of the image before "
            f"it is flattened, (channels, height, width)."
        )
    return shape


def features_of_norm(leaf: np.ndarray, target: TargetLayer, role: str) -> np.ndarray:
    """A norm's array in our order of feature axes, and flat if the model's is."""
    if leaf.ndim > 1 and target.channels_first:
        leaf = np.moveaxis(leaf, 0, -1)
    shape = target.shapes.get(role)
    return leaf.reshape(-1) if shape == (leaf.size,) else leaf


def features_first(leaf: np.ndarray, target: TargetLayer) -> np.ndarray:
    """The way back from `features_of_norm`."""
    shape = target.channels_first
    if not shape:
        return leaf
    if isinstance(shape, tuple):
        channels, *spatial = shape
        leaf = leaf.reshape(*spatial, channels)
    return np.moveaxis(leaf, -1, 0)


def unsaid_order(leaf: np.ndarray, target: TargetLayer, role: str) -> str | None:
    """Why it must be said whether channels come first in a norm's array; None if it need not."""
    shape = target.shapes.get(role)
    if leaf.ndim < 2 or shape is None or target.channels_first is not None:
        return None
    moved = np.moveaxis(leaf, 0, -1).shape
    if moved != leaf.shape and shape == leaf.shape:
        return None
    if shape not in (moved, (leaf.size,)):
        return None
    return (
        f"its features {tuple(leaf.shape)} may lie channels first or as in the model. Say "
        f"channels_first={{{target.name!r}: True}} or False"
    )
