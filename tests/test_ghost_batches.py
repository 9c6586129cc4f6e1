"""Ghost batches: groups of k examples are batches of their own, wherever their examples lie.

The reference is a loop over the groups with the plain function, and the evidence of the whole
batch: on four devices, in every mapped context, in float64. Then what compiled programs send. The
layers, against the papers, are in `test_ghost_layers.py`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.diagnose import collectives

EXAMPLES, DEVICES, LOCAL, FEATURES = 16, 4, 4, 4
SHAPE = (EXAMPLES, 2, FEATURES)
CLOSE = dict(rtol=1e-9, atol=1e-9)
EXACT = pytest.mark.usefixtures("x64", "quick_compile")


class Method(NamedTuple):
    """A function that can be taken over ghost batches, its arguments before scale and bias."""

    function: Callable[..., Any]
    first: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}

    def __call__(self, x, scale, bias, where=None, *, size=None, **options):
        function = self.function if size is None else jaxnorm.ghost_batches(self.function, size)
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), self.first)
        return function(x, *first, scale, bias, where=where, **self.options, **options)


RUNNING = jaxnorm.Stats(np.full(FEATURES, 0.3), np.full(FEATURES, 1.7))
IN_PAIRS = {"num_groups": None, "group_size": 2, "epsilon": 0.1}
METHODS = {
    "batch_norm": Method(jaxnorm.batch_norm),
    "batch_renorm": Method(jaxnorm.batch_renorm, (RUNNING,), {"rmax": 1.2, "dmax": 0.1}),
    "ibn_a": Method(jaxnorm.ibn_a),
    "switchable_norm": Method(
        jaxnorm.switchable_norm, (np.array([0.3, 0.1, 0.8]), np.array([0.5, 0.2, 0.9]))
    ),
    "decorrelated_batch_norm": Method(jaxnorm.decorrelated_batch_norm, (), IN_PAIRS),
    "iter_norm": Method(jaxnorm.iter_norm, (), IN_PAIRS),
}


def inputs(dtype=np.float64):
    """An input whose groups differ, scale, bias, and weights.

    Groups of two and of eight have unequal counts in it, and some of both have none.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=SHAPE) + np.arange(EXAMPLES)[:, None, None] / 4
    mask = (rng.random((*SHAPE[:-1], 1)) < 0.7) * rng.uniform(0.2, 1.8, (*SHAPE[:-1], 1))
    mask[2:4] = mask[8:] = 0
    return x.astype(dtype), 1 + rng.normal(size=FEATURES), rng.normal(size=FEATURES), mask


def one_by_one(method, size, x, scale, bias, where):
    """Each group by the plain function, and the evidence of the whole batch."""

    def of_group(group):
        return method(group[0], scale, bias, where=group[1])[0]

    groups = (None if a is None else a.reshape(-1, size, *a.shape[1:]) for a in (x, where))
    y = jax.lax.map(of_group, tuple(groups)).reshape(x.shape)
    return y, method(x, scale, bias, where=where)[1]


def with_gradients(function):
    """Result, evidence, and the gradients of a loss of both."""

    def loss(x, scale, bias, where):
        y, seen = function(x, scale, bias, where)
        known = sum((leaf * jnp.cos(leaf)).sum() for leaf in jax.tree.leaves(seen)[1:])
        return jnp.sin(y).sum() + known, (y, seen)

    return jax.grad(loss, (0, 1, 2), has_aux=True)


@functools.cache
def expected(name, size, masked=True):
    """In float64, once for all contexts."""
    *arrays, mask = inputs()
    reference = with_gradients(partial(one_by_one, METHODS[name], size))
    return jax.tree.map(np.asarray, jax.jit(reference)(*arrays, mask if masked else None))


# The contexts: each takes a function of (x, scale, bias, where) of one device to one of the whole.


def mesh_of(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("d", "m")[: len(sizes)], axis_types=(kind,) * len(sizes))


def alone(function):
    return partial(function, axis_name=None)


def by_sharding(put, function):
    """Arrays that lie on several devices: no names."""

    def whole(x, scale, bias, where):
        return function(put(x), scale, bias, None if where is None else put(where))

    return whole


