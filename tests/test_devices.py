"""The answer on eight devices is that on one, in every mapped context.

Compared in float64, so that what remains is rounding: value, moments, gradient, and the derivative
of the gradient.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm

DEVICES, LOCAL, FEATURES = 8, 2, 3
CLOSE = dict(rtol=1e-11, atol=1e-11)
GROUPS = [[0, 3], [1, 2, 4, 5], [6], [7]]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(DEVICES * LOCAL, FEATURES)) + 2
    return x, 1 + rng.normal(size=FEATURES), rng.normal(size=FEATURES)


def masks():
    uneven = np.array([1, 1, 1, 0, 0, 0, 0, 1] + [1] * 8, bool)[:, None]  # device 2 has none
    each = np.random.default_rng(1).random((DEVICES * LOCAL, FEATURES)) < 0.6
    return {"no mask": None, "a device with none": uneven, "per feature": each}


def split(array):
    return array.reshape(DEVICES, LOCAL, -1)


def by_shard_map(function, mask, check_vma, names=("d",), sizes=(DEVICES,)):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    where = P(names)
    sharded = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(names), P(), P(), where),
        out_specs=(P(names), P()),
        check_vma=check_vma,
    )
    return lambda x, scale, bias: sharded(x, scale, bias, mask)


def by_mapping(mapping, function, mask, **options):
    mapped = mapping(function, in_axes=(0, None, None, 0), axis_name="d", **options)

    def whole(x, scale, bias):
        y, seen = mapped(split(x), scale, bias, None if mask is None else split(mask))
        return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[0], seen)

    return whole


def normalize(x, scale, bias, where, **options):
    return jaxnorm.batch_norm(x, scale, bias, where=where, **options)


CONTEXTS = {
    "shard_map": partial(by_shard_map, check_vma=True),
    "shard_map unchecked": partial(by_shard_map, check_vma=False),
    "pmap": partial(by_mapping, jax.pmap),
    "vmap": partial(by_mapping, jax.vmap),
}


def everything(function, x, scale, bias):
    """Result, moments, gradients and a derivative of gradients of a loss of both."""

    def loss(x, scale, bias):
        y, seen = function(x, scale, bias)
        return jnp.sin(y).sum() + (seen.mean**2 * jnp.cos(seen.var)).sum(), (y, seen)

    gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
    along = tuple(jnp.cos(a) for a in (x, scale, bias))
    primals, tangents, aux = jax.jvp(gradient, (x, scale, bias), along, has_aux=True)
    return primals, tangents, aux


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("context", CONTEXTS)
def test_devices_together_are_one(x64, quick_compile, arrays, context, mask):
    mask = masks()[mask]
    together = CONTEXTS[context](partial(normalize, axis_name="d"), mask)
    alone = partial(normalize, where=mask)
    arrays = jax.tree.map(jnp.asarray, arrays)
    chex.assert_trees_all_close(everything(together, *arrays), everything(alone, *arrays), **CLOSE)


@pytest.mark.parametrize("mask", [pytest.param("no mask", marks=pytest.mark.slow), "per feature"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_groups_of_devices_are_batches_of_their_own(x64, quick_compile, arrays, context, mask):
    """Groups of different sizes, also where JAX has no collective over groups."""
    mask = masks()[mask]

    def grouped(x, scale, bias, where):
        options = dict(axis_name="d", axis_index_groups=GROUPS)
        y, _ = normalize(x, scale, bias, where, **options)
        return y, jaxnorm.moments(x, 0, where=where, axis_name="d")

    def alone(x, scale, bias):
        parts = [np.concatenate([np.arange(LOCAL) + LOCAL * d for d in group]) for group in GROUPS]
        y = jnp.zeros_like(x)
        for rows in parts:
            where = None if mask is None else mask[rows]
            y = y.at[rows].set(normalize(x[rows], scale, bias, where)[0])
        return y, jaxnorm.moments(x, 0, where=mask)

    arrays = jax.tree.map(jnp.asarray, arrays)
    together = CONTEXTS[context](grouped, mask)
    chex.assert_trees_all_close(everything(together, *arrays), everything(alone, *arrays), **CLOSE)


@pytest.mark.parametrize("check_vma", [True, False])
def test_several_names_at_once(x64, quick_compile, arrays, check_vma):
    mask = masks()["a device with none"]
    names = ("a", "b")
    together = by_shard_map(
        partial(normalize, axis_name=names), mask, check_vma, names=names, sizes=(2, 4)
    )
    arrays = jax.tree.map(jnp.asarray, arrays)
    expected = everything(partial(normalize, where=mask), *arrays)
    chex.assert_trees_all_close(everything(together, *arrays), expected, **CLOSE)


def test_sharded_arrays_under_jit_need_no_name(x64, arrays):
    x, scale, bias = jax.tree.map(jnp.asarray, arrays)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
    function = jax.jit(lambda *a: everything(partial(normalize, where=None), *a))
    expected = function(x, scale, bias)
    chex.assert_trees_all_close(function(sharded, scale, bias), expected, **CLOSE)


@pytest.mark.parametrize("spec", [P("a", "b"), P(None, "b"), P(("a", "b"))], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_explicit_mesh_axes_under_jit(arrays, spec, masked):
    """Also with features on several devices, where shapes alone would not make arrays match."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(np.concatenate([arrays[0]] * 2, 1)[:, :4], jnp.float32)
    where = jnp.arange(len(x))[:, None] % 3 > 0 if masked else None
    start = jaxnorm.Stats(jnp.zeros(4), jnp.ones(4))

    def step(x, where):
        def loss(x):
            y, seen = jaxnorm.batch_norm(x, where=where)
            return jnp.sin(y).sum(), (y, seen)

        gradient, (y, seen) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, jaxnorm.update_running(start, seen)[0]

    expected = step(x, where)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, spec))
        found = jax.tree.map(np.asarray, jax.jit(step)(sharded, where))
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=1e-5)


