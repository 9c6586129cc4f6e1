"""One training step, compiled for chips that are not there, and what is read off the program."""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from benchmarks.tpu.candidates import Candidate
from jaxnorm.diagnose import Collective, collectives, hlo

TOPOLOGIES = {1: "v5e:2x2", 4: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}

MEMORY_RATE = 819 / 1.5
"""Bytes a cycle: 819 GB/s at 1.5 GHz, what the chip's memory could do."""

COPY_RATE = 222.0
"""Bytes a cycle at which the compiler expects x * 2 to run."""


class Parted(NamedTuple):
    """A sum over a program: of what always runs, and of what is in branches of conditionals."""

    always: float
    in_branches: float


class Cost(NamedTuple):
    """What is read off one program, for one chip; bytes over those of its part of x.

    Attributes:
        hbm: what instructions read from the chip's memory and write to it.
        hbm_by_xla: the compiler's own count.
        cycles: millions, by the compiler's estimate, which knows of kernels nothing.
        kernel_bytes: what kernels move, in millions of bytes.
        temporaries: memory besides arguments and results.
        sent: the collectives.
    """

    hbm: Parted
    hbm_by_xla: float
    cycles: Parted
    kernel_bytes: float
    temporaries: float
    sent: tuple[Collective, ...]

    def cycles_with_kernels(self, rate: float = COPY_RATE) -> float:
        """Millions of cycles of what always runs, with kernels that move `rate` bytes in each."""
        return self.cycles.always + self.kernel_bytes / rate


def prepare() -> None:
    """Keeps libtpu from asking which TPU the machine is, and from refusing to be shared."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


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

    with jaxnorm.use_kernels(candidate.kernels):
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


def kernel_bytes(instruction: hlo.Instruction) -> int:
    """The same of a kernel, and 0 of other instructions."""
    return hbm_bytes(instruction) if "tpu_custom_call" in instruction.attributes else 0


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
    return Cost(
        hbm=parted(hbm_bytes, size),
        hbm_by_xla=analysis["bytes accessed"] / size,
        cycles=parted(cycles, 1e6),
        kernel_bytes=parted(kernel_bytes, 1e6).always,
        temporaries=temporaries(program, candidate),
        sent=collectives(program),
    )


def temporaries(program: jax.stages.Compiled, candidate: Candidate) -> float:
    """Memory besides arguments and results, over the bytes of x."""
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes / (2 * math.prod(candidate.shape))


def temporaries_on_cpu(candidate: Candidate) -> float:
    """The same of the program for this machine's CPU."""
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("batch",), axis_types=(AxisType.Auto,))
    return temporaries(compiled_step(candidate, mesh), candidate)
