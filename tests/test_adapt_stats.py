"""Statistics of another domain, mixed with the source's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from branches_oracle import Oracle
from flax import linen as nn
from flax import nnx
from test_population import FRAMEWORKS, arrays_of, chain, changed, stored, vectors
from tool_models import branches, image, resnet

import jaxnorm
from jaxnorm.tools.statistics.adapt import adapt_stats, batch_adapter
from jaxnorm.tools.statistics.population import population_stats

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(("framework", "order"), [("linen", "layer by layer"), ("nnx", "together")])
def test_mixtures_are_those_of_the_formula(framework, order):
    """Also in between: what comes before normalizes by a mixture."""
    model, batches = branches(framework), vectors(7, 7, 4)
    before = arrays_of(model)
    adapted = adapt_stats(model, batches, prior_strength=5, order=order)
    expected = getattr(Oracle(model, strength=5), order.replace(" ", "_"))(batches)
    for (name, step), stats in expected.items():
        for found, wanted in zip(stored(adapted, name, step), stats, strict=True):
            np.testing.assert_allclose(
                found, wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} {step}"
            )
    assert changed(model, adapted) == {"mean", "var"}
    assert all(np.array_equal(leaf, before[key]) for key, leaf in arrays_of(model).items())


def test_one_batch_is_the_same_in_both_orders_and_for_each_batch_by_itself():
    model, batches = chain(jnp.square), np.stack(vectors(6, 6))
    one, other = (
        adapt_stats(model, list(batches[1:]), prior_strength=6, order=order)
        for order in ("together", "layer by layer")
    )
    for key, leaf in arrays_of(one).items():
        np.testing.assert_allclose(leaf, arrays_of(other)[key], rtol=1e-4, atol=1e-5)

    traces = []
    predict = batch_adapter(
        model, batches[0], prior_strength=6, call=lambda m, x: traces.append(0) or m(x)
    )
    each = [predict(x) for x in batches]
    traced = len(traces)
    np.testing.assert_allclose(jax.lax.map(predict, batches), each, rtol=1e-4, atol=1e-5)
    assert len(traces) == traced
    one.eval()
    np.testing.assert_allclose(each[1], one(batches[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_a_prior_each_batch_is_called_as_in_training(framework):
    x = image(3)
    call = {"linen": lambda m, x: m(x, train=False), "nnx": lambda m, x: m(x)}[framework]
    model = resnet(framework)
    predict = batch_adapter(model, x, call=call)
    if framework == "nnx":
        model.train()
        model.dropout.deterministic = True
        wanted = nnx.jit(lambda model, x: model(x))(model, x)
    else:
        module, variables = model.clone(norm=trained), model.variables
        wanted, _ = jax.jit(partial(module.apply, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(predict(x), wanted, rtol=1e-3, atol=1e-4)


def trained(use_running_average, **options):
    """A batch norm that is in training whatever it is told."""
    return nn.BatchNorm(use_running_average=False, **options)


def test_without_a_prior_they_are_the_targets_and_with_an_endless_one_the_sources():
    model, batches = chain(jnp.square), vectors(6, 3)
    targets = population_stats(model, batches)
    assert changed(targets, adapt_stats(model, batches)) == set()
    assert changed(model, adapt_stats(model, batches, prior_strength=np.inf)) == set()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_batch_spread_over_a_mesh_with_explicit_axes(framework):
    """There JAX infers how each result is spread, and refuses where it cannot."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    over, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ("d", ())
    )
    (batch,) = vectors(16)
    if framework == "linen":
        module = nn.Sequential([nn.BatchNorm(True), jnp.square, nn.BatchNorm(True)])
        variables = module.init(jax.random.key(0), batch)
        alone, spread = module.bind(variables), module.bind(jax.device_put(variables, everywhere))
    else:
        alone = spread = chain(jnp.square)
        spread = nnx.clone(spread)
        nnx.update(spread, jax.device_put(nnx.state(spread), everywhere))
    shared = jax.device_put(batch, over)
    assert "d" in str(jax.typeof(shared))
    for tool in (population_stats, partial(adapt_stats, prior_strength=3)):
        expected = arrays_of(tool(alone, [batch]))
        for key, leaf in arrays_of(tool(spread, [shared])).items():
            np.testing.assert_allclose(leaf, expected[key], rtol=1e-5, atol=1e-6)
    predicted = (
        batch_adapter(model, x, prior_strength=3)(x)
        for model, x in ((alone, batch), (spread, shared))
    )
    np.testing.assert_allclose(*predicted, rtol=1e-4, atol=1e-5)


def test_a_layer_of_domains_adapts_the_one_of_the_call():
    layer = jaxnorm.nnx.AdaBN(4, domains=("source", "target"), rngs=nnx.Rngs(0))
    layer.mean_target[...] = jnp.full(4, 8.0)
    (batch,) = vectors(6)
    adapted = adapt_stats(
        layer, [batch], prior_strength=2, call=lambda norm, x: norm(x, domain="target")
    )
    expected = 0.25 * 8 + 0.75 * batch.mean(0)
    np.testing.assert_allclose(adapted.mean_target[...], expected, rtol=1e-5)
    assert changed(layer, adapted) == {"mean_target", "var_target"}


def test_examples_are_counted_as_the_user_says():
    """Padding is no example, nor is a pixel."""
    x = np.ones((4, 3, 4), np.float32) * np.array([1, 2, 100, 100])[:, None, None]
    valid = np.array([1, 1, 0, 0], bool)
    adapted = adapt_stats(
        chain(kind=jaxnorm.nnx.BatchNorm),
        [(x, valid)],
        prior_strength=2,
        call=lambda model, batch: model.layers[0](batch[0], mask=batch[1][:, None, None]),
        examples=lambda batch: batch[1].sum(),
    )
    np.testing.assert_allclose(stored(adapted, "layers/0")[0], np.full(4, 0.75), rtol=1e-6)
