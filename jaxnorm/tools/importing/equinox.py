"""Import of Equinox modules and their states; Equinox itself is not needed.

What differs between the two: layers have channels first and know one example, kernels have outputs
first, a norm may have parameters for whole images, and the running statistics of a batch norm are
kept biased, beside a count.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.importing.arrays import (
    by_name,
    flat_arrays,
    mirrored,
    repeated,
    without_ones,
)
from jaxnorm.tools.importing.layouts import (
    axes_of_dense_general,
    features_of_norm,
    has_axes_of,
    inputs_of_dense,
    unsaid_order,
)
from jaxnorm.tools.importing.names import Names
from jaxnorm.tools.importing.options import SourceOptions
from jaxnorm.tools.importing.plan import Imported, Source, SourceLayer, import_layers
from jaxnorm.tools.importing.targets import TargetLayer

NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
KERNELS = ("Conv", "ConvTranspose", "Dense", "DenseGeneral")
ROLES = {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var"}
OPTIONS = {"eps": "epsilon", "momentum": "momentum"}


def import_equinox(
    model: Any,
    module: Any,
    state: Any,
    *args: Any,
    names: Names | None = None,
    source: SourceOptions | Literal["same"] | None = None,
    channels_first: Mapping[str, bool | tuple[int, ...]] | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Imported:
    """Fills a model with the arrays of an Equinox module and its state.

    Linear layers, convolutions, transposed ones, batch, layer, group and RMS norms. What is not
    mapped is listed, never guessed.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`,
            of the same architecture. Its layers may be ours or Flax's.
        module: the Equinox module, of which the options are read too; or arrays by name, as
            `equinox_arrays(module, state)` gives them: `{"layers.0.weight": ...}`.
        state: its `eqx.nn.State`; None if it has none, or with arrays by name.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its name in Equinox:
            `{"stem": "layers.0"}`; or a function from the one to the other. What is not named is
            called alike in both. A tuple of names fills one layer that `nn.scan` or `nnx.scan` runs
            for several. A variable of no known layer is named itself,
            `{"embed/embedding": "embed.weight"}`, and taken as it is.
        source: the options that Equinox's layers had, by kind or path of the layer, where they are
            not its defaults: `{"BatchNorm": dict(momentum=0.9)}`; `zero_centered_scale=True` for a
            scale that is stored minus 1. `"same"` says that they are those of the model, and
            compares nothing.
        channels_first: what the order of several feature axes was: `{"head": (64, 7, 7)}` for a
            dense layer behind a flattened image of channels, height, width; `{"norm": True}` for a
            layer norm over these, False for one whose axes lie as in the model.
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
        Values are copied bit by bit, and rounded only if the model's dtype is narrower. Running
        statistics of `mode="batch"` are those by which Equinox normalizes, see `equinox_arrays`.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from flax import nnx
        >>> from jaxnorm.tools import import_equinox
        >>> arrays = {"mlp.layers.0.weight": np.float32([[2.0]])}
        >>> layer = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> filled, report = import_equinox(
        ...     layer, arrays, None, jnp.ones((1, 1)), names={"": "mlp.layers.0"}
        ... )
        >>> filled(jnp.array([[5.0]])).tolist()
        [[10.0]]
    """
    who = "import_equinox"
    options = {}
    if dataclasses.is_dataclass(module):
        options = _options(module)
        module = equinox_arrays(module, state)
    fix = "the module, or equinox_arrays(module, state)"
    arrays = flat_arrays({"arrays": module}, who, fix, ".")
    return import_layers(
        model,
        Source("equinox", arrays, functools.partial(_read, who=who), options=options),
        example_call(args, kwargs, who),
        names=names,
        source_options=source,
        channels_first=channels_first,
        partial=partial,
        who=who,
    )


def equinox_arrays(module: Any, state: Any = None) -> dict[str, np.ndarray]:
    """The arrays of an Equinox module by name, to be kept in a file and imported without Equinox.

    The names are those on the way, with dots, `"layers.0.weight"`. The statistics of a batch norm
    are `"mean"` and `"var"` beside its `"weight"`, and with `mode="batch"` `"updates"`:

        mean = hidden_mean / (1 - momentum^t),   var = hidden_var / (1 - momentum^t)

    Args:
        module: an Equinox module.
        state: its `eqx.nn.State`, or None if it has none.

    Returns:
        Arrays by name, in NumPy: `np.savez(path, **equinox_arrays(module, state))` keeps them.

    Numerics:
        The statistics are computed in float64 and rounded once. They are those by which Equinox
        normalizes in inference, though its variance starts at 1 and is debiased as if it started at
        0: after t batches it is too large by momentum^t / (1 - momentum^t).

    Example:
        >>> import dataclasses
        >>> import numpy as np
        >>> from jaxnorm.tools import equinox_arrays
        >>> Linear = dataclasses.make_dataclass("Linear", ["weight", "bias"])  # as eqx.nn.Linear
        >>> arrays = equinox_arrays(Linear(weight=np.ones((3, 2)), bias=np.zeros(3)))
        >>> {name: leaf.shape for name, leaf in arrays.items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    arrays = []
    for path, node in _nodes(module, ""):
        if _is_array(node):
            arrays.append((path, "an array", np.asarray(node)))
        elif state is not None and hasattr(node, "batch_state_index"):
            for name, leaf in _stats(node, state):
                arrays.append((f"{path}.{name}".lstrip("."), "a running average", leaf))
    return by_name(arrays, "equinox_arrays")


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Modules, containers and arrays, with the names on the way to them."""
    yield path, node
    if _is_array(node):
        return
    if dataclasses.is_dataclass(node):
        fields = (f.name for f in dataclasses.fields(node) if not f.metadata.get("static", False))
        children = [(name, getattr(node, name, None)) for name in fields]
    elif isinstance(node, Mapping):
        children = list(node.items())
    elif isinstance(node, list | tuple):
        children = list(enumerate(node))
    else:
        return
    for name, child in children:
        yield from _nodes(child, f"{path}.{name}".lstrip("."))


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _stats(norm: Any, state: Any) -> list[tuple[str, np.ndarray]]:
    """The running statistics of a batch norm, by name; none before the first batch of `"ema"`."""
    if norm.mode == "ema":
        if bool(state.get(norm.ema_first_time_index)):
            return []
        mean, var = state.get(norm.ema_state_index)
        return [("mean", np.asarray(mean)), ("var", np.asarray(var))]
    updates = int(state.get(norm.batch_counter))
    weight = 1.0 if updates == 0 else 1.0 - float(norm.momentum) ** updates
    mean, var = (
        (np.asarray(leaf, np.float64) / weight).astype(leaf.dtype)
        for leaf in state.get(norm.batch_state_index)
    )
    return [("mean", mean), ("var", var), ("updates", np.asarray(updates, np.int32))]


def _options(module: Any) -> dict[str, dict[str, Any]]:
    """The options of the norms of a module, by name."""
    found = {}
    for path, node in _nodes(module, ""):
        if hasattr(node, "eps"):
            found[path] = {
                ours: getattr(node, theirs)
                for theirs, ours in OPTIONS.items()
                if hasattr(node, theirs)
            }
    return found


def _read(target: TargetLayer, local: Mapping[str, np.ndarray], who: str) -> SourceLayer:
    if target.kind in NORMS:
        return _read_norm(target, local)
    if target.kind not in KERNELS:
        return SourceLayer({}, {})
    keys = {role: (key,) for role, key in (("kernel", "weight"), ("bias", "bias")) if key in local}
    arrays = {role: local[key] for role, (key,) in keys.items()}
    if "kernel" in arrays and not has_axes_of(arrays["kernel"], target):
        del arrays["kernel"], keys["kernel"]
    if "kernel" in arrays:
        arrays["kernel"] = _kernel(arrays["kernel"], target, who)
    if "bias" in arrays and target.kind in ("Conv", "ConvTranspose"):
        # They keep the spatial axes, of size 1.
        arrays["bias"] = without_ones(arrays["bias"], target.shapes.get("bias"))
    arrays = {role: axes_of_dense_general(leaf, target, role) for role, leaf in arrays.items()}
    return SourceLayer(arrays, keys)


def _kernel(weight: np.ndarray, target: TargetLayer, who: str) -> np.ndarray:
    """A weight [outputs, inputs, ...] in the layout of the model's layer."""
    kernel = np.moveaxis(weight, (1, 0), (-2, -1))
    if target.kind == "Dense":
        return inputs_of_dense(kernel, target, who)
    if target.kind == "ConvTranspose" and target.layer.transpose_kernel:
        return mirrored(kernel)
    return kernel


def _read_norm(target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
    keys = {role: (key,) for key, role in ROLES.items() if key in local}
    found = {role: local[key] for role, (key,) in keys.items()}
    problems = {unsaid_order(leaf, target, role) for role, leaf in found.items()} - {None}
    arrays = {role: features_of_norm(leaf, target, role) for role, leaf in found.items()}
    notes = ()
    if "updates" in local:
        arrays["updates"] = repeated(local["updates"], target.shapes.get("updates"))
        keys["updates"] = ("updates",)
        if "updates" not in target.keys:
            notes = ("Equinox debiases; to train on alike, construct ours with debias=True",)
    elif "var" in local:
        notes = ("Equinox's mode='ema' trains by running statistics, ours by the batch's",)
    return SourceLayer(
        arrays,
        keys,
        droppable=frozenset({"updates"}),
        notes=notes,
        problems=tuple(map(str, problems)),
    )
