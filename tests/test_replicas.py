"""Replicas that ran apart, merged: by float64 NumPy, by laws, in every mapped context."""

from functools import partial

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS, draw
from subjects import SUBJECTS, in_turn

import jaxnorm
from jaxnorm.core.replicas import pool_stats
from jaxnorm.tools import merge_replicas

pytestmark = pytest.mark.usefixtures("quick_compile")
REPLICAS, FEATURES = 4, 3


def pooled(mean, var, weights=None):
    """Along axis 0, in float64."""
    mean, var = np.asarray(mean), np.asarray(var, np.float64)
    mean = mean.astype(np.complex128 if np.iscomplexobj(mean) else np.float64)
    weights = np.ones(len(mean)) if weights is None else np.asarray(weights, np.float64)
    weights = np.broadcast_to(weights.T, mean.T.shape).T
    share = weights / weights.sum(0)
    centre = (share * mean).sum(0)
    return centre, (share * (var + np.abs(mean - centre) ** 2)).sum(0)


def pooled_jointly(mean, cov, weights=None):
    """The same of vectors `[replicas, groups, k]`."""
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    weights = np.ones(len(mean)) if weights is None else np.asarray(weights, np.float64)
    share = np.broadcast_to(weights.T, mean.shape[1::-1]).T
    share = (share / share.sum(0))[..., None]
    centre = (share * mean).sum(0)
    apart = mean - centre
    outer = apart[..., :, None] * apart[..., None, :]
    return centre, (share[..., None] * (cov + outer)).sum(0)


def some_stats(seed=0, mean_dtype=np.float32, shape=(REPLICAS, FEATURES)):
    mean = np.asarray(draw(shape, mean_dtype, seed))
    return jaxnorm.Stats(mean, np.random.default_rng(seed).uniform(0.5, 2, shape).astype("float32"))


def some_joint_stats(seed=0, groups=2, k=3):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(REPLICAS, groups, k, k)).astype(np.float32)
    return jaxnorm.JointStats(
        rng.normal(size=(REPLICAS, groups, k)).astype(np.float32), root @ root.swapaxes(-1, -2)
    )


def assert_stats(found, expected, **limits):
    for leaf, exact in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(leaf, exact, **(dict(rtol=3e-6, atol=3e-6) | limits))


WEIGHTS = {
    "equal": None,
    "one for each replica": np.array([1, 5, 0, 2]),
    "one for each entry": np.random.default_rng(0).integers(0, 9, (REPLICAS, FEATURES)) + 1,
}
EACH_WEIGHT = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())


# The pure function.


@EACH_WEIGHT
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_pooled_statistics(weights, dtype):
    stats = some_stats(mean_dtype=dtype)
    found = pool_stats(stats, axes=0, weights=weights)
    assert_stats(found, pooled(stats.mean, stats.var, weights))


@pytest.mark.parametrize("weights", [None, [1, 5, 0, 2], [[1, 2], [5, 1], [0, 4], [2, 7]]], ids=str)
def test_pooled_covariances(weights):
    stats = some_joint_stats()
    found = pool_stats(stats, axes=0, weights=weights)
    assert isinstance(found, jaxnorm.JointStats)
    assert_stats(found, pooled_jointly(stats.mean, stats.cov, weights))


def test_pooled_about_the_origin():
    """Without means there is no spread of means."""
    var = some_stats().var
    found = pool_stats(jaxnorm.Stats(None, var), axes=0)
    assert found.mean is None
    np.testing.assert_allclose(found.var, var.mean(0), rtol=1e-6)


def test_several_axes():
    stats = some_stats(shape=(2, FEATURES, 5))
    found = pool_stats(stats, axes=(0, -1), weights=np.arange(10).reshape(2, 5))
    flat = [np.moveaxis(leaf, 1, -1).reshape(10, FEATURES) for leaf in (stats.mean, stats.var)]
    assert_stats(found, pooled(*flat, np.arange(10)))


