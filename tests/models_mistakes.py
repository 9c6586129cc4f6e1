"""What is given to a tool as a model, and is none. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import KEY, Row

from jaxnorm.tools.adapter.models import model_of


class Coder(nn.Module):
    """A model with another method than its call."""

    @nn.compact
    def __call__(self, x):
        return self.encode(x)

    @nn.compact
    def encode(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


def encoded_by_an_exchanged_model():
    model = model_of(Coder().bind(Coder().init(KEY, X)), "replace")
    rebuilt = model.rebuilt(model.arrays, {("norm",): nn.LayerNorm()})
    return rebuilt.encode(X)


def endless():
    """Variables that contain themselves."""
    params = {"scale": jnp.ones(3)}
    params["again"] = params
    return {"params": params}


X = jnp.ones((4, 3))
MODULE = nn.BatchNorm(use_running_average=True)

ROWS = [
    *(
        Row(
            f"a model that is {kind}",
            lambda make=make: model_of(make(), "fold"),
            TypeError,
            rf"^fold: found {found}, but needs a model with its variables.*nnx\.Module.*"
            r"fold\(model\.bind\(variables\), \.\.\.\)",
        )
        for kind, found, make in (
            ("variables alone", "dict", lambda: MODULE.init(KEY, X)),
            ("nothing", "NoneType", lambda: None),
            ("a function", "function", lambda: lambda x: x),
            ("a state", "State", lambda: nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))),
            ("a class", "ABCMeta|ModuleMeta|PytreeMeta|type", lambda: nnx.BatchNorm),
        )
    ),
    Row(
        "a Linen module without variables",
        lambda: model_of(MODULE, "fold"),
        ValueError,
        r"^fold: the Linen module BatchNorm has no variables here.*"
        r"fold\(batchnorm\.bind\(variables\), \.\.\.\)",
    ),
    Row(
        "variables that contain themselves",
        lambda: model_of(MODULE.bind(endless()), "fold"),
        ValueError,
        r"^fold: a dictionary among the variables of BatchNorm contains itself.*"
        r"fold\(model\.bind\(\{'params': params\}\), \.\.\.\)",
    ),
    Row(
        "another method of a model whose layers were exchanged",
        encoded_by_an_exchanged_model,
        AttributeError,
        r"^encode: layers of this Coder were exchanged.*"
        r"module\.apply\(variables, 'encode', \.\.\., method='call'\)",
    ),
]
