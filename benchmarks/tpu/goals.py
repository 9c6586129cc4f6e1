"""What was aimed at on TPUs, beside what the compiled programs say."""

from collections.abc import Iterator, Mapping

from benchmarks.goals import Goal
from benchmarks.tpu import candidates as names
from benchmarks.tpu.candidates import METHODS, MODELS, Candidate
from benchmarks.tpu.costs import MEMORY_RATE, Cost

Costs = Mapping[tuple[str, str], Cost]
"""For one chip, by method and candidate."""

SCANNED = "transformer, RMSNorm, nn.scan"
CONVNET = "ConvNet, BatchNorm"
ROUNDING = 0.05
"""Bytes over x are compared to one digit: parameters and statistics are not counted."""


def of_batch_norm(costs: Costs) -> Iterator[Goal]:
    """Goal 2, first half."""
    alone = costs.get(("BatchNorm", names.OURS))
    if alone:
        met = alone.hbm.always <= 7 + ROUNDING
        found = f"{alone.hbm.always:.1f}, and {alone.hbm.in_branches:.1f} more in branches"
        yield Goal("BatchNorm alone: 7.0 x moved", found, met)
    ours, flax = (costs.get((CONVNET, name)) for name in (names.OURS, names.FLAX_FAST))
    if ours and flax:
        yield Goal(
            "ConvNet with BatchNorm: no more bytes than Flax's unstable variance",
            f"{ours.hbm.always:.1f} x against {flax.hbm.always:.1f} x",
            ours.hbm.always <= flax.hbm.always + ROUNDING,
        )
        yield Goal(
            "the same: no more cycles",
            f"{ours.cycles.always:.1f} million against {flax.cycles.always:.1f} million",
            ours.cycles.always <= flax.cycles.always + ROUNDING,
        )


def of_kernels(costs: Costs) -> Iterator[Goal]:
    """Goal 2, second half."""
    for method in ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"):
        ours, always = (costs.get((method, name)) for name in (names.OURS, names.ALWAYS))
        if ours and always:
            found = f"{always.hbm.always:.1f} with `always`, {ours.hbm.always:.1f} without"
            met = always.hbm.always <= 5 + ROUNDING
            yield Goal(f"{method} alone: 5.0 x moved by a kernel", found, met)


def of_choice(costs: Costs) -> Iterator[Goal]:
    """Goal 2: kernels are chosen by whole models."""
    for model in MODELS:
        uses = [costs.get((model, name)) for name in names.USES]
        if None in uses:
            continue
        chosen, always, never = (one.cycles_with_kernels() for one in uses if one)
        found = f"{chosen:.1f} million; `always` {always:.1f}, `never` {never:.1f}"
        met = chosen <= min(always, never) + ROUNDING
        yield Goal(f"{model}: `automatic` takes no more cycles than the others", found, met)


def of_saved_memory(costs: Costs, on_cpu: Mapping[str, float]) -> Iterator[Goal]:
    """Goal 3."""
    ours, flax = (costs.get((SCANNED, name)) for name in (names.OURS, names.FLAX))

    def share(what: str, ours: float, flax: float, most: float) -> Goal:
        aim = f"{SCANNED}: at most {most:.0%} of Flax's {what}"
        return Goal(aim, f"{ours / flax:.1%} ({ours:.1f} of {flax:.1f})", ours <= most * flax)

    if ours and flax:
        yield share("temporaries, in x", ours.temporaries, flax.temporaries, 0.65)
        yield share("bytes moved by XLA's count, in x", ours.hbm_by_xla, flax.hbm_by_xla, 0.75)
        slow, fast = ours.cycles_with_kernels(), ours.cycles_with_kernels(MEMORY_RATE)
        yield share("Mcycles, kernels as slow as copies", slow, flax.cycles_with_kernels(), 0.90)
        yield share("Mcycles, kernels at full rate", fast, flax.cycles_with_kernels(), 0.90)
    if on_cpu:
        least, ours, flax = (on_cpu[name] for name in (names.NO_NORM, names.OURS, names.FLAX))
        goal = share("temporaries on CPU, in x", ours, flax, 0.65)
        more = (
            f"without norms {least:.1f}, so {(ours - least) / (flax - least):.0%} of what they add"
        )
        yield goal._replace(found=f"{goal.found}; {more}")


def compared_on_cpu() -> list[Candidate]:
    """The model whose memory on CPU is a goal: without norms, with this library's, with Flax's."""
    wanted = names.NO_NORM, names.OURS, names.FLAX
    return [one for one in MODELS[SCANNED] if one.name in wanted]


def goals_of(costs: Costs, on_cpu: Mapping[str, float]) -> list[Goal]:
    """All goals of which this run tells something."""
    unknown = [key for key in costs if key[0] not in (METHODS | MODELS)]
    assert not unknown, unknown
    return [
        *of_batch_norm(costs),
        *of_kernels(costs),
        *of_choice(costs),
        *of_saved_memory(costs, on_cpu),
    ]