def test_means_of_many_standard_deviations():
    """Equal to what the given float32 means say, which are themselves rounded at 1e4."""
    rng = np.random.default_rng(0)
    mean = (1e4 + rng.normal(size=(64, FEATURES))).astype(np.float32)
    var = rng.uniform(0.5, 2, mean.shape).astype(np.float32)
    assert_stats(pool_stats(jaxnorm.Stats(mean, var), axes=0), pooled(mean, var), rtol=1e-6)
    cov = np.broadcast_to(np.eye(FEATURES, dtype=np.float32), (64, 1, FEATURES, FEATURES))
    together = pool_stats(jaxnorm.JointStats(mean[:, None], cov), axes=0)
    assert_stats(together, pooled_jointly(mean[:, None], cov), rtol=1e-5)


@pytest.mark.parametrize("counts", [(4, 4, 4), (7, 4, 1)])
def test_statistics_of_disjoint_data_become_those_of_the_union(counts):
    parts = [draw((count, FEATURES), seed=seed) for seed, count in enumerate(counts)]
    each = [jaxnorm.moments(part, axes=0).stats() for part in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    weights = None if len(set(counts)) == 1 else counts
    whole = np.concatenate(parts).astype(np.float64)
    found = pool_stats(stacked, axes=0, weights=weights)
    assert_stats(found, (whole.mean(0), whole.var(0)))


@pytest.mark.parametrize(
    "stats", [some_stats(), some_joint_stats()], ids=lambda s: type(s).__name__
)
def test_order_and_scale_of_weights_do_not_matter(stats):
    weights, order = np.array([1.0, 5, 0, 2]), np.array([2, 0, 3, 1])
    found = pool_stats(stats, axes=0, weights=weights)
    again = pool_stats(jax.tree.map(lambda s: s[order], stats), 0, weights=0.1 * weights[order])
    chex.assert_trees_all_close(found, again, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "stats", [some_stats(), some_joint_stats()], ids=lambda s: type(s).__name__
)
def test_equal_replicas_stay_what_they_are(stats):
    alike = jax.tree.map(lambda leaf: np.stack([leaf[0]] * REPLICAS), stats)
    found = pool_stats(alike, axes=0, weights=[1, 2, 0, 3])
    chex.assert_trees_all_close(found, jax.tree.map(lambda s: s[0], stats), rtol=1e-6, atol=1e-6)


def test_what_weighs_nothing_is_not_there():
    """Not even NaN; and entries that nobody weighs are those of no evidence."""
    stats = some_stats()
    broken = jaxnorm.Stats(stats.mean.copy(), stats.var.copy())
    broken.mean[2] = broken.var[2] = np.nan
    weights = np.array([[1, 2, 0], [5, 1, 0], [0, 0, 0], [2, 7, 0]], np.float32)
    found = jax.jit(partial(pool_stats, axes=0))(broken, weights=weights)
    mean, var = pooled(stats.mean, stats.var, np.where(weights.any(0), weights, 1))
    assert_stats(found, ([*mean[:2], 0], [*var[:2], 1]))
    cov = some_joint_stats()
    nothing = jax.jit(partial(pool_stats, axes=0))(cov, weights=jnp.zeros(REPLICAS))
    assert_stats(nothing, (np.zeros((2, 3)), np.stack([np.eye(3)] * 2)))


def test_narrow_statistics_are_pooled_in_float32():
    stats = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), some_stats())
    found = pool_stats(stats, axes=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    assert_stats(found, pooled(*(np.asarray(s, np.float64) for s in (stats.mean, stats.var))))


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for stats in (some_stats(), some_joint_stats()):
            pool_stats(stats, axes=0, weights=jnp.array([1, 5, 0, 2]))


# Mapped contexts.


def by_mapping(mapping, function, *arguments):
    return mapping(function, axis_name="d")(*arguments)


def by_shard_map(check_vma, function, *arguments):
    def local(*arguments):
        merged = function(*jax.tree.map(lambda leaf: leaf.squeeze(0), arguments))
        return jax.tree.map(lambda leaf: leaf[None], merged)

    mesh = jax.make_mesh((REPLICAS,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
    )
    return jax.jit(sharded)(*arguments)


CONTEXTS = {
    "vmap": partial(by_mapping, jax.vmap),
    "pmap": partial(by_mapping, jax.pmap),
    "shard_map": partial(by_shard_map, True),
    "shard_map unchecked": partial(by_shard_map, False),
}
EACH_CONTEXT = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())


@EACH_CONTEXT
@pytest.mark.parametrize(
    "stats", [some_stats(), some_joint_stats()], ids=lambda s: type(s).__name__
)
def test_replicas_on_devices(context, stats):
    weights = np.array([1.0, 5, 0, 2], np.float32)
    each = context(lambda s, w: pool_stats(s, weights=w, axis_name="d"), stats, weights)
    expected = pool_stats(stats, axes=0, weights=weights)
    for device in range(REPLICAS):
        found = jax.tree.map(lambda leaf, d=device: leaf[d], each)
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@EACH_CONTEXT
def test_replicas_in_groups_of_devices(context):
    stats, groups = some_stats(), [[0, 3], [1, 2]]
    each = context(lambda s: pool_stats(s, axis_name="d", axis_index_groups=groups), stats)
    for group in groups:
        expected = pooled(stats.mean[group], stats.var[group])
        for device in group:
            assert_stats(jax.tree.map(lambda leaf, d=device: leaf[d], each), expected)


# Whole models.

WITH_STATS = [
    ("BatchNorm", {}),
    ("BatchNorm", {"debias": True}),
    ("BatchNorm", {"momentum": None, "update_every": 3}),
    ("BatchRenorm", {"rmax": 3.0, "dmax": 5.0}),
    ("AdaBN", {"domains": ("a", "b"), "momentum": None}),
    ("AdaBN", {"domains": ("a", "b"), "update_every": 3}),
    ("DecorrelatedBatchNorm", {"num_groups": 2, "momentum": None}),
    ("IterNorm", {"num_groups": 2, "update_every": 2}),
    ("SwitchableNorm", {}),
    ("IBNa", {"debias": True}),
]
SHAPE = (16, 4)


def state_of_replicas(framework, method, options, steps=2):
    """A layer, and its statistics after some steps in which each replica saw its own data."""
    cls = getattr(getattr(jaxnorm, framework), method)
    layer = FRAMEWORKS[framework](draw(SHAPE), cls, **options)

    @jax.jit
    @jax.vmap
    def run(x):
        stats = layer.stats
        for step in range(steps):
            _, changed = layer.train(layer.params, stats, x[step])
            stats = stats | changed
        return stats

    x = jnp.stack([draw((steps, *SHAPE), seed=seed) + seed for seed in range(REPLICAS)])
    return layer, run(x), x


@pytest.mark.parametrize(("case", "framework"), in_turn(WITH_STATS, FRAMEWORKS))
def test_every_norm_merges(case, framework):
    method, options = case
    layer, stats, _ = state_of_replicas(framework, method, options)
    merged = jax.jit(merge_replicas)({"block": {"norm": stats}})["block"]["norm"]
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, layer.stats)
    assert {n: v.dtype for n, v in merged.items()} == {n: v.dtype for n, v in layer.stats.items()}
    for suffix in ("", "_b") if method == "AdaBN" else ("",):
        for prefix, counts in (("", f"updates{suffix}"), ("pending_", f"pending_count{suffix}")):
            of = {r: f"{prefix}{r}{suffix}" for r in ("mean", "var", "cov", "count", "batches")}
            if of["mean"] not in stats:
                continue
            weights = np.asarray(stats.get(counts, np.ones(REPLICAS)), np.float64)
            weights = np.where(weights.sum(0) == 0, 1, weights)
            if "cov" in stats:
                cov = stats[of["cov"]]
                mean = stats[of["mean"]].reshape(cov.shape[:-1])
                mean, spread = pooled_jointly(mean, cov, weights)
            else:
                mean, spread = pooled(stats[of["mean"]], stats[of["var"]], weights)
            found = merged[of["mean"]], merged[of["cov" if "cov" in stats else "var"]]
            assert_stats(found, (mean.reshape(found[0].shape), spread), rtol=1e-5, atol=1e-5)
            if prefix:
                np.testing.assert_allclose(merged[of["count"]], stats[of["count"]].sum(0))
    for name in ("updates", "updates_b", "step", "pending_batches", "pending_batches_b"):
        if name in stats:
            assert (np.asarray(merged[name]) == np.asarray(stats[name]).max(0)).all(), name


