"""Import of the parameters and states of Haiku models; Haiku itself is not needed.

What differs between the two: names (`w`, `offset`, a module of its own for each running average),
norms' arrays that keep all axes of the input, `(1, 1, 1, features)`, the kernels of transposed
convolutions, which have outputs before inputs, and running averages that are always debiased.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.importing.arrays import flat_arrays, mirrored, repeated, without_ones
from jaxnorm.tools.importing.layouts import axes_of_dense_general, has_axes_of
from jaxnorm.tools.importing.names import Names
from jaxnorm.tools.importing.options import SourceOptions
from jaxnorm.tools.importing.plan import Imported, Source, SourceLayer, import_layers
from jaxnorm.tools.importing.targets import TargetLayer

NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
PARAMS = {"scale": "scale", "offset": "bias"}
AVERAGES = {"mean": "~/mean_ema", "var": "~/var_ema"}


def import_haiku(
    model: Any,
    params: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    *args: Any,
    names: Names | None = None,
    source: SourceOptions | Literal["same"] | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Imported:
    """Fills a model with the parameters and the state of a Haiku model.

    Linear layers, convolutions (also depthwise, separable and transposed ones), batch, layer,
    group, instance and RMS norms. What is not mapped is listed, never guessed.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`,
            of the same architecture. Its layers may be ours or Flax's.
        params: Haiku's parameters, `{"resnet/~/conv": {"w": ...}}`.
        state: Haiku's state, `{"resnet/~/bn/~/mean_ema": {"average": ...}}`; None if it has none.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its name in Haiku:
            `{"stem": "resnet/~/conv"}`; or a function from the one to the other. What is not named
            is called alike in both. A tuple of names fills one layer that `nn.scan` or `nnx.scan`
            runs for several. A variable of no known layer is named itself,
            `{"embed/embedding": "embed/embeddings"}`, and taken as it is.
        source: the options that Haiku's layers had, by kind or path of the layer, where they are
            not its defaults: `{"BatchNorm": dict(momentum=0.9)}`, which Haiku calls `decay_rate`;
            `zero_centered_scale=True` for a scale that is stored minus 1. `"same"` says that they
            are those of the model, and compares nothing.
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
        Values are copied bit by bit, and rounded only if the model's dtype is narrower. Of a
        running average its `average` is taken, by which Haiku normalizes; `hidden` says the same
        before it is debiased. With `debias=True` our batch norm also takes its `counter`, and goes
        on as Haiku does.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from flax import nnx
        >>> from jaxnorm.tools import import_haiku
        >>> params = {"mlp/~/linear_0": {"w": np.float32([[2.0]]), "b": np.float32([1.0])}}
        >>> layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> filled, report = import_haiku(
        ...     layer, params, None, jnp.ones((1, 1)), names={"": "mlp/~/linear_0"}
        ... )
        >>> filled(jnp.array([[5.0]])).tolist()
        [[11.0]]
    """
    who = "import_haiku"
    fix = "params and state as hk.transform_with_state(f).init gives them, state=None for none"
    trees = {"params": params, "state": {} if state is None else state}
    arrays = flat_arrays(trees, who, fix)
    return import_layers(
        model,
        Source("haiku", arrays, _read, separator="/"),
        example_call(args, kwargs, who),
        names=names,
        source_options=source,
        partial=partial,
        who=who,
    )


def _read(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    if target.kind in NORMS:
        return _read_norm(target, local)
    arrays, keys = {}, {}
    is_transposed = target.kind == "ConvTranspose"
    if "w" in local and (not is_transposed or has_axes_of(local["w"], target)):
        kernel = local["w"]
        if is_transposed:
            kernel = kernel.swapaxes(-1, -2)
            kernel = mirrored(kernel) if target.layer.transpose_kernel else kernel
        arrays["kernel"], keys["kernel"] = kernel, ("w",)
    if "b" in local:
        arrays["bias"], keys["bias"] = local["b"], ("b",)
        if target.kind in ("Conv", "ConvTranspose"):
            # With channels first it has an axis of size 1 for each spatial axis.
            arrays["bias"] = without_ones(local["b"], target.shapes.get("bias"))
    arrays = {role: axes_of_dense_general(leaf, target, role) for role, leaf in arrays.items()}
    return SourceLayer(arrays, keys)


def _read_norm(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    arrays = {role: local[name] for name, role in PARAMS.items() if name in local}
    keys: dict[str, tuple[str, ...]]
    keys = {role: (name,) for name, role in PARAMS.items() if name in local}
    notes = ()
    for role, module in AVERAGES.items():
        if f"{module}/average" in local:
            arrays[role] = local[f"{module}/average"]
            keys[role] = (f"{module}/average", f"{module}/hidden")
        if f"{module}/counter" in local:
            count = local[f"{module}/counter"]
            arrays["updates"] = repeated(count, target.shapes.get("updates"))
            keys["updates"] = (*keys.get("updates", ()), f"{module}/counter")
            if "updates" not in target.keys:
                notes = ("Haiku debiases; to train on alike, construct ours with debias=True",)
    arrays = {role: without_ones(leaf, target.shapes.get(role)) for role, leaf in arrays.items()}
    return SourceLayer(arrays, keys, droppable=frozenset({"updates"}), notes=notes)
