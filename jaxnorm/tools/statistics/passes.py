"""Passes over a data set, after which the norms of a model know what they see in it.

Evidence of single batches merges by pairs, as in a tournament: a sum of many batches, one after the
other, would stop moving once a batch is smaller than the rounding of what was before.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import length_hint
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm.methods.accumulation import PREFIX
from jaxnorm.tools.adapter.calling import Call, call_of
from jaxnorm.tools.adapter.cycles import check_no_cycle
from jaxnorm.tools.adapter.evidence import Blend, Collector, Estimate, Norm
from jaxnorm.tools.adapter.marks import is_array
from jaxnorm.tools.adapter.models import Arrays, Model, Path, fresh, model_of
from jaxnorm.tools.adapter.norms import Only

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Order = Literal["together", "layer by layer"]
RunningVar = Literal["biased", "unbiased"] | None
Part = TypeVar("Part")


ROUNDING, GROWN_ROUNDING = 100.0, 10_000.0
"""Within how many units of rounding statistics count as settled: at once, and in a deep network, in
which the rounding of the first layers grows through the others."""


class Study:
    """What the norms of a model see of a data set.

    Args:
        model, batches, call, order, running_var, only, progress: as in `population_stats`.
        who: the tool's name for errors.
        examples: how many examples a batch has.
        blend: by the number of examples, what is kept of the stored estimates and the data's; None
            for the data's.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        who: str,
        *,
        call: Call,
        order: Order,
        running_var: RunningVar,
        only: Only,
        progress: bool | None,
        examples: Callable[[Any], Any] = lambda batch: 0.0,
        blend: Callable[[Any], Blend] | None = None,
    ):
        self._who, self._call, self._order = who, call_of(call, who), order
        self._examples, self._blend = examples, blend
        _check_options(order, running_var, who)
        _check_batches(batches, order, who)
        self._model = model_of(model, who)
        self._batches, self._progress = batches, progress
        self._first, self._rest = self._opened(1)
        _check_values(self._first, self._model, who)
        self._collector = Collector(
            self._model, lambda model: self._call(model, self._first), who, running_var, only
        )
        self._norms: Mapping[Path, Norm] = self._collector.norms
        self._step, self._merge = jax.jit(self._seen), jax.jit(self._together)
        self._finish = jax.jit(self._finished)

    def adapted(self) -> Any:
        """The model with what its norms see."""
        arrays = self._once() if self._order == "together" else self._until_settled()
        for norm in self._norms.values():
            arrays |= {key: jnp.zeros_like(arrays[key]) for key in _pending(norm, arrays)}
        return self._model.rebuilt(arrays)

    def by_each_batch(self) -> Callable[[Any], Any]:
        """What `call` returns for a batch by whose statistics the norms normalize, blended."""

        def called(arrays: Arrays, batch: Any) -> Any:
            out = self._observed(arrays, batch)[0]
            for leaf in jax.tree.leaves(out):
                if not is_array(leaf):
                    raise TypeError(
                        f"{self._who}: the call returns {type(leaf).__name__}, which a compiled "
                        f"function cannot. Pick the arrays: call=lambda model, batch: "
                        f"model(batch)['logits']."
                    )
            return out

        return functools.partial(jax.jit(called), fresh(self._model.arrays))

    def _once(self) -> Arrays:
        arrays, _ = self._passed(self._model.arrays, 1, ROUNDING)
        self._check_finite(arrays)
        return arrays

    def _until_settled(self) -> Arrays:
        """Each pass makes at least one more norm final; each step of a scan is a norm.

        After as many passes, what still moves is the rounding of the norms before, which grows with
        depth.
        """
        arrays = self._model.arrays
        norms = sum(len(norm.rows) for norm in self._norms.values())
        # As many again and some, for a norm that sees what depends on its own output.
        most = 2 * norms + 10
        unsettled: list[Path] = []
        for number in range(1, most + 1):
            tolerance = ROUNDING if number <= norms else GROWN_ROUNDING
            arrays, unsettled = self._passed(arrays, number, tolerance)
            if number >= norms or not unsettled:
                self._check_finite(arrays)
            if not unsettled:
                return arrays
        raise ValueError(
            f"{self._who}: after {most} passes over the batches, the statistics of "
            f"{_listed(unsettled)} still move. Either batches differ from pass to pass, or a norm "
            f"sees what depends on its own output. Use order='together'."
        )

    def _passed(self, arrays: Arrays, number: int, tolerance: float) -> tuple[Arrays, list[Path]]:
        """The arrays after a pass over all batches, and the norms whose statistics it moved."""
        if number > 1:
            self._first, self._rest = self._opened(number)
        parts = (self._step(arrays, batch) for batch in self._shown(number))
        seen = pairwise(parts, self._merge)
        nothing = [
            path
            for path, evidence in seen[0].items()
            if not np.asarray(evidence.count).reshape(len(evidence.count), -1).any(1).all()
        ]
        if nothing:
            raise ValueError(
                f"{self._who}: in all batches, nothing valid reached {_listed(nothing)}. Give "
                f"batches that do, or leave these norms as they are: only=lambda path: path not in "
                f"{_strings(nothing)}."
            )
        new, settled = self._finish(arrays, seen, tolerance)
        return new, [path for path in self._norms if not settled[path]]

    def _seen(self, arrays: Arrays, batch: Any) -> tuple[dict[Path, Any], Any]:
        """The evidence of a batch, and how many examples it has."""
        _, evidence, examples = self._observed(arrays, batch)
        return evidence, examples

    def _observed(self, arrays: Arrays, batch: Any) -> tuple[Any, dict[Path, Any], jax.Array]:
        """What the call returns, the evidence of all norms, and the number of examples."""
        examples = jnp.asarray(self._examples(batch), jnp.float32)
        together = self._order == "together"
        out, evidence = self._collector.evidence(
            arrays,
            lambda model: self._call(model, batch),
            self._norms if together else (),
            self._blend(examples) if self._blend and together else None,
        )
        return out, evidence, examples

    def _together(self, early: Any, late: Any) -> tuple[dict[Path, Any], Any]:
        return self._collector.merged(early[0], late[0]), early[1] + late[1]

    def _finished(
        self, before: Arrays, seen: Any, tolerance: ArrayLike
    ) -> tuple[Arrays, dict[Path, jax.Array]]:
        """The arrays with what was seen in them, and where that is what was there before."""
        evidence, examples = seen
        source = self._collector.stored(self._model.arrays)
        estimates = self._collector.estimates(self._model.arrays, evidence)
        if self._blend:
            blend = self._blend(examples)
            estimates = {path: blend(source[path], new) for path, new in estimates.items()}
        # Compared as they are stored: what is rounded would never settle on what is not.
        after = self._collector.written(before, estimates)
        old, new = self._collector.stored(before), self._collector.stored(after)
        return after, {path: _alike(old[path], new[path], tolerance) for path in self._norms}

    def _opened(self, number: int) -> tuple[Any, Iterator[Any]]:
        """The first batch of a pass, and an iterator over the others."""
        batches: Any = self._batches
        others = iter(batches if _is_iterable(batches) else batches())
        for first in others:
            return first, others
        raise ValueError(
            f"{self._who}: in pass {number} there are no batches. Give one or more; a function "
            f"must return a new iterable each time it is called: batches=lambda: load()."
        )

    def _shown(self, number: int) -> Iterable[Any]:
        """The batches of a pass, with a bar that shows how far it is."""
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        shows = console.is_terminal if self._progress is None else self._progress
        return track(
            chain([self._first], self._rest),
            description=f"{self._who}, pass {number}",
            total=length_hint(self._batches) or None,
            console=console,
            disable=not shows,
        )

    def _check_finite(self, arrays: Arrays) -> None:
        stored = self._collector.stored(arrays)
        broken = [
            path
            for path in self._norms
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored[path]))
        ]
        if broken:
            raise ValueError(
                f"{self._who}: NaN or infinite statistics in {_listed(broken)}, the first in the "
                f"order of the model. Look for such values in the batches and in the weights "
                f"before it, or hand a mask to the norms: call=..."
            )


