"""One layer of PyTorch as one of ours, and back: names of arrays, layouts, normalized weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jaxnorm.tools.importing.arrays import repeated
from jaxnorm.tools.importing.layouts import (
    axes_of_dense_general,
    features_first,
    features_of_norm,
    has_axes_of,
    inputs_first,
    inputs_of_dense,
    is_batched,
    unsaid_order,
)
from jaxnorm.tools.importing.plan import SourceLayer, shifted
from jaxnorm.tools.importing.targets import VARIABLE, TargetLayer

NORM_KEYS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNT = "num_batches_tracked"
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
KERNELS = ("Conv", "ConvTranspose", "Dense", "DenseGeneral")
STEM = "parametrizations.weight."
WEIGHT_NORM = ((f"{STEM}original0", f"{STEM}original1"), ("weight_g", "weight_v"))
"""The keys of length and direction, of PyTorch's two ways to normalize a weight."""
SPECTRAL_NORM = (
    (f"{STEM}original", f"{STEM}0._u", f"{STEM}0._v"),
    ("weight_orig", "weight_u", "weight_v"),
)
"""The keys of the weight and of its left and right singular vector."""


def read_layer(target: TargetLayer, local: Mapping[str, np.ndarray], who: str) -> SourceLayer:
    """The arrays of a layer of PyTorch, for a layer of a model."""
    if target.kind in NORMS:
        return _read_norm(target, local)
    if is_kernel(target):
        return _read_kernel(target, local, who)
    return SourceLayer({}, {})


def has_counterpart(target: TargetLayer) -> bool:
    """Whether PyTorch has a layer with these variables."""
    roles = {role for role in target.keys if not role.startswith("pending_")}
    if target.kind in NORMS:
        return roles <= {*NORM_KEYS, "updates"}
    if is_kernel(target):
        normalized = "kernel/scale" in roles
        plain = target.wrapper is None and roles <= {"kernel", "bias"}
        return plain or (normalized and _normalizes_alike(target, "WeightNorm"))
    return target.kind == VARIABLE


def write_layer(
    target: TargetLayer, arrays: Mapping[str, np.ndarray], who: str
) -> dict[str, np.ndarray]:
    """The arrays of a layer of a model by PyTorch's keys."""
    if target.kind in NORMS:
        return _written_norm(target, arrays, who)
    return _written_kernel(target, arrays, who) if is_kernel(target) else dict(arrays)


def is_kernel(target: TargetLayer) -> bool:
    """Whether a layer has a kernel that PyTorch's layers have too."""
    return target.kind in KERNELS and not is_batched(target.layer)


