"""Which modules an NNX model consists of."""

from typing import Any

from flax import nnx


def modules_within(model: Any) -> list[type]:
    """The classes of all modules in `model`, itself among them."""
    return list(dict.fromkeys(type(module) for _, module in nnx.iter_modules(model)))