def pairwise(parts: Iterable[Part], merge: Callable[[Part, Part], Part]) -> Part:
    """All parts merged, each time two that are of as many parts, but for the rest at the end."""
    waiting: list[Part] = []
    for number, part in enumerate(parts, 1):
        while number % 2 == 0:
            part, number = merge(waiting.pop(), part), number // 2
        waiting.append(part)
    return functools.reduce(lambda late, early: merge(early, late), reversed(waiting))


def _alike(old: Estimate, new: Estimate, tolerance: ArrayLike) -> jax.Array:
    """Whether two estimates are the same, within so many roundings of standard deviations."""
    joint = hasattr(new, "cov")
    spread = getattr(new, "cov" if joint else "var")
    before = getattr(old, "cov" if joint else "var")
    var = jnp.diagonal(spread, axis1=-2, axis2=-1) if joint else spread
    epsilon = jnp.finfo(var.dtype).eps
    allowed = jnp.asarray(tolerance, var.dtype) * epsilon
    assert new.mean is not None
    assert old.mean is not None
    mean_moved = jnp.abs(new.mean - old.mean)
    settled = mean_moved <= allowed * jnp.sqrt(var) + 4 * epsilon * jnp.abs(new.mean)
    scale = jnp.max(var, -1)[..., None, None] if joint else var
    return settled.all() & (jnp.abs(spread - before) <= allowed * scale).all()


