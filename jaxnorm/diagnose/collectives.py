"""What a compiled program sends between devices.

Use it to see what a training step costs in traffic, or to hold a step to its promise in a test: the
compiler merges collectives, moves them and drops them, so that the source does not tell. It does
not say how long they take, which depends on the links between the devices.
"""

import math
import re
from typing import NamedTuple

import jax

from jaxnorm.diagnose import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
        kind: its operation, for example "all-reduce".
        shapes: type and dimensions of each operand on one device, for example
            `("f32[64]", "f32[64]")`: several operands travel together.
        bytes: the size of the operands on one device.
        conditional: it is in a branch of a `lax.cond` or `lax.switch`, and runs only when this
            branch does.
        repeated: it is in a loop such as `lax.scan`, and runs once per iteration.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    conditional: bool = False
    repeated: bool = False


def collectives(program: jax.stages.Compiled | str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order in which they are scheduled.

    Several that the compiler merged are one, and so are start and end of one that runs while the
    program computes. Those that stay within one device are left out.

    Args:
        program: what `jax.jit(f).lower(...).compile()` returns, or its HLO text.

    Returns:
        One `Collective` for each place where the program communicates.

    Raises:
        TypeError: `program` is neither.
        ValueError: the text is not that of a compiled program.

    Numerics: shapes and types are those in which the compiled program sends, which need not be
        those of the source: a sum of bfloat16 may travel as float32.

    Example:
        >>> from jaxnorm.diagnose import collectives
        >>> program = '''
        ... %add (a: f32[], b: f32[]) -> f32[] {
        ...   %a = f32[] parameter(0)
        ...   %b = f32[] parameter(1)
        ...   ROOT %c = f32[] add(%a, %b)
        ... }
        ... ENTRY %main (x: f32[64]) -> f32[64] {
        ...   %x = f32[64] parameter(0)
        ...   ROOT %y = f32[64] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
        ... }'''
        >>> [(one.kind, one.shapes, one.bytes) for one in collectives(program)]
        [('all-reduce', ('f32[64]',), 256)]

    Source: the operations of HLO, https://openxla.org/xla/operation_semantics.

    Differs: from a search of the text for "all-reduce(": that misses pairs of start and end, and
        does not tell what runs always from what runs sometimes or repeatedly. Neither sees what a
        kernel sends by itself (a custom call), nor `send` and `recv`.
    """
    if isinstance(program, jax.stages.Compiled):
        program = program.as_text() or ""
    if not isinstance(program, str):
        raise TypeError(
            f"collectives: found {type(program).__name__}, which is no compiled program. "
            f"Compile it first: jax.jit(f).lower(x).compile()."
        )
    found = []
    chains = set()
    for instruction in hlo.instructions(program):
        kind = instruction.operation.removesuffix("-start")
        if kind not in KINDS or _stays_on_one_device(instruction.attributes):
            continue
        # A TPU repeats a collective in each fusion that runs meanwhile, as the links of one chain.
        if chain := re.search(r'chain_id="(\w+)"', instruction.attributes):
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        shapes = tuple(array.kind for array in instruction.operands)
        size = sum(array.bytes for array in instruction.operands)
        found.append(Collective(kind, shapes, size, instruction.conditional, instruction.repeated))
    return tuple(found)


def _stays_on_one_device(attributes: str) -> bool:
    """Whether each device sends to itself alone, in any of the ways in which HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes):
        return all(source == to for source, to in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        # Axes of a mesh by name, mesh['x'=4,'y'=2] {'y'}, or a part of one, {'x':(1)2}.
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts) == 1
    # Lists of members, or numbers of groups and of members: [4,2]<=[8].
    return bool(re.search(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\]<=)", attributes))
