"""Which modules a Linen model calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn


def is_module(model: object) -> bool:
    """Whether this is a Linen model."""
    return isinstance(model, nn.Module)


def modules_called(
    model: Any, inputs: Sequence[Any], call: Mapping[str, Any]
) -> list[type[nn.Module]]:
    """The classes of all modules that `model` calls when it is initialized with `inputs`."""
    found: dict[type[nn.Module], None] = {}

    def note(next_function, args, kwargs, context):
        found[type(context.module)] = None
        return next_function(*args, **kwargs)

    def init(*arrays):
        keys = {name: jax.random.key(0) for name in ("params", "dropout")}
        return model.init(keys, *arrays, **call)

    with nn.intercept_methods(note):
        jax.eval_shape(init, *inputs)
    return list(found)
