"""The evidence of a batch for each norm of a model, and where it is stored."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import branches, image, resnet, stir, stirred_variables, vector

import jaxnorm
from jaxnorm.tools.adapter.evidence import Collector
from jaxnorm.tools.adapter.models import model_of

FRAMEWORKS = ("linen", "nnx")
pytestmark = pytest.mark.usefixtures("quick_compile")


def collected(model, run, by_batch=None, arrays=None, running_var=None):
    """The arrays of a model after one batch's evidence has been written into it."""
    adapter = model_of(model, "test")
    collector = Collector(adapter, run, "test", running_var)
    by_batch = list(collector.norms) if by_batch is None else by_batch
    take = jax.jit(lambda arrays: collector.evidence(arrays, run, by_batch))
    out, evidence = take(adapter.arrays if arrays is None else arrays)
    estimates = collector.estimates(adapter.arrays, evidence)
    return adapter, collector, out, evidence, collector.written(adapter.arrays, estimates)


@pytest.mark.parametrize(("make", "x"), [(resnet, image(5)), (branches, vector(7))])
def test_it_is_what_a_training_step_would_store(make, x):
    """With momentum 0, which forgets what was before; shared layers are the exception."""
    model = make("linen", partial(nn.BatchNorm, momentum=0.0))
    _, collector, out, _, new = collected(model, lambda m: m(x))
    module, variables = model.unbind()
    y, updated = module.apply(
        variables, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
    )
    expected = model_of(module.bind({**variables, **updated}), "test").arrays
    for key, leaf in new.items():
        if "shared" not in key:
            np.testing.assert_allclose(leaf, expected[key], rtol=2e-5, atol=1e-5)
    if make is branches:  # no dropout: the result is that of training too
        np.testing.assert_allclose(out, y, rtol=2e-4, atol=2e-4)
    assert {key[1:-1] for key in new if key[0] == "batch_stats"} == set(collector.norms)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_shared_norm_sees_all_its_calls_as_one_batch(framework):
    model = branches(framework)
    x = vector(7)
    adapter, _, _, evidence, new = collected(model, lambda m: m(x))
    params = adapter.arrays

    def dense(name, x):
        key = partial(adapter.key, (name,))
        return np.asarray(x @ params[key("kernel")]) + np.asarray(params[key("bias")])

    both = np.concatenate([dense("first", x), dense("second", x)]).astype(np.float64)
    assert (evidence[("shared",)].count == 14).all()
    np.testing.assert_allclose(
        new[adapter.key(("shared",), "mean")], both.mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(new[adapter.key(("shared",), "var")], both.var(0), rtol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_norms_by_their_statistics_do_as_the_call_says(framework):
    """The result is then that of inference, and so is what later norms see."""
    model = resnet(framework)
    x = image(4)
    if framework == "nnx":
        model.eval()
    _, _, out, _, _ = collected(model, lambda m: m(x), by_batch=())
    np.testing.assert_allclose(out, model(x), rtol=1e-5, atol=1e-6)


METHODS = {
    "BatchRenorm": dict(rmax=2.0, dmax=1.0),
    "AdaBN": dict(domains=("a", "b"), domain="b"),
    "IterNorm": dict(group_size=3, num_groups=None),
    "DecorrelatedBatchNorm": dict(group_size=3, num_groups=None),
    "SwitchableNorm": {},
    "IBNa": {},
    "InstanceNorm": dict(track_running_stats=True),
    "BatchNorm": dict(momentum=None, running_var="unbiased"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_statistics(name):
    """As one training step with momentum=0 stores."""
    x = image(4).repeat(2, -1) + jnp.arange(6.0)[None, None, None]
    options = {**METHODS[name]}
    cls = getattr(jaxnorm.linen, name)
    layer = cls(**(options | dict(momentum=0.0)))
    variables = stirred_variables(layer, x, use_running_average=False)
    _, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    expected = updated["batch_stats"]
    layer = cls(**options)
    _, _, _, _, new = collected(layer.bind(variables), lambda m: m(x, use_running_average=True))
    stats = [name for name in expected if name.startswith(("mean", "var", "cov"))]
    assert stats
    for name in stats:
        np.testing.assert_allclose(
            new[("batch_stats", name)], expected[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_layers_stacked_along_any_axis():
    """By numbers, and not by shapes, it is found whose evidence it is: 4 layers of 4 features."""

    class Stack(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x, train=False):
            layers = nn.scan(
                Step,
                variable_axes={"params": 0, "batch_stats": self.axis},
                split_rngs={"params": True},
                length=4,
            )
            return layers(train)(x, None)[0]

    class Step(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x, _):
            x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x))
            return x, None

    x = vector(5)
    first = Stack(0)
    variables = stirred_variables(first, x)
    second = jax.tree.map(lambda leaf: leaf, variables)
    second["batch_stats"] = jax.tree.map(jnp.transpose, variables["batch_stats"])
    _, _, _, _, new = collected(first.bind(variables), lambda m: m(x))
    _, _, _, _, transposed = collected(Stack(1).bind(second), lambda m: m(x))
    for key, leaf in new.items():
        if key[0] == "batch_stats":
            np.testing.assert_allclose(transposed[key], leaf.T, rtol=1e-5, atol=1e-5)
            assert jnp.unique(leaf).size == 16


def test_models_side_by_side():
    """`nn.vmap` over four models that share nothing, or only the statistics."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    x = jnp.stack([vector(5), vector(5) + 3])
    own = nn.vmap(
        Model, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
    )()
    shared = nn.vmap(
        Model, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}
    )()
    for module, expected in ((own, x.mean(1)), (shared, x.mean((0, 1)))):
        model = module.bind(stirred_variables(module, x))
        _, _, _, _, new = collected(model, lambda m: m(x))
        found = new[("batch_stats", "BatchNorm_0", "mean")]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_branches_give_evidence_where_they_are_taken():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = (nn.BatchNorm(use_running_average=True, name=n) for n in "ab")
            if self.is_initializing():
                return first(x) + second(x)
            return nn.cond(x.sum() > 0, lambda m, x: first(x), lambda m, x: second(x), self, x)

    x = jnp.abs(vector(5))
    module = Switch()
    variables = stirred_variables(module, x)
    _, _, _, evidence, new = collected(module.bind(variables), lambda m: m(x))
    stats = variables["batch_stats"]
    np.testing.assert_allclose(new[("batch_stats", "a", "mean")], x.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(new[("batch_stats", "b", "mean")], stats["b"]["mean"])
    assert evidence[("b",)].count.sum() == 0


def test_masks_that_the_model_gives_its_norms():
    layer = nn.BatchNorm(use_running_average=True)
    x = vector(6)
    mask = jnp.arange(6)[:, None] < 4
    model = layer.bind(stirred_variables(layer, x))
    _, _, _, evidence, new = collected(model, lambda m: m(x, mask=mask))
    np.testing.assert_allclose(new[("batch_stats", "mean")], x[:4].mean(0), rtol=1e-5, atol=1e-6)
    assert (evidence[()].count == 4).all()


def test_flat_variables_of_several_feature_axes():
    x = image(4)
    layer = stir(jaxnorm.nnx.BatchNorm(24, axis=(2, 3), rngs=nnx.Rngs(0)))
    _, _, _, _, new = collected(layer, lambda m: m(x))
    np.testing.assert_allclose(new[("mean",)], x.mean((0, 1)).ravel(), rtol=1e-5, atol=1e-6)


def test_unbiased_if_asked():
    x = vector(6)
    layer = nn.BatchNorm(use_running_average=True)
    model = layer.bind(stirred_variables(layer, x))
    _, _, _, _, new = collected(model, lambda m: m(x), running_var="unbiased")
    np.testing.assert_allclose(new[("batch_stats", "var")], x.var(0, ddof=1), rtol=1e-5)


def test_batches_merge_to_one():
    model = resnet("linen")
    x = image(7)
    adapter = model_of(model, "test")
    collector = Collector(adapter, lambda m: m(x), "test")

    def of(x):
        return collector.evidence(adapter.arrays, lambda m: m(x))[1]

    parts = [jax.jit(of)(part) for part in (x[:2], x[2:])]
    merged, whole = collector.merged(*parts), jax.jit(of)(x)
    for path in whole:
        np.testing.assert_allclose(merged[path].mean, whole[path].mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(merged[path].var, whole[path].var, rtol=1e-4, atol=1e-6)
