"""Statistics of a data set for all norms of a model, in one pass or layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from branches_oracle import Oracle
from flax import linen as nn
from flax import nnx
from tool_models import branches, resnet

import jaxnorm
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.statistics.passes import pairwise
from jaxnorm.tools.statistics.population import population_stats

FRAMEWORKS = ("linen", "nnx")
ORDERS = ("together", "layer by layer")
pytestmark = pytest.mark.usefixtures("quick_compile")


def chain(*between, kind=nnx.BatchNorm, **options):
    """Norms of four features with functions between them."""
    rngs = nnx.Rngs(0)
    layers = [kind(4, rngs=rngs, **options)]
    for function in between:
        layers += [function, kind(4, rngs=rngs, **options)]
    return nnx.Sequential(*layers)


def vectors(*sizes, seed=1):
    """Batches of these sizes, each about another mean."""
    generator = np.random.default_rng(seed)
    return [generator.normal(generator.normal(), 1, (size, 4)).astype(np.float32) for size in sizes]


def images(*sizes):
    generator = np.random.default_rng(1)
    return [generator.normal(1, 2, (size, 8, 8, 3)).astype(np.float32) for size in sizes]


def arrays_of(model):
    return {
        key: np.asarray(leaf)
        for key, leaf in model_of(model, "test").arrays.items()
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def stored(model, name, step=None):
    """Mean and variance of a norm."""
    adapter = model_of(model, "test")
    path = tuple(name.split("/")) if name else ()
    leaves = (adapter.arrays[adapter.key(path, role)] for role in ("mean", "var"))
    return tuple(np.asarray(leaf if step is None else leaf[step]) for leaf in leaves)


def changed(before, after):
    """The last names of variables that differ between two models of the same structure."""
    before, after = arrays_of(before), arrays_of(after)
    assert before.keys() == after.keys()
    return {key[-1] for key, leaf in before.items() if not np.array_equal(leaf, after[key])}


@pytest.mark.parametrize(  # the other pairs: tests/test_adapt_stats.py
    ("framework", "order"), [("linen", "together"), ("nnx", "layer by layer")]
)
def test_statistics_are_those_of_the_data_set(framework, order):
    """Of reused norms, of norms in scans and checkpoints, and with a smaller last batch."""
    model, batches = branches(framework), vectors(7, 7, 4)
    before = arrays_of(model)
    exact = population_stats(model, batches, order=order)

    expected = getattr(Oracle(model), order.replace(" ", "_"))(batches)
    for (name, step), stats in expected.items():
        for found, wanted in zip(stored(exact, name, step), stats, strict=True):
            np.testing.assert_allclose(
                found, wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} {step}"
            )
    assert type(exact) is type(model)
    assert changed(model, exact) == {"mean", "var"}
    assert all(np.array_equal(leaf, before[key]) for key, leaf in arrays_of(model).items())


def test_the_orders_differ_and_splits_matter_in_one_of_them():
    coarse, fine = vectors(16), np.split(vectors(16)[0], 4)

    def last(batches, order):
        return stored(population_stats(chain(jnp.square), batches, order=order), "layers/2")

    by_coarse, by_fine = (last(batches, "layer by layer") for batches in (coarse, fine))
    np.testing.assert_allclose(by_coarse, by_fine, rtol=1e-4)
    # One batch: what it has and what the data set has are the same.
    np.testing.assert_allclose(by_coarse, last(coarse, "together"), rtol=1e-4)
    assert np.abs(last(fine, "together")[1] / by_fine[1] - 1).max() > 0.05


def test_layer_by_layer_is_what_inference_sees():
    """Asked of Flax: one norm at a time in training over all data, those before in inference."""
    model = population_stats(resnet("nnx"), images(3, 2), order="layer by layer")
    data = jnp.concatenate(images(3, 2))
    for name in ("block1/norm2", "block2/norm3"):
        asked = nnx.clone(model)
        asked.eval()
        norm = asked
        for part in name.split("/"):
            norm = getattr(norm, part)
        norm.use_running_average, norm.momentum = False, 0.0
        nnx.jit(lambda model, x: model(x))(asked, data)
        for found, wanted in zip(stored(model, name), stored(asked, name), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_dropout_is_off():
    model = chain(nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    model.train()
    exact = population_stats(model, vectors(5))
    np.testing.assert_allclose(stored(exact, "layers/2")[1], np.ones(4), rtol=1e-3)
    assert changed(model, exact) == {"mean", "var"}  # not the count of random keys


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_shared_with_the_caller(framework):
    model = branches(framework)
    exact = population_stats(model, vectors(4), only="shared")
    for leaf in jax.tree.leaves(nnx.state(exact) if framework == "nnx" else exact.variables):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in model_of(model, "test").arrays.values())


def linear_norm(kind=nnx.BatchNorm, features=2, **options):
    return kind(features, rngs=nnx.Rngs(0), **options)


def test_many_batches_about_a_large_and_drifting_mean():
    """Added one after the other in float32, they would lose 0.3 standard deviations here."""
    generator = np.random.default_rng(0)
    drift = 1e4 + 4 * np.linspace(0, 1, 1200) ** 2
    batches = [generator.normal(mean, 1, (8, 2)).astype(np.float32) for mean in drift]
    mean, var = stored(population_stats(linear_norm(), batches), "")
    data = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(mean, data.mean(0), atol=2e-3)
    np.testing.assert_allclose(var, data.var(0), rtol=2e-3)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 8, 13])
def test_parts_are_merged_in_their_order_and_by_pairs(number):
    def merge(early, late):
        return (early[0] + late[0], max(early[1], late[1]) + 1)

    order, depth = pairwise((([i], 0) for i in range(number)), merge)
    assert order == list(range(number))
    assert depth <= np.ceil(np.log2(number)) + 1


def test_one_trace_for_batches_of_one_shape():
    def traces(batches):
        calls = []
        population_stats(linear_norm(), batches, call=lambda m, x: calls.append(0) or m(x))
        return len(calls)

    few = traces([np.ones((4, 2))] * 2)
    assert traces([np.ones((4, 2))] * 9) == few
    assert few < traces([np.ones((4, 2)), np.ones((3, 2))]) <= 2 * few


def test_data_on_several_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = chain(jnp.square)
    nnx.update(spread, jax.device_put(nnx.state(spread), everywhere))
    batches = vectors(16, 8)
    for order in ORDERS:
        alone = arrays_of(population_stats(chain(jnp.square), batches, order=order))
        shared = population_stats(spread, [jax.device_put(x, over) for x in batches], order=order)
        for key, leaf in arrays_of(shared).items():
            np.testing.assert_allclose(leaf, alone[key], rtol=1e-5, atol=1e-6)


def test_rounding_that_grows_through_a_deep_network_counts_as_settled():
    rngs = nnx.Rngs(0)
    layers = [
        layer
        for _ in range(14)
        for layer in (nnx.Linear(16, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.relu)
    ]
    x = np.random.default_rng(0).normal(size=(2, 32, 16)).astype(np.float32)
    exact = population_stats(nnx.Sequential(*layers), list(x), order="layer by layer")
    exact.eval()
    before_last = nnx.jit(lambda model: nnx.Sequential(*model.layers[:-2])(x.reshape(-1, 16)))
    seen = np.asarray(before_last(exact), np.float64)
    mean, var = stored(exact, "layers/40")
    assert (np.abs(mean - seen.mean(0)) < 0.01 * np.sqrt(seen.var(0)) + 1e-6).all()
    np.testing.assert_allclose(var, seen.var(0), rtol=0.01)


def test_averaged_weights_get_what_one_training_batch_of_all_data_has():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for _ in range(2):
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.0)
                x = nn.relu(norm(nn.Dense(5)(x)))
            return x

    net, batches = Net(), vectors(7, 7, 4)
    one, other = (net.init(jax.random.key(seed), batches[0]) for seed in (0, 1))
    averaged = one | {
        "params": jax.tree.map(lambda a, b: (a + b) / 2, one["params"], other["params"])
    }
    exact = population_stats(net.bind(averaged), batches, order="layer by layer")
    data = np.concatenate(batches)
    _, trained = net.apply(averaged, data, train=True, mutable=["batch_stats"])
    for path, wanted in jax.tree_util.tree_leaves_with_path(trained["batch_stats"]):
        found = exact.variables["batch_stats"][path[0].key][path[1].key]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


class LinenReluNorm(nn.BatchNorm):
    """A user's own, of which it is not known what it does."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x, use_running_average=True))


