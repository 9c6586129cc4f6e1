"""Times of several ways to do one thing, such that what else the machine does meets all of them.

One round times each way once, in an order that rotates by one each round. Ratios are taken inside
a round, and their median and quartiles over the rounds are reported. A way that does exactly what
another one does is timed like the others: how far their ratio lies from 1 is the noise.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

AGAIN = " again"
"""Marks the name of a way that repeats another one."""


class Quartiles(NamedTuple):
    """Of times, or of ratios of two times."""

    low: float
    middle: float
    high: float

    def in_milliseconds(self) -> str:
        """Of seconds: the median, and in brackets the others."""
        low, middle, high = (f"{1e3 * seconds:.0f}" for seconds in self)
        return f"{middle} ms ({low}, {high})"


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at most.
        seconds: after which no further round begins.
        fewest: rounds, whatever they take.
        shortest: seconds that one measurement takes at least, by repeating what is measured.
    """

    rounds: int
    seconds: float
    fewest: int = 5
    shortest: float = 5e-3


@dataclass
class Times:
    """Seconds of each way, one number a round; in `apart` are those timed in other rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)

    def median(self, way: str) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds[way])

    def quartiles(self, way: str) -> Quartiles:
        """Seconds of one call, as they vary."""
        return quartiles(self.seconds[way])

    def ratio(self, way: str, to: str) -> Quartiles:
        """How many times as long one way takes as another."""
        if self.apart & {way, to}:
            unit = self.median(to)
            ratios = [seconds / unit for seconds in self.seconds[way]]
        else:
            pairs = zip(self.seconds[way], self.seconds[to], strict=True)
            ratios = [one / other for one, other in pairs]
        return quartiles(ratios)

    def add_apart(self, way: str, seconds: list[float]) -> None:
        """Times that come from another process."""
        self.seconds[way] = seconds
        self.apart.add(way)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least two numbers."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def seconds_of(way: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, as the mean of some."""
    start = time.perf_counter()
    for _ in range(repeats):
        way()
    return (time.perf_counter() - start) / repeats


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order in which a round takes the ways."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def interleaved(ways: Mapping[str, Callable[[], object]], effort: Effort) -> Times:
    """Times of each way; a way returns when its work is done."""
    names, repeats = list(ways), {}
    for name, way in ways.items():
        way()
        repeats[name] = max(1, math.ceil(effort.shortest / seconds_of(way)))
    times = Times({name: [] for name in names})
    end = time.perf_counter() + effort.seconds
    for number in range(effort.rounds):
        if number >= effort.fewest and time.perf_counter() > end:
            break
        for name in rotated(names, number):
            times.seconds[name].append(seconds_of(ways[name], repeats[name]))
    return times


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios, where twice and half cancel; not a number if there are none."""
    values = list(values)
    return statistics.geometric_mean(values) if values else math.nan