def by_shard_map(check_vma, function, names="d", mesh=None):
    def whole(x, scale, bias, where):
        sharded = jax.shard_map(
            partial(function, axis_name=names),
            mesh=mesh_of(DEVICES) if mesh is None else mesh,
            in_specs=(P(names), P(), P(), P(names)),
            out_specs=(P(names), P()),
            check_vma=check_vma,
        )
        return sharded(x, scale, bias, where)

    return whole


def by_mapping(mapping, function):
    mapped = mapping(partial(function, axis_name="d"), in_axes=(0, None, None, 0), axis_name="d")

    def whole(x, scale, bias, where):
        x, where = (
            None if array is None else array.reshape(DEVICES, LOCAL, *array.shape[1:])
            for array in (x, where)
        )
        y, seen = mapped(x, scale, bias, where)
        return y.reshape(SHAPE), jax.tree.map(lambda leaf: leaf[0], seen)

    return whole


CONTEXTS = {
    "one device": lambda function: function,
    "sharded": partial(by_sharding, lambda array: jax.lax.with_sharding_constraint(array, P("d"))),
    "sharded, explicit": partial(by_sharding, lambda array: jax.sharding.reshard(array, P("d"))),
    "shard_map": partial(by_shard_map, True),
    "shard_map unchecked": partial(by_shard_map, False),
    "pmap": partial(by_mapping, jax.pmap),
    "vmap": partial(by_mapping, jax.vmap),
}


def mesh_in(context):
    explicit = context == "sharded, explicit"
    return mesh_of(DEVICES, kind=AxisType.Explicit if explicit else AxisType.Auto)


def run(context, function, *arguments):
    """Result, evidence and gradients of `function` of one device, taken in a context."""
    with jax.set_mesh(mesh_in(context)):
        found = jax.jit(with_gradients(CONTEXTS[context](function)))(*arguments)
    return jax.tree.map(np.asarray, found)


# The laws.


IN_SHORT = {(context, "batch_norm") for context in CONTEXTS}
IN_SHORT |= {("shard_map", name) for name in METHODS}


def sweep(contexts):
    cases = itertools.product(contexts, METHODS)
    marks = {case: () if case in IN_SHORT else pytest.mark.slow for case in cases}
    return pytest.mark.parametrize(
        ("context", "name"), [pytest.param(*case, marks=mark) for case, mark in marks.items()]
    )


