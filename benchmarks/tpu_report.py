"""What one training step of each method costs on TPUs, without having one.

    python benchmarks/tpu_report.py

libtpu compiles for a TPU that is not there, always in the same way. The report reads four things
off the compiled programs, for single layers and for small models, for one chip and for many; the
global batch grows with the chips, so that each chip's part stays the same:

- HBM: bytes moved between the chip and its memory, over the bytes of the chip's part of x;
- cycles: the compiler's own estimate, that knows nothing of what chips wait for each other;
- temporaries: memory needed besides arguments and results, over the bytes of x;
- all-reduces, and the bytes that a chip puts into them.

A step is the forward pass, the backward pass for x and for the parameters from a given gradient of
the output, and the new running statistics. What is compiled stands in `tpu/candidates.py`, what is
read off the programs in `tpu/costs.py`, what was aimed at in `tpu/goals.py`.
"""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from rich.progress import track

from benchmarks.goals import Goal
from benchmarks.tpu.candidates import METHODS, MODELS, Candidate
from benchmarks.tpu.costs import (
    COPY_RATE,
    MEMORY_RATE,
    TOPOLOGIES,
    Cost,
    Parted,
    cost_of,
    mesh_of,
    prepare,
    temporaries_on_cpu,
)
from benchmarks.tpu.goals import SCANNED, compared_on_cpu, goals_of
from jaxnorm.diagnose import Collective

jax.config.update("jax_platforms", "cpu")  # libtpu compiles; no TPU is to be looked for

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    """What to report."""

    chips: tuple[int, ...] = tuple(TOPOLOGIES)
    """Numbers of chips, of 1, 4, 16 and 256."""

    methods: tuple[str, ...] = (*METHODS, *MODELS)
    """Names of layers and models; most models are compiled for one chip only."""

    out: Path | None = None
    """Where to write; without it benchmarks/results/ with the date."""


class Job(NamedTuple):
    """One program to compile."""

    chips: int
    method: str
    candidate: Candidate


def jobs_of(options: Options) -> list[Job]:
    """Everything to compile.

    Kernels are told apart on one chip: programs that the compiler divides between chips have none.
    """
    return [
        Job(chips, method, candidate)
        for chips in options.chips
        for method in options.methods
        if chips == 1 or method in METHODS
        for candidate in (METHODS | MODELS)[method]
        if chips == 1 or candidate.kernels == "automatic"
    ]


def cell(value: Parted, form: str = ".1f") -> str:
    """What always counts, and in brackets what branches add."""
    more = format(value.in_branches, form)
    some = more != format(0, form)
    return format(value.always, form) + (f" (+{more})" if some else "")


def sent_cells(sent: Sequence[Collective]) -> tuple[str, str]:
    """How many collectives of each kind, and the KiB that one chip puts into them."""

    def parted(value: Callable[[Collective], float]) -> Parted:
        return Parted(*(sum(value(c) for c in sent if c.conditional == some) for some in (0, 1)))

    kinds = sorted({one.kind for one in sent})
    counts = (f"{cell(parted(lambda one, k=k: one.kind == k), 'd')} {k}" for k in kinds)
    return ", ".join(counts) or "none", cell(parted(lambda one: one.bytes / 1024), ".1f")


HEADINGS = (
    "method",
    "norms of",
    "x on one chip",
    "HBM / x",
    "by XLA",
    "Mcycles",
    "of kernels",
    "temporaries / x",
    "collectives",
    "KiB sent",
)


def row(job: Job, cost: Cost) -> tuple[str, ...]:
    """One line of the table of costs."""
    fast, slow = (cost.kernel_bytes / rate for rate in (MEMORY_RATE, COPY_RATE))
    return (
        job.method,
        job.candidate.name,
        "x".join(map(str, job.candidate.shape)),
        cell(cost.hbm),
        f"{cost.hbm_by_xla:.1f}",
        cell(cost.cycles),
        f"{fast:.1f} to {slow:.1f}" if cost.kernel_bytes else "",
        f"{cost.temporaries:.1f}",
        *sent_cells(cost.sent),
    )


def table(headings: Sequence[str], rule: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], rule, *lines[1:], ""]


