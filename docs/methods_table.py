"""Writes `docs/methods.md`, the table of methods and what they can do, from the registry.

python docs/methods_table.py
"""

from pathlib import Path

import jaxnorm
from jaxnorm.methods import METHODS, Method

TARGET = Path(__file__).with_name("methods.md")

HEADER = """\
# Methods and what they can do

Written by `python docs/methods_table.py` from the registry in `jaxnorm/methods/__init__.py`.

"""

COLUMNS = {
    "method": lambda m: m.title,
    "pure function": lambda m: f"`{m.function.__name__}`",
    "Linen and NNX": lambda m: f"`{m.name}`",
    "statistics": lambda m: m.statistics,
    "taken over": lambda m: m.pooled_over,
    "state": lambda m: m.state or "none",
    "mask": lambda m: m.mask or "none",
    "devices": lambda m: "pools over mapped axes" if m.devices else "nothing to pool",
    "derivatives": lambda m: m.derivatives,
    "paper": lambda m: ", ".join(f"[{p.short}](https://arxiv.org/abs/{p.arxiv})" for p in m.papers),
}

FOOTER = """
*State* are the variables beside the parameters; in brackets those that an option adds. *Mask*: what
a mask may tell apart. *Derivatives* of the result, by input and parameters; tested to second order.

Layer, RMS, group and instance norm run as kernels where these serve: [kernels.md](kernels.md).
"""


def row(method: Method) -> str:
    """One line of the table."""
    return "| " + " | ".join(of(method) for of in COLUMNS.values()) + " |"


def table() -> str:
    """The whole page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(row, METHODS)]
    return HEADER + "\n".join(lines) + "\n" + FOOTER


if __name__ == "__main__":
    TARGET.write_text(table())
    print(f"jaxnorm {jaxnorm.__version__}: wrote {TARGET} with {len(METHODS)} methods")
