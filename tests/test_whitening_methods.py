"""Decorrelated batch normalization and IterNorm: functions, derivatives, devices, layers."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whitening_oracles as oracles
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from whitening_cases import CASES, case_of, check_derivatives, data, some_mask

import jaxnorm
from jaxnorm.core.comoments import comoments
from jaxnorm.core.covariance import JointStats
from jaxnorm.linen import whitening as linen_whitening
from jaxnorm.methods.decorrelated_batch_norm import (
    decorrelated_batch_norm,
    decorrelated_batch_norm_inference,
)
from jaxnorm.methods.iter_norm import iter_norm, iter_norm_inference
from jaxnorm.methods.whitening import whiten
from jaxnorm.nnx import whitening as nnx_whitening

pytestmark = pytest.mark.usefixtures("quick_compile")
FUNCTIONS = {"dbn": decorrelated_batch_norm, "iter_norm": iter_norm}
INFERENCE = {"dbn": decorrelated_batch_norm_inference, "iter_norm": iter_norm_inference}
ORACLES = {"dbn": oracles.decorrelated_batch_norm, "iter_norm": oracles.iter_norm}
CLOSE = dict(rtol=1e-11, atol=1e-11)
NEARLY = dict(rtol=1e-9, atol=1e-9)
each_method = pytest.mark.parametrize("method", FUNCTIONS)


@each_method
@pytest.mark.parametrize("name", CASES)
def test_methods_equal_their_oracles(x64, name, method):
    x, options, groups = case_of(name)
    features = x.shape[options["axis"]]
    scale, bias = np.arange(1.0, 1 + features), np.arange(features) - 2.0
    y, seen = FUNCTIONS[method](x, scale, bias, num_groups=groups, **options)
    expected = ORACLES[method](x, scale, bias, groups=groups, **options)
    np.testing.assert_allclose(y, expected, **NEARLY)
    by_stats = INFERENCE[method](x, seen.stats(), scale, bias, **options)
    np.testing.assert_allclose(by_stats, y, **CLOSE)


def test_the_result_of_decorrelation_is_white(x64):
    y, _ = decorrelated_batch_norm(data(5, 6, 4), num_groups=2, axis=1, epsilon=1e-12)
    np.testing.assert_allclose(comoments(y, num_groups=2, axis=1).cov, [np.eye(3)] * 2, **NEARLY)


def test_decorrelation_of_one_group_is_zca(x64):
    x = jnp.asarray(data(30, 5))
    y, seen = decorrelated_batch_norm(x)
    np.testing.assert_allclose(y, whiten(x, seen.stats()), **CLOSE)


def test_newton_arrives_at_zca(x64):
    x = jnp.asarray(data(30, 5))
    y, _ = decorrelated_batch_norm(x)
    distance = [jnp.abs(iter_norm(x, n_steps=steps)[0] - y).max() for steps in (3, 7, 30)]
    assert distance[0] > distance[1] > 0.01
    assert distance[2] < 1e-10


def everything(function, *arrays):
    """Result, evidence, gradients and a derivative of gradients of a loss of both."""

    def loss(*arrays):
        y, seen = function(*arrays)
        return jnp.sin(y).sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(seen)), y

    gradient = jax.grad(loss, tuple(range(len(arrays))), has_aux=True)
    along = tuple(jnp.cos(a) for a in arrays)
    return jax.jit(lambda *arrays: jax.jvp(gradient, arrays, along, has_aux=True))(*arrays)


def arrays_of(rows, features):
    """Input, scale and bias."""
    scale, bias = np.arange(1.0, 1 + features), np.arange(features) - 2.0
    return tuple(map(jnp.asarray, (data(rows, features), scale, bias)))


@each_method
def test_groups_of_one_are_batch_norm(x64, method):
    """IterNorm of one feature has its variance as trace, so that it starts at its root."""
    where = some_mask(8, 1)

    def whitened(*arrays):
        options = dict(num_groups=None, group_size=1, where=where)
        y, seen = FUNCTIONS[method](*arrays, **options)
        return y, (seen.mean[:, 0], seen.cov[:, 0, 0])

    def normalized(*arrays):
        y, seen = jaxnorm.batch_norm(*arrays, where=where)
        return y, (seen.mean, seen.var)

    found, expected = (everything(f, *arrays_of(8, 3)) for f in (whitened, normalized))
    chex.assert_trees_all_close(found, expected, **NEARLY)


# Derivatives

DEGENERATE = {
    "equal eigenvalues": np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]]),
    "duplicated features": np.repeat(data(4, 1), 3, 1),
    "constant features": np.ones((4, 3)),
    "fewer examples than features": np.repeat(data(2, 3), 2, 0),
}
WEIGHTS = np.random.default_rng(4).normal(size=(4, 3))


def loss_by(method, x):
    return (jnp.sin(FUNCTIONS[method](x, epsilon=0.3)[0]) * WEIGHTS).sum()


LOSSES = {method: partial(loss_by, method) for method in FUNCTIONS}


@each_method
@pytest.mark.parametrize("name", DEGENERATE)
def test_derivatives_where_eigenvalues_are_equal(x64, name, method):
    check_derivatives(LOSSES[method], jnp.asarray(DEGENERATE[name]))


@each_method
def test_derivatives_in_float32_are_those_in_float64(method):
    """With two features alike, so that one eigenvalue is epsilon."""
    x = data(20, 3, offset=0)
    x = np.concatenate([x, x[:, :1]], 1).astype(np.float32)

    def derivatives(x):
        def loss(x):
            return (FUNCTIONS[method](x, epsilon=1e-3)[0] ** 3).sum()

        gradient = jax.grad(loss)
        return jax.jit(lambda x: jax.jvp(gradient, (x,), (jnp.cos(x),)))(x)

    found = derivatives(jnp.asarray(x))
    with jax.enable_x64(True):
        expected = derivatives(jnp.asarray(x, jnp.float64))
        expected = jax.tree.map(np.asarray, expected)
    for order, (value, exact) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(value, exact, atol=(1e-3, 1e-1)[order] * np.abs(exact).max())


@each_method
def test_what_is_masked_reaches_nothing(method):
    x = jnp.asarray(data(6, 4), jnp.float32)
    where = np.array([True, True, False, True, True, False])[:, None]

    def loss(x):
        y, seen = FUNCTIONS[method](x, where=where, epsilon=1e-2)
        return (y**3 * where).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(seen))

    derivatives = jax.jit(jax.value_and_grad(loss))
    expected = derivatives(jnp.where(where, x, 0))
    assert np.all(expected[1][2] == 0)
    for bad in (jnp.nan, jnp.inf, 1e30):
        chex.assert_trees_all_equal(derivatives(jnp.where(where, x, bad)), expected)


@each_method
def test_without_evidence_nothing_changes(method):
    """The mean is taken for 0 and the covariance for I, of which IterNorm finds the root soon."""
    x = jnp.asarray(data(6, 4), jnp.float32)

    def function(x):
        return FUNCTIONS[method](x, where=np.zeros((6, 1), bool))[0]

    with jax.debug_nans(True):
        y, pull_back = jax.vjp(jax.jit(function), x)
        (gradient,) = pull_back(x)
    chex.assert_trees_all_close((y, gradient), (x, x), rtol=1e-3)


# Devices

DEVICES = 8
GROUPS = [[0, 3], [1, 2, 4, 5], [6], [7]]


def by_shard_map(function, check_vma):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs = dict(in_specs=(P("d"), P(), P(), P("d")), out_specs=(P("d"), P()))
    return jax.shard_map(function, mesh=mesh, check_vma=check_vma, **specs)


def by_mapping(mapping, function):
    mapped = mapping(function, in_axes=(0, None, None, 0), axis_name="d")

    def whole(x, scale, bias, where):
        x, where = (a if a is None else a.reshape(DEVICES, -1, a.shape[1]) for a in (x, where))
        y, seen = mapped(x, scale, bias, where)
        return y.reshape(-1, y.shape[-1]), jax.tree.map(lambda leaf: leaf[0], seen)

    return whole


CONTEXTS = {
    "shard_map": partial(by_shard_map, check_vma=True),
    "shard_map unchecked": partial(by_shard_map, check_vma=False),
    "pmap": partial(by_mapping, jax.pmap),
    "vmap": partial(by_mapping, jax.vmap),
}
UNEVEN = np.array([1, 1, 1, 0, 0, 0, 0, 1] + [1] * 8, bool)[:, None]  # device 2 has none


@cache
def on_one_device(method, masked):
    function = partial(FUNCTIONS[method], num_groups=2, where=UNEVEN if masked else None)
    return everything(function, *arrays_of(2 * DEVICES, 4))


@pytest.mark.parametrize(
    ("context", "masked", "method"),
    [
        *((context, True, "dbn") for context in CONTEXTS),
        ("shard_map", False, "dbn"),
        ("shard_map", True, "iter_norm"),
    ],
)
def test_devices_together_are_one(x64, context, masked, method):
    def local(x, scale, bias, where):
        return FUNCTIONS[method](x, scale, bias, num_groups=2, axis_name="d", where=where)

    mapped, mask = CONTEXTS[context](local), UNEVEN if masked else None
    together = everything(lambda *a: mapped(*a, mask), *arrays_of(2 * DEVICES, 4))
    chex.assert_trees_all_close(together, on_one_device(method, masked), **CLOSE)


@pytest.mark.parametrize("context", CONTEXTS)
def test_groups_of_devices_are_batches_of_their_own(x64, context):
    x, scale, bias = arrays_of(2 * DEVICES, 4)

    def local(x, scale, bias, where):
        options = dict(axis_name="d", axis_index_groups=GROUPS)
        y, _ = decorrelated_batch_norm(x, scale, bias, epsilon=0.1, **options)
        return y, comoments(x, axis_name="d")

    y, seen = jax.jit(lambda *a: CONTEXTS[context](local)(*a, None))(x, scale, bias)
    chex.assert_trees_all_close(seen, comoments(x), **CLOSE)
    for group in GROUPS:
        rows = np.concatenate([[2 * d, 2 * d + 1] for d in group])
        expected = oracles.decorrelated_batch_norm(x[rows], scale, bias, epsilon=0.1)
        np.testing.assert_allclose(y[rows], expected, **NEARLY)


@pytest.mark.parametrize("spec", [P("a", "b"), P(None, "b"), P(("a", "b"))], ids=str)
def test_explicit_mesh_axes_under_jit(spec):
    """Also with groups of features on several devices."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(data(16, 4), jnp.float32)

    def step(x):
        return jax.grad(lambda x: (decorrelated_batch_norm(x, num_groups=2)[0] ** 3).sum())(x)

    expected = jax.jit(step)(x)
    with jax.set_mesh(mesh):
        found = jax.jit(step)(jax.device_put(x, jax.NamedSharding(mesh, spec)))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-3, atol=1e-4)