class NNXReluNorm(nnx.BatchNorm):
    """The same."""

    def __call__(self, x):
        return nnx.relu(super().__call__(x))


def with_a_users_own(framework):
    if framework == "nnx":
        rngs = nnx.Rngs(0)
        return nnx.Sequential(NNXReluNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    model = nn.Sequential([LinenReluNorm(), nn.BatchNorm(use_running_average=True)])
    return model.bind(model.init(jax.random.key(0), vectors(3)[0]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_users_own_norm_that_is_not_chosen_is_called_as_it_is(framework, order):
    model, (batch,) = with_a_users_own(framework), vectors(6)
    exact = population_stats(model, [batch], order=order, only="layers*1")
    first, second = np.maximum(batch / np.sqrt(1 + 1e-5), 0), "layers/1"
    if framework == "linen":
        second = "layers_1"
    np.testing.assert_allclose(stored(exact, second)[0], first.mean(0), rtol=1e-5, atol=1e-6)
    own = second.replace("1", "0")
    np.testing.assert_array_equal(stored(exact, own), stored(model, own))
    with pytest.raises(ValueError, match=rf"only=lambda path: path not in \['{own}'\]"):
        population_stats(model, [batch], order=order)


class Masked(nn.Module):
    """A model that hands a mask on to its norms."""

    @nn.compact
    def __call__(self, x, mask):
        norm = jaxnorm.linen.BatchNorm
        x = norm(use_running_average=True, running_var="unbiased", name="first")(x, mask=mask)
        return norm(use_running_average=True, update_every=3, name="second")(x * x, mask=mask)


def test_weights_waiting_evidence_and_bessels_correction():
    x, valid = np.stack(vectors(6, 6)), np.array([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1]], bool)
    x = np.where(valid[..., None], x, np.nan)
    times = np.where(valid, [[1, 2, 1, 1, 2, 1], [3, 1, 1, 1, 1, 1]], 0)  # weights that repeat
    model, mask = Masked(), times[..., None].astype(np.float32)
    variables = model.init(jax.random.key(0), x[0], mask[0])
    waiting = variables["batch_stats"]["second"]
    waiting |= {"pending_batches": jnp.int32(2), "pending_count": jnp.full(4, 5.0)}

    def exact(**options):
        return population_stats(
            model.bind(variables),
            [{"x": x, "mask": mask} for x, mask in zip(x, mask, strict=True)],
            call=lambda model, batch: model(**batch),
            order="layer by layer",
            **options,
        )

    data = np.repeat(x[valid].astype(np.float64), times[valid], 0)
    after = exact()
    np.testing.assert_allclose(stored(after, "first")[1], data.var(0, ddof=1), rtol=1e-5)
    second = ((data - data.mean(0)) / np.sqrt(data.var(0, ddof=1) + 1e-5)) ** 2
    np.testing.assert_allclose(stored(after, "second")[1], second.var(0), rtol=1e-4)
    pending = after.variables["batch_stats"]["second"]
    assert not pending["pending_batches"]
    assert not pending["pending_count"].any()
    biased = exact(running_var="biased")
    np.testing.assert_allclose(stored(biased, "first")[1], data.var(0), rtol=1e-5)


def test_other_norms_keep_what_they_have():
    model, batches = branches("nnx"), vectors(5, 5)
    some = population_stats(model, batches, only="layers/*")
    for name in ("shared", "after_branch", "checkpointed/norm"):
        np.testing.assert_array_equal(stored(some, name), stored(model, name))
    # By what the others have, not by their batches: that is what comes before it in inference.
    frozen = {(name, None): stored(model, name) for name in ("shared", "after_branch")}
    expected = Oracle(model, frozen=frozen).layer_by_layer(batches)["layers/norm", 0]
    np.testing.assert_allclose(stored(some, "layers/norm", 0), expected, rtol=1e-4, atol=1e-5)


def test_covariances_and_domains():
    data = vectors(9, 5)
    joined = np.concatenate(data).astype(np.float64)
    whitened = population_stats(linear_norm(jaxnorm.nnx.IterNorm, 4, num_groups=2), data)
    cov = np.cov(joined[:, :2].T, ddof=0)
    np.testing.assert_allclose(whitened.cov[0], cov, rtol=1e-4, atol=1e-5)
    layer = linear_norm(jaxnorm.nnx.AdaBN, 4, domains=("source", "target"), momentum=None)
    both = population_stats(layer, data, call=lambda norm, x: norm(x, domain="target"))
    np.testing.assert_allclose(both.mean_target[...], joined.mean(0), rtol=1e-4)
    assert changed(layer, both) == {"mean_target", "var_target"}


def test_batches_from_functions_and_iterators(capsys):
    expected = stored(population_stats(linear_norm(features=4), vectors(4, 3)), "")
    found = stored(population_stats(linear_norm(features=4), iter(vectors(4, 3))), "")
    np.testing.assert_array_equal(found, expected)
    assert not any(capsys.readouterr())
    again = population_stats(
        linear_norm(features=4), lambda: iter(vectors(4, 3)), order="layer by layer", progress=True
    )
    np.testing.assert_allclose(stored(again, ""), expected, rtol=1e-5, atol=1e-6)
    shown = capsys.readouterr().err
    assert "population_stats, pass 1" in shown
    assert "pass 2" in shown
    assert "pass 3" not in shown


def test_features_without_values_keep_what_they_have():
    norm = linear_norm(jaxnorm.nnx.BatchNorm)
    mask = np.array([[True, False]])
    exact = population_stats(norm, [np.full((3, 2), 5.0)], call=lambda m, x: m(x, mask=mask))
    np.testing.assert_array_equal(stored(exact, ""), [[5, 0], [0, 1]])
