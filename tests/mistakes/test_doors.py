"""Mistakes that can be made at several doors: the function, the Linen layer, the NNX layer."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors, nnx

import jaxnorm
from mistakes import refused, while_tracing
from mistakes.layers import Net

SHAPE = (4, 2, 3)


class Call(NamedTuple):
    """How a layer is built and called; each mistake differs in one or two of these."""

    shape: tuple[int, ...] = SHAPE
    dtype: Any = jnp.float32
    example: Any = jnp.float32  # Dtype of the input by which a Linen module is initialized.
    mask: tuple[tuple[int, ...], Any] | None = None  # Shape and dtype.
    options: Mapping[str, Any] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({"use_running_average": False})
    stored: Any = None  # Dtype to which stored statistics are cast.
    mutable: tuple[str, ...] = ("batch_stats",)  # What Linen may change.

    def input(self):
        return jnp.zeros(self.shape, self.dtype)

    def given_mask(self):
        return None if self.mask is None else jnp.ones(*self.mask)

    def recast(self, stats):
        return jax.tree.map(lambda leaf: leaf.astype(self.stored or leaf.dtype), stats)


def call_function(given: Call):
    parameters = jnp.ones(3), jnp.zeros(3)
    jaxnorm.batch_norm(given.input(), *parameters, where=given.given_mask(), **given.options)


def call_linen(given: Call):
    model = Net(jaxnorm.linen.BatchNorm(**given.options))
    variables = dict(model.init(jax.random.key(0), jnp.zeros(SHAPE, given.example), **given.call))
    variables["batch_stats"] = given.recast(variables["batch_stats"])
    mask, mutable = given.given_mask(), list(given.mutable)
    model.apply(variables, given.input(), mask=mask, mutable=mutable, **given.call)


def call_nnx(given: Call):
    layer = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **given.options)
    nnx.update(layer, given.recast(nnx.state(layer, nnx.BatchStat)))
    layer(given.input(), mask=given.given_mask(), **given.call)


class Door(NamedTuple):
    """A way into the library, and how its messages begin."""

    who: str
    call: Callable[[Call], None]


FUNCTION = Door("batch_norm", call_function)
LINEN = Door("BatchNorm 'norm'", call_linen)
NNX = Door("BatchNorm(num_features=3)", call_nnx)
LAYERS = LINEN, NNX
DOORS = FUNCTION, LINEN, NNX


def at(doors, error, says, mapped=False, **given):
    """The same mistake at each of the doors; mapped over 4 devices named "batch" if asked."""
    for door in doors:
        call = partial(door.call, Call(**given))
        with refused(error, f"{door.who}: … {says}"):
            if mapped:
                jax.vmap(lambda _, call=call: call(), axis_name="batch")(jnp.arange(4))
            else:
                call()


@while_tracing
def test_correct_calls_raise_nothing():
    """The doors themselves make no mistake."""
    for door in DOORS:
        door.call(Call())
        door.call(Call(mask=((4, 1, 1), bool)))


@while_tracing
def test_features_masks_and_axes():
    says = "shape (3,) … (4, 2, 5) has 5 features along axis 2 … scale of shape (5,)"
    at([FUNCTION], ValueError, says, shape=(4, 2, 5))
    says = "'mean' in 'batch_stats' … shape (3,) … shape (5,) … axis="
    at([LINEN], ValueError, says, shape=(4, 2, 5))
    says = "(4, 2, 5) has 5 features along axis 2 … num_features=5 … axis="
    at([NNX], ValueError, says, shape=(4, 2, 5))

    # As long as the features, but without their axis.
    says = "mask of shape (3, 3) … (3, 3, 3) in 2 ways … mask[..., None] or mask[None, ."
    at(DOORS, ValueError, says, shape=(3, 3, 3), mask=((3, 3), bool))
    says = "mask of shape (4,) … mask[..., None, None]"
    at(DOORS, ValueError, says, mask=((4,), bool))
    says = "mask of shape (4, 1, 2) … shape (4, 2, 3) … as many axes, each of the input's size"
    at(DOORS, ValueError, says, mask=((4, 1, 2), bool))
    at(DOORS, TypeError, "mask is complex64 … mask.real", mask=((4, 2, 1), complex))

    at(DOORS, ValueError, "axis=3 … 3 axes … from -3 to 2", options={"axis": 3})
    at(DOORS, ValueError, "axis=-1 … 0 axes … x[None]", shape=())
    says = "axis=(2, -1) … they are (2, 2) … axis=(2,)"
    at(DOORS, ValueError, says, options={"axis": (2, -1)})
    at(DOORS, ValueError, "axis=(1, 1) … axis=(1,)", options={"axis": (1, 1)})
    at(DOORS, TypeError, "integer … 'last' … axis=", options={"axis": "last"})


@while_tracing
def test_numbers_and_dtypes():
    at(DOORS, ValueError, "epsilon=-1e-05 … epsilon=1e-5", options={"epsilon": -1e-5})
    at(DOORS, ValueError, "epsilon=nan … epsilon=1e-5", options={"epsilon": float("nan")})
    at(DOORS, TypeError, "dtype=int32 … jnp.float32", options={"dtype": "int32"})
    complex64 = {"dtype": jnp.complex64, "example": jnp.complex64}
    says = "dtype=float32 … complex64 … dtype=jnp.complex64"
    at([FUNCTION, LINEN], TypeError, says, options={"dtype": jnp.float32}, **complex64)
    says = "input is complex64 … stored as float32 … complex example … dtype=jnp.complex64"
    at(LAYERS, TypeError, says, dtype=jnp.complex64)
    says = "running mean is stored as int32, … no statistics … mean.astype(jnp.float32)"
    at(LAYERS, TypeError, says, stored=jnp.int32)


@while_tracing
def test_mapped_axes():
    batch = {"axis_name": "batch"}
    says = "axis_name='batch' … jax.vmap(step, axis_name='batch') … axis_name=None"
    at(DOORS, NameError, says, options=batch)
    says = "axis_name='batch' is not bound … axis_name=None … unbound_axis='local'"
    at(LAYERS, NameError, says, options=batch)
    two_axes = {"axis_name": ("batch", "model")}
    at(DOORS, NameError, "axis_name='model'", options=two_axes, mapped=True)
    says = "unbound_axis='ignore' is unknown … unbound_axis='error' or unbound_axis='local'"
    at(LAYERS, ValueError, says, options={"unbound_axis": "ignore"})

    groups = {"axis_index_groups": [[0, 1], [2, 3]]}
    says = "axis_index_groups=[[0, 1], [2, 3]] … axis_name='batch'"
    at(DOORS, ValueError, says, options=groups)
    says = "axis_index_groups=[[0, 1], [2]] … from 0 to 3 … [[0, 1], [2, 3]]"
    at(DOORS, ValueError, says, options=batch | {"axis_index_groups": [[0, 1], [2]]}, mapped=True)
    overlapping = {"axis_index_groups": [[0, 1, 2], [2, 3]]}
    says = "[[0, 1, 2], [2, 3]] … exactly once"
    at(DOORS, ValueError, says, options=batch | overlapping, mapped=True)
    says = "axis_index_groups count … ('batch', 'model') … only ('batch',) are bound … groups=None"
    options = two_axes | groups | {"unbound_axis": "local"}
    at(LAYERS, ValueError, says, options=options, mapped=True)


@while_tracing
def test_running_statistics():
    says = "momentum=None … debias=True … momentum=0.99"
    at(LAYERS, ValueError, says, options={"momentum": None, "debias": True})
    says = "momentum=1 … debias=True … momentum=None"
    at(LAYERS, ValueError, says, options={"momentum": 1, "debias": True})
    says = "momentum=1.5 … from 0 to 1 … momentum=0.99"
    at(LAYERS, ValueError, says, options={"momentum": 1.5})
    at(LAYERS, ValueError, "momentum=-0.1 … from 0 to 1", options={"momentum": -0.1})
    says = "running_var='sample' … running_var='biased' or running_var='unbiased'"
    at(LAYERS, ValueError, says, options={"running_var": "sample"})
    says = "update_every=0 batches … update_every=1 … update_stats=False"
    at(LAYERS, ValueError, says, options={"update_every": 0})
    for value in (True, 1.5, "4"):
        says = f"update_every={value!r} must be an integer … update_every=1 … MultiSteps"
        at(LAYERS, TypeError, says, options={"update_every": value})

    # Training or inference.
    says = "use_running_average is missing … use_running_average=False to train"
    at(LAYERS, ValueError, says, options={"use_running_average": None}, call={})
    says = "update_stats=True … use_running_average=True … Drop one"
    at(LAYERS, ValueError, says, call={"use_running_average": True, "update_stats": True})
    says = "average=True was given to the constructor … average=False to the call … once"
    at([LINEN], ValueError, says, options={"use_running_average": True})
    says = "'batch_stats' … y, updated = … mutable=['batch_stats']) … update_stats=False"
    at([LINEN], jaxnorm.linen.StatsNotMutableError, says, mutable=())


def test_flax_code_can_catch_immutable_statistics():
    assert issubclass(jaxnorm.linen.StatsNotMutableError, errors.ModifyScopeVariableError)