def _pending(norm: Norm, arrays: Arrays) -> list[Path]:
    """Where evidence waits for the next step of the running statistics of a norm."""
    *parents, mean = norm.keys["mean"]
    domain = mean.removeprefix("mean")
    roles = ("batches", "count", *norm.keys)
    keys = [(*parents, f"{PREFIX}{role}{domain}") for role in roles]
    return [key for key in keys if key in arrays]


def _is_iterable(batches: Any) -> bool:
    return hasattr(batches, "__iter__")


def _check_options(order: str, running_var: str | None, who: str) -> None:
    if order not in ("together", "layer by layer"):
        raise ValueError(
            f"{who}: order={order!r} is unknown. Use order='together' or order='layer by layer'."
        )
    if running_var not in (None, "biased", "unbiased"):
        raise ValueError(
            f"{who}: running_var={running_var!r} is unknown. Use running_var='biased', "
            f"running_var='unbiased', or None for what each norm says."
        )


def _check_batches(batches: Any, order: str, who: str) -> None:
    is_batch = isinstance(batches, jax.Array | np.ndarray | Mapping)
    if is_batch or not (_is_iterable(batches) or callable(batches)):
        raise TypeError(
            f"{who}: the batches are {type(batches).__name__}, but must be an iterable of batches, "
            f"or a function that gives one. One batch alone is [batch]."
        )
    if order == "layer by layer" and isinstance(batches, Iterator):
        raise TypeError(
            f"{who}: the batches are {type(batches).__name__}, which can be gone through once, but "
            f"order='layer by layer' needs several passes. Give a list, or a function that starts "
            f"anew: batches=lambda: load()."
        )


def _check_values(batch: Any, model: Model, who: str) -> None:
    check_no_cycle(batch, who)
    for leaf in jax.tree.leaves(batch):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | complex | float | int):
            raise TypeError(
                f"{who}: a batch holds {type(leaf).__name__}, which is no array. Make it one: "
                f"batches=map(convert, batches)."
            )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((batch, model.arrays))):
        raise TypeError(
            f"{who}: works on values, batch after batch, and cannot be traced. Call it outside of "
            f"jax.jit, jax.vmap and jax.grad; it compiles its steps itself."
        )


def _strings(paths: Iterable[Path]) -> list[str]:
    return ["/".join(path) for path in paths]


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(repr(path) for path in _strings(paths))