def goals_table(goals: Sequence[Goal]) -> list[str]:
    """What was aimed at, beside what was found."""
    if not goals:
        return []
    rows = [(goal.aim, goal.found, goal.verdict) for goal in goals]
    return ["## Goals\n", *table(("aim", "found", ""), "|---" * 3 + "|", rows)]


def versions() -> str:
    """What the numbers depend on."""
    names = ("jax", "jaxlib", "flax", "libtpu", "jaxnorm")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", "jaxnorm"], text=True)
    found[-1] += f" at {commit}{' with changes' if changed else ''}"
    return ", ".join([f"Python {platform.python_version()}", *found])


HEAD = """# One training step on TPU v5e, {date}

Compiled ahead of time for chips that are not there, not run. {versions}.

    python benchmarks/tpu_report.py{arguments}

A step of one layer; of four times a convolution, normalization and relu (ConvNet); or of two blocks
of a transformer without its attention, x + dense(relu(dense(norm(x)))) of width 1x and 4x, each
twice. Forward, backward for x and for the parameters from a given gradient of the output, and the
new running statistics. All in bfloat16, with parameters and statistics in float32. The batch is
spread over the chips and grows with them. All numbers are for one chip.

- norms of: jaxnorm as it chooses kernels by itself, `always` and `never` with
  `jaxnorm.use_kernels`. Programs that the compiler divides between chips have no kernels.
- HBM / x: bytes moved from and to the chip's memory, over the bytes of x: operands and results of
  each instruction that lie there. In brackets, what branches of conditionals add that run only for
  data they are made for; what is before the brackets always runs. Of an array of which a step of a
  scan needs a part, all is counted, so that XLA's count is the better one there.
- by XLA: its own count, which takes of each conditional the most expensive branch.
- Mcycles: its estimate, without kernels, collectives and waiting; loops are taken as one iteration.
- of kernels: Mcycles that come to it, of which XLA knows nothing: the bytes that kernels move at
  the rate of the memory, 819 GB/s at 1.5 GHz, and at the {copy:.0f} bytes a cycle that XLA expects
  of x * 2. Goals take the second.
- temporaries / x: memory besides arguments and results.
- KiB sent: operands of the collectives.
"""


def missing() -> str:
    """What to do without the compiler."""
    return (
        "tpu_report: found no libtpu, the compiler for TPUs, which needs no TPU. "
        "Install the one that belongs to this JAX: pip install 'jax[tpu]', or 'jaxnorm[tpu]'."
    )


def main(options: Options) -> None:
    """Compiles everything, prints each row as it is known, and writes the report."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit(missing())
    known = [*METHODS, *MODELS]
    unknown = [*({*options.chips} - {*TOPOLOGIES}), *({*options.methods} - {*known})]
    if unknown:
        sys.exit(f"tpu_report: {unknown} are none of {[*TOPOLOGIES]} and {known}.")
    prepare()
    jobs = jobs_of(options)
    meshes = {chips: mesh_of(chips) for chips in options.chips}
    tables: dict[int, list[tuple[str, ...]]] = {}
    on_one: dict[tuple[str, str], Cost] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        costs = pool.map(lambda job: cost_of(job.candidate, meshes[job.chips]), jobs)
        for job, cost in zip(jobs, track(costs, "compiling", total=len(jobs)), strict=True):
            tables.setdefault(job.chips, []).append(row(job, cost))
            print(f"{job.chips} chips:", *row(job, cost), sep=" | ", flush=True)
            if job.chips == 1:
                on_one[job.method, job.candidate.name] = cost
    on_cpu = {}
    if SCANNED in options.methods:
        on_cpu = {one.name: temporaries_on_cpu(one) for one in compared_on_cpu()}

    date = datetime.date.today().isoformat()
    arguments = " ".join(["", *sys.argv[1:]])
    lines = [HEAD.format(date=date, versions=versions(), arguments=arguments, copy=COPY_RATE)]
    lines += goals_table(goals_of(on_one, on_cpu))
    for chips, rows in tables.items():
        lines += [f"## {chips} chip{'s' * (chips > 1)}\n"]
        lines += table(HEADINGS, "|---" * 3 + "|--:" * 5 + "|---|--:|", rows)
    out = options.out or REPOSITORY / "benchmarks" / "results" / f"{date}-tpu.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print(f"written to {out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
