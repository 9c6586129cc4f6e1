"""The kernels for TPUs: what they compute, in interpret mode, and what they cost once compiled."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxnorm.core.kernels import fits, rows_tpu, slabs_tpu
from jaxnorm.diagnose import hlo

EPSILON = 1e-6
# Rows are slabs of one position and one group. Fewer than a register holds, not divisible by
# anything, several blocks of which the last is ragged, and several pieces of one block.
ROWS = [(5, 7), (37, 300), (2500, 256), (48, 2048)]
# (examples, positions, features), groups
SLABS = [((3, 49, 6), 3), ((4, 300, 256), 32), ((8, 16, 12), 12), ((2, 70, 20), 1)]
TOLERANCE = {jnp.dtype("float32"): 1e-6, jnp.dtype("bfloat16"): 2**-8}


def closed_form(x, scale, bias, dy, groups, use_mean):
    """Wu & He 2018, equation 7, and its derivatives written out, in float64.

    Returns y, mean, var, dx, dscale, dbias.
    """
    x, dy = (np.asarray(one, np.float64) for one in (x, dy))
    scale = 1.0 if scale is None else np.asarray(scale, np.float64)
    bias = 0.0 if bias is None else np.asarray(bias, np.float64)
    examples, positions, features = x.shape

    def grouped(one):
        return one.reshape(examples, positions, groups, features // groups)

    def average(one):
        return one.mean((1, 3), keepdims=True)

    mean = average(grouped(x)) if use_mean else np.zeros((examples, 1, groups, 1))
    var = average((grouped(x) - mean) ** 2)
    xhat = (grouped(x) - mean) / np.sqrt(var + EPSILON)
    slope = grouped(dy * scale)
    dx = slope - xhat * average(slope * xhat) - (average(slope) if use_mean else 0.0)
    dx /= np.sqrt(var + EPSILON)
    xhat = xhat.reshape(x.shape)
    stats = mean[:, 0, :, 0], var[:, 0, :, 0]
    sums = (dy * xhat).sum((0, 1)), dy.sum((0, 1))
    return xhat * scale + bias, *stats, dx.reshape(x.shape), *sums


@partial(jax.jit, static_argnames=("kernels", "groups", "use_mean", "dtype", "interpret"))
def both_ways(kernels, x, scale, bias, dy, *, groups, use_mean, dtype, interpret=False):
    """Forward, then backward from what it returned."""
    options = {} if groups is None else dict(groups=groups)
    y, mean, var = kernels.forward(
        x,
        scale,
        bias,
        epsilon=EPSILON,
        use_mean=use_mean,
        dtype=dtype,
        interpret=interpret,
        **options,
    )
    rstd = lax.rsqrt(var + EPSILON)
    given = dict(with_bias=bias is not None, interpret=interpret)
    return y, mean, var, *kernels.backward(x, scale, mean, rstd, dy, **given)


def drawn(shape, offset=0.0, dtype="float32"):
    """x with this mean in standard deviations, scale, bias and the gradient of the result."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(offset * i + rng.normal(size=shape), dtype) for i in (1, 0))
    return x, *rng.normal(size=(2, shape[-1])).astype(np.float32), dy


def compare(shape, groups, use_mean, dtype, offset, *, parameters=True, result=None):
    x, scale, bias, dy = drawn(shape, offset, dtype)
    if not parameters:
        scale = bias = None
    slab = (*(shape[0], 1)[: 4 - len(shape)], *shape[1:])
    kernels = rows_tpu if len(shape) == 2 else slabs_tpu
    result = jnp.dtype(result or dtype)
    dy = dy.astype(result)
    options = dict(use_mean=use_mean, dtype=result, interpret=True)
    found = both_ways(kernels, x, scale, bias, dy, groups=groups, **options)
    expected = closed_form(x.reshape(slab), scale, bias, dy.reshape(slab), groups or 1, use_mean)
    names = ("y", "mean", "var", "dx", "dscale", "dbias")
    dtypes = (result, jnp.float32, jnp.float32, dtype, jnp.float32, jnp.float32)
    for name, one, right, kept in zip(names, found, expected, dtypes, strict=True):
        if one is None:
            assert (name == "mean" and not use_mean) or (name[1:] in ("scale", "bias"))
            continue
        assert one.dtype == kept, name
        one = np.asarray(one, np.float64)
        assert np.isfinite(one).all(), name
        # Of a mean of 1e4 standard deviations, float32 keeps a thousandth of one of them.
        coarse = np.spacing(np.float32(offset)) if use_mean and name != "var" else 0.0
        limit = TOLERANCE[jnp.dtype(kept)] + coarse
        assert np.abs(one - right.reshape(one.shape)).max() <= limit * np.abs(right).max(), name


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("use_mean", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_are_those_of_the_closed_form(shape, use_mean, offset):
    compare(shape, None, use_mean, "float32", offset)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "groups"), SLABS, ids=str)
