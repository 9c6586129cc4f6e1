"""The kernels for GPUs against the formulas in float64, interpreted where there is no GPU."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.core.kernels import rows_gpu

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

EPSILON = 1e-5
INTERPRET = jax.default_backend() != "gpu"
DTYPES = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}

forward = jax.jit(
    functools.partial(rows_gpu.forward, epsilon=EPSILON, interpret=INTERPRET),
    static_argnames=("use_mean", "dtype"),
)
backward = jax.jit(
    functools.partial(rows_gpu.backward, interpret=INTERPRET), static_argnames="with_bias"
)


def oracle(x, scale, bias, dy, use_mean):
    """Ba, Kiros & Hinton 2016, equation 4, and its gradients; RMS norm without the mean."""
    x, dy = np.float64(x), np.float64(dy)
    a = 1 if scale is None else np.float64(scale)
    mean = x.mean(1, keepdims=True) if use_mean else 0.0
    var = ((x - mean) ** 2).mean(1, keepdims=True)
    std = np.sqrt(var + EPSILON)
    xhat = (x - mean) / std
    y = xhat * a + (0 if bias is None else np.float64(bias))
    # What of the slope changes neither mean nor variance of the row reaches x.
    slope = dy * a
    dx = slope - xhat * (slope * xhat).mean(1, keepdims=True)
    dx = (dx - slope.mean(1, keepdims=True) if use_mean else dx) / std
    dscale = None if scale is None else (dy * xhat).sum(0)
    dbias = None if bias is None else dy.sum(0)
    mean = mean if use_mean else None
    return (y, mean, var), (dx, dscale, dbias)


def drawn(shape, dtype="float32", offset=0.0):
    generator = np.random.default_rng(0)
    x = jnp.asarray(offset + generator.normal(size=shape), dtype)
    dy = jnp.asarray(generator.normal(size=shape), dtype)
    return x, jnp.float32(generator.normal(size=shape[1])), dy


def agree(found, wanted, tolerance):
    """All the results, absent ones alike, by the size of the largest number."""
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            one = np.asarray(one, np.float64)
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, 0, tolerance * (1e-30 + np.abs(other).max()))


# One row; several rows a program; rows and features that fill no tile; a row for many threads;
# more rows than programs take in one step.
SHAPES = [(1, 3), (40, 8), (7, 300), (3, 1030), (1200, 200)]


@pytest.mark.parametrize("use_mean", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, use_mean):
    x, scale, dy = drawn(shape)
    bias = scale + 1 if use_mean else None
    expected, gradients = oracle(x, scale, bias, dy, use_mean)
    y, mean, var = forward(x, scale, bias, use_mean=use_mean, dtype="float32")
    agree((y, mean, var), expected, 2e-6)
    rstd = 1 / np.sqrt(var + EPSILON)
    agree(backward(x, scale, mean, rstd, dy, with_bias=bias is not None), gradients, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x, scale, dy = drawn((12, 96), dtype)
    expected, gradients = oracle(x, scale, scale, dy, True)
    y, mean, var = forward(x, scale, scale, use_mean=True, dtype=dtype)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == jnp.float32
    agree((y,), expected[:1], DTYPES[dtype])
    agree((mean, var), expected[1:], 2e-6)  # of the numbers as they are given
    dx, *sums = backward(x, scale, mean, 1 / np.sqrt(var + EPSILON), dy, with_bias=True)
    assert dx.dtype == dtype
    agree((dx,), gradients[:1], DTYPES[dtype])
    agree(sums, gradients[1:], 1e-5)


def test_result_of_another_dtype_and_narrow_parameters():
    x, scale, dy = drawn((5, 48), "bfloat16")
    scale = scale.astype(jnp.bfloat16)
    expected, gradients = oracle(x, scale, scale, np.float32(dy), True)
    y, mean, var = forward(x, scale, scale, use_mean=True, dtype="float32")
    assert y.dtype == jnp.float32
    agree((y,), expected[:1], 2e-6)
    rstd = 1 / np.sqrt(var + EPSILON)
    dx, *sums = backward(x, scale, mean, rstd, dy.astype(jnp.float32), with_bias=True)
    assert dx.dtype == jnp.bfloat16
    assert {total.dtype for total in sums} == {jnp.dtype("float32")}
    agree(sums, gradients[1:], 1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_absent_parameters(with_scale, with_bias):
    x, scale, dy = drawn((9, 20))
    scale, bias = (scale if with_scale else None), (scale if with_bias else None)
    expected, gradients = oracle(x, scale, bias, dy, True)
    y, mean, var = forward(x, scale, bias, use_mean=True, dtype="float32")
    agree((y,), expected[:1], 2e-6)
    rstd = 1 / np.sqrt(var + EPSILON)
    agree(backward(x, scale, mean, rstd, dy, with_bias=with_bias), gradients, 1e-5)


def test_a_mean_of_ten_thousand_standard_deviations():
    x, scale, dy = drawn((16, 700), offset=1e4)
    expected, gradients = oracle(x, scale, scale, dy, True)
    y, mean, var = forward(x, scale, scale, use_mean=True, dtype="float32")
    agree((y, var), (expected[0], expected[2]), 2e-6)
    # The gradients see the mean in float32, which is by up to 5e-4 standard deviations off.
    rstd = 1 / np.sqrt(var + EPSILON)
    agree(backward(x, scale, mean, rstd, dy, with_bias=True), gradients, 2e-3)


def test_equal_numbers_have_no_variance():
    x = jnp.full((3, 33), 12345.678, jnp.float32)
    y, mean, var = forward(x, None, None, use_mean=True, dtype="float32")
    assert not y.any()
    assert not var.any()
    assert (mean == x[:, :1]).all()


def test_a_row_does_not_see_the_others():
    x, scale, _ = drawn((6, 40))
    spoilt = x.at[2].set(jnp.nan).at[4].set(jnp.inf)
    whole, *_ = forward(x, scale, None, use_mean=True, dtype="float32")
    found, *_ = forward(spoilt, scale, None, use_mean=True, dtype="float32")
    others = np.array([0, 1, 3, 5])
    np.testing.assert_array_equal(found[others], whole[others])
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((8, 8192), "bfloat16", None),
        ((8, 4097), "float16", None),
        ((1, 1), "float32", None),
        ((8, 8193), "float32", "8193 features are more than the 8192 that registers hold"),
        ((8, 64), "float64", "float64 is none of float32, bfloat16, float16"),
        ((8, 64), "complex64", "complex64 is none of"),
        ((0, 64), "float32", "the shape (0, 64) holds nothing"),
    ],
)
def test_what_is_served(shape, dtype, reason):
    found = rows_gpu.fit(shape, jnp.dtype(dtype))
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")


def a_gpu():
    """From 0.11 on JAX asks for which GPU it lowers; before, it takes one where it sees none."""
    if jax.__version_info__ < (0, 11) or not INTERPRET:
        return contextlib.nullcontext()
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [8, 768, 8192])
def test_lowers_without_a_gpu(features, dtype):
    def step(x, scale, dy):
        y, mean, var = rows_gpu.forward(
            x, scale, scale, epsilon=EPSILON, use_mean=True, dtype=x.dtype
        )
        return y, rows_gpu.backward(x, scale, mean, var, dy, with_bias=True)

    x = jax.ShapeDtypeStruct((4096, features), dtype)
    scale = jax.ShapeDtypeStruct((features,), jnp.float32)
    with a_gpu():
        program = jax.jit(step).trace(x, scale, x).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @\S*triton", program)) == 2
    # Besides the kernels nothing of the size of x is computed.
    size = rf"tensor<4096x{features}x"
    others = [line for line in program.splitlines() if size in line and "triton" not in line]
    assert all(re.search(r"func\.func|return", line) for line in others), others


def report(*arguments):
    """Runs the report where no GPU is to be found."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu_report.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_report_on_small_arrays(tmp_path):
    out = tmp_path / "report.md"
    done = report(
        "--platform", "cpu", "--methods", "rms", "--dtypes", "float32", "--rounds", 1, "--out", out
    )
    assert not done.returncode, done.stderr
    rows = re.findall(r"^\| ([^|]+) \|.*\| (\S+) \|$", out.read_text(), re.M)
    differences = dict(rows)
    assert differences["jaxnorm, once more"] == "0e+00"
    assert float(differences["jaxnorm's kernel"]) < 1e-5
    assert float(differences.get("Flax", 0)) < 1e-5


def test_the_report_without_a_gpu():
    done = report()
    assert done.returncode == 1
    assert "gpu_report: JAX runs on cpu, not on gpu" in done.stderr
