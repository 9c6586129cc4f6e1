"""What a training step of each method sends: one all-reduce forward and one backward.

Read off the compiled program. Collectives in branches do not count: they are for batches whose mean
is far from the running one (`test_one_pass.py`).
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from subjects import drawn, in_turn
from test_devices_kinds import lies, mesh_of, params_lie
from test_devices_methods import DEVICES, POOLED

import jaxnorm
from jaxnorm.diagnose import collectives

ROWS = {"LayerNorm", "GroupNorm", "InstanceNorm", "IBNb"}
"""Methods with a mean of each example, for which there is no running mean."""


def step_of(subject, way):
    """Value, new state and gradients of one training step, and its arguments as they lie."""
    mesh = mesh_of(AxisType.Auto)
    x, mask = subject.input(), subject.some_mask()
    layer = subject.layer("linen", x, **({"axis_name": "d"} if way == "shard_map" else {}))
    params = drawn(layer.params)
    places = params_lie(subject, x, params)

    def train(params, x, mask):
        return layer.train(params, layer.stats, x, mask=mask)

    if way == "shard_map":
        inputs = places, lies(subject, x), lies(subject, mask)
        train = jax.shard_map(train, mesh=mesh, in_specs=inputs, out_specs=(inputs[1], P()))

    def step(params, x, mask, dy):
        y, pull, new = jax.vjp(lambda params, x: train(params, x, mask), params, x, has_aux=True)
        return y, new, pull(dy * jnp.cos(y))

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    spread = put(x, lies(subject, x))
    spread_params = {name: put(p, places[name]) for name, p in params.items()}
    return step, (spread_params, spread, put(mask, lies(subject, mask)), jnp.ones_like(spread))


@pytest.mark.parametrize(("subject", "way"), in_turn(POOLED, ["jit", "shard_map"]))
def test_one_all_reduce_each_way(subject, way):
    step, arguments = step_of(subject, way)
    traffic = collectives(jax.jit(step).lower(*arguments).compile())
    always = [one for one in traffic if not one.conditional]
    # Of rows the compiler alone knows that they are spread: it takes the two passes in turn.
    by_compiler = way == "jit" and subject.method in ROWS
    assert [one.kind for one in always] == ["all-reduce"] * (3 if by_compiler else 2)
    assert not any(one.repeated for one in always)
    assert len(always[0].shapes) <= 3
    x = arguments[1]
    if x.shape[subject.split] > DEVICES:  # Otherwise a device's sums are of the input's size.
        assert all(size_of(one) < x.size // DEVICES for one in always)


def size_of(collective):
    """The number of elements of its largest operand, such as "f32[2,3]"."""
    dimensions = (shape[shape.index("[") + 1 : -1].split(",") for shape in collective.shapes)
    return max(math.prod(int(n) for n in sizes if n) for sizes in dimensions)


def test_a_network_sends_as_often_as_it_has_layers():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def network(x):
        for _ in range(3):
            x = jnp.sin(jaxnorm.batch_norm(x, axis_name=("a", "b"))[0])
        return x

    sharded = jax.shard_map(network, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    gradient = jax.jit(jax.grad(lambda x: sharded(x).sum()))
    traffic = collectives(gradient.lower(jnp.ones((8, 4))).compile())
    assert sum(not one.conditional for one in traffic) == 6
