"""Mistakes that can be made at several doors: the function, the Linen layer, the NNX layer.

Part of the table of `test_errors.py`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxnorm


class Row(NamedTuple):
    """One mistake.

    Attributes:
        name: shown by pytest.
        trigger: makes it.
        error: what is raised.
        says: pattern of the message: who, then what was found, then the fix.
        with_values: whether values are there; not, but for tools that work on those of a model.
    """

    name: str
    trigger: Callable[[], Any]
    error: type[Exception]
    says: str
    with_values: bool = False


SHAPE = (4, 2, 3)
KEY = jax.random.key(0)


class Net(nn.Module):
    """A layer inside a model, so that it has a path."""

    norm: nn.Module

    def __call__(self, x, **call):
        return self.norm(x, **call)


class Call(NamedTuple):
    """How a layer is built and called; each mistake differs in one or two of these.

    Attributes:
        shape, dtype: of the input.
        example: dtype of the input by which a Linen module is initialized.
        mask: shape and dtype of the mask, or None.
        options: of the constructor.
        call: arguments of the call.
        stored: dtype to which stored statistics are cast, or None.
        mutable: what Linen may change.
        mapped: whether the call is mapped over 4 devices named "batch".
    """

    shape: tuple[int, ...] = SHAPE
    dtype: Any = jnp.float32
    example: Any = jnp.float32
    mask: tuple[tuple[int, ...], Any] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({"use_running_average": False})
    stored: Any = None
    mutable: tuple[str, ...] = ("batch_stats",)
    mapped: bool = False

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
    variables = dict(model.init(KEY, jnp.zeros(SHAPE, given.example), **given.call))
    variables["batch_stats"] = given.recast(variables["batch_stats"])
    mask, mutable = given.given_mask(), list(given.mutable)
    model.apply(variables, given.input(), mask=mask, mutable=mutable, **given.call)


def call_nnx(given: Call):
    layer = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **given.options)
    nnx.update(layer, given.recast(nnx.state(layer, nnx.BatchStat)))
    layer(given.input(), mask=given.given_mask(), **given.call)


class Door(NamedTuple):
    """A way into the library, and how its messages begin."""

    name: str
    call: Callable[[Call], None]
    who: str


FUNCTION = Door("function", call_function, r"^batch_norm: ")
LINEN = Door("linen", call_linen, r"^BatchNorm 'norm': ")
NNX = Door("nnx", call_nnx, r"^BatchNorm\(num_features=3\): ")
LAYERS = (LINEN, NNX)
DOORS = (FUNCTION, LINEN, NNX)


def rows(name, error, says, at=DOORS, **given):
    """One row for each of the doors at which the same mistake can be made."""
    given = Call(**given)

    def trigger(door):
        if not given.mapped:
            return lambda: door.call(given)
        return lambda: jax.vmap(lambda _: door.call(given), axis_name="batch")(jnp.arange(4))

    return [Row(f"{name}, {door.name}", trigger(door), error, f"{door.who}.*{says}") for door in at]


MISTAKES_AT_DOORS = (
    # Input and mask
    rows(
        "wrong number of features",
        ValueError,
        r"shape \(3,\).*\(4, 2, 5\) has 5 features along axis 2.*scale of shape \(5,\)",
        at=[FUNCTION],
        shape=(4, 2, 5),
    )
    + rows(
        "wrong number of features",
        ValueError,
        r"'mean' in 'batch_stats'.*shape \(3,\).*shape \(5,\).*axis=",
        at=[LINEN],
        shape=(4, 2, 5),
    )
    + rows(
        "wrong number of features",
        ValueError,
        r"\(4, 2, 5\) has 5 features along axis 2.*num_features=5.*axis=",
        at=[NNX],
        shape=(4, 2, 5),
    )
    + rows(
        "mask without feature axis, as long as the features",
        ValueError,
        r"mask of shape \(3, 3\).*\(3, 3, 3\) in 2 ways.*mask\[\.\.\., None\] or mask\[None, \.",
        shape=(3, 3, 3),
        mask=((3, 3), bool),
    )
    + rows(
        "mask without two axes",
        ValueError,
        r"mask of shape \(4,\).*mask\[\.\.\., None, None\]",
        mask=((4,), bool),
    )
    + rows(
        "mask of another size",
        ValueError,
        r"mask of shape \(4, 1, 2\).*shape \(4, 2, 3\).*as many axes, each of the input's size",
        mask=((4, 1, 2), bool),
    )
    + rows("complex mask", TypeError, r"mask is complex64.*mask\.real", mask=((4, 2, 1), complex))
    # Axes
    + rows("axis out of range", ValueError, r"axis=3.*3 axes.*from -3 to 2", options={"axis": 3})
    + rows("no axes at all", ValueError, r"axis=-1.*0 axes.*x\[None\]", shape=())
    + rows(
        "axis named twice, once from the end",
        ValueError,
        r"axis=\(2, -1\).*they are \(2, 2\).*axis=\(2,\)",
        options={"axis": (2, -1)},
    )
    + rows("axis named twice", ValueError, r"axis=\(1, 1\).*axis=\(1,\)", options={"axis": (1, 1)})
    + rows("axis no integer", TypeError, r"integer.*'last'.*axis=", options={"axis": "last"})
    # Numbers and dtypes
    + rows(
        "negative epsilon", ValueError, r"epsilon=-1e-05.*epsilon=1e-5", options={"epsilon": -1e-5}
    )
    + rows(
        "epsilon that is no number",
        ValueError,
        r"epsilon=nan.*epsilon=1e-5",
        options={"epsilon": float("nan")},
    )
    + rows("integer result", TypeError, r"dtype=int32.*jnp\.float32", options={"dtype": "int32"})
    + rows(
        "real result of complex input",
        TypeError,
        r"dtype=float32.*complex64.*dtype=jnp\.complex64",
        at=[FUNCTION, LINEN],
        dtype=jnp.complex64,
        example=jnp.complex64,
        options={"dtype": jnp.float32},
    )
    + rows(
        "complex input for a real running mean",
        TypeError,
        r"input is complex64.*stored as float32.*complex example.*dtype=jnp\.complex64",
        at=LAYERS,
        dtype=jnp.complex64,
    )
    + rows(
        "statistics stored as integers",
        TypeError,
        r"running mean is stored as int32, .*no statistics.*mean\.astype\(jnp\.float32\)",
        at=LAYERS,
        stored=jnp.int32,
    )
    # Mapped axes
    + rows(
        "unbound axis_name",
        NameError,
        r"axis_name='batch'.*jax\.vmap\(step, axis_name='batch'\).*axis_name=None",
        options={"axis_name": "batch"},
    )
    + rows(
        "one of two axis names unbound",
        NameError,
        r"axis_name='model'",
        options={"axis_name": ("batch", "model")},
        mapped=True,
    )
    + rows(
        "groups without axis_name",
        ValueError,
        r"axis_index_groups=.{2}0, 1.{4}2, 3.*axis_name='batch'",
        options={"axis_index_groups": [[0, 1], [2, 3]]},
    )
    + rows(
        "groups that miss an index",
        ValueError,
        r"axis_index_groups=\[\[0, 1\], \[2\]\].*from 0 to 3.*\[\[0, 1\], \[2, 3\]\]",
        options={"axis_name": "batch", "axis_index_groups": [[0, 1], [2]]},
        mapped=True,
    )
    + rows(
        "groups that share an index",
        ValueError,
        r"\[\[0, 1, 2\], \[2, 3\]\].*exactly once",
        options={"axis_name": "batch", "axis_index_groups": [[0, 1, 2], [2, 3]]},
        mapped=True,
    )
    # Options of running statistics
    + rows(
        "debiased cumulative average",
        ValueError,
        r"momentum=None.*debias=True.*momentum=0\.99",
        at=LAYERS,
        options={"momentum": None, "debias": True},
    )
    + rows(
        "momentum above 1",
        ValueError,
        r"momentum=1\.5.*from 0 to 1.*momentum=0\.99",
        at=LAYERS,
        options={"momentum": 1.5},
    )
    + rows(
        "momentum below 0",
        ValueError,
        r"momentum=-0\.1.*from 0 to 1",
        at=LAYERS,
        options={"momentum": -0.1},
    )
    + rows(
        "debiased average that never moves",
        ValueError,
        r"momentum=1 .*debias=True.*momentum=None",
        at=LAYERS,
        options={"momentum": 1, "debias": True},
    )
    + rows(
        "unknown running_var",
        ValueError,
        r"running_var='sample'.*running_var='biased' or running_var='unbiased'",
        at=LAYERS,
        options={"running_var": "sample"},
    )
    + rows(
        "a step of the statistics after no batch",
        ValueError,
        r"update_every=0 batches.*update_every=1.*update_stats=False",
        at=LAYERS,
        options={"update_every": 0},
    )
    + [
        row
        for kind, value in (("a truth", True), ("a fraction", 1.5), ("text", "4"))
        for row in rows(
            f"number of batches that is {kind}",
            TypeError,
            rf"update_every={value!r} must be an integer.*update_every=1.*MultiSteps",
            at=LAYERS,
            options={"update_every": value},
        )
    ]
    # Training or inference
    + rows(
        "neither training nor inference",
        ValueError,
        r"use_running_average is missing.*use_running_average=False to train",
        at=LAYERS,
        options={"use_running_average": None},
        call={},
    )
    + rows(
        "inference that moves the statistics",
        ValueError,
        r"update_stats=True.*use_running_average=True.*Drop one",
        at=LAYERS,
        call={"use_running_average": True, "update_stats": True},
    )
    + rows(
        "use_running_average given twice",
        ValueError,
        r"average=True was given to the constructor.*average=False to the call.*once",
        at=[LINEN],
        options={"use_running_average": True},
    )
    + rows(
        "training without mutable statistics",
        jaxnorm.linen.StatsNotMutableError,
        r"'batch_stats'.*y, updated = .*mutable=\['batch_stats'\]\).*update_stats=False",
        at=[LINEN],
        mutable=(),
    )
)
