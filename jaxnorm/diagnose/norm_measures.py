"""What is measured at each layer while a model runs: the hook of the report on norms.

All of it is part of the model's program, small, and travels out by marks; only for singular values
the inputs of norms travel out as a whole.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.core import axes as ax
from jaxnorm.core import checks, precision
from jaxnorm.core.masks import checked_mask, counting
from jaxnorm.core.moments import moments
from jaxnorm.methods import InstanceNorm
from jaxnorm.methods.narrow_stats import widened
from jaxnorm.methods.spec import Spec
from jaxnorm.tools.adapter.kinds import keeps_statistics, spec_of
from jaxnorm.tools.adapter.marks import harvest, mark, why_unread
from jaxnorm.tools.adapter.models import Arrays, LayerCall, Model, Path, Run

FLAT_RANGE = 3.0
"""Beyond it tanh has less than a hundredth of its slope, and sigmoid less than a twentieth."""


class Place(NamedTuple):
    """A layer's call in the model's program, and what was measured there.

    Attributes:
        path: the names on the way to the layer.
        spec: its options; None for a layer that is no norm.
        shape: of the input.
        mode: what else the call says to the method, such as `use_running_average`.
        pools: the mapped axes over which it pools, if these are there.
        measured: arrays by name, nested, with `lifted` leading axes, one for each `jax.vmap` and
            each scan around the layer.
        lifted: how many leading axes there are.
    """

    path: Path
    spec: Any
    shape: tuple[int, ...]
    mode: dict[str, Any]
    pools: bool
    measured: Any = None
    lifted: int = 0


def measured_places(
    model: Model, run: Run, arrays: Arrays, *, by_batch: bool, keep_inputs: bool, who: str
) -> tuple[list[Place], dict[Path, str], Sequence[Any]]:
    """The layers that `run` calls, in the order of its program, without the measured arrays.

    To be traced: the last result are the arrays, of each place a tuple, for `with_arrays`. The
    second are layers of which nothing can be measured, and why.
    """
    called: list[Place] = []

    def measure(call: LayerCall) -> Any:
        place, y, measured = _measured(call, by_batch, keep_inputs, who)
        leaves, structure = jax.tree.flatten(measured)
        mark((len(called),), *leaves)
        called.append(place._replace(measured=structure))
        return y

    _, found = harvest(lambda arrays: model.run(arrays, run, measure))(arrays)
    seen = [one for one in found if one.inside is None]
    places = [called[one.label[0]]._replace(lifted=one.lifted) for one in seen]
    unseen = {called[one.label[0]].path: why_unread(one.inside) for one in found if one.inside}
    return places, unseen, [one.values for one in seen]


def with_arrays(places: Sequence[Place], arrays: Sequence[Any]) -> list[Place]:
    """The places with what was measured there, as NumPy arrays."""
    return [
        place._replace(
            measured=jax.tree.unflatten(place.measured, [_on_host(leaf) for leaf in leaves])
        )
        for place, leaves in zip(places, arrays, strict=True)
    ]


def _on_host(leaf: jax.Array) -> np.ndarray:
    # NumPy knows no bfloat16 of its own, and computes with it slowly.
    array = np.asarray(leaf)
    return array.astype(np.float32) if leaf.dtype == jnp.bfloat16 else array


def _measured(
    call: LayerCall, by_batch: bool, keep_inputs: bool, who: str
) -> tuple[Place, Any, dict[str, Any]]:
    """What is known of a call before it runs, its result, and what is measured."""
    spec, x = spec_of(call.layer), jnp.asarray(call.x)
    if spec is None:
        y = call.proceed(call.x)
        place = Place(call.path, None, x.shape, {}, False)
        return place, y, _nonfinite(x, y, call.values, None)
    who = f"{who}, '{'/'.join(call.path)}'"
    if "shortcut" in call.arguments:
        x = x + call.arguments["shortcut"]  # IBN-b normalizes the sum
    # Where no axis is mapped, as for singular values, it is taken as it is on one device.
    spec = dataclasses.replace(spec, unbound_axis="local")
    x = checks.input_array(x, who)
    where = _mask(call, x.shape, who)
    values = _shaped(spec, call.values, x, who)
    mode = _mode(spec, call.arguments, by_batch, who)
    y = call.proceed(call.x)
    if by_batch and keeps_statistics(spec):
        with _without_warnings():
            y, _ = spec._transform(values, x, where, y.dtype, who, initializing=False, **mode)
    measured = _nonfinite(x, y, call.values, where)
    measured |= _channels(spec, x, y, where, who)
    measured["values"] = values
    measured["batch"] = _batch_statistics(spec, values, x, where, call.arguments, who)
    scale, _ = spec._affine(values)
    measured["scale"] = None if scale is None else scale.ravel()
    measured["mask"] = where
    pools = spec._pooled_over(who) is not None
    measurable = keep_inputs and not pools and not jnp.iscomplexobj(y)
    measured["x"] = x if measurable else None
    return Place(call.path, spec, x.shape, mode, pools), y, measured


def _mask(call: LayerCall, shape: tuple[int, ...], who: str) -> jax.Array | None:
    """The mask, with as many axes as the input.

    Flax's layers know no weights, and lay a mask along the last axes also where others fit.
    """
    mask = call.arguments.get("mask")
    if mask is not None and not isinstance(call.layer, Spec):
        mask = jnp.asarray(mask) != 0
        mask = jnp.expand_dims(mask, tuple(range(len(shape) - mask.ndim)))
    return checked_mask(mask, shape, who)


def _shaped(
    spec: Spec, values: Mapping[str, jax.Array], x: jax.Array, who: str
) -> dict[str, jax.Array]:
    """Variables in the shape of the features: NNX may keep those of several axes flat."""
    features = ax.sizes(x.shape, spec._feature_axes(x.ndim, who))
    slots = spec._slots(features, precision.is_complex(x.dtype), who)
    return {
        name: value.reshape(slots[name].shape) if name in slots else value
        for name, value in values.items()
    }


def _mode(spec: Any, arguments: Mapping[str, Any], by_batch: bool, who: str) -> dict[str, Any]:
    """What a call says to the method beside input and mask."""
    if not (keeps_statistics(spec) or isinstance(spec, InstanceNorm)):
        return {}
    mode = {name: arguments[name] for name in ("domain",) if name in arguments}
    frozen = False
    if not by_batch:
        frozen, _ = spec._mode(arguments.get("use_running_average"), None, who)
    return mode | dict(use_running_average=frozen, update_stats=False)


def _nonfinite(
    x: jax.Array, y: jax.Array, values: Mapping[str, jax.Array], where: jax.Array | None
) -> dict[str, Any]:
    """How many values are NaN or infinite in the input, the result and the variables."""

    def count(leaf: jax.Array, where: jax.Array | None = None) -> jax.Array:
        bad = ~jnp.isfinite(leaf)
        return (bad if where is None else bad & counting(where)).sum(dtype=jnp.int32)

    return {
        "nonfinite": {
            "input": count(x, where),
            "output": count(y, where),
            "values": {name: count(value) for name, value in values.items()},
        }
    }


def _channels(
    spec: Any, x: jax.Array, y: jax.Array, where: jax.Array | None, who: str
) -> dict[str, Any]:
    """Mean and variance of each feature of the input, and what the result looks like."""
    others = ax.other_axes(spec._feature_axes(x.ndim, who), x.ndim)
    seen, made = moments(x, others, where=where), moments(y, others, where=where)
    channels = dict(x_mean=seen.mean, x_var=seen.var, y_mean=made.mean, y_var=made.var)
    if not jnp.iscomplexobj(y):
        lowest = jnp.asarray(-jnp.inf, y.dtype)
        highest = (y if where is None else jnp.where(counting(where), y, lowest)).max(others)
        flat = jnp.abs(y) > jnp.asarray(FLAT_RANGE, y.dtype)
        channels |= dict(
            y_max=highest.astype(jnp.float32),
            saturated=moments(flat.astype(jnp.float32), others, where=where).mean,
        )
    return {name: leaf.ravel() for name, leaf in channels.items() if leaf is not None}


def _batch_statistics(
    spec: Any,
    values: Mapping[str, jax.Array],
    x: jax.Array,
    where: jax.Array | None,
    arguments: Mapping[str, Any],
    who: str,
) -> dict[str, jax.Array] | None:
    """The statistics of the batch and the stored ones, side by side; None where none are stored.

    Those of the batch are what a training step would store if it forgot all others: so they are
    taken as the method takes them, for the features and the domain for which they are stored.
    """
    if not keeps_statistics(spec):
        return None
    forgetful: dict[str, Any] = dict(momentum=0.0, debias=False, update_every=1)
    forgetful |= dict(skip_nonfinite=False, update_stats=True, ghost_batch_size=None)
    with _without_warnings():
        _, changed = dataclasses.replace(spec, **forgetful)._transform(
            widened(values),
            x,
            where,
            None if jnp.iscomplexobj(x) else x.dtype,
            who,
            initializing=False,
            use_running_average=False,
            update_stats=True,
            **{name: arguments[name] for name in ("domain",) if name in arguments},
        )
    found = {}
    for name, new in changed.items():
        role = name.partition("_")[0]
        if role in ("mean", "var", "cov") and name in values:
            role, read = ("var", _diagonal) if role == "cov" else (role, jnp.ravel)
            found[f"batch_{role}"], found[f"stored_{role}"] = read(new), read(values[name])
    return found


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without those of batches too small to train on, of which the report speaks itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _diagonal(cov: jax.Array) -> jax.Array:
    return jnp.diagonal(cov, axis1=-2, axis2=-1).ravel()
