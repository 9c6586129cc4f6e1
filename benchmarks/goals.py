"""What was aimed at, beside what was measured."""

import math
from typing import NamedTuple

from benchmarks.cases import DTYPES
from benchmarks.peers import FLAX, FLAX_NNX, OURS, OURS_NNX, TORCH
from benchmarks.results import Results, fastest_rival, mean_ratio, noise_of
from benchmarks.timing import geometric_mean

SCANNED = "nn.scan"


class Goal(NamedTuple):
    """One line of the goals.

    Attributes:
        aim: what was aimed at.
        found: what was measured.
        met: whether that is enough; None where this run does not tell.
    """

    aim: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "met", False: "**missed**", None: ""}[self.met]


def speed(results: Results) -> list[Goal]:
    """One layer's training step against Flax's, with Linen and with NNX."""
    goals = []
    for ours, flax, kind in ((OURS, FLAX, "Linen"), (OURS_NNX, FLAX_NNX, "NNX")):
        means = {d: mean_ratio(results.chosen("training", d), flax, ours) for d in DTYPES}
        both = mean_ratio(results.chosen("training"), flax, ours)
        if math.isnan(both):
            continue
        parts = ", ".join(f"{dtype} {mean:.2f}" for dtype, mean in means.items() if mean == mean)
        aim = f"training step of one layer ({kind}), `small` included: "
        aim += "1.5 times Flax's speed, aiming at 2.0"
        goals.append(Goal(aim, f"{both:.2f} ({parts})", both >= 1.5))
    return goals


def never_slower(results: Results) -> Goal | None:
    """The training step against whichever peer on JAX is fastest."""
    found = [(one, fastest_rival(one)) for one in results.chosen("training")]
    ratios = [(one, rival[1].middle) for one, rival in found if rival]
    if not ratios:
        return None
    slower = [(one, ratio) for one, ratio in ratios if ratio < 1]
    worst, ratio = min(ratios, key=lambda item: item[1])
    beyond = sum(ratio < results.noise()[0] for _, ratio in slower)
    text = (
        f"slower in {len(slower)} of {len(ratios)} cases, in {beyond} by more than the noise; the "
        f"fastest peer's time over ours is at least {ratio:.2f} ({worst.case.label})"
    )
    aim = "training step of one layer, `small` included: never slower than the fastest on JAX"
    return Goal(aim, text, not slower)


def torch(results: Results) -> Goal | None:
    """The training step against PyTorch, for which no goal is set."""
    mean = mean_ratio(results.chosen("training"), TORCH)
    if math.isnan(mean):
        return None
    return Goal("training step of one layer: PyTorch's speed (no goal)", f"{mean:.2f}", None)


def saved_memory(results: Results) -> list[Goal]:
    """Residuals of one layer, and temporaries of a model that stores many."""
    goals = []
    # Beside a small x, statistics and parameters are no trifle.
    held = [held[OURS] for case, held in results.residuals.items() if case.size != "small"]
    if held:
        most = max(held)
        aim = "bytes held for the backward pass of one layer, all sizes but `small`: 1.00 of x"
        goals.append(Goal(aim, f"at most {most:.2f}", round(most, 2) <= 1.0))
    for one in results.models:
        if SCANNED in one.name and one.dtype == "bfloat16":
            share = one.temporaries[OURS] / one.temporaries[FLAX]
            aim = "scanned transformer, bfloat16, training step: at most 65% of Flax's temporaries"
            goals.append(Goal(aim, f"{share:.0%} on this device", share <= 0.65))
    return goals


def overheads(results: Results) -> list[Goal]:
    """Importing, tracing, compiling, calling without jit."""
    goals = []
    if results.imports.seconds:
        seconds = results.imports.quartiles("jaxnorm")
        aim = "`import jaxnorm`: under 60 ms beyond `import jax`"
        goals.append(Goal(aim, seconds.in_milliseconds(), seconds.middle < 0.060))
    if results.deep:
        for what, part in (("tracing", "traced"), ("compiling", "compiled")):
            times = {one.name: getattr(one, part) for one in results.deep}
            ratios = {name: one.ratio(OURS, FLAX).middle for name, one in times.items()}
            mean, worst = geometric_mean(ratios.values()), max(ratios, key=ratios.__getitem__)
            text = (
                f"{mean:.2f} of it; most {ratios[worst]:.2f} ({worst}); "
                f"Flax again: up to {noise_of(times.values())[1]:.2f}"
            )
            aim = f"{what} models of 50 norms: at most the time with Flax's"
            goals.append(Goal(aim, text, ratios[worst] <= 1))
    if results.recompiles:
        most = max(number for (name, _), number in results.recompiles.items() if name == OURS)
        goals.append(Goal("no recompile between steps", str(most), most == 0))
    if results.eager:
        ratios = {key: times.ratio(OURS, FLAX).middle for key, times in results.eager.items()}
        mean, worst = geometric_mean(ratios.values()), max(ratios, key=lambda key: ratios[key])
        text = f"{mean:.2f} of its time; most {ratios[worst]:.2f} ({worst[0]}, {worst[1]})"
        aim = "calling the module without jit: not slower than Flax's"
        goals.append(Goal(aim, text, ratios[worst] <= 1))
    return goals


def elsewhere(platform: str) -> list[Goal]:
    """What other commands measure."""
    gpu = "see `benchmarks/gpu_report.py`"
    if platform != "gpu":
        gpu += "; nothing was run on a GPU by this command"
    return [
        Goal("TPU: bytes moved, cycles, temporaries", "see `benchmarks/tpu_report.py`", None),
        Goal("GPU: share of the copy bandwidth", gpu, None),
    ]


def goals_of(results: Results) -> list[Goal]:
    """All goals of which there is something to say."""
    maybe = [*speed(results), never_slower(results), torch(results)]
    maybe += [*saved_memory(results), *overheads(results), *elsewhere(results.platform)]
    return [goal for goal in maybe if goal is not None]
