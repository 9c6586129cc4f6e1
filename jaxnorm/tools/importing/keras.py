"""Import of the variables of Keras 3 models; Keras itself is not needed.

What differs between the two: names (`gamma`, `moving_variance`), an epsilon of 1e-3, the kernels of
depthwise convolutions, and those of transposed ones, which lie as `transpose_kernel=True` has them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.importing.arrays import as_array, by_name, flat_arrays, mirrored
from jaxnorm.tools.importing.layouts import (
    axes_of_dense_general,
    features_of_norm,
    has_axes_of,
)
from jaxnorm.tools.importing.names import Names
from jaxnorm.tools.importing.options import SourceOptions
from jaxnorm.tools.importing.plan import Imported, Source, SourceLayer, import_layers
from jaxnorm.tools.importing.targets import TargetLayer

ROLES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
    "scale": "scale",  # of RMSNormalization
}
NORMS = ("BatchNorm", "BatchRenorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
OPTIONS = ("epsilon", "momentum")
"""What is read off the norms of a Keras model, in Keras's words, which are ours."""


def import_keras(
    model: Any,
    variables: Any,
    *args: Any,
    names: Names | None = None,
    source: SourceOptions | Literal["same"] | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Imported:
    """Fills a model with the variables of a Keras 3 model.

    Dense layers, convolutions (also depthwise, separable and transposed ones), batch, layer, group,
    instance and RMS normalization, and batch renormalization. What is not mapped is listed, never
    guessed.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`,
            of the same architecture. Its layers may be ours or Flax's.
        variables: arrays by Keras's paths, `{v.path: np.asarray(v) for v in net.variables}`, or
            nested dictionaries of them; or the Keras model, of which the options are read too.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its path in Keras:
            `{"stem": "resnet/conv1"}`; or a function from the one to the other. What is not named
            is called alike in both. A `SeparableConv2D` counts as two layers, `"net/sep/depthwise"`
            and `"net/sep/pointwise"`, the latter with the bias. A tuple of names fills one layer
            that `nn.scan` or `nnx.scan` runs for several. A variable of no known layer is named
            itself, `{"embed/embedding": "net/embed/embeddings"}`, and taken as it is.
        source: the options that Keras's layers had, by kind or path of the layer, where they are
            not its defaults: `{"BatchNorm": dict(epsilon=1e-5)}`; `zero_centered_scale=True` for a
            scale that is stored minus 1. `"same"` says that they are those of the model, and
            compares nothing.
        partial: whether what does not fit is only reported, and keeps the model's values: for fine
            tuning. Options that differ are an error all the same.
        **kwargs: the model's call; in Linen these say that it is inference, `train=False`.

    Returns:
        The filled model, of the kind of `model`, which stays as it is, and a report: `print` it.

    Raises:
        TypeError: no model with variables; arrays, names or options that are none.
        ValueError: every key that was not used, every variable that was not filled, every shape
            and every option that differs, and values that no layer can have, all at once; two
            arrays of one name.

    Numerics:
        Values are copied bit by bit, and rounded only if the model's dtype is narrower.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from flax import nnx
        >>> from jaxnorm.tools import import_keras
        >>> from jaxnorm.tools import keras_defaults
        >>> norm = nnx.BatchNorm(1, **keras_defaults(nnx.BatchNorm), rngs=nnx.Rngs(0))
        >>> names = ("gamma", "beta", "moving_mean", "moving_variance")
        >>> values = (1.0, 0.0, 2.0, 9.0)
        >>> arrays = {f"net/bn/{k}": np.float32([v]) for k, v in zip(names, values)}
        >>> filled, report = import_keras(norm, arrays, jnp.ones((1, 1)), names={"": "net/bn"})
        >>> filled(jnp.array([[5.0]]), use_running_average=True).round(3).tolist()
        [[1.0]]

    Differs:
        A batch norm with `renorm=True` has two sets of statistics in Keras, `moving_*` for
        inference and `renorm_*` for training, which are the same if one momentum moves them. Ours
        has one: if the two differ, the second is listed as not used.
    """
    who = "import_keras"
    fix = "{v.path: np.asarray(v) for v in net.variables}"
    options = {}
    if hasattr(variables, "variables"):
        options = _options(variables)
        named = (
            (variable.path, f"variables[{i}]", as_array(variable, variable.path, who, fix))
            for i, variable in enumerate(variables.variables)
        )
        variables = by_name(named, who)
    arrays = _separable_as_two(flat_arrays({"variables": variables}, who, fix), who)
    return import_layers(
        model,
        Source("keras", arrays, _read, separator="/", options=options),
        example_call(args, kwargs, who),
        names=names,
        source_options=source,
        partial=partial,
        who=who,
    )


def _options(model: Any) -> dict[str, dict[str, Any]]:
    """The options of the norms of a Keras model, by path."""
    found = {}
    for layer in model._flatten_layers():
        options = {name: getattr(layer, name) for name in OPTIONS if hasattr(layer, name)}
        if options and layer.path is not None:
            found[layer.path] = options
    return found


def _separable_as_two(arrays: dict[str, np.ndarray], who: str) -> dict[str, np.ndarray]:
    """Keys that have two layers in the place of a separable convolution."""
    renamed = []
    for stored, leaf in arrays.items():
        key = stored
        layer, _, name = key.rpartition("/")
        if f"{layer}/pointwise_kernel" in arrays:
            key = {
                "depthwise_kernel": f"{layer}/depthwise/kernel",
                "pointwise_kernel": f"{layer}/pointwise/kernel",
                "bias": f"{layer}/pointwise/bias",
            }.get(name, key)
        renamed.append((key, repr(stored), leaf))
    return by_name(renamed, who)


def _read(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    if target.kind in NORMS:
        return _read_norm(target, local)
    arrays = {role: local[role] for role in ("kernel", "bias") if role in local}
    if "kernel" in arrays:
        if target.kind == "ConvTranspose" and not has_axes_of(arrays["kernel"], target):
            del arrays["kernel"]
        else:
            arrays["kernel"] = _kernel(arrays["kernel"], target)
    arrays = {role: axes_of_dense_general(leaf, target, role) for role, leaf in arrays.items()}
    return SourceLayer(arrays, {role: (role,) for role in arrays})


def _kernel(kernel: np.ndarray, target: TargetLayer) -> np.ndarray:
    """A kernel in the layout of the model's layer."""
    if target.kind == "ConvTranspose":
        return kernel if target.layer.transpose_kernel else mirrored(kernel)
    if target.kind != "Conv" or kernel.ndim < 2:
        return kernel
    *_, inputs, multiplier = kernel.shape
    outputs = (1, inputs * multiplier)
    if target.layer.feature_group_count == inputs and target.shapes["kernel"][-2:] == outputs:
        # Depthwise, [..., inputs, multiplier]: the outputs of one input lie together in both.
        return kernel.reshape(*kernel.shape[:-2], 1, -1)
    return kernel


def _read_norm(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    found = {role: key for key, role in ROLES.items() if key in local}
    arrays = {role: features_of_norm(local[key], target, role) for role, key in found.items()}
    keys: dict[str, tuple[str, ...]] = {role: (key,) for role, key in found.items()}
    if _says_the_same_twice(local):
        keys["mean"] += ("renorm_mean",)
        keys["var"] += ("moving_stddev", "renorm_stddev")
    if target.kind == "BatchRenorm":
        arrays["step"], keys["step"] = np.zeros((), np.int32), ()
    limits = [getattr(target.layer, name, None) for name in ("rmax", "dmax")]
    notes = ("the schedules of rmax and dmax begin anew: Keras counts no steps",)
    return SourceLayer(arrays, keys, notes=notes if any(map(callable, limits)) else ())


def _says_the_same_twice(local: Mapping[str, np.ndarray]) -> bool:
    """Whether the statistics of batch renormalization in training are those of inference."""
    pairs = (("renorm_mean", "moving_mean"), ("renorm_stddev", "moving_stddev"))
    return all(
        training in local and inference in local and np.allclose(local[training], local[inference])
        for training, inference in pairs
    )
