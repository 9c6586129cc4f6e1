"""Import of Flax models into others: from Linen into NNX, from NNX into Linen, or into a like one.

The same variables have the same names in both, so that what differs is little: Linen sorts them
into collections; NNX keeps those of weight norms elsewhere, and several feature axes flat.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import linen, nnx

from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.adapter.kinds import method_of
from jaxnorm.tools.adapter.models import Model, Path, Run, model_of
from jaxnorm.tools.importing.arrays import by_name, flat_arrays
from jaxnorm.tools.importing.layouts import feature_sizes
from jaxnorm.tools.importing.names import Names, check_paths
from jaxnorm.tools.importing.options import SourceOptions
from jaxnorm.tools.importing.plan import Imported, Source, SourceLayer, import_layers
from jaxnorm.tools.importing.targets import (
    TargetLayer,
    beside_layers,
    places,
    target_layers,
    tied,
)

COLLECTIONS = ("params", "batch_stats")
OPTIONS = ("epsilon", "momentum", "running_var", "debias", "zero_centered_scale")
"""What is read off the norms of a model: what changes what its arrays mean."""
BOOKKEEPING = re.compile("updates|step|pending_.*|r_max|d_max")
"""What a norm without the options that need it can do without."""
RENORM = ("steps", "r_max", "d_max")
"""What the batch renorm that circulates among Flax users keeps beside `mean` and `var`."""
RENORM_EPSILON = 1e-3
"""The default of all its copies."""


def import_flax(
    model: Any,
    other: Any,
    *args: Any,
    names: Names | None = None,
    source: SourceOptions | Literal["same"] | None = None,
    scans: Mapping[str, tuple[int, int]] | None = None,
    call_other: Run | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Imported:
    """Fills a model with the variables of another Flax model, of either framework.

    All layers, ours and Flax's, and all other parameters and statistics. Options of norms are
    compared. What does not fit is listed, never guessed. The batch renorm that circulates in copies
    (sbx, CrossQ, purejaxql), which keeps `steps`, `r_max` and `d_max`, fills `BatchRenorm`, or
    `BatchNorm` for inference; its epsilon is taken for 1e-3, the default of these copies.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`.
        other: what is imported: an `nnx.Module`; a Linen module bound to its variables; or
            variables alone, Linen's `{"params": ..., "batch_stats": ...}`, or nested dictionaries
            of NNX.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its path in `other`:
            `{"stem": "encoder/conv1"}`; or a function from the one to the other. What is not named
            is called alike in both. A tuple of names fills one layer that `nn.scan` or `nnx.scan`
            runs for several. A variable of no known layer is named itself.
        source: the options that the layers of `other` had, by kind or path of the layer, where they
            are neither seen nor Flax's defaults: `{"BatchNorm": dict(epsilon=1e-3)}`. `"same"` says
            that they are those of the model, and compares nothing.
        scans: by the path of a module that a scan runs for several layers, the axis of these in
            `other` and in the model, where they are not the same: `{"layers": (1, 0)}`.
        call_other: how a Linen module `other` is called for its options to be seen; by default as
            the model is. Where that is otherwise: `lambda other: other(x, train=False)`.
        partial: whether what does not fit is only reported, and keeps the model's values: for fine
            tuning. Options that differ are an error all the same.
        **kwargs: the model's call; in Linen these say that it is inference, `train=False`.

    Returns:
        The filled model, of the kind of `model`, which stays as it is, and a report: `print` it.

    Raises:
        TypeError: no model with variables; variables, names or options that are none.
        ValueError: every key that was not used, every variable that was not filled, every shape
            and every option that differs, and values that no layer can have, all at once; two
            arrays of one name.

    Numerics:
        Values are copied bit by bit, and rounded only if the model's dtype is narrower, or a scale
        is stored minus 1 in one of the two.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> from jaxnorm.tools import import_flax
        >>> x = jnp.ones((1, 2))
        >>> dense = nn.Dense(3, use_bias=False)
        >>> bound = dense.bind(dense.init(jax.random.key(0), x))
        >>> layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(1))
        >>> filled, report = import_flax(layer, bound, x)
        >>> print(report)
        kernel  <-  kernel
        >>> bool((filled(x) == bound(x)).all())
        True

    Differs:
        Counts of updates and steps, and evidence that waits for a step, are taken by norms that
        keep them and dropped by others; evidence that the other model lacks starts at none.
    """
    who = "import_flax"
    scans = dict(scans or {})
    spare: frozenset[str] = frozenset()

    call = example_call(args, kwargs, who)
    if isinstance(other, linen.Module):
        arrays, options = _of_linen(other, call_other or call, who)
    elif isinstance(other, nnx.Module):
        arrays, options, spare = _of_nnx(other, who)
    else:
        arrays, options = _of_variables(other, who), {}
    held = model_of(model, who)
    if scans:
        check_paths("scans", scans, [target.name for target in target_layers(held, call)], who)
    reader = _Reader({key: leaf.shape for key, leaf in held.arrays.items()}, scans)
    return import_layers(
        model,
        Source("flax", arrays, reader.read, "/", options, spare),
        call,
        names=names,
        source_options=source,
        partial=partial,
        who=who,
    )


Options = dict[str, dict[str, Any]]


def _of_linen(other: linen.Module, call: Run, who: str) -> tuple[dict[str, np.ndarray], Options]:
    """The arrays of a Linen module bound to its variables, and the options of its norms."""
    held = model_of(other, who)
    layers = {"/".join(path): calls[0].layer for path, calls in held.layers(call).items()}
    return _named(_kept(held), who), _options(layers)


def _of_nnx(other: nnx.Module, who: str) -> tuple[dict[str, np.ndarray], Options, frozenset[str]]:
    """The arrays of an NNX module, the options of its norms, and second names of what is tied."""
    layers = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(other)}
    kept, ties = _kept(model_of(other, who)), tied(other)
    again = {place: leaf for key, leaf in kept.items() for place in places(key, ties)[1:]}
    spare = frozenset(_named(again, who))
    return _named({**kept, **again}, who), _options(layers), spare


def _kept(held: Model) -> dict[Path, Any]:
    """Parameters and statistics, and no random keys or caches."""
    return {key: leaf for key, leaf in held.arrays.items() if held.collection(key) in COLLECTIONS}


def _of_variables(variables: Any, who: str) -> dict[str, np.ndarray]:
    """The arrays of variables alone, of Linen by collection or of NNX."""
    fix = "model.bind(variables), an nnx.Module, {'params': ..., 'batch_stats': ...} of Linen, or "
    fix += "nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))"
    flat = flat_arrays({"variables": variables}, who, fix, separator="\n")
    return _named({tuple(key.split("\n")): leaf for key, leaf in flat.items()}, who)


def _named(arrays: Mapping[Path, Any], who: str) -> dict[str, np.ndarray]:
    """Arrays by the name of their layer and their role in it, `"block/conv/kernel/scale"`."""
    plain = {_without_collection(key) for key in arrays}
    named = []
    for key, leaf in arrays.items():
        path = _without_collection(key)
        for layer, role in beside_layers(key):
            if (*layer, role.split("/")[0]) in plain:
                path = (*layer, role)
                break
        named.append(("/".join(path), repr("/".join(key)), np.asarray(leaf)))
    return by_name(named, who)


def _without_collection(key: Path) -> Path:
    """The path of a variable, in Linen without the collection that it begins with."""
    return key[1:] if key[0] in COLLECTIONS and len(key) > 1 else key


def _options(layers: Mapping[str, Any]) -> Options:
    """The options of the norms among layers."""
    return {
        name: {option: getattr(layer, option) for option in OPTIONS if hasattr(layer, option)}
        for name, layer in layers.items()
        if method_of(layer) is not None
    }


class _Reader(NamedTuple):
    """Reads layers, whose arrays have the same roles in all of Flax.

    Attributes:
        shapes: those of the model's variables, with the axes of scans.
        scans: see `import_flax`.
    """

    shapes: Mapping[Path, tuple[int, ...]]
    scans: Mapping[str, tuple[int, int]]

    def read(self, target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
        """The arrays of a layer of the other model, for a layer of this one."""
        if method_of(target.layer) is not None and local.keys() >= {*RENORM}:
            return self._of_renorm(target, local)
        return self._alike(target, local)

    def _of_renorm(self, target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
        """Those of the batch renorm that circulates: sbx, CrossQ, purejaxql."""
        read = self._alike(target, {"step" if k == "steps" else k: v for k, v in local.items()})
        r_max, d_max = (float(np.max(local[name])) for name in ("r_max", "d_max"))
        note = (
            f"the source limits r to {r_max:g} and d to {d_max:g} once its warm-up of some steps "
            f"is over. To train on alike: rmax=lambda step: jnp.where(step < warm_up, 1.0, "
            f"{r_max:g}), dmax=lambda step: jnp.where(step < warm_up, 0.0, {d_max:g})"
        )
        return read._replace(
            keys={**read.keys, "step": ("steps",)},
            options={"epsilon": RENORM_EPSILON},
            notes=(note,) if target.kind == "BatchRenorm" else (),
        )

    def _alike(self, target: TargetLayer, local: Mapping[str, np.ndarray]) -> SourceLayer:
        """Those of a layer whose variables are named as ours."""
        droppable = frozenset(filter(BOOKKEEPING.fullmatch, local))
        arrays = {
            role: self._shaped(self._along(local[role], target), target, role)
            for role in local
            if role in target.keys
        }
        keys = {role: (role,) for role in {*arrays, *droppable}}
        return SourceLayer(arrays, keys, droppable=droppable)

    def _along(self, leaf: np.ndarray, target: TargetLayer) -> np.ndarray:
        """An array with the axis of a scan where the model has it."""
        for path, (there, here) in self.scans.items():
            if f"{target.name}/".startswith(f"{path}/") and leaf.ndim > max(there, here):
                return np.moveaxis(leaf, there, here)
        return leaf

    def _shaped(self, leaf: np.ndarray, target: TargetLayer, role: str) -> np.ndarray:
        """A norm's array with several feature axes or one for all, as the model has them."""
        if method_of(target.layer) is None:
            return leaf
        whole = self.shapes[target.keys[role]]
        scanned = len(whole) - len(target.shapes[role])
        sizes = feature_sizes(target)
        layouts = [(*whole[:scanned], *inner) for inner in (sizes, (math.prod(sizes),))]
        return leaf.reshape(whole) if {leaf.shape, whole} <= {*layouts} else leaf