def test_slabs_are_those_of_the_closed_form(shape, groups, offset):
    compare(shape, groups, True, "float32", offset)


@pytest.mark.usefixtures("quick_compile")
def test_slabs_about_the_origin():
    compare((3, 49, 6), 3, False, "float32", 1e4)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((37, 300), None), ((4, 300, 256), 32)], ids=str)
def test_bfloat16_is_rounded_once(shape, groups, parameters):
    compare(shape, groups, True, "bfloat16", 0.0, parameters=parameters)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("shape", "groups"), [((37, 300), None), ((3, 49, 6), 3)], ids=str)
def test_result_of_another_dtype(shape, groups):
    compare(shape, groups, True, "bfloat16", 0.0, result="float32")


LARGE = {
    "layer": (rows_tpu, (64, 2048, 2048), None, True),
    "rms": (rows_tpu, (64, 2048, 2048), None, False),
    "group": (slabs_tpu, (256, 64, 64, 256), 32, True),
    "instance": (slabs_tpu, (256, 64, 64, 256), 256, True),
    "layer over space": (slabs_tpu, (256, 64, 64, 256), 1, True),
}


def step(kernels, groups, use_mean):
    """What a layer does in training, for an array as it comes."""
    kept = 1 if kernels is slabs_tpu else 0  # the axis of examples

    def both(x, scale, bias, dy):
        flat = [one.reshape(*x.shape[:kept], -1, x.shape[-1]) for one in (x, dy)]
        given = dict(groups=groups, use_mean=use_mean, dtype=x.dtype)
        y, *_, dx, dscale, dbias = both_ways(kernels, flat[0], scale, bias, flat[1], **given)
        return y.reshape(x.shape), dx.reshape(x.shape), dscale, dbias

    return both


def abstract(shape, sharding=None):
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32, sharding=sharding)
    return array, vector, vector, array


@pytest.mark.parametrize("kind", LARGE)
def test_lowering_needs_no_tpu(kind):
    kernels, shape, groups, use_mean = LARGE[kind]
    traced = jax.jit(step(kernels, groups, use_mean)).trace(*abstract(shape))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize("kind", LARGE)
def test_five_times_x_are_moved(kind, monkeypatch):
    """x is read and y written; x and dy are read and dx written; nothing is laid out anew."""
    environment = dict(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    kernels, shape, groups, use_mean = LARGE[kind]
    arguments = abstract(shape, SingleDeviceSharding(device))
    program = jax.jit(step(kernels, groups, use_mean)).lower(*arguments).compile()
    of_x = 2 * np.prod(shape)
    moved = sum(
        array.bytes
        for one in hlo.instructions(program.as_text())
        if one.operation == "custom-call" or (one.operation in ("copy", "fusion") and not one.fused)
        for array in (*one.operands, *one.results)
    )
    assert moved / of_x == pytest.approx(5, rel=0.01)
    assert program.cost_analysis()["bytes accessed"] / of_x == pytest.approx(5, rel=0.01)


UNFIT = [
    (fits.rows_fit, ((128, 256), jnp.float16), "float16 is neither bfloat16 nor float32"),
    (fits.rows_fit, ((0, 256), jnp.float32), r"the shape \(0, 256\) holds nothing"),
    (fits.rows_fit, ((64, 1 << 16), jnp.bfloat16), "16 rows of 65536 features need 44 MiB of"),
    (fits.slabs_fit, ((8, 1 << 16, 256), jnp.float32), "one example's slab of 64 MiB needs 387.6"),
    (fits.slabs_fit, ((8, 64, 256), jnp.bfloat16, jnp.float16), "float16 is neither"),
]


@pytest.mark.parametrize(("fit", "given", "reason"), UNFIT)
def test_what_does_not_fit_is_said(fit, given, reason):
    assert re.match(reason, fit(*given))


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_what_fits(shape):
    assert fits.rows_fit(shape, jnp.bfloat16) is None
    assert fits.slabs_fit((3, *shape), jnp.float32) is None
