"""What `diagnose.norm_kernels` reports: which form each normalization takes where, and why."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.diagnose import NormKernel, norm_kernels

TOKENS = jax.ShapeDtypeStruct((4, 2048, 768), jnp.bfloat16)
IMAGES = jax.ShapeDtypeStruct((8, 16, 16, 64), jnp.bfloat16)
group_norm = partial(jaxnorm.group_norm, num_groups=32)


def forms(function, *args, use="automatic", **options):
    with jaxnorm.use_kernels(use):
        return [one.kernel for one in norm_kernels(function, *args, **options)]


def reason(function, *args, use="automatic", **options):
    """Why the specification is taken."""
    with jaxnorm.use_kernels(use):
        (found,) = norm_kernels(function, *args, **options)
    assert found.kernel is None
    assert found.dtype == args[0].dtype.name
    return found.why


def test_a_report():
    (found,) = norm_kernels(jaxnorm.layer_norm, TOKENS, platform="cpu")
    assert found.why
    assert found == NormKernel(
        (4, 2048, 768), "bfloat16", (2,), "rows_cpu", found.why, "rows_cpu", found.why_backward
    )


def test_gradients_have_a_form_of_their_own():
    (found,) = norm_kernels(jaxnorm.layer_norm, TOKENS, platform="tpu")
    assert (found.kernel, found.backward) == ("rows_tpu", None)
    assert found.why_backward != found.why


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_dtype_of_the_result_counts(platform):
    """A kernel must be able to write it."""
    to_wide = partial(jaxnorm.layer_norm, dtype=jnp.float64)
    found = reason(to_wide, TOKENS, use="always", platform=platform)
    assert found.startswith("float64")


def test_flags_may_be_given_by_name():
    def model(x, *, train, mask):
        return jaxnorm.layer_norm(x, where=mask) if train else x

    found = norm_kernels(model, TOKENS, train=True, mask=None, platform="gpu")
    assert [one.kernel for one in found] == [None]
    assert not norm_kernels(model, TOKENS, train=False, mask=None)


def test_scales_of_each_example_are_told():
    x, scale = jnp.ones((3, 4, 8)), jnp.ones((3, 8))
    (found,) = norm_kernels(jax.vmap(jaxnorm.layer_norm), x, scale, platform="cpu")
    assert found.why == "examples have parameters of their own"


# By function and use, the kernel on cpu, tpu, cuda.
WHERE = [
    (jaxnorm.layer_norm, TOKENS, "automatic", ["rows_cpu", "rows_tpu", None]),
    (jaxnorm.layer_norm, TOKENS, "always", ["rows_cpu", "rows_tpu", "rows_gpu"]),
    (jaxnorm.rms_norm, TOKENS, "automatic", ["rows_cpu", "rows_tpu", None]),
    (jaxnorm.rms_norm, TOKENS, "never", [None] * 3),
    (group_norm, IMAGES, "automatic", ["slabs_cpu", None, None]),
    (group_norm, IMAGES, "always", ["slabs_cpu", "slabs_tpu", None]),
    (jaxnorm.instance_norm, IMAGES, "always", ["slabs_cpu", "slabs_tpu", None]),
]


@pytest.mark.parametrize(("function", "x", "use", "expected"), WHERE)
def test_platforms(function, x, use, expected):
    found = [forms(function, x, use=use, platform=one) for one in ("cpu", "tpu", "cuda")]
    assert found == [[one] for one in expected]


def test_the_platform_is_by_default_that_of_the_backend():
    assert jax.default_backend() == "cpu"
    assert forms(jaxnorm.layer_norm, TOKENS) == ["rows_cpu"]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


MASK = np.ones((4, 1), bool)
on_tpu, on_gpu = dict(platform="tpu"), dict(platform="cuda")
always = dict(use="always")
REASONS = {
    "a mask": (partial(jaxnorm.layer_norm, where=MASK), array(4, 8), {}, "a mask$"),
    "complex": (jaxnorm.layer_norm, array(4, 8, dtype=jnp.complex64), {}, "complex numbers"),
    "a shift": (partial(jaxnorm.normalize, axes=-1, shift=0.0), array(4, 8), {}, "moments or an"),
    "channels first": (
        partial(jaxnorm.layer_norm, scale=np.ones(8, np.float32), axes=1, axis=1),
        array(4, 8, 3), {}, "neither rows nor slabs",
    ),
    "empty": (jaxnorm.layer_norm, array(0, 8), {}, "neither rows nor slabs"),
    "not wanted": (jaxnorm.layer_norm, TOKENS, dict(use="never"), "kernels are not wanted"),
    "divided": (jaxnorm.layer_norm, TOKENS, dict(devices=8), "the compiler divides the program"),
    "features of no whole register": (
        jaxnorm.layer_norm, array(64, 300), on_tpu, "300 features are no multiple of 128",
    ),
    "half precision on TPUs": (
        jaxnorm.layer_norm, array(64, 256, dtype=jnp.float16), on_tpu | always,
        "float16 is neither",
    ),
    "rows too wide for TPUs": (
        jaxnorm.layer_norm, array(64, 1 << 16), on_tpu | always, "16 rows of 65536 features need",
    ),
    "slabs of convnets on TPUs": (group_norm, IMAGES, on_tpu, "the compiler fuses it into conv"),
    "slabs too large for TPUs": (
        jaxnorm.instance_norm, array(2, 1024, 1024, 64), on_tpu | always, "one example's slab of",
    ),
    "slabs on GPUs": (group_norm, IMAGES, on_gpu | always, "slabs do not stay in a multiproc"),
    "automatic on GPUs": (jaxnorm.layer_norm, TOKENS, on_gpu, "kernels for GPUs have not been"),
    "rows too wide for GPUs": (
        jaxnorm.layer_norm, array(64, 8193), on_gpu | always,
        "8193 features are more than the 8192",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_reasons_for_the_specification(name):
    function, x, options, expected = REASONS[name]
    assert re.match(expected, reason(function, x, **options))


def test_float64(x64):
    x = array(4, 8, dtype=jnp.float64)
    assert reason(jaxnorm.layer_norm, x) == "complex numbers, or wider than float32"


def test_statistics_of_several_devices():
    def mapped(x):
        return jax.vmap(partial(jaxnorm.batch_norm, axis_name="d"), axis_name="d")(x)[0]

    (found,) = norm_kernels(mapped, array(8, 4, 3))
    assert found.kernel is None
    assert found.why in (
        "statistics of several devices",
        "moments or an estimate of them are given",
    )


def mesh_of(kind):
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


def test_explicit_mesh_axes():
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        x = jax.device_put(jnp.ones((8, 4)), P("d"))
        assert reason(jaxnorm.layer_norm, x) == "explicit mesh axes"


def test_inside_shard_map_each_device_has_its_own():
    mesh = mesh_of(AxisType.Auto)

    def both(x):
        inside = jax.shard_map(jaxnorm.layer_norm, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        return jaxnorm.layer_norm(inside(x))

    assert forms(both, array(8, 16, 32), devices=8) == ["rows_cpu", None]
    assert forms(both, array(8, 16, 32)) == ["rows_cpu", "rows_cpu"]


def test_scans_branches_and_inner_programs():
    def several(x):
        x = lax.scan(lambda x, _: (jaxnorm.layer_norm(x), None), x, length=3)[0]
        x = lax.cond(x[0, 0] > 0, jaxnorm.rms_norm, jnp.sin, x)
        x = jax.checkpoint(jax.jit(jaxnorm.layer_norm))(x)
        return jax.vmap(jaxnorm.layer_norm)(jnp.stack([x, x]))

    found = norm_kernels(several, array(16, 32))
    assert [one.kernel for one in found] == ["rows_cpu"] * 4
    assert [one.shape for one in found] == [(16, 32)] * 3 + [(2, 16, 32)]


@pytest.mark.parametrize("use", ["always", "never"])
def test_a_gradient_normalizes_once(use):
    def loss(x):
        return jaxnorm.layer_norm(jnp.sin(x)).sum()

    for function in (loss, jax.grad(loss), jax.value_and_grad(loss)):
        assert forms(function, array(16, 32), use=use) == ["rows_cpu" if use == "always" else None]


def test_only_norms_by_the_moments_of_their_input():
    stats = jaxnorm.Stats(jnp.zeros(8), jnp.ones(8))
    assert forms(lambda x: jaxnorm.batch_norm_inference(jnp.sin(x), stats), array(4, 8)) == []
    assert forms(jnp.sin, array(4, 8)) == []


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jaxnorm.linen.LayerNorm()(nn.Dense(128)(x))
        return jaxnorm.linen.GroupNorm(num_groups=4, dtype=jnp.bfloat16)(x)


def test_a_linen_model():
    x = array(4, 16, 128)
    variables = jax.eval_shape(Block().init, jax.random.key(0), x)

    def step(variables, x):
        return jax.grad(lambda v: Block().apply(v, x).astype(jnp.float32).sum())(variables)

    found = norm_kernels(step, variables, x, platform="tpu")
    assert [(one.kernel, one.shape) for one in found] == [
        ("rows_tpu", (4, 16, 128)),
        (None, (4, 16, 4, 32)),  # features divided into groups
    ]
    assert forms(step, variables, x, platform="tpu", use="always") == ["rows_tpu", "slabs_tpu"]


def test_an_nnx_model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 128, rngs=rngs), jaxnorm.nnx.RMSNorm(128, rngs=rngs), nnx.relu
    )
    graph, state = nnx.split(model)

    def gradient(state, x):
        return nnx.grad(lambda model: model(x).sum())(nnx.merge(graph, state))

    x = array(4, 16, 8)
    assert forms(model, x, platform="tpu") == ["rows_tpu"]
    assert forms(gradient, state, x, platform="tpu") == ["rows_tpu"]


def test_what_is_run_is_what_is_reported():
    """Programs look at a sample first, as that kernel for CPUs does, and the specification not."""
    for use in ("always", "never"):
        with jaxnorm.use_kernels(use):
            text = jax.jit(lambda x: group_norm(x)).lower(IMAGES).as_text()
        assert ("stablehlo.slice" in text) == (use == "always")


def test_the_environment_decides_outside_of_use_kernels(monkeypatch):
    monkeypatch.setenv("JAXNORM_KERNELS", "never")
    (found,) = norm_kernels(jaxnorm.layer_norm, TOKENS)
    assert found.kernel is None
    assert forms(jaxnorm.layer_norm, TOKENS, use="always") == ["rows_cpu"]


def test_uses_nest():
    with jaxnorm.use_kernels("never"):
        assert forms(jaxnorm.layer_norm, TOKENS, use="automatic") == ["rows_cpu"]
        (found,) = norm_kernels(jaxnorm.layer_norm, TOKENS)
        assert found.kernel is None
    (found,) = norm_kernels(jaxnorm.layer_norm, TOKENS)
    assert found.kernel == "rows_cpu"
