"""What every importer does with arrays that no such layer has: of other shapes, of other values.

The law of shapes goes over importers x kinds of layers x shapes. One model has a copy of each layer
for each shape, and one import shows what is done with all.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tool_models import drawn_nnx

import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.equinox import import_equinox
from jaxnorm.tools.importing.flax import import_flax
from jaxnorm.tools.importing.haiku import import_haiku
from jaxnorm.tools.importing.keras import import_keras
from jaxnorm.tools.importing.torch import import_torch

Shape = tuple[int, ...]
AXES = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
IMAGE = (1, 3, 3, 4)
LAYERS: Mapping[str, tuple[Callable[..., nnx.Module], Shape]] = {
    "dense": (lambda **kw: nnx.Linear(4, 6, **kw), (1, 4)),
    "heads": (lambda **kw: nnx.LinearGeneral(4, (2, 3), **kw), (1, 4)),
    "conv": (lambda **kw: nnx.Conv(4, 6, (3, 2), **kw), IMAGE),
    "depthwise": (lambda **kw: nnx.Conv(4, 12, (3, 2), feature_group_count=4, **kw), IMAGE),
    "transposed": (lambda **kw: nnx.ConvTranspose(4, 6, (3, 2), **kw), IMAGE),
    "batch": (lambda **kw: jnx.BatchNorm(6, **kw), (2, 6)),
    "axes": (lambda **kw: jnx.LayerNorm((2, 3), **AXES, **kw), (1, 2, 3)),
    "flat": (lambda **kw: jnx.LayerNorm(6, **AXES, **kw), (1, 2, 3)),
}
"""Kinds of layers, and a shape of an input. No two sizes of a kernel are alike."""
MANY = 9


class Importer(NamedTuple):
    """An importer, and what its framework has.

    Attributes:
        run: imports arrays by key, given a model and how it is called.
        separator: between the names in a key.
        kernel, bias: the names of a layer's arrays.
        norm: those of a norm's.
        kernels: the shapes in which it keeps kernels, by kind.
        heads: those of a bias with axes of its own.
        axes, flat: those of norms over two axes, for layers that keep them and layers that do not.
        ones: kinds of which arrays may have more axes of size 1: those of the input.
    """

    run: Callable[..., Any]
    separator: str
    kernel: str
    bias: str
    norm: tuple[str, ...]
    kernels: Mapping[str, list[Shape]]
    heads: list[Shape]
    axes: list[Shape]
    flat: list[Shape]
    ones: tuple[str, ...] = ()


def haiku(model, arrays, *args, **options):
    return import_haiku(model, arrays, None, *args, **options)


def equinox(model, arrays, *args, **options):
    return import_equinox(model, arrays, None, *args, **options, channels_first=AS_IN_THE_MODEL)


def torch(*args, **options):
    return import_torch(*args, **options, channels_first=AS_IN_THE_MODEL)


AS_IN_THE_MODEL = {f"{kind}{i}": False for kind in ("axes", "flat") for i in range(MANY)}
OUTPUTS_FIRST = {
    "dense": [(6, 4)],
    "heads": [(6, 4)],
    "conv": [(6, 4, 3, 2)],
    "depthwise": [(12, 1, 3, 2)],
    "transposed": [(6, 4, 3, 2)],
}
OUTPUTS_LAST = {
    "dense": [(4, 6)],
    "heads": [(4, 6), (4, 2, 3)],
    "conv": [(3, 2, 4, 6)],
    "depthwise": [(3, 2, 1, 12)],
    "transposed": [(3, 2, 6, 4)],
}
TWO, ONE, BOTH = [(2, 3)], [(6,)], [(6,), (2, 3)]
IMPORTERS = {
    "torch": Importer(
        torch,
        ".",
        "weight",
        "bias",
        ("weight", "bias", "running_mean", "running_var"),
        OUTPUTS_FIRST | {"transposed": [(4, 6, 3, 2)]},
        heads=BOTH,
        axes=TWO,
        flat=BOTH,
    ),
    "keras": Importer(
        import_keras,
        "/",
        "kernel",
        "bias",
        ("gamma", "beta", "moving_mean", "moving_variance"),
        OUTPUTS_LAST | {"depthwise": [(3, 2, 4, 3), (3, 2, 1, 12)]},
        heads=BOTH,
        axes=TWO,
        flat=BOTH,
    ),
    "haiku": Importer(
        haiku,
        "/",
        "w",
        "b",
        ("scale", "offset", "~/mean_ema/average", "~/var_ema/average"),
        OUTPUTS_LAST,
        heads=BOTH,
        axes=TWO,
        flat=ONE,
        ones=("conv", "depthwise", "transposed", "batch", "axes", "flat"),
    ),
    "equinox": Importer(
        equinox,
        ".",
        "weight",
        "bias",
        ("weight", "bias", "mean", "var"),
        OUTPUTS_FIRST,
        heads=BOTH,
        axes=TWO,
        flat=BOTH,
        ones=("conv", "depthwise", "transposed"),
    ),
    "flax": Importer(
        import_flax,
        "/",
        "kernel",
        "bias",
        ("scale", "bias", "mean", "var"),
        OUTPUTS_LAST | {"heads": [(4, 2, 3)], "transposed": [(3, 2, 4, 6)]},
        heads=TWO,
        axes=BOTH,
        flat=BOTH,
    ),
}


class Copies(nnx.Module):
    """`MANY` copies of each layer, each called on an input of its own."""

    def __init__(self):
        for kind, (make, _) in LAYERS.items():
            for i in range(MANY):
                setattr(self, f"{kind}{i}", make(rngs=nnx.Rngs(0)))

    def __call__(self, **inputs):
        for kind, x in inputs.items():
            for i in range(MANY):
                getattr(self, f"{kind}{i}")(x)


def right_shapes(importer, kind):
    """The shapes that arrays of a layer may have, by their names in the source."""
    if kind in importer.kernels:
        bias = {"heads": importer.heads, "depthwise": [(12,)]}.get(kind, [(6,)])
        return {importer.kernel: importer.kernels[kind], importer.bias: bias}
    if kind == "batch":
        return {array: [(6,)] for array in importer.norm}
    return {array: getattr(importer, kind) for array in importer.norm[:2]}


def wrong_shapes(right, may_have_ones):
    """Other shapes with as many elements."""
    first, size = right[0], math.prod(right[0])
    shapes = {(size,), (1, size), (2, size // 2), (size // 2, 2)}
    shapes |= {first[::-1], (*first, 1), (*first[1:], first[0])}

    def bare(shape):
        return tuple(n for n in shape if n != 1) if may_have_ones else shape

    return sorted(shapes - {s for s in shapes if bare(s) in map(bare, right)})


@pytest.mark.parametrize("name", IMPORTERS)
def test_a_wrong_shape_is_never_imported(name):
    importer = IMPORTERS[name]
    model = nnx.eval_shape(Copies)
    inputs = {kind: jnp.ones(shape) for kind, (_, shape) in LAYERS.items()}
    arrays, taken = {}, set()
    for kind in LAYERS:
        for array, right in right_shapes(importer, kind).items():
            may_have_ones = kind in importer.ones and array != importer.kernel
            wrong = wrong_shapes(right, may_have_ones)
            for i, shape in enumerate([*right, *wrong, *wrong][:MANY]):
                key = f"{kind}{i}{importer.separator}{array}"
                arrays[key] = np.ones(shape, np.float32)
                if i < len(right):
                    taken.add(key)
            assert len(right) + len(wrong) <= MANY
    keys = arrays.keys()
    if name == "flax":
        arrays = {
            layer: {k.rpartition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{layer}/")}
            for layer in {key.partition("/")[0] for key in arrays}
        }
    _, report = importer.run(model, arrays, **inputs, source="same", partial=True)
    copied = {key for made_of in report.copied.values() for key in made_of.split(", ")}
    assert copied & keys == taken


def norm(dtype=jnp.int32):
    layer = drawn_nnx(partial(jnx.BatchNorm, 2, debias=True))
    layer.updates.set_value(jnp.zeros(2, dtype))
    return layer


X = jnp.ones((1, 2))
STATE = {
    "weight": np.ones(2, np.float32),
    "bias": np.ones(2, np.float32),
    "running_mean": np.ones(2, np.float32),
    "running_var": np.ones(2, np.float32),
    "num_batches_tracked": np.array(7),
}
COUNT, VAR, SCALE = "num_batches_tracked", "running_var", "weight"
float8 = ml_dtypes.float8_e4m3fn
ROUNDED = "float64 of the source was rounded to the model's float32: 'scale'"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (COUNT, np.array(2**40 + 5), r"1 of 2|2 of 2 values do not fit into int32, .*2147483647"),
        (COUNT, np.array(-1), "2 of 2 counts are negative or NaN"),
        (COUNT, np.float32(np.nan), "2 of 2 counts are negative or NaN"),
        (COUNT, np.array(2.5), "2 of 2 values are no whole numbers"),
        (COUNT, np.array([1, 2, 3]), r"int32\(2,\) from 'num_batches_tracked' int64\(3,\)"),
        (VAR, np.float32([1, -1]), "1 of 2 variances are negative"),
        (SCALE, np.array([1.0, 1e39]), r"1 of 2 values do not fit into float32, .*3\.4e\+38"),
        (SCALE, np.array([1, 2]), "int64: numbers of another kind"),
        (SCALE, np.array([1j, 2]), "complex128: numbers of another kind"),
    ],
    ids=str,
)
def test_values_that_no_layer_has_are_refused(key, value, says):
    with pytest.raises(ValueError, match=rf"^import_torch: .*{says}"):
        import_torch(norm(), STATE | {key: value}, X, source="same")
    filled, report = import_torch(norm(), STATE | {key: value}, X, source="same", partial=True)
    assert not report.fits
    assert len(report.copied) == 4
    role = {COUNT: "updates", VAR: "var", SCALE: "scale"}[key]
    assert (getattr(filled, role)[...] == getattr(norm(), role)[...]).all()


@pytest.mark.parametrize(
    ("key", "value", "stored", "notes"),
    [
        (COUNT, np.array(7.0), [7, 7], []),
        (SCALE, np.array([1, 2], ">f4"), [1, 2], []),
        (SCALE, np.array([1.5, 2], float8), [1.5, 2], []),
        (SCALE, np.full(2, 0.1), np.full(2, 0.1, np.float32), [ROUNDED]),
        (SCALE, np.float32([np.nan, np.inf]), [np.nan, np.inf], ["2 of 2 values are NaN or inf"]),
        (SCALE, np.array([1, np.inf]), [1, np.inf], ["float64 of", "1 of 2 values are NaN or inf"]),
        (VAR, np.float32([1, -1e-6]), [1, np.float32(-1e-6)], ["1 of 2 variances are negative, b"]),
    ],
    ids=str,
)
def test_values_that_are_odd_are_taken_and_said(key, value, stored, notes):
    filled, report = import_torch(norm(), STATE | {key: value}, X, source="same")
    role = {COUNT: "updates", VAR: "var", SCALE: "scale"}[key]
    np.testing.assert_array_equal(getattr(filled, role)[...], stored)
    assert report.fits
    assert len(report.notes) == len(notes)
    for note, begin in zip(report.notes, notes, strict=True):
        assert note.startswith(begin)


def test_counts_are_stored_in_the_dtype_that_the_model_has():
    """A float count is rounded where float32 has not every integer."""
    filled, _ = import_torch(
        norm(jnp.float32), STATE | {COUNT: np.array(2**40 + 5)}, X, source="same"
    )
    assert filled.updates.dtype == jnp.float32
    assert filled.updates[...].tolist() == [2**40, 2**40]
