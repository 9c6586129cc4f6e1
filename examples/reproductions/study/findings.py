"""What several seeds say: means with their spread, and whether one way is better than another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Spread(NamedTuple):
    """A quantity measured with several seeds; prints as mean ± standard deviation."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value for each seed."""
        return cls(tuple(map(float, values)))

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """The standard deviation between seeds (n - 1); NaN for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    def __format__(self, spec: str) -> str:
        """With one seed, the value alone: it has no deviation."""
        if len(self.values) == 1:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.std:{spec}}"


class Comparison(NamedTuple):
    """The difference of two ways, paired by seed.

    Attributes:
        mean: of first - second.
        margin: half of the 95% confidence interval of that mean, by Student's t; NaN for one seed.
    """

    mean: float
    margin: float

    @property
    def more(self) -> bool | None:
        """Whether the first is more than the second; None if the seeds do not tell."""
        if not abs(self.mean) > self.margin:
            return None
        return self.mean > 0

    @property
    def less(self) -> bool | None:
        """Whether the first is less than the second; None if the seeds do not tell."""
        return None if self.more is None else not self.more


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compares two ways by what each measured with the same seeds, in the same order."""
    if len(first) != len(second):
        raise ValueError(f"compare: {len(first)} and {len(second)} values are no pairs")
    differences = np.subtract(first, second)
    count = len(differences)
    if count < 2:
        return Comparison(float(differences.mean()), float("nan"))
    error = differences.std(ddof=1) / np.sqrt(count)
    margin = float(stats.t.ppf(0.975, count - 1) * error)
    return Comparison(float(differences.mean()), margin)


class Finding(NamedTuple):
    """A claim of a paper beside what was measured.

    Attributes:
        claim: in one sentence, with the section or figure.
        measured: in one sentence with numbers.
        held: whether it held here; None where the spread between seeds is too large to tell.
    """

    claim: str
    measured: str
    held: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "held", False: "did not hold", None: "cannot be told"}[self.held]