def test_large_means_on_many_devices():
    rng = np.random.default_rng(0)
    x = (1e4 + 0.1 * np.arange(DEVICES)[:, None, None] + rng.normal(size=(DEVICES, 512, 2))).astype(
        np.float32
    )
    together = jax.pmap(partial(jaxnorm.moments, axes=0, axis_name="d"), axis_name="d")(x)
    exact = x.astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(together.mean[0], exact.mean(0), atol=6e-4)
    np.testing.assert_allclose(together.var[0], exact.var(0), rtol=1e-5)


def test_a_group_with_nan_leaves_the_others_alone():
    x = jnp.ones((DEVICES, LOCAL, 1)).at[:, 0].set(0).at[0].set(jnp.nan)
    seen = jax.vmap(
        lambda x: jaxnorm.moments(x, 0, axis_name="d", axis_index_groups=GROUPS), axis_name="d"
    )(x)
    assert jnp.isfinite(seen.var[:, 0]).tolist() == [d not in GROUPS[0] for d in range(DEVICES)]


# The modules.


@pytest.mark.parametrize("mapping", [jax.pmap, jax.vmap])
def test_linen_layer_on_devices(arrays, mapping):
    """Initialized where no axis is mapped, trained where it is, with a shard that has no rows."""
    x = split(np.asarray(arrays[0], np.float32))
    mask = split(masks()["a device with none"])
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.5, axis_name="d")
    variables = layer.init(jax.random.key(0), x[0])
    assert variables["batch_stats"]["mean"].tolist() == [0] * FEATURES
    step = mapping(
        lambda x, m: layer.apply(variables, x, mask=m, mutable=["batch_stats"]), axis_name="d"
    )
    y, updated = step(x, mask)
    alone = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.5)
    expected, stats = alone.apply(
        variables, x.reshape(-1, FEATURES), mask=mask.reshape(-1, 1), mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-5)
    for device in range(DEVICES):
        found = jax.tree.map(lambda leaf, device=device: leaf[device], updated)
        chex.assert_trees_all_close(found, stats, rtol=1e-5)


def test_nnx_layer_on_devices(arrays):
    x = split(np.asarray(arrays[0], np.float32))
    layer, alone = (
        jaxnorm.nnx.BatchNorm(FEATURES, momentum=0.5, axis_name=name, rngs=nnx.Rngs(0))
        for name in ("d", None)
    )

    def step(layer, x):
        return layer(x)

    shared = nnx.StateAxes({...: None})
    y = nnx.vmap(step, in_axes=(shared, 0), axis_name="d")(layer, x)
    np.testing.assert_allclose(y.reshape(-1, FEATURES), alone(x.reshape(-1, FEATURES)), atol=1e-5)
    np.testing.assert_allclose(layer.var[...], alone.var[...], rtol=1e-5)


def test_pmap_without_devices(arrays):
    """The same code runs on one device when pmap is faked, as chex does for debugging."""
    x = split(np.asarray(arrays[0], np.float32))
    with chex.fake_pmap_and_jit():
        seen = jax.pmap(partial(jaxnorm.moments, axes=0, axis_name="d"), axis_name="d")(x)
    np.testing.assert_allclose(seen.mean[0], x.reshape(-1, FEATURES).mean(0), rtol=1e-5)
