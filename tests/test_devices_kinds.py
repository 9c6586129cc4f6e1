"""Every method that pools over devices, on kinds of data and meshes: the answer is that of one.

Beside `test_devices_methods.py`, which goes through the mapped contexts in float64: whole arrays
under `jit`, far means, a device without a valid element, bfloat16.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modules import draw
from subjects import drawn, in_turn
from test_devices_methods import DEVICES, POOLED

import jaxnorm
import jaxnorm.linen

pytestmark = pytest.mark.usefixtures("quick_compile")


def lies(subject, array):
    """Spread along the axis that the subject is pooled over."""
    axis = subject.split % array.ndim
    return P(*("d" if a == axis and n > 1 else None for a, n in enumerate(array.shape)))


def mesh_of(axis_type):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))


def of_step(train):
    """Loss, result, new state and gradients of a training step."""

    def loss(params, x, mask):
        y, new = train(params, x, mask)
        return jnp.sin(y.astype(jnp.float32)).sum(), (y, new)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def params_lie(subject, x, params):
    by_feature = subject.split % x.ndim == x.ndim - 1
    return {name: P("d") if by_feature else P() for name in params}


@pytest.mark.parametrize(
    ("subject", "axis_type"), in_turn(POOLED, [AxisType.Auto, AxisType.Explicit])
)
def test_whole_arrays_under_jit(subject, axis_type):
    explicit = axis_type == AxisType.Explicit
    x, mask = subject.input(), subject.some_weights() if explicit else subject.some_mask()
    layer = subject.layer("linen", x)
    params = drawn(layer.params)
    step = of_step(lambda params, x, mask: layer.train(params, layer.stats, x, mask=mask))
    expected = step(params, x, mask)
    mesh = mesh_of(axis_type)

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        places = params_lie(subject, x, params)
        spread = {name: put(p, places[name]) for name, p in params.items()}
        found = step(spread, put(x, lies(subject, x)), put(mask, lies(subject, mask)))
    found, expected = jax.tree.map(np.asarray, (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"update_every": 2, "debias": True}], ids=str)
@pytest.mark.parametrize(
    ("x_lies", "state_lies"), [(P("d", "m"), P(None)), (P("d"), P("m"))], ids=["features", "state"]
)
def test_the_state_stays_where_it_is(x_lies, state_lies, options):
    """Features of the input lie on other devices of an explicit mesh than the variables."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.5, **options)
    x = draw((2, 16, 4))
    variables = layer.init(jax.random.key(0), x[0])

    def train(stats, x):
        y, updated = layer.apply(variables | {"batch_stats": stats}, x, mutable=["batch_stats"])
        return updated["batch_stats"], y

    scan = jax.jit(lambda stats, x: jax.lax.scan(train, stats, x))
    expected = scan(variables["batch_stats"], x)
    with jax.set_mesh(mesh):
        start = {
            name: jax.device_put(leaf, state_lies if leaf.ndim else P())
            for name, leaf in variables["batch_stats"].items()
        }
        stats, y = scan(start, jax.device_put(x, P(None, *x_lies)))
    assert jax.tree.map(lambda leaf: leaf.sharding, stats) == jax.tree.map(
        lambda leaf: leaf.sharding, start
    )
    found, expected = jax.tree.map(np.asarray, ((stats, y), expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def by_shard_map(subject, train, params, x, mask):
    return jax.shard_map(
        train,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(params_lie(subject, x, params), lies(subject, x), lies(subject, mask)),
        out_specs=(lies(subject, x), P()),
    )


KINDS = {  # dtype, mean, how far two answers may differ
    "far mean": (jnp.float32, 1e4, 3e-3),
    "bfloat16": (jnp.bfloat16, 1.0, 4e-2),
}


@pytest.mark.parametrize(("subject", "kind"), in_turn(POOLED, KINDS))
def test_a_device_without_valid_elements(subject, kind):
    dtype, mean, limit = KINDS[kind]
    x = (mean + subject.input()).astype(dtype)
    mask = subject.some_mask()
    axis = subject.split % x.ndim
    if mask.shape[axis] > 1:
        first = jnp.arange(x.shape[axis]) < x.shape[axis] // DEVICES
        mask &= jnp.expand_dims(first, [a for a in range(x.ndim) if a != axis])
    together, alone = (subject.layer("linen", x, axis_name=name) for name in ("d", None))
    params = {name: p.astype(jnp.float32) for name, p in drawn(alone.params).items()}

    def train(layer):
        return lambda params, x, mask: layer.train(params, layer.stats, x, mask=mask)

    mapped = by_shard_map(subject, train(together), params, x, mask)
    found = of_step(mapped)(params, x, mask)
    expected = of_step(train(alone))(params, x, mask)
    for one in (found, expected):
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(one))
    # Relative to the largest of an array: gradients by x of few examples are large.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        np.testing.assert_allclose(a, b, atol=limit * max(1, np.abs(b).max()), rtol=limit)
