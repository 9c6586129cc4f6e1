"""What is kept for the backward pass: `x` in its own dtype, and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm

SHAPE = (64, 8, 8, 32)


def share_of_input(function, x, *others):
    """Bytes of all arrays that the vjp of `function` holds, over the bytes of `x`."""
    vjp = jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], x, *others)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp)) / x.nbytes


def pure(x, scale, bias):
    return jaxnorm.batch_norm(x, scale, bias)[0]


def frozen(x, scale, bias):
    return jaxnorm.batch_norm_inference(x, jaxnorm.Stats(bias, scale), scale, bias)


def linen(layer, x, scale, bias, **call):
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": bias, "var": scale},
    }
    return layer.apply(variables, x, mutable=["batch_stats"], **call)[0]


def of_linen(layer, frozen):
    return lambda *arrays: linen(layer, *arrays, use_running_average=frozen)


def of_nnx(layer, frozen):
    graph, state = nnx.split(layer)

    def apply(x, scale, bias):
        model = nnx.merge(graph, state, copy=True)
        model.scale[...], model.bias[...] = scale, bias
        return model(x, use_running_average=frozen)

    return apply


WAYS = {
    "pure": pure,
    "pure inference": frozen,
    "linen": of_linen(jaxnorm.linen.BatchNorm(dtype=jnp.bfloat16), False),
    "linen inference": of_linen(jaxnorm.linen.BatchNorm(dtype=jnp.bfloat16), True),
    "nnx": of_nnx(jaxnorm.nnx.BatchNorm(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), False),
    "nnx inference": of_nnx(jaxnorm.nnx.BatchNorm(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), True),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_residuals_are_the_input(way, dtype, jit):
    x = jnp.ones(SHAPE, dtype)
    function = jax.jit(WAYS[way]) if jit else WAYS[way]
    assert 1 <= share_of_input(function, x, jnp.ones(32), jnp.zeros(32)) <= 1.05


def test_a_mask_is_all_that_it_adds():
    x, mask = jnp.ones(SHAPE, jnp.bfloat16), np.ones((64, 8, 8, 1), bool)
    share = share_of_input(lambda x: jaxnorm.batch_norm(x, where=mask)[0], x)
    assert share <= 1.05 + mask.nbytes / x.nbytes


def test_the_measure_sees_what_flax_keeps():
    """Flax's layer keeps several float32 arrays of the size of a bfloat16 input."""
    layer = nn.BatchNorm(dtype=jnp.bfloat16)
    x = jnp.ones(SHAPE, jnp.bfloat16)
    share = share_of_input(of_linen(layer, False), x, jnp.ones(32), jnp.zeros(32))
    assert share >= 3.9


@pytest.mark.parametrize(
    ("name", "flax_keeps"),
    [("LayerNorm", 6), ("RMSNorm", 6), ("GroupNorm", 4), ("InstanceNorm", 4)],
)
def test_the_row_norms_keep_less_than_flaxs(name, flax_keeps):
    x = jnp.ones((8, 16, 16, 256), jnp.bfloat16)

    def kept(library):
        layer = getattr(library, name)(dtype=jnp.bfloat16)
        variables = layer.init(jax.random.key(0), x)
        return share_of_input(lambda x: layer.apply(variables, x), x)

    assert kept(jaxnorm.linen) <= 1.05
    assert kept(nn) >= flax_keeps - 0.1


# The methods that take moments of their input alone, as rows, slabs, or columns of the batch.
OF_MOMENTS = {
    "BatchNorm": dict(use_running_average=False),
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": dict(num_groups=8),
    "InstanceNorm": {},
    "BatchRenorm": dict(use_running_average=False),
    "AdaBN": dict(use_running_average=False, domains=("one", "other")),
    "IBNb": {},
}
CALLS = {"AdaBN": dict(domain="one")}


@pytest.mark.parametrize("use", ["always", "never"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OF_MOMENTS)
def test_residuals_are_the_input_for_every_method(name, dtype, use):
    x = jnp.ones((8, 16, 16, 256), dtype)
    layer = getattr(jaxnorm.linen, name)(**OF_MOMENTS[name], dtype=dtype)
    call = CALLS.get(name, {})
    variables = layer.init(jax.random.key(0), x, **call)
    params = variables.pop("params")

    def apply(x, params):
        return layer.apply(variables | {"params": params}, x, mutable=[*variables], **call)[0]

    with jaxnorm.use_kernels(use):
        assert 1 <= share_of_input(apply, x, params) <= 1.03


def residuals_in_scan(layer_class, **options):
    """The same for a stack of scanned layers, where XLA cannot recompute on its own."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return layer_class(**options, dtype=x.dtype)(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=4
    )()
    x = jnp.ones((4, 16, 16, 128), jnp.bfloat16)
    variables = stack.init(jax.random.key(0), x, None)

    def apply(x):
        return stack.apply(variables, x, None, mutable=["batch_stats"])[0][0]

    return share_of_input(apply, x)


@pytest.mark.parametrize("use", ["always", "never"])
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_scanned_layers_keep_one_input_each(name, use):
    with jaxnorm.use_kernels(use):
        assert 4 <= residuals_in_scan(getattr(jaxnorm.linen, name), **OF_MOMENTS[name]) <= 4.2


@pytest.mark.parametrize(
    ("name", "flax_keeps"), [("BatchNorm", 16), ("LayerNorm", 24), ("RMSNorm", 24)]
)
def test_flaxs_scanned_layers_keep_more(name, flax_keeps):
    assert residuals_in_scan(getattr(nn, name), **OF_MOMENTS[name]) >= flax_keeps