def _read_norm(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    found = {role: local[key] for role, key in NORM_KEYS.items() if key in local}
    keys = {role: (NORM_KEYS[role],) for role in found}
    unsaid = {unsaid_order(leaf, target, role) for role, leaf in found.items()} - {None}
    arrays = {role: features_of_norm(leaf, target, role) for role, leaf in found.items()}
    if COUNT in local:
        arrays["updates"] = repeated(local[COUNT], target.shapes.get("updates"))
        keys["updates"] = (COUNT,)
    return SourceLayer(
        arrays, keys, droppable=frozenset({"updates"}), problems=tuple(map(str, unsaid))
    )


class Weight(NamedTuple):
    """A weight as PyTorch stores it, normalized or not.

    Attributes:
        roles: arrays in PyTorch's layout, by our roles.
        keys: of which they are made.
        whole: the weight with which the layer is called.
        method: our name of how it is normalized, or "".
    """

    roles: Mapping[str, np.ndarray]
    keys: Mapping[str, tuple[str, ...]]
    whole: np.ndarray
    method: str = ""


def _weight(local: Mapping[str, np.ndarray], outputs: int) -> Weight | None:
    """The weight among the arrays of a layer, whose outputs lie along this axis."""
    for g_key, v_key in WEIGHT_NORM:
        if g_key not in local or v_key not in local:
            continue
        g, v = local[g_key], local[v_key]
        # One length for each entry of the first axis, as PyTorch does by default.
        if v.ndim > 1 and g.shape == (v.shape[0], *(1 for _ in v.shape[1:])):
            wide = v.astype(np.float64)
            others = tuple(range(1, v.ndim))
            norm = np.sqrt((wide * wide).sum(others, keepdims=True))
            with np.errstate(invalid="ignore"):  # 0 has no direction: NaN, as in PyTorch
                whole = (g * wide / norm).astype(v.dtype)
            return Weight(
                {"kernel": v, "kernel/scale": g},
                {"kernel": (v_key,), "kernel/scale": (g_key,)},
                whole,
                "WeightNorm",
            )
    for w_key, u_key, v_key in SPECTRAL_NORM:
        if not (w_key in local and u_key in local and v_key in local):
            continue
        w, u, v = (local[key].astype(np.float64) for key in (w_key, u_key, v_key))
        if w.ndim > 1 and (u.shape, v.shape) == ((n := w.shape[outputs],), (w.size // n,)):
            dtype = local[w_key].dtype
            sigma = u @ np.moveaxis(w, outputs, 0).reshape(u.size, -1) @ v
            with np.errstate(divide="ignore", invalid="ignore"):
                whole = (w / sigma).astype(dtype)
            return Weight(
                {
                    "kernel": local[w_key],
                    "kernel/u": local[u_key][None],
                    "kernel/sigma": np.asarray(sigma, dtype),
                },
                {
                    "kernel": (w_key,),
                    "kernel/u": (u_key,),
                    "kernel/sigma": (u_key, v_key),
                },
                whole,
                "SpectralNorm",
            )
    if "weight" in local:
        return Weight({"kernel": local["weight"]}, {"kernel": ("weight",)}, local["weight"])
    return None


def _read_kernel(target: TargetLayer, local: Mapping[str, np.ndarray], who: str) -> SourceLayer:
    arrays, keys, notes = {}, {}, _padding(target)
    weight = _weight(local, outputs=int(target.kind == "ConvTranspose"))
    if weight is not None and not has_axes_of(weight.whole, target):
        weight = None
    if weight is not None and (target.wrapper is None or not weight.method):
        arrays["kernel"] = kernel_from_torch(weight.whole, target, who)
        keys["kernel"] = tuple(key for several in weight.keys.values() for key in several)
        if weight.method:
            notes += (f"{weight.method} of the source was multiplied into the kernel",)
    elif weight is not None and _normalizes_alike(target, weight.method):
        arrays |= weight.roles
        keys |= weight.keys
        arrays["kernel"] = kernel_from_torch(weight.roles["kernel"], target, who)
        if "kernel/scale" in arrays:
            arrays["kernel/scale"] = arrays["kernel/scale"].reshape(-1)
    if "bias" in local:
        arrays["bias"] = axes_of_dense_general(local["bias"], target, "bias")
        keys["bias"] = ("bias",)
    return SourceLayer(arrays, keys, notes=notes)


def _normalizes_alike(target: TargetLayer, method: str) -> bool:
    """Whether what is around a layer normalizes its kernel as one of PyTorch's methods does."""
    if type(target.wrapper).__name__ != method:
        return False
    # PyTorch's weight norm has one length for each entry of the first axis, the inputs of a
    # transposed convolution.
    axis = getattr(target.wrapper, "feature_axes", -1)
    return method == "SpectralNorm" or (axis in (-1, (-1,)) and target.kind in ("Conv", "Dense"))


def kernel_from_torch(w: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """A weight of PyTorch in our layout."""
    if target.kind in ("Dense", "DenseGeneral"):
        return axes_of_dense_general(inputs_of_dense(w.T, target, who), target, "kernel")
    window = tuple(range(2, w.ndim))
    if target.kind == "Conv":
        return w.transpose(*window, 1, 0)
    if target.layer.transpose_kernel:
        return w.transpose(*window, 1, 0)
    # PyTorch's is the derivative of a convolution, which mirrors the window.
    return np.flip(w.transpose(*window, 0, 1), tuple(range(w.ndim - 2)))


def kernel_to_torch(kernel: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """The way back from `kernel_from_torch`."""
    if target.kind in ("Dense", "DenseGeneral"):
        outputs = target.shapes["bias"] if "bias" in target.shapes else _features(target)
        return inputs_first(kernel.reshape(-1, int(np.prod(outputs))), target, who).T
    window = tuple(range(kernel.ndim - 2))
    if target.kind == "Conv" or target.layer.transpose_kernel:
        return kernel.transpose(-1, -2, *window)
    return np.flip(kernel, window).transpose(-2, -1, *window)


def _features(target: TargetLayer) -> Any:
    layer = target.layer
    return layer.features if hasattr(layer, "features") else layer.out_features


def _written_norm(
    target: TargetLayer, arrays: Mapping[str, np.ndarray], who: str
) -> dict[str, np.ndarray]:
    written = {}
    for role, leaf in arrays.items():
        if role == "updates":
            # Whole in PyTorch; an average of states may hold a fraction.
            written[COUNT] = np.rint(leaf.max()).astype(np.int64)
            continue
        if role == "scale" and getattr(target.layer, "zero_centered_scale", False):
            leaf = shifted(leaf, 1)
        written[NORM_KEYS[role]] = features_first(leaf, target, who)
    return written


def _written_kernel(
    target: TargetLayer, arrays: Mapping[str, np.ndarray], who: str
) -> dict[str, np.ndarray]:
    weight = kernel_to_torch(arrays["kernel"], target, who)
    written = {"weight": weight}
    if "kernel/scale" in arrays:
        g_key, v_key = WEIGHT_NORM[0]
        g = arrays["kernel/scale"].reshape(-1, *(1 for _ in weight.shape[1:]))
        written = {g_key: g, v_key: weight}
    if "bias" in arrays:
        written["bias"] = arrays["bias"].reshape(-1)
    return written


def _padding(target: TargetLayer) -> tuple[str, ...]:
    """A note where a convolution pads the two sides of its input differently: PyTorch cannot."""
    layer, window = target.layer, target.shapes.get("kernel", ())[:-2]
    if target.kind != "Conv" or layer.padding != "SAME" or not window:
        return ()

    def each(option: Any) -> tuple[int, ...]:
        several = option if isinstance(option, tuple | list) else [option or 1] * len(window)
        return tuple(int(n) for n in several)

    shape = target.x.shape[-1 - len(window) : -1]
    dilated = [(k - 1) * d + 1 for k, d in zip(window, each(layer.kernel_dilation), strict=True)]
    pads = lax.padtype_to_pads(shape, dilated, each(layer.strides), "SAME")
    if all(low == high for low, high in pads):
        return ()
    even = [(k // 2, k // 2) for k in dilated]
    return (
        f"padding='SAME' pads {pads}, more on one side, as no convolution of PyTorch does. Where "
        f"its padding was {[k // 2 for k in dilated]}, use padding={even}",
    )
