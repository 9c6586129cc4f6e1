"""What one training step of each method costs on TPUs, without having one.

    python benchmarks/tpu_report.py

libtpu compiles for a TPU that is not there, always in the same way. The report reads four things
off the compiled programs, for one layer and for a small convolutional network, for one chip and for
many; the global batch grows with the chips, so that each chip's part stays the same:

- HBM: bytes moved between the chip and its memory, over the bytes of the chip's part of x;
- cycles: the compiler's own estimate, that knows nothing of what chips wait for each other;
- temporaries: memory needed besides arguments and results, over the bytes of x;
- all-reduces, and the bytes that a chip puts into them.

A step is the layer's forward pass, its backward pass for x and for the parameters from a given
gradient of the output, and the new running statistics.
"""

import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

from jaxnorm import linen as jnn
from jaxnorm.diagnose import Collective, collectives, hlo

jax.config.update("jax_platforms", "cpu")  # libtpu compiles; no TPU is to be looked for

REPOSITORY = Path(__file__).parent.parent
TOPOLOGIES = {1: "v5e:2x2", 4: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}
# What one chip has of x: well over the 128 MiB that it could hold next to its arithmetic units.
IMAGES, TOKENS, SMALL_IMAGES = (256, 64, 64, 256), (64, 2048, 2048), (256, 56, 56, 128)
TRAINING = dict(use_running_average=False)
FAST, TWO_PASSES = dict(use_fast_variance=True), dict(use_fast_variance=False)


class ConvNet(nn.Module):
    """Four times a convolution, a normalization and a relu."""

    norm: Callable[[], nn.Module] | None

    @nn.compact
    def __call__(self, x):
        """The features after the last relu."""
        for _ in range(4):
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(x if self.norm is None else self.norm()(x))
        return x


class Candidate(NamedTuple):
    """One thing to measure: whose it is, how it is made, and the shape of one chip's input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def candidates(shape, ours, flax=None, two_passes=True, **options) -> list[Candidate]:
    """This library's layer beside Flax's with its two formulas for the variance."""
    options = dict(options, dtype=jnp.bfloat16)
    found = [Candidate("jaxnorm", partial(ours, **options), shape)]
    if flax is not None and two_passes:
        found += [
            Candidate("Flax, fast variance", partial(flax, **options, **FAST), shape),
            Candidate("Flax, two passes", partial(flax, **options, **TWO_PASSES), shape),
        ]
    elif flax is not None:
        found += [Candidate("Flax", partial(flax, **options), shape)]
    return found


METHODS = {
    "BatchNorm": candidates(IMAGES, jnn.BatchNorm, nn.BatchNorm, **TRAINING),
    "LayerNorm": candidates(TOKENS, jnn.LayerNorm, nn.LayerNorm),
    "RMSNorm": candidates(TOKENS, jnn.RMSNorm, nn.RMSNorm, two_passes=False),
    "GroupNorm": candidates(IMAGES, jnn.GroupNorm, nn.GroupNorm, num_groups=32),
    "InstanceNorm": candidates(IMAGES, jnn.InstanceNorm, nn.InstanceNorm),
    "BatchRenorm": candidates(IMAGES, jnn.BatchRenorm, **TRAINING),
    "SwitchableNorm": candidates(IMAGES, jnn.SwitchableNorm, **TRAINING),
    "IBNa": candidates(IMAGES, jnn.IBNa, **TRAINING),
    "AdaBN": candidates(IMAGES, jnn.AdaBN, domains=("photos", "sketches"), **TRAINING),
    "IterNorm": candidates(IMAGES, jnn.IterNorm, **TRAINING),
    "DecorrelatedBatchNorm": candidates(IMAGES, jnn.DecorrelatedBatchNorm, **TRAINING),
    "ConvNet": [
        Candidate("no normalization", partial(ConvNet, None), SMALL_IMAGES),
        *(
            Candidate(one.name, partial(ConvNet, one.make), SMALL_IMAGES)
            for one in candidates(SMALL_IMAGES, jnn.BatchNorm, nn.BatchNorm, **TRAINING)
        ),
    ],
}


@dataclass(frozen=True)
class Options:
    """What to report."""

    chips: tuple[int, ...] = tuple(TOPOLOGIES)
    """Numbers of chips, of 1, 4, 16 and 256."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Names of layers, and ConvNet for four times a convolution, batch norm and relu."""

    out: Path | None = None
    """Where to write; without it benchmarks/results/ with the date."""


class Parted(NamedTuple):
    """A sum over a program: of what always runs, and of what is in branches of conditionals."""

    always: float
    in_branches: float


class Cost(NamedTuple):
    """What is read off one program, for one chip."""

    hbm: Parted
    hbm_by_xla: float
    cycles: Parted
    temporaries: float
    sent: tuple[Collective, ...]


def mesh_of(chips: int) -> Mesh:
    """Chips along one axis, over which the batch is spread."""
    topology = topologies.get_topology_desc(TOPOLOGIES[chips], platform="tpu")
    return Mesh(np.array(topology.devices[:chips]), ("batch",), axis_types=(AxisType.Auto,))


