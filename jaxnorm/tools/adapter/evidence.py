"""The evidence that a batch gives to every norm of a model that keeps statistics.

Each norm tells its evidence by a mark (`marks.py`), so that scans, checkpoints and branches do not
hide it. Where it belongs is found by the same means: the model is run once with numbers in the
place of its stored statistics, the first of which is 1, the next 2, ...; a norm inside a scan over
layers then sees which of the stored numbers are its own. Calls of a shared layer see the same.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.core import precision
from jaxnorm.core.axes import sizes
from jaxnorm.core.covariance import Comoments, JointStats, merge_comoments
from jaxnorm.core.moments import Moments, Stats
from jaxnorm.methods import AdaBN, InstanceNorm
from jaxnorm.methods.accumulation import PREFIX
from jaxnorm.methods.narrow_stats import rounded, widened
from jaxnorm.methods.running_covariance import RunningCovariance
from jaxnorm.tools.adapter.kinds import calls_as_its_kind, keeps_statistics, spec_of
from jaxnorm.tools.adapter.lookalikes import lookalikes
from jaxnorm.tools.adapter.marks import Marked, harvest, mark, why_unread
from jaxnorm.tools.adapter.models import Arrays, LayerCall, Model, Path, Run
from jaxnorm.tools.adapter.norms import Only, chosen

Evidence = Moments | Comoments
Estimate = Stats | JointStats
Blend = Callable[[Any, Any], Any]
"""What a norm normalizes by, of its stored estimate and that of the batch."""


class Norm(NamedTuple):
    """A norm with stored statistics, as one run of the model uses it.

    Attributes:
        path: the names on the way to it; of a domain's statistics of `AdaBN` with that at the end.
        layer: the layer as the model calls it.
        spec: its options.
        keys: where its `mean` and its `var` or `cov` are among the arrays of the model.
        places: for each of these the positions in the flattened array, `[places, ...]`: one place
            for each layer of an `nn.scan`, and one in all without.
        rows: which calls, counted over all and over the steps of scans, belong to each place;
            -1 for none, `[places, calls]`.
    """

    path: Path
    layer: Any
    spec: Any
    keys: dict[str, Path]
    places: dict[str, np.ndarray]
    rows: np.ndarray


class Collector:
    """Takes the evidence of batches for the norms of a model.

    Args:
        model: the model.
        run: a call of the model, with an example batch; says which norms there are.
        who: the tool's name for errors.
        running_var: `"biased"` or `"unbiased"`, whether estimates have Bessel's correction; None
            for what each norm says.
        only: of which norms, see `chosen`. The others are called as the model does, and nothing
            more.

    Raises:
        TypeError: a norm whose statistics are cast on the way to it, or stored in 8 bits or as
            integers.
        ValueError: a norm that a user's subclass calls in its own way, whose statistics are not
            stored as they are; no norm at all.

    Warns of norms that it leaves: users' own, and those in a loop.
    """

    def __init__(
        self,
        model: Model,
        run: Run,
        who: str,
        running_var: str | None = None,
        only: Only = None,
    ):
        self._model, self._who, self._running_var = model, who, running_var
        self._labels: list[tuple[Any, ...]] = []
        self._left: set[Path] = set()
        self.norms = self._norms(run, only)

    def evidence(
        self,
        arrays: Arrays,
        run: Run,
        by_batch: Collection[Path] = (),
        blend: Blend | None = None,
    ) -> tuple[Any, dict[Path, Evidence]]:
        """What `run` returns, and the evidence of its batch for each norm.

        A pure function of arrays, to be compiled.

        Args:
            arrays: of the model.
            run: a call of the model.
            by_batch: paths of norms that normalize by the batch, as in training; the others do as
                the call says.
            blend: by what norms in `by_batch` normalize instead: an estimate made of the stored
                one and the batch's.

        Returns:
            The result of `run`, and by path `Moments` or `Comoments` with an axis of places before
            all others.

        Raises:
            ValueError: the run calls other norms than that of the example.
        """

        def observe(call: LayerCall) -> Any:
            norm = self._of_call(call)
            if norm is None or norm.path in self._left:
                return call.proceed(call.x)
            y, normalized, evidence = self._observed(
                norm, call, blend, warn=norm.path in by_batch and blend is None
            )
            mark((norm.path,), *jax.tree.leaves(evidence), *_lifting(norm, call))
            return normalized if norm.path in by_batch else y

        watched = harvest(lambda arrays: self._model.run(arrays, run, observe))
        out, found = watched(arrays)
        labels = [place.label for place in found]
        if labels != self._labels:
            raise ValueError(
                f"{self._who}: the first batch called the norms {_names(self._labels)}, another "
                f"{_names(labels)}. Give batches for which the model "
                f"calls the same layers."
            )
        return out, {path: _pooled(norm, found) for path, norm in self.norms.items()}

    def merged(self, evidence: dict[Path, Any], other: dict[Path, Any]) -> dict[Path, Any]:
        """The evidence of both together."""
        return {
            path: jax.vmap(_merge_of(self.norms[path].spec))(evidence[path], other[path])
            for path in evidence
        }

    def stored(self, arrays: Arrays) -> dict[Path, Estimate]:
        """The statistics that are stored, in float32 or wider; their first axis is of places."""
        return {path: _read(norm, arrays) for path, norm in self.norms.items()}

    def estimates(self, arrays: Arrays, evidence: Mapping[Path, Any]) -> dict[Path, Estimate]:
        """The statistics of which the evidence tells; what is stored where it tells nothing."""
        return {
            path: _estimate(self.norms[path].spec, seen, _read(self.norms[path], arrays))
            for path, seen in evidence.items()
        }

    def written(self, arrays: Arrays, estimates: Mapping[Path, Any]) -> Arrays:
        """The arrays of the model with these statistics in them."""
        new = dict(arrays)
        for path, estimate in estimates.items():
            norm = self.norms[path]
            for name, key in norm.keys.items():
                places = norm.places[name]
                leaf = rounded(getattr(estimate, name).reshape(places.shape), new[key].dtype)
                new[key] = new[key].ravel().at[places].set(leaf).reshape(new[key].shape)
        return new

    def _of_call(self, call: LayerCall) -> "_Called | None":
        spec = spec_of(call.layer)
        if spec is None or not keeps_statistics(spec):
            return None
        options: dict[str, Any] = dict(
            momentum=0.5, debias=False, update_every=2, update_stats=True, unbound_axis="local"
        )
        options |= dict(skip_nonfinite=False)
        if self._running_var is not None:
            options |= dict(running_var=self._running_var)
        spec = dataclasses.replace(spec, **options)
        domain = ""
        if isinstance(spec, AdaBN):
            domain = call.arguments.get("domain") or spec.domain or spec.domains[0]
            spec = dataclasses.replace(spec, domain=domain)
            domain = "" if domain == spec.domains[0] else domain
        path = (*call.path, domain) if domain else call.path
        return _Called(path, call.layer, spec, domain)

    def _observed(
        self, norm: "_Called", call: LayerCall, blend: Blend | None, *, warn: bool
    ) -> tuple[jax.Array, jax.Array, Evidence]:
        """What a norm returns here, what by the batch (blended), and the evidence of the batch.

        The evidence is what it would keep until the next step of its running statistics.
        """
        y, spec, x = call.proceed(call.x), norm.spec, jnp.asarray(call.x)
        features = sizes(x.shape, spec._feature_axes(x.ndim, self._who))
        slots = spec._slots(features, precision.is_complex(x.dtype), self._who)
        values = {
            # NNX may keep the variables of several feature axes flat.
            name: value.reshape(slots[name].shape) if name in slots else value
            for name, value in widened(call.values).items()
        }
        values |= {
            name: jnp.zeros(slot.shape, slot.dtype)
            for name, slot in slots.items()
            if name.startswith(PREFIX)
        }
        transform = functools.partial(
            spec._transform,
            x=x,
            mask=call.arguments.get("mask"),
            dtype=y.dtype,
            who=f"{self._who}, '{'/'.join(norm.path)}'",
            initializing=False,
        )
        with warnings.catch_warnings():
            if not warn:
                warnings.simplefilter("ignore")
            by_batch, changed = transform(values, use_running_average=False, update_stats=True)
        own = widened(call.values)
        seen = {name: changed[norm.name(f"{PREFIX}{name}")] for name in ("count", *norm.roles)}
        stored = {role: own[norm.name(role)] for role in norm.roles}
        if "cov" in seen:
            seen["mean"] = seen["mean"].reshape(seen["cov"].shape[:-1])
            stored["mean"] = stored["mean"].reshape(stored["cov"].shape[:-1])
            evidence, estimate = Comoments(**seen), JointStats(**stored)
        else:
            shape = stored["mean"].shape
            evidence = Moments(**{name: leaf.reshape(shape) for name, leaf in seen.items()})
            estimate = Stats(**stored)
        if blend is not None:
            blended = blend(estimate, _estimate(spec, evidence, estimate))
            values |= {
                norm.name(role): getattr(blended, role).reshape(values[norm.name(role)].shape)
                for role in norm.roles
            }
            by_batch, _ = transform(values, use_running_average=True, update_stats=False)
        return y, by_batch, evidence

    def _where(self, path: Path) -> str:
        return f"{self._who}, '{'/'.join(path)}'" if path else self._who

    def _norms(self, run: Run, only: Only) -> dict[Path, Norm]:
        """The chosen of the norms that a run calls, and where their statistics are stored."""
        called: list[_Called] = []
        of_users: dict[Path, str] = {}

        def observe(call: LayerCall) -> Any:
            norm = self._of_call(call)
            if norm is not None and not calls_as_its_kind(norm.layer):
                of_users[norm.path] = type(norm.layer).__name__
            elif norm is not None:
                mark((len(called),), *_lifting(norm, call))
                called.append(norm)
            return call.proceed(call.x)

        @jax.jit
        def seen_inside(arrays: Arrays) -> list[Marked]:
            called.clear()
            watched = harvest(
                lambda arrays: self._model.run(arrays, run, observe),
                every_branch=True,
            )
            return watched(arrays)[1]

        numbers = _Numbers(self._model)
        high, low = (seen_inside(arrays) for arrays in numbers.as_arrays())
        similar = {
            path: each.why
            for path, each in lookalikes(self._model, run).items()
            if each.has_statistics and each.kind is not None
        }
        unread = {
            called[place.label[0]].path: why_unread(place.inside) for place in high if place.inside
        }
        paths = dict.fromkeys([*(norm.path for norm in called), *of_users, *similar])
        self._left = paths.keys() - (chosen(paths, only, self._who) if paths else paths)
        self._check_known(of_users)
        unhandled = {p: why for p, why in (unread | similar).items() if p not in self._left}
        self._left |= unhandled.keys()
        calls: dict[Path, list[_Stored]] = {}
        for place, rest in zip(high, low, strict=True):
            norm = called[place.label[0]]
            if norm.path in self._left:
                continue
            where = self._where(norm.path)
            stored = [
                numbers.read(place.values[i], rest.values[i], place.lifted, where)
                for i in range(len(norm.roles))
            ]
            calls.setdefault(norm.path, []).append(
                _Stored(norm, dict(zip(norm.roles, stored, strict=True)))
            )
            self._labels.append((norm.path,))
        self._tell(unhandled, bool(calls))
        return {path: _norm(path, stored, self._where(path)) for path, stored in calls.items()}

    def _tell(self, unhandled: Mapping[Path, str], others: bool) -> None:
        """Warns of norms that keep their statistics, or raises if there are no others."""
        said = "; ".join(f"'{'/'.join(path)}' {why}" for path, why in unhandled.items())
        if not others:
            raise ValueError(
                f"{self._who}: the call reaches no norm with stored statistics"
                f"{f' that can be handled: {said}' if said else ''}. Give a model that has some, "
                f"such as batch norms, and call it so that it uses them: call=..."
            )
        if unhandled:
            warnings.warn(
                f"{self._who}: these norms keep their statistics: {said}. Without this warning: "
                f"only=lambda path: path not in {['/'.join(path) for path in unhandled]}.",
                stacklevel=2,
            )

    def _check_known(self, of_users: Mapping[Path, str]) -> None:
        """Raises if a user's subclass, whose call may do anything, is among the chosen norms."""
        unknown = [path for path in of_users if path not in self._left]
        if unknown:
            raise ValueError(
                f"{self._where(unknown[0])}: is a {of_users[unknown[0]]}, whose call is a user's "
                f"own, so that it is not known what it normalizes. Leave such norms as they are: "
                f"only=lambda path: path not in {['/'.join(path) for path in unknown]}. Or write a "
                f"module that calls the norm and then does the rest, in the place of a subclass."
            )


