"""One pass about a known shift, or two: the same answer, and the right one, whichever is taken."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import of_batch_norm

import jaxnorm
from jaxnorm.core import pooling
from jaxnorm.diagnose import collectives

DEVICES = 8


@pytest.fixture(autouse=True, scope="module")
def _small_arrays_take_one_pass():
    """What decides for large ones is to decide here, for programs traced from now on."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "SMALL", 0)
        yield
    jax.clear_caches()


def draw(mean, shape=(64, 3), std=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return (mean + std * rng.normal(size=shape)).astype(np.float32)


SHIFTS = {
    "zero": 0.0,
    "exact": 1.0,
    "5 std off": 1 + 5e-4,
    "50 std off": 1 + 5e-3,
    "its square overflows": 1e19,
    "their sum does": 1e14,
}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("masked", [False, True])
def test_right_whatever_the_shift(shift, masked):
    """At a mean of 1e4 standard deviations; the shifts are in units of the mean."""
    x = draw(1e4)
    where = np.arange(64)[:, None] % 3 > 0 if masked else None
    seen = jaxnorm.moments(x, 0, where=where, shift=SHIFTS[shift] * 1e4)
    valid = np.asarray(x, np.float64)[slice(None) if where is None else where[:, 0]]
    np.testing.assert_allclose(seen.mean, valid.mean(0), rtol=1e-7)
    np.testing.assert_allclose(seen.var, valid.var(0), rtol=1e-5)
    assert seen.count.tolist() == [len(valid)] * 3


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_a_spoiled_running_mean_does_not_spoil_the_batch(spoiled):
    x = draw(2.0)
    y, seen = jaxnorm.batch_norm(x, shift=jnp.array([spoiled, 2.0, spoiled]))
    expected, moments = jaxnorm.batch_norm(x)
    chex.assert_trees_all_close((y, seen), (expected, moments), rtol=1e-5, atol=1e-5)


def test_what_the_shift_is_worth():
    """Near, the data are read once: no branch is left that reads them again unasked."""
    x = draw(0.0)
    text = str(jax.make_jaxpr(lambda x: jaxnorm.batch_norm(x, shift=0.0))(x))
    assert text.count("cond[") == 1
    assert "cond[" not in str(jax.make_jaxpr(lambda x: jaxnorm.moments(x, 0))(x))


@pytest.mark.parametrize(("numbers", "devices", "branches"), [(64, 1, 0), (64, 8, 1), (128, 1, 1)])
def test_few_numbers_on_one_device_need_no_branch(monkeypatch, numbers, devices, branches):
    """To read them twice is cheaper than to compile both ways; not so where devices must talk."""
    monkeypatch.setattr(pooling, "SMALL", 128)
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(draw(0.0, (numbers, 1)), NamedSharding(mesh, P("d")))
    program = jax.jit(lambda x: jaxnorm.batch_norm(x, shift=0.0)).lower(x).compile()
    assert program.as_text().count(" conditional(") == branches


HIDDEN = {
    "batch_norm": lambda x, shift: jaxnorm.batch_norm(x, shift=shift, epsilon=1e-3),
    "batch_renorm": lambda x, shift: jaxnorm.batch_renorm(
        x, jaxnorm.Stats(jnp.zeros(3), jnp.ones(3)), rmax=3.0, dmax=5.0, shift=shift
    ),
    "switchable_norm": lambda x, shift: jaxnorm.switchable_norm(
        x[:, None], jnp.ones(3), jnp.ones(3), shift=shift
    ),
    "decorrelated_batch_norm": lambda x, shift: jaxnorm.decorrelated_batch_norm(x, shift=shift),
    "iter_norm": lambda x, shift: jaxnorm.iter_norm(x, shift=shift),
}


@pytest.mark.parametrize("method", HIDDEN)
def test_epsilon_hides_no_lost_digits(method):
    """Evidence is handed out, so it is that of `moments` also far below epsilon."""
    x = draw(5e-3, std=1e-7)
    _, seen = HIDDEN[method](x, 0.0)
    if isinstance(seen, jaxnorm.Moments):
        np.testing.assert_allclose(seen.var, x.var(0, dtype=np.float64), rtol=1e-5)
    else:
        cov = np.asarray(seen.cov[0], np.float64)
        expected = np.cov(x.astype(np.float64).T, bias=True)
        np.testing.assert_allclose(cov, expected, atol=1e-5 * expected.max())
        assert np.linalg.eigvalsh(cov).min() > 0.5 * np.linalg.eigvalsh(expected).min()


def test_constant_features_take_one_pass(monkeypatch):
    """A running mean stops short of a constant; a rare feature is 0 throughout most batches."""
    monkeypatch.setattr(
        pooling,
        "_by_two_passes",
        lambda look, *_: (0.0, look()[1][:1] * jnp.nan, jnp.full((1, 2), jnp.nan)),
    )
    constant = jnp.array([3.7, -1e4])
    x = jnp.broadcast_to(constant, (37, 2))  # a shape of its own: programs are kept

    def twice(x, shift):
        return bool(jnp.isnan(jaxnorm.moments(x, 0, shift=shift).var).any())

    assert not twice(x, constant * (1 + 90 * 2**-23))
    assert twice(x, constant * 1.001)
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    stats = {"mean": jnp.full(2, 0.1), "var": jnp.full(2, 0.3)}
    rare = layer.init(jax.random.key(0), x) | {"batch_stats": stats}
    _, updated = layer.apply(rare, jnp.zeros((37, 2)), mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.297, rtol=1e-6)


def taken(x, shift):
    """Which way a batch goes, told by rounding at a mean of thousands of standard deviations.

    Far means are right to the last digits, since two passes were taken.
    """
    seen = jaxnorm.moments(x, 0, shift=shift)
    return np.abs(np.asarray(seen.var) / np.asarray(x, np.float64).var(0) - 1).max()


def test_the_error_stays_bounded_up_to_the_switch():
    for off in np.linspace(0, 20, 41):
        assert taken(draw(off, (4096, 2)), 0.0) < 1e-5


def mapped(context, function):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    ways = {
        "shard_map": lambda: jax.shard_map(
            function, mesh=mesh, in_specs=(P("d"), P()), out_specs=P()
        ),
        "unchecked": lambda: jax.shard_map(
            function, mesh=mesh, in_specs=(P("d"), P()), out_specs=P(), check_vma=False
        ),
        "pmap": lambda: (
            lambda x, shift: jax.tree.map(
                lambda leaf: leaf[0],
                jax.pmap(function, axis_name="d", in_axes=(0, None))(
                    x.reshape(DEVICES, -1, x.shape[-1]), shift
                ),
            )
        ),
        "vmap": lambda: (
            lambda x, shift: jax.tree.map(
                lambda leaf: leaf[0],
                jax.vmap(function, axis_name="d", in_axes=(0, None))(
                    x.reshape(DEVICES, -1, x.shape[-1]), shift
                ),
            )
        ),
    }
    return ways[context]()


@pytest.mark.parametrize("context", ["shard_map", "unchecked", "pmap", "vmap"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_on_devices(context, offset):
    """Each device of another mean, with the running mean at 0 or at the truth."""
    x = draw(offset, (DEVICES * 32, 2)) + np.repeat(np.arange(DEVICES), 32)[:, None]
    x = x.astype(np.float32)
    exact = np.asarray(x, np.float64)
    whole = mapped(context, lambda x, shift: jaxnorm.moments(x, 0, shift=shift, axis_name="d"))
    for shift in (jnp.zeros(2), jnp.full(2, offset)):
        seen = whole(x, shift)
        np.testing.assert_allclose(seen.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(seen.var, exact.var(0), rtol=1e-5)


@pytest.mark.parametrize("context", ["pmap", "vmap"])
def test_shifts_that_differ_between_devices_do_no_harm(context):
    """As running means do that were kept without an axis name before."""
    x, shift = draw(3.0, (DEVICES, 16, 2)), jnp.arange(2.0 * DEVICES).reshape(DEVICES, 2)
    mapping = getattr(jax, context)
    seen = mapping(lambda x, s: jaxnorm.moments(x, 0, shift=s, axis_name="d"), axis_name="d")(
        x, shift
    )
    exact = np.asarray(x, np.float64).reshape(-1, 2)
    for leaf, expected in ((seen.mean, exact.mean(0)), (seen.var, exact.var(0))):
        np.testing.assert_allclose(leaf, np.broadcast_to(expected, (DEVICES, 2)), rtol=1e-5)


def test_groups_that_would_decide_differently_go_together():
    """One group of devices has a far mean: all must take the branch with its collectives."""
    groups = [[0, 1, 2], [3, 4, 5, 6, 7]]
    x = draw(0.0, (DEVICES * 16, 2)).reshape(DEVICES, 16, 2)
    x[:3] += 1e4
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    function = partial(jaxnorm.moments, axes=1, shift=0.0, axis_name="d", axis_index_groups=groups)
    seen = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(x)
    for members in groups:
        exact = np.asarray(x[members], np.float64).reshape(-1, 2)
        for device in members:
            np.testing.assert_allclose(seen.var[device], exact.var(0), rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_subgroups_by_a_further_mesh_axis(check_vma):
    """Pooled over one mesh axis of two: the other's devices may decide differently."""
    mesh = jax.make_mesh((2, 4), ("apart", "together"), axis_types=(AxisType.Auto,) * 2)
    x = draw(0.0, (8 * 16, 2)).reshape(2, 4 * 16, 2)
    x[0] += 1e4

    def loss(x):
        normalize = partial(jaxnorm.batch_norm, axis_name="together")
        sharded = jax.shard_map(
            lambda x: normalize(x)[0],
            mesh=mesh,
            in_specs=P(("apart", "together")),
            out_specs=P(("apart", "together")),
            check_vma=check_vma,
        )
        y = sharded(x)
        return (y**3).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x.reshape(-1, 2))
    for half in range(2):
        rows = slice(64 * half, 64 * (half + 1))
        expected = of_batch_norm(np.asarray(x[half], np.float64), {}, None)
        np.testing.assert_allclose(y[rows], expected, atol=2e-3)
    alone = jax.grad(lambda x: (jaxnorm.batch_norm(x)[0] ** 3).sum())(x[1])
    np.testing.assert_allclose(gradient[64:], alone, rtol=1e-4, atol=1e-4)


def test_collectives_in_branches_are_for_far_means_alone():
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda x: jaxnorm.batch_norm(x, axis_name="d")[0],
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
    )
    traffic = collectives(jax.jit(sharded).lower(jnp.ones((64, 3))).compile())
    assert [one.conditional for one in traffic] == [False, True, True]


@pytest.mark.parametrize("weighted", [False, True])
def test_pool_about_a_shift_has_all_derivatives(x64, quick_compile, weighted):
    """By mean, variance and count, of first and second order."""
    rng = np.random.default_rng(3)
    count = jnp.asarray(rng.integers(0 if weighted else 4, 5, (5, 2)), jnp.float64)
    count = count.at[0].set(3.0)
    each = jaxnorm.Moments(
        count, jnp.asarray(rng.normal(size=(5, 2))), jnp.asarray(rng.random((5, 2)))
    )

    def loss(each, shift):
        seen = jaxnorm.pool(each, 0, shift=shift)
        return (jnp.sin(seen.mean) * seen.var**2 + jnp.log(seen.count)).sum()

    for shift in (0.1, 1e3):
        both = jax.jit(
            lambda each, shift: (jax.grad(loss)(each, shift), jax.hessian(loss)(each, shift))
        )
        found, expected = both(each, shift), both(each, None)
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


def test_vmap_over_models_takes_each_its_way():
    x = np.stack([draw(0.0), draw(1e4), draw(-5.0)])
    y, seen = jax.vmap(jaxnorm.batch_norm)(x)
    for model in range(3):
        exact = np.asarray(x[model], np.float64)
        np.testing.assert_allclose(seen.var[model], exact.var(0), rtol=1e-5)
        np.testing.assert_allclose(y[model], of_batch_norm(exact, {}, None), atol=2e-3)


def test_the_layer_uses_its_running_mean():
    """The moments are taken about it: a scan of steps at a far mean stays right."""
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.5)
    x = draw(1e4, (4, 64, 3))
    variables = layer.init(jax.random.key(0), x[0])

    def step(stats, x):
        y, updated = layer.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
        return updated["batch_stats"], y

    _, y = lax.scan(step, variables["batch_stats"], x)
    for batch in range(4):
        expected = of_batch_norm(np.asarray(x[batch], np.float64), {}, None)
        np.testing.assert_allclose(y[batch], expected, atol=2e-3)
