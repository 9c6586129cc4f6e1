"""The instructions of a compiled program, read off its HLO text in the order in which they run.

A program is a set of computations that call each other: `call` and `fusion` run what they name
once, `conditional` runs one of its branches, `while` repeats its body. Walking from the entry along
these calls meets each instruction where it runs and knows whether it always does, and how often.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# f32[8,128]{1,0:T(8,128)S(1)}: type with its bits, dimensions, layout. S(1) is no main memory.
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*?)\)(.*)")
_CALLED = re.compile(
    r"\b(?:to_apply|calls|called_computations|branch_computations|true_computation|"
    r"false_computation|body|condition)=(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CONTROL_FLOW = ("call", "conditional", "while", "async-start")


class Array(NamedTuple):
    """One array: what it is, for example "f32[8,128]", its bytes, and whether in main memory."""

    kind: str
    bytes: int
    in_main_memory: bool


class Instruction(NamedTuple):
    """One instruction at one place of a program.

    Attributes:
        operation: its name, for example "fusion".
        results: the arrays it makes.
        operands: the arrays it is given.
        attributes: the text behind the operands.
        conditional: it is in a branch of a conditional.
        repeated: it is in a loop.
        fused: it is part of a fusion or of a reduction, and touches memory only through that.
    """

    operation: str
    results: tuple[Array, ...]
    operands: tuple[Array, ...]
    attributes: str
    conditional: bool = False
    repeated: bool = False
    fused: bool = False


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions that the program runs; those of a computation once for each call of it.

    Raises:
        ValueError: there is no computation to start from, so that this is not HLO text.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = None
    found: list[Instruction] = []
    results: dict[str, tuple[Array, ...]] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            found = computations[header[2]] = []
            results = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, operation, operands, attributes = match.groups()
            results[name] = _arrays(shape)
            given = sum((results[operand] for operand in _NAME.findall(operands)), ())
            found.append(Instruction(operation, results[name], given, attributes))
    if entry is None:
        raise ValueError(
            f"hlo.instructions: the text of {len(text)} characters has no line that starts with "
            f"ENTRY, so it is not that of a compiled program. "
            f"Use jax.jit(f).lower(x).compile().as_text()."
        )
    return _walk(computations, computations[entry], {})


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            kind=f"{array[1]}[{array[3]}]",
            # A truth value has no bits in its name and takes a byte.
            bytes=math.prod(map(int, re.findall(r"\d+", array[3]))) * int(array[2] or 8) // 8,
            in_main_memory="S(" not in (array[4] or ""),
        )
        for array in _ARRAY.finditer(shape)
    )


def _walk(
    computations: dict[str, list[Instruction]], here: list[Instruction], where: dict[str, bool]
) -> Iterator[Instruction]:
    """The instructions of one computation, each followed by those that it calls."""
    for instruction in here:
        instruction = instruction._replace(**where)
        yield instruction
        if instruction.operation in ("async-update", "async-done"):  # begun by an async-start
            continue
        inside = {
            "conditional": instruction.conditional or instruction.operation == "conditional",
            "repeated": instruction.repeated or instruction.operation == "while",
            "fused": instruction.fused or instruction.operation not in _CONTROL_FLOW,
        }
        for called in _CALLED.findall(instruction.attributes):
            for name in _NAME.findall(called):
                yield from _walk(computations, computations[name], inside)
