"""All that one run measured, and the figures that are drawn from it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.cases import Case
from benchmarks.layers import LayerResult
from benchmarks.oracle import Errors
from benchmarks.overheads import Stages
from benchmarks.peers import FLAX, OURS, OURS_NNX, TORCH
from benchmarks.timing import AGAIN, Effort, Quartiles, Times, geometric_mean
from benchmarks.whole_models import ModelResult


@dataclass
class Results:
    """What is empty was not measured.

    Attributes:
        peers: names of those that were measured.
        absent: names of those that are not installed.
        platform: of JAX: cpu, gpu or tpu.
        shortest: seconds that one measurement took at least.
        errors: distances from float64 by peer, method and dtype.
        widened: peer, method and dtype, where another dtype is returned, which follows.
        layers: steps of one layer.
        further: training steps of methods that no peer has.
        residuals: bytes held for the backward pass over those of x, by case, then by peer.
        models: training steps of whole models.
        imports: seconds of imports.
        stages: tracing and compiling of one layer, then of models with many norms.
        deep: the latter.
        eager: calls without jit by method and kind of module.
        recompiles: programs compiled after the first step by library and kind of module.
    """

    peers: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    platform: str = "cpu"
    shortest: float = Effort.shortest
    errors: dict[tuple[str, str, str], Errors] = field(default_factory=dict)
    widened: dict[tuple[str, str, str], str] = field(default_factory=dict)
    layers: list[LayerResult] = field(default_factory=list)
    further: list[LayerResult] = field(default_factory=list)
    residuals: dict[Case, dict[str, float]] = field(default_factory=dict)
    models: list[ModelResult] = field(default_factory=list)
    imports: Times = field(default_factory=Times)
    stages: list[Stages] = field(default_factory=list)
    deep: list[Stages] = field(default_factory=list)
    eager: dict[tuple[str, str], Times] = field(default_factory=dict)
    recompiles: dict[tuple[str, str], int] = field(default_factory=dict)

    def rivals(self) -> list[str]:
        """Everyone but this library, those on JAX before PyTorch."""
        return [name for name in self.peers if name not in (OURS, OURS_NNX)]

    def chosen(self, step: str, dtype: str | None = None) -> list[LayerResult]:
        """Results of a step, in one dtype or in all."""
        return [one for one in self.layers if one.step == step and dtype in (None, one.case.dtype)]

    def noise(self) -> tuple[float, float]:
        """Least and largest ratio of Flax to itself, among medians of training steps."""
        return noise_of(one.times for one in (*self.chosen("training"), *self.models))


def noise_of(times: Iterable[Times]) -> tuple[float, float]:
    """Least and largest ratio of a way to itself; 1 where none was taken twice."""
    again = [one.ratio(FLAX + AGAIN, FLAX).middle for one in times if FLAX in one.seconds]
    return min(again, default=1.0), max(again, default=1.0)


def mean_ratio(results: Iterable[LayerResult], way: str, to: str = OURS) -> float:
    """Geometric mean, over cases that both were timed in, of how much longer `way` takes."""
    both = (one.times for one in results if {way, to} <= one.times.seconds.keys())
    return geometric_mean(times.ratio(way, to).middle for times in both)


def fastest_rival(result: LayerResult) -> tuple[str, Quartiles] | None:
    """The fastest peer on JAX, and how many times as long as ours it takes."""
    ratios = {
        way: result.times.ratio(way, OURS)
        for way in result.times.seconds
        if way not in (OURS, OURS_NNX, TORCH) and not way.endswith(AGAIN)
    }
    return min(ratios.items(), key=lambda item: item[1].middle) if ratios else None
