"""Mistakes with ghost batches."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxnorm
from mistakes import name_error, type_error, value_error, while_tracing
from mistakes.layers import linen_layer, nnx_layer, zeros

X = zeros(6, 2, 3)
GROUPS_OF_DEVICES = {"axis_name": "d", "axis_index_groups": [[0], [1]]}


def by_groups(size, x=X, **options):
    return jaxnorm.ghost_batches(jaxnorm.batch_norm, size)(x, **options)


def on_devices(size, devices=4):
    """Of six examples each."""
    step = partial(by_groups, size, axis_name="d")
    return jax.vmap(lambda x: step(x=x), axis_name="d")(jnp.zeros((devices, 6, 2, 3)))


def exported(function, shape):
    """Traced with symbolic sizes."""
    sizes = jax.export.symbolic_shape(shape)
    jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(sizes, jnp.float32))


@while_tracing
def test_sizes():
    for size in (2.0, True, None, "many"):
        with type_error(f"ghost_batches: the size {size!r} … must be an integer … Use 32"):
            by_groups(size)
    with type_error("BatchNorm: the size '2' of ghost batches must be an integer"):
        linen_layer("BatchNorm", X, train=True, ghost_batch_size="2")
    with type_error("BatchNorm(num_features=3): the size '2' of ghost batches must be an integer"):
        nnx_layer("BatchNorm", 3, ghost_batch_size="2")
    for size in (0, -2):
        with value_error(f"ghost_batches: ghost batches of {size} examples hold nothing … Use 32"):
            by_groups(size)
    with value_error("IterNorm(num_features=3): ghost batches of 0 examples"):
        nnx_layer("IterNorm", 3, ghost_batch_size=0)


@while_tracing
def test_examples_that_do_not_divide():
    with value_error("batch_norm: 6 examples do not make ghost batches of 4 … Use 3, or"):
        by_groups(4)
    with value_error("batch_norm: 6 examples do not make ghost batches of 32 … Use 6, or"):
        by_groups(32)
    on_each = "batch_norm: 6 examples on each of 4 devices do not make …"
    with value_error(f"{on_each} of 8 … Use 6, or"):
        on_devices(8)
    with value_error(f"{on_each} of 18 … Use 24, or"):
        on_devices(18)
    with value_error("SwitchableNorm(num_features=3): 6 examples do not make ghost batches of 4"):
        nnx_layer("SwitchableNorm", 3, ghost_batch_size=4)(X)

    with value_error("batch_norm: b examples, a symbolic size, … of 2 … symbolic_shape('2*b,"):
        exported(partial(by_groups, 2), "b, 5, 6")
    with value_error("group_norm: f features cannot be split with num_groups=2. … '2*f'"):
        exported(lambda x: jaxnorm.group_norm(x, num_groups=2), "5, f")


@while_tracing
def test_axes():
    along_examples = "batch_norm: ghost batches take examples along axis 0 …"
    for axis in (0, (-1, -3)):
        with value_error(f"{along_examples} (6, 2, 3) … [examples, "):
            by_groups(2, axis=axis)
    with value_error(f"{along_examples} shape ()"):
        by_groups(2, jnp.float32(0), axis=())
    with name_error("batch_norm: axis_name='d' is not bound"):
        by_groups(2, axis_name="d")
    and_groups = "ghost batches of 2 examples and axis_index_groups … Drop one"
    with value_error(f"batch_norm: {and_groups}"):
        by_groups(2, axis_index_groups=[[0, 1]])
    with value_error(f"BatchNorm: {and_groups}"):
        linen_layer("BatchNorm", X, train=True, ghost_batch_size=2, **GROUPS_OF_DEVICES)
    with value_error(f"BatchNorm(num_features=3): {and_groups}"):
        nnx_layer("BatchNorm", 3, ghost_batch_size=2, **GROUPS_OF_DEVICES)

    with value_error("InstanceNorm: ghost_batch_size=2 would group examples … Drop it"):
        linen_layer("InstanceNorm", X, ghost_batch_size=2)
    with value_error("InstanceNorm(num_features=3): ghost_batch_size=2 would group … Drop it"):
        nnx_layer("InstanceNorm", 3, ghost_batch_size=2)