# Numbers and memory


@each_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(x64, method, dtype):
    x = jnp.asarray(data(40, 4), dtype)
    scale, bias = jnp.full(4, 1.5, jnp.float32), jnp.ones(4, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        y, seen = FUNCTIONS[method](x, scale, bias, num_groups=2)
        again = INFERENCE[method](x, seen.stats(), scale, bias)
        wide, _ = FUNCTIONS[method](x, scale, bias, num_groups=2, dtype=jnp.float32)
    stored = jnp.promote_types(dtype, jnp.float32)
    assert (y.dtype, again.dtype, wide.dtype, seen.cov.dtype) == (dtype, dtype, jnp.float32, stored)
    expected = ORACLES[method](x, scale, bias, groups=2)
    for found in (y, again, wide):
        precision = max(jnp.finfo(found.dtype).eps, jnp.finfo(jnp.float32).eps)
        np.testing.assert_allclose(
            found.astype(jnp.float64), expected, rtol=precision, atol=200 * 1.2e-7
        )


@each_method
def test_large_means(method):
    """What is left is the rounding of the mean: half of 2^-10, times the entries of the matrix."""
    mixing = np.eye(3) + 0.3
    x = (np.random.default_rng(0).normal(size=(200, 3)) @ mixing + 1e4).astype(np.float32)
    y, _ = FUNCTIONS[method](x)
    np.testing.assert_allclose(y, ORACLES[method](x), atol=1e-3)


@each_method
@pytest.mark.parametrize(("dtype", "jit"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_residuals_are_the_input_and_small_matrices(method, dtype, jit):
    x, scale, bias = jnp.ones((64, 8, 8, 32), dtype), jnp.ones(32), jnp.zeros(32)
    stats = JointStats(jnp.zeros((8, 4)), jnp.stack([jnp.eye(4)] * 8))
    functions = (
        lambda *a: FUNCTIONS[method](*a, num_groups=8)[0],
        lambda x, *a: INFERENCE[method](x, stats, *a),
    )
    for function in functions:
        _, vjp = jax.vjp(jax.jit(function) if jit else function, x, scale, bias)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
        assert x.nbytes <= kept <= 1.05 * x.nbytes


@each_method
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(method, platform):
    def gradient(x):
        return jax.grad(lambda x: (FUNCTIONS[method](x)[0] ** 3).sum())(x)

    exported = jax.export.export(jax.jit(gradient), platforms=[platform])(jnp.ones((8, 4)))
    assert exported.platforms == (platform,)


# Layers


LINEN = {"dbn": linen_whitening.DecorrelatedBatchNorm, "iter_norm": linen_whitening.IterNorm}
NNX = {"dbn": nnx_whitening.DecorrelatedBatchNorm, "iter_norm": nnx_whitening.IterNorm}


class Linen:
    """A layer and its variables, called as an NNX layer is."""

    def __init__(self, layer, x):
        self.layer = layer
        self.variables = layer.init(jax.random.key(0), x, use_running_average=False)

    def __call__(self, x, frozen=False, **call):
        y, updated = self.layer.apply(
            self.variables, x, use_running_average=frozen, mutable=["batch_stats"], **call
        )
        self.variables = {**self.variables, **updated}
        return y

    def stats(self):
        return dict(self.variables["batch_stats"])


class Nnx:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, frozen=False, **call):
        return self.layer(x, use_running_average=frozen, **call)

    def stats(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))


def layers(method, x, **options):
    yield Linen(LINEN[method](**options), x)
    yield Nnx(NNX[method](x.shape[-1], rngs=nnx.Rngs(0), **options))


BATCHES = [data(12, 6, seed=seed, offset=seed).astype(np.float32) for seed in range(3)]


@each_method
def test_layers_train_and_infer(method):
    for layer in layers(method, BATCHES[0], momentum=0.75, num_groups=None, group_size=3):
        mean, cov = np.zeros((2, 3)), np.stack([np.eye(3)] * 2)
        start = layer.stats()
        chex.assert_trees_all_equal(start, {"mean": mean.reshape(-1), "cov": cov})
        for x in BATCHES:
            expected = ORACLES[method](x, groups=2)
            np.testing.assert_allclose(layer(x), expected, atol=1e-3)
            _, batch_mean, batch_cov = oracles.comoments(x, groups=2)
            mean, cov = 0.75 * mean + 0.25 * batch_mean, 0.75 * cov + 0.25 * batch_cov
        kept = layer.stats()
        chex.assert_trees_all_close(kept, {"mean": mean.reshape(-1), "cov": cov}, rtol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(kept, start)
        expected = ORACLES[method](BATCHES[0], groups=2, stats=(mean, cov))
        np.testing.assert_allclose(layer(BATCHES[0], frozen=True), expected, atol=1e-3)
        chex.assert_trees_all_equal(layer.stats(), kept)


@pytest.mark.parametrize("options", [{"momentum": None}, {"debias": True, "momentum": 0.5}])
def test_averages_that_forget_their_start(options):
    for layer in layers("dbn", BATCHES[0], running_var="unbiased", **options):
        for x in BATCHES:
            layer(x)
        seen = [oracles.comoments(x) for x in BATCHES]
        weights = [1, 1, 1] if options["momentum"] is None else [1, 2, 4]
        kept = layer.stats()
        for name, part, factor in (("mean", 1, 1), ("cov", 2, 12 / 11)):
            average = np.average([each[part][0] for each in seen], 0, weights) * factor
            np.testing.assert_allclose(kept[name].reshape(average.shape), average, rtol=1e-4)
        assert kept["updates"].tolist() == [3]


def test_statistics_that_stay():
    x = BATCHES[0]
    for layer in layers("dbn", x, skip_nonfinite=True):
        layer(x)
        before = layer.stats()
        layer(np.full_like(x, np.nan))
        layer(np.where(np.arange(12)[:, None] == 3, np.inf, x))
        layer(x, mask=np.zeros((12, 1), bool))
        layer(x, update_stats=False)
        chex.assert_trees_all_equal(layer.stats(), before)
    for layer in layers("dbn", x):
        layer(np.full_like(x, np.nan))
        assert np.isnan(layer.stats()["cov"]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_stored_statistics_keep_their_dtype(x64, dtype):
    x = jnp.asarray(BATCHES[0], dtype)
    for layer in layers("dbn", x, param_dtype=jnp.float32):
        before = layer.stats()
        assert layer(x).dtype == jnp.promote_types(dtype, jnp.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(layer.stats(), before)


@each_method
@pytest.mark.parametrize("frozen", [False, True])
def test_no_gradient_passes_through_stored_statistics(method, frozen):
    layer = LINEN[method](use_running_average=frozen)
    variables = layer.init(jax.random.key(0), BATCHES[0])

    def sums(variables, x):
        y, updated = layer.apply(variables, x, mutable=["batch_stats"])
        return (
            sum(leaf.sum() for leaf in jax.tree.leaves(updated)) * (not frozen) + y.sum() * frozen
        )

    by_variables, by_input = jax.jit(jax.grad(sums, (0, 1)))(variables, BATCHES[0])
    if frozen:
        assert not any(leaf.any() for leaf in jax.tree.leaves(by_variables["batch_stats"]))
    else:
        assert not by_input.any()


def test_too_few_examples_warn():
    for layer in layers("dbn", BATCHES[0]):
        with pytest.warns(
            UserWarning, match=r"6 examples for groups of 6 features.*rank 5 at most"
        ):
            layer(BATCHES[0][:6])
        layer(BATCHES[0][:7])


@each_method
def test_layers_on_devices(method):
    """Initialized where no axis is mapped; the batch of all devices is large enough not to warn."""
    x = np.stack(BATCHES + BATCHES[:1]).reshape(DEVICES, 6, 6)
    layer, alone = (LINEN[method](use_running_average=False, axis_name=a) for a in ("d", None))
    variables = layer.init(jax.random.key(0), x[0])
    step = partial(layer.apply, variables, mutable=["batch_stats"])
    y, updated = jax.vmap(step, axis_name="d")(x)
    expected = alone.apply(variables, x.reshape(-1, 6), mutable=["batch_stats"])
    found = y.reshape(-1, 6), jax.tree.map(lambda leaf: leaf[0], updated)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