def test_every_method_with_statistics_is_merged_here():
    """Instance norms and weight norms are the exceptions, with tests of their own."""
    tracked = {
        subject.method for subject in SUBJECTS if subject.layer("linen", subject.input()).stats
    }
    assert tracked - {"InstanceNorm"} == {method for method, _ in WITH_STATS}


@pytest.mark.parametrize("method", ["BatchNorm", "DecorrelatedBatchNorm"])
def test_averages_of_disjoint_batches_become_the_statistics_of_all_data(method):
    """One batch for each replica, of equal size: what the whole batch would have stored."""
    layer, stats, x = state_of_replicas("linen", method, {"momentum": None}, steps=1)
    _, whole = layer.train(layer.params, layer.stats, x.reshape(-1, SHAPE[-1]))
    chex.assert_trees_all_close(merge_replicas(stats), dict(whole), rtol=1e-5, atol=1e-5)


def test_replicas_count_by_their_steps():
    """One that saw nothing weighs nothing; where none saw anything, nothing changes."""
    stats = {
        "mean": jnp.array([[1.0, 7.0], [4.0, 7.0], [9.0, 7.0]]),
        "var": jnp.array([[1.0, 3.0], [2.0, 3.0], [5.0, 3.0]]),
        "updates": jnp.array([[10, 0], [0, 0], [30, 0]]),
    }
    merged = merge_replicas(stats)
    mean, var = pooled([1.0, 9.0], [1.0, 5.0], [10, 30])
    np.testing.assert_allclose(merged["mean"], [mean, 7])
    np.testing.assert_allclose(merged["var"], [var, 3], rtol=1e-6)
    assert merged["updates"].tolist() == [30, 0]
    given = merge_replicas(stats, weights=[0, 1, 0])
    assert given["mean"].tolist() == [4.0, 7.0]


