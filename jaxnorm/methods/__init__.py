"""The methods, one file each, and the registry that lists them.

A method is its file (paper, formula, when to use, pure function, spec) and one row here. The tests
go through the rows, and fail with what is missing if a method lacks a Linen class, an NNX class, a
public function, an oracle, a test case, or a place in the README.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxnorm.methods.batch_norm import BatchNorm, batch_norm


class Method(NamedTuple):
    """One row of the registry.

    Attributes:
        name: of the Linen and NNX classes.
        spec: the class of options that both inherit.
        function: the pure function.
        title: as in a sentence.
        paper: author, year, arXiv number.
    """

    name: str
    spec: type
    function: Callable[..., Any]
    title: str
    paper: str


METHODS = (
    Method(
        name="BatchNorm",
        spec=BatchNorm,
        function=batch_norm,
        title="batch normalization",
        paper="Ioffe & Szegedy 2015, arXiv:1502.03167",
    ),
)