def compiled_step(candidate: Candidate, mesh: Mesh) -> jax.stages.Compiled:
    """One training step for arrays whose first axis is spread over the chips."""
    module = candidate.make()

    def array(like, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    examples, *rest = candidate.shape
    x = jax.ShapeDtypeStruct((examples * mesh.size, *rest), jnp.bfloat16)
    x = array(x, P("batch"))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    state = jax.tree.map(lambda like: array(like, P()), variables)
    params = state.pop("params")

    def step(params, state, x, dy):
        def forward(params, x):
            return module.apply({"params": params, **state}, x, mutable=list(state))

        y, backward, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, updated, backward(dy)

    return jax.jit(step).lower(params, state, x, x).compile()


# These move nothing by themselves: they name memory, or stand for the instructions inside.
MOVES_NOTHING = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|conditional|while|call|.*-done)$"
)


def hbm_bytes(instruction: hlo.Instruction) -> int:
    """What an instruction reads from the chip's memory and writes to it."""
    if instruction.fused or MOVES_NOTHING.match(instruction.operation):
        return 0
    results = instruction.results
    if instruction.operation.endswith("-start"):  # the result, then the operand and flags
        results = results[:1]
    elif instruction.operation in ("slice", "dynamic-slice", "gather"):
        return 2 * sum(array.bytes for array in results if array.in_main_memory)
    arrays = (*instruction.operands, *results)
    return sum(array.bytes for array in arrays if array.in_main_memory)


def cycles(instruction: hlo.Instruction) -> int:
    """The compiler's estimate for an instruction; 0 where it makes none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else 0


def cost_of(candidate: Candidate, mesh: Mesh) -> Cost:
    """Compiles one step and reads off what it costs on each chip."""
    program = compiled_step(candidate, mesh)
    everything = list(hlo.instructions(program.as_text() or ""))
    size = 2 * math.prod(candidate.shape)  # bytes of bfloat16

    def parted(count: Callable[[hlo.Instruction], int], unit: float) -> Parted:
        sums = [
            sum(count(one) for one in everything if one.conditional == in_branches) / unit
            for in_branches in (False, True)
        ]
        return Parted(*sums)

    analysis: Any = program.cost_analysis()
    memory: Any = program.memory_analysis()
    return Cost(
        hbm=parted(hbm_bytes, size),
        hbm_by_xla=analysis["bytes accessed"] / size,
        cycles=parted(cycles, 1e6),
        temporaries=memory.temp_size_in_bytes / size,
        sent=collectives(program),
    )


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
    "layer of",
    "x on one chip",
    "HBM / x",
    "by XLA",
    "Mcycles",
    "temporaries / x",
    "collectives",
    "KiB sent",
)


def row(method: str, candidate: Candidate, cost: Cost) -> str:
    """One line of a table."""
    cells = (
        method,
        candidate.name,
        "x".join(map(str, candidate.shape)),
        cell(cost.hbm),
        f"{cost.hbm_by_xla:.1f}",
        cell(cost.cycles),
        f"{cost.temporaries:.1f}",
        *sent_cells(cost.sent),
    )
    return f"| {' | '.join(cells)} |"


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

A step of one layer, or of four times a convolution, normalization and relu (ConvNet): forward,
backward for x and for the parameters from a given gradient of the output, and the new running
statistics. All in bfloat16, with parameters and statistics in float32. The batch is spread over the
chips and grows with them. All numbers are for one chip.

- HBM / x: bytes moved from and to the chip's memory, over the bytes of x: operands and results of
  each instruction that lie there. In brackets, what branches of conditionals add that run only for
  data they are made for; what is before the brackets always runs.
- by XLA: its own count, which takes of each conditional the most expensive branch.
- Mcycles: its estimate, without collectives and waiting; loops are taken as one iteration.
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
    """Compiles everything, then writes and prints the report."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit(missing())
    unknown = [*({*options.chips} - {*TOPOLOGIES}), *({*options.methods} - {*METHODS})]
    if unknown:
        sys.exit(f"tpu_report: {unknown} are none of {[*TOPOLOGIES]} and {[*METHODS]}.")
    # libtpu would ask the machine which TPU it is, and refuse to share it with another process.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jobs = [
        (chips, method, candidate)
        for chips in options.chips
        for method in options.methods
        for candidate in METHODS[method]
    ]
    tables: dict[int, list[str]] = {}
    meshes = {chips: mesh_of(chips) for chips in options.chips}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        costs = pool.map(lambda job: cost_of(job[2], meshes[job[0]]), jobs)
        for (chips, method, candidate), cost in zip(
            jobs, track(costs, "compiling", total=len(jobs)), strict=True
        ):
            tables.setdefault(chips, []).append(row(method, candidate, cost))

    date = datetime.date.today().isoformat()
    arguments = " ".join(["", *sys.argv[1:]])
    lines = [HEAD.format(date=date, versions=versions(), arguments=arguments)]
    for chips, rows in tables.items():
        lines += [f"## {chips} chip{'s' * (chips > 1)}\n"]
        lines += [f"| {' | '.join(HEADINGS)} |", "|---" * 3 + "|--:" * 4 + "|---|--:|", *rows, ""]
    out = options.out or REPOSITORY / "benchmarks" / "results" / f"{date}-tpu.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print(*lines, f"\nwritten to {out}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
