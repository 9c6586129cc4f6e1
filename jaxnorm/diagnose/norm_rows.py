"""The report on norms as data: what was measured of each, summed up, and what there is to say."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxnorm.diagnose.norm_groups import statistic_groups
from jaxnorm.diagnose.norm_measures import FLAT_RANGE, Place
from jaxnorm.diagnose.singular_values import Map, singular_range
from jaxnorm.methods import SwitchableNorm
from jaxnorm.methods.batch_norm import BatchNorm
from jaxnorm.methods.running_covariance import RunningCovariance
from jaxnorm.tools.adapter.kinds import keeps_statistics
from jaxnorm.tools.adapter.models import Model

SMALL = 1e-3
"""A scale is taken for 0 if it is so small a part of the largest of its norm."""
LAG = 0.5
"""Running statistics lag if half the channels are off by more, in standard deviations."""
MUCH_FLAT = 0.05
"""More outputs beyond the flat range than these are worth a word; of normal ones it is 0.003."""
FEW = 8
"""Statistics of fewer values are noise."""
ROUNDING = 8 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class NormRow:
    """What a report says of one norm, over all its calls.

    Attributes:
        path: the names on the way to it; `[0]`, `[1]`, ... tell layers of a stack apart.
        method: the name of the method.
        normalizes_by: `"stored"` statistics, those of the `"batch"`, or those of the `"example"`.
        features: the number of channels.
        calls: how often it is called; under `jax.vmap` each index counts.
        count: number of values of this batch behind a statistic, the smallest if they differ;
            masked ones do not count. None for an unknown method.
        updates: the steps of its running statistics, where it counts them.
        shift: of each stored mean, its distance from the batch's, in the standard deviations by
            which inference divides. None where nothing is stored, as for the next.
        variance_ratio: of each stored variance, the batch's divided by it, epsilon added to both.
        mean, deviation: of each channel of the input, on this batch.
        collapsed: which channels do not vary on this batch: no more than by rounding, or so little
            that epsilon is 100 times their variance.
        zero_scale: which channels have a scale of less than a thousandth of the largest; None
            without a scale.
        never_positive: which channels of the output are nowhere above 0, where a ReLU gives
            zeros only; None for complex output.
        saturated: of each channel, the share of outputs beyond 3 on either side, where tanh and
            sigmoid are flat; None for complex output.
        nonfinite: how many values are NaN or infinite, by what holds them: `"input"`,
            `"output"`, or the name of a variable.
        largest, smallest: singular values of the Jacobian of its input to its output on this batch.
            A norm that takes its statistics from its input answers to no change of their mean and
            scale; the smallest is that of all other directions. None where not measured.
        warnings: what there is to say, in sentences.
    """

    path: str
    method: str
    normalizes_by: str
    features: int
    calls: int
    count: int | None
    updates: int | None
    shift: np.ndarray | None
    variance_ratio: np.ndarray | None
    mean: np.ndarray
    deviation: np.ndarray
    collapsed: np.ndarray
    zero_scale: np.ndarray | None
    never_positive: np.ndarray | None
    saturated: np.ndarray | None
    nonfinite: Mapping[str, int]
    largest: float | None = None
    smallest: float | None = None
    warnings: tuple[str, ...] = ()


def norm_rows(
    model: Model, places: Sequence[Place], singular_values: bool, who: str
) -> tuple[NormRow, ...]:
    """One row for each norm among the places, in the order in which the model calls them."""
    calls: dict[str, list[Place]] = {}
    for place in places:
        if place.spec is not None:
            for name, call in _single_calls(model, place):
                calls.setdefault(name, []).append(call)
    return tuple(_row(name, calls[name], singular_values, who) for name in calls)


def first_nonfinite(model: Model, places: Sequence[Place]) -> str | None:
    """Where NaN or infinite values come from, in a sentence; None if all are finite.

    The first layer that makes them of finite input, otherwise the first that receives them.
    """
    calls = [call for place in places for call in _single_calls(model, place)]
    for name, call in calls:
        bad = call.measured["nonfinite"]
        if bad["output"] and not bad["input"]:
            variables = [key for key, count in bad["values"].items() if count]
            why = f", by its {' and '.join(variables)}" if variables else ""
            return f"'{name}' is the first to make them, of finite input{why}"
    for name, call in calls:
        if call.measured["nonfinite"]["input"]:
            return f"'{name}' is the first to receive them, from outside the layers"
    return None


def _single_calls(model: Model, place: Place) -> list[tuple[str, Place]]:
    """The calls that a place inside scans and maps stands for, with the names of their layers."""
    path = "/".join(place.path) or "(root)"
    if not place.lifted:
        return [(path, place)]
    sizes = np.shape(place.measured["nonfinite"]["input"])
    stacked = _stack_axes(model, place, sizes)
    found = []
    for index in np.ndindex(*sizes):
        layer = [index[axis] for axis in stacked]
        name = f"{path}[{', '.join(map(str, layer))}]" if layer else path
        found.append((name, place._replace(measured=_at(place.measured, index), lifted=0)))
    return found


def _at(measured: Any, index: tuple[int, ...]) -> Any:
    if isinstance(measured, dict):
        return {name: _at(leaf, index) for name, leaf in measured.items()}
    return None if measured is None else measured[index]


def _stack_axes(model: Model, place: Place, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Along which axes of scans and maps there are several layers, and not several calls of one.

    As many as the model stores. Where sizes leave a choice, those along which variables differ,
    then the inner ones.
    """
    values = place.measured.get("values", {})
    stored = {name: model.key(place.path, name) for name in values}
    layers, differing = 1, set()
    for name, key in stored.items():
        inside = math.prod(values[name].shape[place.lifted :])
        if key is not None and inside:
            layers = max(layers, model.arrays[key].size // inside)
        differing |= {
            axis
            for axis in range(place.lifted)
            if (values[name] != np.take(values[name], [0], axis)).any()
        }
    every = range(place.lifted)
    fitting = [
        axes
        for count in range(place.lifted + 1)
        for axes in itertools.combinations(every, count)
        if math.prod(sizes[axis] for axis in axes) == layers
    ]
    return max(fitting, key=lambda axes: (len(differing & {*axes}), axes), default=())


@np.errstate(all="ignore")  # of NaN and infinities, which the report is about
def _row(name: str, calls: Sequence[Place], singular_values: bool, who: str) -> NormRow:
    spec, measured = calls[0].spec, [call.measured for call in calls]
    shift, ratio = _against_stored(spec, measured)
    scale = measured[0]["scale"]
    mean = np.stack([one.get("x_mean", np.zeros_like(one["x_var"])) for one in measured])
    var = np.stack([one["x_var"] for one in measured])
    noise = ROUNDING**2 * (np.abs(mean) ** 2 + var)
    nonfinite: dict[str, int] = {}
    for one in measured:
        bad = one["nonfinite"]
        for what in ("input", "output"):
            nonfinite[what] = nonfinite.get(what, 0) + int(bad[what])
    nonfinite |= {key: int(count) for key, count in measured[0]["nonfinite"]["values"].items()}
    ranges = [_range_of(call, f"{who}, '{name}'") for call in calls] if singular_values else []
    largest = [high for high, _ in ranges if high is not None]
    smallest = [low for _, low in ranges if low is not None]
    updates = [int(leaf.max()) for key, leaf in measured[0]["values"].items() if "updates" in key]
    real = "saturated" in measured[0]
    row = NormRow(
        path=name,
        method=type(spec).__name__,
        normalizes_by=_normalizes_by(calls[0]),
        features=var.shape[1],
        calls=len(calls),
        count=_count(calls, who),
        updates=max(updates, default=None),
        shift=shift,
        variance_ratio=ratio,
        mean=mean.mean(0),
        deviation=np.sqrt(var.mean(0)),
        collapsed=np.all(var <= np.maximum(noise, spec.epsilon / 100), 0),
        zero_scale=None if scale is None else np.abs(scale) <= SMALL * np.abs(scale).max(),
        never_positive=np.max([one["y_max"] for one in measured], 0) <= 0 if real else None,
        saturated=np.stack([one["saturated"] for one in measured]).mean(0) if real else None,
        nonfinite={what: count for what, count in nonfinite.items() if count},
        largest=max(largest, default=None) if len(largest) == len(calls) else None,
        smallest=min(smallest, default=None) if len(smallest) == len(calls) else None,
    )
    pooled = singular_values and calls[0].pools
    return dataclasses.replace(row, warnings=tuple(_warnings(row, calls[0], pooled)))


def _normalizes_by(call: Place) -> str:
    if call.mode.get("use_running_average", False):
        return "stored"
    across = isinstance(call.spec, BatchNorm | RunningCovariance | SwitchableNorm)
    return "batch" if across else "example"


def _count(calls: Sequence[Place], who: str) -> int | None:
    groups = statistic_groups(calls[0].spec, calls[0].shape, who)
    if groups is None:
        return None
    counts = []
    for call in calls:
        mask = call.measured["mask"]
        if mask is None:
            counts += [positions.shape[1] for positions in groups]
        else:
            valid = np.broadcast_to(mask != 0, call.shape).ravel()
            counts += [valid[positions[..., 0]].sum(1).min() for positions in groups]
    return int(min(counts))


def _against_stored(
    spec: Any, measured: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Shift and ratio of variances of each stored statistic, the worst of all calls."""
    if not keeps_statistics(spec) or not measured[0]["batch"]:
        return None, None
    shifts, ratios = [], []
    for one in measured:
        seen = one["batch"]
        stored = seen["stored_var"] + spec.epsilon
        shifts.append(np.abs(seen["batch_mean"] - seen["stored_mean"]) / np.sqrt(stored))
        ratios.append((seen["batch_var"] + spec.epsilon) / stored)
    ratio = np.stack(ratios)
    worst = farthest_from_one(ratio)
    return np.stack(shifts).max(0), np.take_along_axis(ratio, worst[None], 0)[0]


def farthest_from_one(ratio: np.ndarray) -> np.ndarray:
    """Along the first axis, where the ratio is farthest from 1 by its factor."""
    with np.errstate(all="ignore"):
        return np.argmax(np.abs(np.log(ratio)), 0)


def _range_of(call: Place, who: str) -> tuple[float | None, float | None]:
    measured = call.measured
    if measured["x"] is None:
        return None, None
    norm = Map(call.spec, measured["values"], measured["x"], measured["mask"], call.mode)
    return singular_range(norm, who)


def _warnings(row: NormRow, call: Place, pooled: bool) -> list[str]:
    said = []
    if row.nonfinite:
        parts = [f"{count} in {what}" for what, count in row.nonfinite.items()]
        said.append(f"NaN or infinite values: {', '.join(parts)}.")

    def of_channels(which: np.ndarray | None, what: str) -> None:
        if which is not None and which.any():
            said.append(f"{which.sum()} of {row.features} channels: {what}")

    of_channels(row.collapsed, "constant on this batch, look at the layer before.")
    of_channels(row.zero_scale, "scale of almost 0, nothing of them goes on.")
    of_channels(row.never_positive, "never above 0, a ReLU after them is dead.")
    if row.saturated is not None and row.saturated.mean() > MUCH_FLAT:
        share = row.saturated.mean()
        said.append(f"{share:.0%} of outputs lie beyond {FLAT_RANGE:g}, where tanh is flat.")
    if row.count == 0:
        said.append("A statistic has no valid value: the mask leaves nothing.")
    elif row.count is not None and row.count < FEW and row.normalizes_by == "batch":
        said.append(f"Normalizes by statistics of {row.count} values, which are mostly noise.")
    if row.shift is not None and row.variance_ratio is not None:
        said += _about_stored(row, call)
    if pooled:
        said.append("Pools over mapped axes, so that one part has no singular values of its own.")
    return said


def _about_stored(row: NormRow, call: Place) -> list[str]:
    assert row.shift is not None
    assert row.variance_ratio is not None
    seen = call.measured["batch"]
    if (seen["stored_mean"] == 0).all() and (seen["stored_var"] == 1).all():
        return ["Running statistics are those of the start: train, or call population_stats."]
    noise = 3 / math.sqrt(max(row.count or 1, 1))
    shift, ratio = np.median(row.shift), np.median(row.variance_ratio)
    if shift > LAG + noise or abs(np.log(ratio)) > math.log(2) + math.sqrt(2) * noise:
        return [
            f"Running statistics are far from this batch's: half the means are off by {shift:.2g} "
            f"deviations or more, the middle variance is {ratio:.2g} times the running one. On "
            f"training data this means that they lag: call population_stats."
        ]
    return []