def test_training_goes_on_after_a_merge():
    """Replicas in step, merged in the middle, end with the mean over all batches of all."""
    options = {"momentum": None}
    layer, stats, x = state_of_replicas("linen", "BatchNorm", options)
    y = draw((REPLICAS, *SHAPE), seed=9)
    merged = merge_replicas(stats)
    assert merged["updates"].tolist() == [2] * SHAPE[-1]
    each = jax.vmap(lambda y: layer.train(layer.params, merged, y)[1])(y)
    means = np.concatenate([x.mean(2).reshape(-1, SHAPE[-1]), y.mean(1)])
    np.testing.assert_allclose(merge_replicas(each)["mean"], means.mean(0), rtol=1e-5)


class Block(nn.Module):
    """Norms of several kinds, and some in a stack."""

    @nn.compact
    def __call__(self, x):
        x = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=None)(x)
        x = jaxnorm.linen.IterNorm(use_running_average=False, num_groups=2, n_steps=2)(x)
        scan = nn.scan(
            Step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan()(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jaxnorm.linen.BatchRenorm(use_running_average=False)(x), None


@pytest.fixture(scope="module")
def of_a_model():
    """`batch_stats` of a Linen model, with replicas along the first axis."""
    model = Block()
    variables = jax.jit(model.init)(jax.random.key(0), draw(SHAPE))
    x = jnp.stack([draw(SHAPE, seed=seed) + seed for seed in range(REPLICAS)])
    step = jax.vmap(lambda x: model.apply(variables, x, mutable=["batch_stats"])[1])
    return jax.jit(step)(x)["batch_stats"]


def test_trees_of_all_kinds(of_a_model):
    expected = merge_replicas(of_a_model)
    assert expected["ScanStep_0"]["BatchRenorm_0"]["mean"].shape == (2, SHAPE[-1])
    before = jax.tree.map(np.array, of_a_model)
    frozen = merge_replicas(flax.core.freeze(of_a_model))
    assert isinstance(frozen, flax.core.FrozenDict)
    chex.assert_trees_all_equal(flax.core.unfreeze(frozen), expected)
    several = [jax.tree.map(lambda leaf, i=i: leaf[i], of_a_model) for i in range(REPLICAS)]
    chex.assert_trees_all_equal(merge_replicas(several), expected)
    numpys = merge_replicas(jax.tree.map(np.asarray, of_a_model))
    chex.assert_trees_all_equal(numpys, expected)
    chex.assert_trees_all_equal(of_a_model, before)


@EACH_CONTEXT
def test_models_on_devices(context, of_a_model):
    """What `pmean` is today, in Flax's examples."""
    each = context(partial(merge_replicas, axis_name="d"), of_a_model)
    expected = merge_replicas(of_a_model)
    for device in range(REPLICAS):
        found = jax.tree.map(lambda leaf, d=device: leaf[d], each)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    forgets = jax.tree.map(lambda leaf: leaf.mean(0), of_a_model)
    assert (forgets["BatchNorm_0"]["var"] < 0.9 * expected["BatchNorm_0"]["var"]).all()


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_models(pure):
    """A stack of models, each with data of its own; merged into one of them."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List(
                [
                    jaxnorm.nnx.BatchNorm(4, debias=True, rngs=rngs),
                    jaxnorm.nnx.IterNorm(4, num_groups=2, n_steps=2, rngs=rngs),
                ]
            )

        def __call__(self, x):
            for norm in self.norms:
                x = norm(x)
            return x

    @nnx.split_rngs(splits=REPLICAS)
    @nnx.vmap
    def make(rngs):
        return Net(rngs)

    nets, model = make(nnx.Rngs(0)), Net(nnx.Rngs(0))
    x = jnp.stack([draw(SHAPE, seed=seed) + seed for seed in range(REPLICAS)])
    nnx.vmap(lambda net, x: net(x))(nets, x)
    state = nnx.state(nets, nnx.BatchStat)
    merged = merge_replicas(nnx.to_pure_dict(state) if pure else state)
    assert isinstance(merged, dict if pure else nnx.State)
    nnx.update(model, merged)
    norm = nets.norms[0]
    expected = pooled(norm.mean[...], norm.var[...])
    assert_stats(jaxnorm.Stats(model.norms[0].mean[...], model.norms[0].var[...]), expected)
    model.eval()
    assert model(x[0]).shape == SHAPE


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_weight_norms_only_if_one_says_so(framework):
    """A singular vector is no statistic of data: neither averaged nor taken silently."""
    if framework == "linen":
        layer = jaxnorm.linen.SpectralNorm(nn.Dense(2))
        stats = layer.init(jax.random.key(0), jnp.ones((1, 3)), update_stats=True)["batch_stats"]
    else:
        rngs = nnx.Rngs(0)
        layer = jaxnorm.nnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
        stats = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), stats)
    with pytest.raises(ValueError, match=r"2 variables.*kernel/sigma.*kernel/u.*take_first=\['sig"):
        merge_replicas(stacked)
    names = {"u", "sigma"}
    chex.assert_trees_all_equal(merge_replicas(stacked, take_first=names), stats)
    each = jax.vmap(partial(merge_replicas, axis_name="d", take_first=names), axis_name="d")(
        stacked
    )
    chex.assert_trees_all_equal(each, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), stats))


def test_instance_norms_are_averaged_if_one_says_so():
    stats = {"norm": {"mean": jnp.array([[0.0], [4.0]]), "var": jnp.array([[1.0], [3.0]])}}
    stats["norm"]["updates"] = jnp.array([[3], [5]])
    merged = merge_replicas(stats, average={"norm"})["norm"]
    assert jax.tree.map(lambda leaf: float(leaf[0]), merged) == {
        "mean": 2.0,
        "var": 2.0,
        "updates": 5.0,
    }
    each = jax.vmap(partial(merge_replicas, axis_name="d", average={"norm"}), axis_name="d")(stats)
    assert jax.tree.map(lambda leaf: leaf[1].tolist(), each["norm"]) == (
        jax.tree.map(lambda leaf: leaf.tolist(), merged)
    )


def test_all_unknown_variables_are_named():
    stats = {
        "a": {"mean": jnp.zeros((2, 3)), "other": jnp.zeros(2)},
        "b": {"var": jnp.zeros((2, 3))},
        "c": {"mean": jnp.zeros((2, 3)), "var": jnp.zeros((2, 3))},
    }
    with pytest.raises(ValueError, match=r"3 variables.*'a/mean', 'a/other', 'b/var'.") as caught:
        merge_replicas(stats)
    assert "c/" not in str(caught.value)


def test_nothing_to_merge():
    assert merge_replicas({}) == {}


def test_equal_replicas_of_a_model_stay_what_they_are(of_a_model):
    one = merge_replicas(of_a_model)
    again = merge_replicas([one] * 3)
    chex.assert_trees_all_close(again, one, rtol=1e-5, atol=1e-6)