@sweep(CONTEXTS)
@EXACT
def test_two_devices_for_each_group(context, name):
    found = run(context, partial(METHODS[name], size=2 * LOCAL), *inputs())
    chex.assert_trees_all_close(found, expected(name, 2 * LOCAL), **CLOSE)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "batch_norm" else pytest.mark.slow) for n in METHODS]
)
@pytest.mark.parametrize("context", CONTEXTS)
@EXACT
def test_two_groups_on_each_device(context, name):
    found = run(context, partial(METHODS[name], size=LOCAL // 2), *inputs())
    chex.assert_trees_all_close(found, expected(name, LOCAL // 2), **CLOSE)


@pytest.mark.parametrize("size", [1, LOCAL, EXAMPLES])
@pytest.mark.parametrize("context", ["one device", "shard_map"])
@EXACT
def test_groups_of_other_sizes(context, size):
    """Of one example, of all of a device, and of all; without a mask."""
    found = run(context, partial(METHODS["batch_norm"], size=size), *inputs()[:-1], None)
    chex.assert_trees_all_close(found, expected("batch_norm", size, masked=False), **CLOSE)


@EXACT
def test_second_derivatives():
    """The change of the gradients along a direction."""
    size = 2 * LOCAL

    def along(function):
        gradient = with_gradients(function)

        def derivative(x, scale, bias, where):
            primals = x, scale, bias
            tangents = tuple(jnp.cos(3 * primal) for primal in primals)
            return jax.jvp(lambda *p: gradient(*p, where)[0], primals, tangents)[1]

        return jax.jit(derivative)(*inputs())

    method = METHODS["batch_norm"]
    reference = along(partial(one_by_one, method, size))
    with jax.set_mesh(mesh_of(DEVICES)):
        for context in ("one device", "shard_map"):
            found = along(CONTEXTS[context](partial(method, size=size)))
            chex.assert_trees_all_close(found, reference, **CLOSE)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids=str)
@EXACT
def test_several_names_at_once(names):
    """The devices are counted in the order of the names."""
    size = 2 * LOCAL
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    whole = by_shard_map(True, partial(METHODS["batch_norm"], size=size), names, mesh)
    found = jax.jit(with_gradients(whole))(*inputs())
    chex.assert_trees_all_close(found, expected("batch_norm", size), **CLOSE)


@EXACT
def test_a_mask_for_all_examples():
    """Of size 1 along the examples."""
    x, scale, bias, mask = inputs()
    together = jax.jit(with_gradients(partial(METHODS["batch_norm"], size=2)))
    found = together(x, scale, bias, mask[:1])
    spread = together(x, scale, bias, np.broadcast_to(mask[:1], mask.shape))
    chex.assert_trees_all_close(found, spread, **CLOSE)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "batch_norm" else pytest.mark.slow) for n in METHODS]
)
@pytest.mark.parametrize(
    "spec",
    [
        P("d", "m"),
        P("d", None, "m"),
        pytest.param(P(("d", "m")), marks=pytest.mark.slow),
        pytest.param(P(None, "m"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("quick_compile")
def test_explicit_axes_of_space_and_of_features(spec, name):
    """Evidence lies on the devices where the plain function has it."""
    method, (x, *rest) = METHODS[name], inputs(np.float32)
    expected = jax.jit(with_gradients(partial(one_by_one, method, 2)))(x, *rest)
    mesh = mesh_of(4, 2, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, spec))
        found = jax.jit(with_gradients(partial(method, size=2)))(x, *rest)
        plain = jax.jit(partial(method, size=None))(x, *rest)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(plain), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    found, expected = jax.tree.map(np.asarray, (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


# Numbers as they are in practice.


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("context", ["one device", "shard_map"])
def test_offset_means(context, size):
    """1e4 standard deviations in float32, against NumPy in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, 64, FEATURES)) + 0.2 * np.arange(EXAMPLES)[:, None, None]
    x = (1e4 + x).astype(np.float32)
    scale, bias, mask = np.ones(FEATURES), np.zeros(FEATURES), np.ones((EXAMPLES, 1, 1), bool)
    with jax.set_mesh(mesh_of(DEVICES)):
        for where in (None, mask):
            whole = CONTEXTS[context](partial(METHODS["batch_norm"], size=size))
            y, seen = jax.jit(whole)(x, scale, bias, where)
            groups = [oracles.batch_norm(part)[0] for part in np.split(x, EXAMPLES // size)]
            _, count, mean, var = oracles.batch_norm(x)
            np.testing.assert_allclose(y, np.concatenate(groups), atol=2e-3)
            np.testing.assert_array_equal(seen.count, count)
            np.testing.assert_allclose(seen.mean, mean, atol=1e-3)
            # The means of groups are kept in float32, of which a unit is 1e-3 here.
            np.testing.assert_allclose(seen.var, var, rtol=1e-3)


@pytest.mark.parametrize("name", ["batch_norm", "ibn_a", "iter_norm"])
@pytest.mark.usefixtures("quick_compile")
def test_narrow_input_in_strict_modes(name):
    """The result is narrow, the evidence wide; NaN under the mask stays there."""
    x, scale, bias, mask = inputs(jnp.bfloat16)
    x = jnp.where(mask, x, jnp.nan)
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    step = jax.jit(partial(METHODS[name], size=4))
    with jax.numpy_dtype_promotion("strict"):
        y, seen = step(x, scale, bias, mask)
    wide, wide_seen = step(x.astype(jnp.float32), scale, bias, mask)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal(seen, wide_seen)
    assert jnp.isfinite(wide).all()
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 2, 0), (4, 0, 3)], ids=str)
def test_nothing_to_normalize(shape):
    """As without ghost batches."""
    x = jnp.zeros(shape)
    found = jaxnorm.ghost_batches(jaxnorm.batch_norm, 2)(x)
    chex.assert_trees_all_equal(found, jaxnorm.batch_norm(x))


def test_functions_of_ones_own():
    """Also such as have no name, with arguments by name, and input of NumPy."""
    x, scale, bias, _ = inputs(np.float32)
    own = partial(jaxnorm.batch_norm, epsilon=0.1)
    found = jaxnorm.ghost_batches(own, np.int64(4))(x, bias=bias, scale=scale)
    expected = jaxnorm.ghost_batches(jaxnorm.batch_norm, 4)(x, scale, bias, epsilon=0.1)
    chex.assert_trees_all_equal(found, expected)
    assert jaxnorm.ghost_batches(jaxnorm.batch_norm, 4).__name__ == "batch_norm"


@pytest.mark.parametrize("shift", [5.0, 1e6, np.nan])
@EXACT
def test_a_shift_does_not_change_what_is_pooled(shift):
    """Near the mean, too far off, and none at all; in value and gradient, over an axis or two."""
    rng = np.random.default_rng(0)
    x = 5 + rng.normal(size=(3, 8, 6))

    def pooled(x, **options):
        each = jax.vmap(partial(jaxnorm.comoments, num_groups=2))(x)
        seen = jaxnorm.pool_comoments(each, 0, **options)
        return sum((leaf * jnp.cos(leaf)).sum() for leaf in jax.tree.leaves(seen)), seen

    per_feature = np.full((2, 3), shift)
    step = jax.jit(jax.value_and_grad(pooled, has_aux=True))
    reference = step(x)
    for given in (shift, per_feature):
        moved = jax.jit(jax.value_and_grad(partial(pooled, shift=given), has_aux=True))
        chex.assert_trees_all_close(moved(x), reference, **CLOSE)


# Traffic.


def traffic(context, function, *arguments):
    """What runs always, by kind, and what runs sometimes."""
    mesh = mesh_in(context)
    with jax.set_mesh(mesh):
        lying = jax.NamedSharding(mesh, P("d"))
        x, *rest = arguments
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying)
        found = collectives(jax.jit(function).lower(x, *rest).compile())
    return (
        [each.kind for each in found if not each.conditional],
        [each.kind for each in found if each.conditional],
    )


def steps(context, name, size):
    """Result and gradient by the input, without the evidence and with it."""
    whole = CONTEXTS[context](partial(METHODS[name], size=size))

    def step(x, scale, bias, where):
        def loss(x):
            y, seen = whole(x, scale, bias, where)
            return jnp.sin(y).sum(), (y, seen)

        gradient, (y, seen) = jax.grad(loss, has_aux=True)(x)
        return gradient, y, seen

    return lambda *arguments: step(*arguments)[:2], step


@sweep(["sharded", "sharded, explicit", "shard_map", "shard_map unchecked"])
def test_groups_on_one_device_need_no_traffic(context, name):
    """Neither forward nor backward; their evidence is pooled by one all-reduce."""
    arrays = inputs(np.float32)
    for size in (LOCAL // 2, LOCAL) if name == "batch_norm" else (LOCAL // 2,):
        alone, with_evidence = steps(context, name, size)
        assert traffic(context, alone, *arrays) == ([], [])
        always, sometimes = traffic(context, with_evidence, *arrays)
        assert always == ["all-reduce"]
        assert set(sometimes) == {"all-reduce"}


@pytest.mark.parametrize("name", ["batch_norm", "iter_norm"])
def test_groups_on_several_devices(name):
    """One all-reduce forward, one for the evidence, one backward."""
    whole, arrays = by_shard_map(True, partial(METHODS[name], size=2 * LOCAL)), inputs(np.float32)
    alone, _ = steps("shard_map", name, 2 * LOCAL)
    assert traffic("shard_map", whole, *arrays)[0] == ["all-reduce"] * 2
    assert traffic("shard_map", alone, *arrays)[0] == ["all-reduce"] * 2