class _Called(NamedTuple):
    """A norm as it is called: its path, options, the roles of its statistics, and its domain."""

    path: Path
    layer: Any
    spec: Any
    domain: str

    @property
    def roles(self) -> tuple[str, str]:
        return ("mean", "cov" if isinstance(self.spec, RunningCovariance) else "var")

    def name(self, role: str) -> str:
        return f"{role}_{self.domain}" if self.domain else role


def _lifting(norm: _Called, call: LayerCall) -> tuple[jax.Array, ...]:
    """The stored statistics, and a value that depends on the input.

    All values of a mark have the same leading axes. With these in it, it has an axis for each
    `jax.vmap` over models, over inputs, or both.
    """
    statistics = [call.values[norm.name(role)] for role in norm.roles]
    return (*statistics, jnp.isnan(call.x).any())


class _Stored(NamedTuple):
    """Of one call, for each role, the variable and the positions in it, `[steps, ...]`."""

    norm: _Called
    places: dict[str, tuple[Path, np.ndarray]]


class _Numbers:
    """Numbers in the place of all statistics of a model: 1, 2, ..., no two alike."""

    _BASE = 4096
    """Numbers are told in two parts, since float32 counts to 2**24 only."""

    def __init__(self, model: Model):
        self._arrays = model.arrays
        self._keys = [key for key in model.arrays if model.collection(key) == "batch_stats"]
        self._ends = np.cumsum([0, *(model.arrays[key].size for key in self._keys)])

    def as_arrays(self) -> tuple[Arrays, Arrays]:
        """The arrays of the model with the high and the low parts of the numbers in them."""
        high, low = dict(self._arrays), dict(self._arrays)
        for key, start in zip(self._keys, self._ends, strict=False):
            leaf = self._arrays[key]
            numbers = np.arange(1, leaf.size + 1).reshape(leaf.shape) + start
            dtype = widened({"": leaf})[""].dtype  # half precision counts to 2048, or to 256
            high[key] = jnp.asarray(numbers // self._BASE, dtype)
            low[key] = jnp.asarray(numbers % self._BASE, dtype)
        return high, low

    def read(
        self, high: jax.Array, low: jax.Array, lifted: int, who: str
    ) -> tuple[Path, np.ndarray]:
        """The variable, and the positions in it, of which these numbers tell."""
        if not jnp.issubdtype(high.dtype, jnp.inexact) or jnp.finfo(high.dtype).bits < 32:
            raise TypeError(
                f"{who}: its statistics come to it as {high.dtype}. Store them in float32 or "
                f"bfloat16, and hand them to the norm as they are stored."
            )
        parts = [np.real(np.asarray(part)).astype(np.float64) for part in (high, low)]
        numbers = parts[0] * self._BASE + parts[1] - 1
        whole = all((part == np.rint(part)).all() for part in parts)
        index = np.searchsorted(self._ends, numbers, side="right") - 1
        if not (whole and numbers.size and (index == index.flat[0]).all()) or not (
            0 <= numbers.min() <= numbers.max() < self._ends[-1]
        ):
            raise ValueError(
                f"{who}: its statistics are computed on the way to it, not stored as they are, so "
                f"that no others can be put in their place. Call the layer with its own variables."
            )
        key = self._keys[index.flat[0]]
        places = (numbers - self._ends[index.flat[0]]).astype(np.int64)
        return key, places.reshape(-1, *places.shape[lifted:])


def _norm(path: Path, calls: Sequence[_Stored], who: str) -> Norm:
    """One norm, of all its calls."""
    norm = calls[0].norm
    steps = {role: np.concatenate([call.places[role][1] for call in calls]) for role in norm.roles}
    keys = {role: calls[0].places[role][0] for role in norm.roles}
    means = steps["mean"].reshape(len(steps["mean"]), -1)
    own, first, which = np.unique(means, axis=0, return_index=True, return_inverse=True)
    alike = all(call.places[role][0] == keys[role] for call in calls for role in norm.roles)
    if not alike or len(np.unique(own)) < own.size:
        raise ValueError(
            f"{who}: its calls share a part of their statistics, in "
            f"'{'/'.join(keys['mean'])}'. Give each layer its own, or all the same."
        )
    rows = [np.flatnonzero(which.ravel() == place) for place in range(len(own))]
    longest = max(map(len, rows))
    table = np.stack([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows])
    places = {role: steps[role][first] for role in norm.roles}
    return Norm(path, norm.layer, norm.spec, keys, places, table)


def _estimate(spec: Any, seen: Evidence, stored: Estimate) -> Estimate:
    """The statistics of which evidence tells, in dtypes of those stored, which stay without."""
    ddof = int(spec.running_var == "unbiased")
    if isinstance(spec, InstanceNorm):
        ddof = 0  # the evidence is of examples' estimates, each with its own
    known = seen.count > ddof

    def where_known(new: jax.Array, old: jax.Array) -> jax.Array:
        beside = known.reshape(known.shape + (1,) * (old.ndim - known.ndim))
        return jnp.where(beside, new.astype(old.dtype), old)

    return jax.tree.map(where_known, seen.stats(ddof), stored)


def _merge_of(spec: Any) -> Any:
    return merge_comoments if isinstance(spec, RunningCovariance) else spec._merged


def _pooled(norm: Norm, found: Sequence[Marked]) -> Evidence:
    """The evidence of all calls of a norm, by the places to which they belong."""
    kind = Comoments if "cov" in norm.keys else Moments

    def by_place(*calls: tuple[jax.Array, int]) -> jax.Array:
        rows = [leaf.reshape(-1, *leaf.shape[lifted:]) for leaf, lifted in calls]
        nothing = jnp.zeros((1, *rows[0].shape[1:]), rows[0].dtype)
        return jnp.concatenate([*rows, nothing])[norm.rows]

    own = [place for place in found if place.label == (norm.path,)]
    leaves = [
        by_place(*((place.values[i], place.lifted) for place in own))
        for i in range(len(dataclasses.fields(kind)))
    ]
    calls = [kind(*(leaf[:, i] for leaf in leaves)) for i in range(norm.rows.shape[1])]
    return functools.reduce(jax.vmap(_merge_of(norm.spec)), calls)


def _read(norm: Norm, arrays: Arrays) -> Estimate:
    """The stored statistics of a norm, in float32 or wider; their first axis is of places."""
    stored = {role: arrays[key].ravel()[norm.places[role]] for role, key in norm.keys.items()}
    stored = widened(stored)
    if "cov" in stored:
        stored["mean"] = stored["mean"].reshape(stored["cov"].shape[:-1])
        return JointStats(**stored)
    return Stats(**stored)


def _names(labels: Sequence[Any]) -> str:
    return ", ".join(f"'{'/'.join(path)}'" for (path,) in labels) or "none"
