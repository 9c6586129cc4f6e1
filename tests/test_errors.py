"""Every error of the library: its type, and that its message says who, what was found, and the fix.

One table of mistakes. Each is made inside `jax.eval_shape`, where there are no values: an error is
raised while tracing, from shapes, dtypes and options alone. The last test holds the table against
the source: a `raise` that no row reaches fails it.
"""

import ast
import pathlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import errors, nnx
from flax import linen as nn

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx


class Row(NamedTuple):
    """One mistake.

    Attributes:
        name: shown by pytest.
        trigger: makes it.
        error: what is raised.
        says: pattern of the message: who, then what was found, then the fix.
    """

    name: str
    trigger: Callable[[], Any]
    error: type[Exception]
    says: str


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


def moments_of(*shape):
    return jaxnorm.moments(jnp.ones((2, *shape)), axes=0)


def stats_of(*shape):
    return jaxnorm.Stats(jnp.zeros(shape), jnp.ones(shape))


X = jnp.zeros(SHAPE)

ROWS = (
    # Input and mask
    rows("integers", TypeError, r"int32\[4, 2, 3\].*x\.astype\(jnp\.float32\)", dtype=jnp.int32)
    + rows("booleans", TypeError, r"bool\[4, 2, 3\].*x\.astype\(jnp\.float32\)", dtype=bool)
    + rows(
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
        r"mask of shape \(4, 3\).*shape \(4, 3, 3\).*mask\[\.\.\., None\]",
        shape=(4, 3, 3),
        mask=((4, 3), bool),
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
        r"mask of shape \(4, 1, 2\).*shape \(4, 2, 3\).*3 axes, each of the input's size or 1",
        mask=((4, 1, 2), bool),
    )
    + rows("float mask", TypeError, r"float32.*mask > 0", mask=((4, 2, 1), jnp.float32))
    # Axes
    + rows("axis out of range", ValueError, r"axis=3.*3 axes.*from -3 to 2", options={"axis": 3})
    + rows("no axes at all", ValueError, r"axis=-1.*0 axes.*Add a feature axis", shape=())
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
        "training statistics stored in bfloat16",
        TypeError,
        r"running mean is stored as bfloat16.*leaf\.astype\(jnp\.float32\)",
        at=LAYERS,
        stored=jnp.bfloat16,
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
) + [
    Row(
        "debiased average of a checkpoint without a count",
        lambda: jaxnorm.linen.BatchNorm(use_running_average=False, debias=True).apply(
            jaxnorm.linen.BatchNorm(use_running_average=False).init(KEY, X),
            X,
            mutable=["batch_stats"],
        ),
        ValueError,
        r"^BatchNorm: .*debias=True.*no 'updates'.*jnp\.full\(\(3,\), n, jnp\.int32\)",
    ),
    Row(
        "Linen layer that is no part of a model",
        lambda: jaxnorm.linen.BatchNorm().init(KEY, X),
        ValueError,
        r"^BatchNorm: .*use_running_average",
    ),
    Row(
        "second positional argument",
        lambda: jaxnorm.nnx.BatchNorm(3, nnx.Rngs(0)),
        TypeError,
        r"2 positional arguments but 3 were given",
    ),
    Row(
        "statistics for other features",
        lambda: jaxnorm.batch_norm_inference(X, stats_of(2)),
        ValueError,
        r"^batch_norm_inference: .*mean has shape \(2,\).*\(4, 2, 3\).*shape \(3,\)",
    ),
    Row(
        "variance for other features",
        lambda: jaxnorm.standardize(X, jaxnorm.Stats(jnp.zeros(3), jnp.ones(2)), axes=(0, 1)),
        ValueError,
        r"^standardize: .*variance has shape \(2,\).*3 features along axis 2.*axes=\.\.\.",
    ),
    Row(
        "parameters along two axes",
        lambda: jaxnorm.affine(X, bias=jnp.ones(3), axis=(1, 2)),
        ValueError,
        r"^affine: .*bias has shape \(3,\).*\(2, 3\) features along axes \(1, 2\)",
    ),
    Row(
        "axes of moments out of range",
        lambda: jaxnorm.moments(X, axes=(0, -4)),
        ValueError,
        r"^moments: .*axes=-4.*3 axes.*from -3 to 2",
    ),
    Row(
        "axes of pooling out of range",
        lambda: jaxnorm.pool(moments_of(3), axes=1),
        ValueError,
        r"^pool: .*axes=1.*1 axes.*from -1 to 0",
    ),
    Row(
        "merge of nothing",
        lambda: jaxnorm.merge(),
        ValueError,
        r"^merge: .*found none.*jaxnorm\.moments\(x, axes\)",
    ),
    Row(
        "merge of different features",
        lambda: jaxnorm.merge(moments_of(3), moments_of(2)),
        ValueError,
        r"^merge: .*\(2,\), \(3,\).*jaxnorm\.moments\(x, axes\)",
    ),
    *(
        Row(
            f"{option} without a count of batches",
            lambda options=options: jaxnorm.update_running(stats_of(3), moments_of(3), **options),
            ValueError,
            rf"^update_running: .*{option}.*updates=jnp\.zeros\(\(3,\), jnp\.int32\)",
        )
        for option, options in (
            ("debias=True", {"debias": True}),
            ("momentum=None", {"momentum": None}),
        )
    ),
    *(
        Row(
            f"evidence for {new} features where there are {old}",
            lambda old=old, new=new: jaxnorm.update_running(stats_of(old), moments_of(new)),
            ValueError,
            rf"^update_running: .*\({new},\).*\({old},\)",
        )
        for old, new in ((3, 2), (3, 1), (1, 3))
    ),
    Row(
        "momentum of a function above 1",
        lambda: jaxnorm.update_running(stats_of(3), moments_of(3), momentum=2),
        ValueError,
        r"^update_running: .*momentum=2.*from 0 to 1.*momentum=0\.99",
    ),
    Row(
        "backward pass with another shape",
        lambda: jaxnorm.batch_norm_backward(X[0], X),
        ValueError,
        r"^batch_norm_backward: .*dy has shape \(2, 3\).*x has shape \(4, 2, 3\)",
    ),
    Row(
        "backward pass of complex numbers",
        lambda: jaxnorm.batch_norm_backward_steps(X + 0j, X + 0j),
        TypeError,
        r"^batch_norm_backward_steps: .*complex64.*jax\.vjp",
    ),
    Row(
        "unknown name", lambda: jaxnorm.batchnorm, AttributeError, r"^module 'jaxnorm'.*'batchnorm'"
    ),
]


def raised(row: Row) -> Exception:
    """The error of a mistake that is made where there are no values."""
    with pytest.raises(row.error) as caught:
        jax.eval_shape(row.trigger)
    return caught.value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_message_says_who_what_and_the_fix(row):
    message = str(raised(row))
    assert re.search(row.says, message), message
    assert message.isprintable()


def test_flax_code_can_catch_immutable_statistics():
    assert issubclass(jaxnorm.linen.StatsNotMutableError, errors.ModifyScopeVariableError)


def test_correct_calls_raise_nothing():
    """The doors themselves make no mistake."""
    for door in DOORS:
        jax.eval_shape(lambda door=door: door.call(Call()))
        jax.eval_shape(lambda door=door: door.call(Call(mask=((4, 1, 1), bool))))


def test_every_error_of_the_library_is_in_the_table():
    home = pathlib.Path(jaxnorm.__file__).parent
    reached = set()
    for row in ROWS:
        frame = raised(row).__traceback__
        while frame is not None:
            reached.add((frame.tb_frame.f_code.co_filename, frame.tb_lineno))
            frame = frame.tb_next
    for file in home.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                assert any((str(file), line) in reached for line in lines), f"{file}:{node.lineno}"
