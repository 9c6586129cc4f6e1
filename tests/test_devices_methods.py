"""Every method that pools over devices: two devices together are one, in every mapped context.

Compared in float64, apart from what is stored in float32: result, gradients, new state.
"""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from subjects import SUBJECTS, drawn, in_turn

from jaxnorm.methods import METHODS

POOLING = {method.name for method in METHODS if method.devices}
POOLED = [subject for subject in SUBJECTS if subject.method in POOLING]
DEVICES = 2
pytestmark = pytest.mark.usefixtures("x64", "quick_compile")


def pieces(array, axis):
    """The parts of an array on each device, or copies where it is not spread."""
    if array.shape[axis] == 1:
        return jnp.stack([array] * DEVICES)
    return jnp.stack(jnp.split(array, DEVICES, axis))


def by_mapping(mapping, local, axis, params_axis, params, x, mask):
    spread = {name: None if params_axis is None else pieces(p, -1) for name, p in params.items()}
    in_axes = (None if params_axis is None else 0, 0, 0)
    arguments = params if params_axis is None else spread, pieces(x, axis), pieces(mask, axis)
    return mapping(local, in_axes=in_axes, axis_name="d")(*arguments)


def by_shard_map(check_vma, local, axis, params_axis, params, x, mask):
    def along(array):
        axis_of = axis % array.ndim
        return P(*("d" if a == axis_of and array.shape[a] > 1 else None for a in range(array.ndim)))

    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda p: P() if params_axis is None else P("d"), params)

    def leading(params, x, mask):
        return jax.tree.map(lambda leaf: leaf[None], local(params, x, mask))

    sharded = jax.shard_map(
        leading,
        mesh=mesh,
        in_specs=(specs, along(x), along(mask)),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    return sharded(params, x, mask)


CONTEXTS = {
    "vmap": lambda *a: by_mapping(jax.vmap, *a),
    "pmap": lambda *a: by_mapping(jax.pmap, *a),
    "shard_map": lambda *a: by_shard_map(True, *a),
    "shard_map unchecked": lambda *a: by_shard_map(False, *a),
}


@pytest.mark.parametrize(("subject", "context"), in_turn(POOLED, CONTEXTS, always=("shard_map",)))
def test_devices_together_are_one(subject, context):
    x = subject.input(jnp.float64)
    mask = subject.some_weights() if context == "shard_map" else subject.some_mask()
    together = subject.layer("linen", x, axis_name="d")
    alone = subject.layer("linen", x)
    params = {name: p.astype(jnp.float64) for name, p in drawn(alone.params).items()}
    axis = subject.split % x.ndim
    params_axis = -1 if axis == x.ndim - 1 else None

    def whole(params, x, mask):
        y, new = alone.train(params, alone.stats, x, mask=mask)
        return y, new

    def local(params, x, mask):
        y, new = together.train(params, together.stats, x, mask=mask)
        return y, new

    def loss_of(run, join):
        def loss(params, x):
            y, new = run(params, x)
            y, new = join(y, new)
            return jnp.sin(y).sum(), (y, new)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def joined(y, new):
        return jnp.concatenate(list(y), axis), jax.tree.map(lambda leaf: leaf[0], new)

    def mapped(params, x):
        return CONTEXTS[context](local, axis, params_axis, params, x, mask)

    found = loss_of(mapped, joined)(params, x)
    expected = loss_of(lambda p, x: whole(p, x, mask), lambda y, new: (y, new))(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
