"""Mistakes with ghost batches. Part of the table of `test_errors.py`."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from mistakes import KEY, Row

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

X = jnp.zeros((6, 2, 3))


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


def linen(method="BatchNorm", **options):
    getattr(jaxnorm.linen, method)(**options).init(KEY, X)


def nnx_layer(method="BatchNorm", **options):
    getattr(jaxnorm.nnx, method)(3, rngs=nnx.Rngs(0), **options)


ROWS = [
    *(
        Row(
            f"ghost batches of {size!r}",
            lambda size=size: by_groups(size),
            TypeError,
            rf"^ghost_batches: the size {size!r} .*must be an integer.*Use 32",
        )
        for size in (2.0, True, None, "many")
    ),
    Row(
        "ghost batches of text, Linen",
        lambda: linen(ghost_batch_size="2", use_running_average=False),
        TypeError,
        r"^BatchNorm: the size '2' of ghost batches must be an integer",
    ),
    Row(
        "ghost batches of text, NNX",
        lambda: nnx_layer(ghost_batch_size="2"),
        TypeError,
        r"^BatchNorm\(num_features=3\): the size '2' of ghost batches must be an integer",
    ),
    Row(
        "ghost batches of any number of examples",
        lambda: exported(partial(by_groups, 2), "b, 5, 6"),
        ValueError,
        r"^batch_norm: b examples, a symbolic size, .* ghost batches of 2.*symbolic_shape\('2\*b,",
    ),
    Row(
        "groups of any number of features",
        lambda: exported(lambda x: jaxnorm.group_norm(x, num_groups=2), "5, f"),
        ValueError,
        r"^group_norm: f features cannot be split with num_groups=2\..*'2\*f'",
    ),
    *(
        Row(
            f"ghost batches of {size} examples",
            lambda size=size: by_groups(size),
            ValueError,
            rf"^ghost_batches: ghost batches of {size} examples hold nothing.*Use 32",
        )
        for size in (0, -2)
    ),
    Row(
        "ghost batches of nothing, NNX",
        lambda: nnx_layer("IterNorm", ghost_batch_size=0),
        ValueError,
        r"^IterNorm\(num_features=3\): ghost batches of 0 examples",
    ),
    Row(
        "ghost batches that do not divide the examples",
        lambda: by_groups(4),
        ValueError,
        r"^batch_norm: 6 examples do not make ghost batches of 4.*Use 3, or",
    ),
    Row(
        "fewer examples than a ghost batch",
        lambda: by_groups(32),
        ValueError,
        r"^batch_norm: 6 examples do not make ghost batches of 32.*Use 6, or",
    ),
    Row(
        "ghost batches of parts of devices",
        lambda: on_devices(8),
        ValueError,
        r"^batch_norm: 6 examples on each of 4 devices do not make .* of 8.*Use 6, or",
    ),
    Row(
        "ghost batches of three of four devices",
        lambda: on_devices(18),
        ValueError,
        r"^batch_norm: 6 examples on each of 4 devices do not make .* of 18.*Use 24, or",
    ),
    Row(
        "ghost batches of a layer that do not divide the examples",
        lambda: jaxnorm.nnx.SwitchableNorm(3, rngs=nnx.Rngs(0), ghost_batch_size=4)(X),
        ValueError,
        r"^SwitchableNorm\(num_features=3\): 6 examples do not make ghost batches of 4",
    ),
    *(
        Row(
            f"ghost batches where features lie along {axis}",
            lambda axis=axis: by_groups(2, axis=axis),
            ValueError,
            r"^batch_norm: ghost batches take examples along axis 0.*\(6, 2, 3\).*\[examples, ",
        )
        for axis in (0, (-1, -3))
    ),
    Row(
        "ghost batches of a scalar",
        lambda: by_groups(2, jnp.float32(0), axis=()),
        ValueError,
        r"^batch_norm: ghost batches take examples along axis 0.*shape \(\)",
    ),
    Row(
        "ghost batches and groups of devices",
        lambda: by_groups(2, axis_index_groups=[[0, 1]]),
        ValueError,
        r"^batch_norm: ghost batches of 2 examples and axis_index_groups.*Drop one",
    ),
    *(
        Row(
            f"ghost batches and groups of devices, {name}",
            lambda make=make: make(ghost_batch_size=2, axis_name="d", axis_index_groups=[[0], [1]]),
            ValueError,
            r"^BatchNorm.*: ghost batches of 2 examples and axis_index_groups.*Drop one",
        )
        for name, make in (("Linen", partial(linen, use_running_average=False)), ("NNX", nnx_layer))
    ),
    *(
        Row(
            f"ghost batches of instance norm, {name}",
            lambda make=make: make("InstanceNorm", ghost_batch_size=2),
            ValueError,
            r"^InstanceNorm.*: ghost_batch_size=2 would group examples.*Drop it",
        )
        for name, make in (("Linen", linen), ("NNX", nnx_layer))
    ),
    Row(
        "ghost batches over an axis that is not mapped",
        lambda: by_groups(2, axis_name="d"),
        NameError,
        r"^batch_norm: axis_name='d' is not bound",
    ),
]
