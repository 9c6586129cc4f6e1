"""What AdaBN and IBN-Net alone promise: statistics and parameters of domains, and a shortcut."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_family_oracles import ibn_b
from flax import nnx
from modules import FRAMEWORKS, draw
from subjects import BOTH

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.usefixtures("quick_compile")
IMAGES = (4, 3, 2, 6)
DOMAINS = ("source", "target")


def layer(framework, name, x, **options):
    return FRAMEWORKS[framework](x, getattr(getattr(jaxnorm, framework), name), **options)


@BOTH
def test_ibn_b_normalizes_the_sum(framework):
    x, shortcut = draw(IMAGES), draw(IMAGES, seed=1)
    made = layer(framework, "IBNb", x)
    y, _ = made.train(made.params, made.stats, x, shortcut=shortcut)
    np.testing.assert_allclose(y, ibn_b(x, shortcut), rtol=1e-4, atol=1e-4)
    narrow = jaxnorm.ibn_b(x.astype(jnp.bfloat16), shortcut)[0]
    assert narrow.dtype == jnp.float32


# AdaBN


def standardized(x, stats, domain=""):
    mean, var = (np.float64(stats[f"{name}{domain}"]) for name in ("mean", "var"))
    return (np.float64(x) - mean) / np.sqrt(var + 1e-5)


@BOTH
def test_only_the_statistics_of_the_domain_move(framework):
    x = draw(IMAGES)
    made = layer(framework, "AdaBN", x, domains=DOMAINS, momentum=0.75, debias=True)

    @partial(jax.jit, static_argnames="domain")
    def run(**call):
        y, new = made.train(made.params, made.stats, x, **call)
        return y, new, made.infer(made.params, new, x, **call)

    for domain, suffix in (("source", ""), (None, ""), ("target", "_target")):
        call = {} if domain is None else {"domain": domain}
        y, new, z = run(**call)
        moved = {name for name in new if (new[name] != made.stats[name]).any()}
        assert moved == {f"{name}{suffix}" for name in ("mean", "var", "updates")}
        np.testing.assert_allclose(new[f"mean{suffix}"], x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        expected, _ = jaxnorm.batch_norm(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(z, standardized(x, new, suffix), rtol=1e-4, atol=1e-5)


def test_domains_may_be_a_list():
    """Also in NNX, whose graphs are compared and hashed."""
    made = jaxnorm.nnx.AdaBN(6, domains=list(DOMAINS), rngs=nnx.Rngs(0))
    again = jaxnorm.nnx.AdaBN(6, domains=DOMAINS, rngs=nnx.Rngs(0))
    first, second = (nnx.split(layer)[0] for layer in (made, again))
    assert first == second
    assert hash(first) == hash(second)


@BOTH
def test_separate_parameters(framework):
    """Auxiliary batch norm: the gradient of a domain's loss reaches only its parameters."""
    x = draw(IMAGES)
    made = layer(framework, "AdaBN", x, domains=DOMAINS, separate_affine=True)
    assert set(made.params) == {"scale", "bias", "scale_target", "bias_target"}

    @jax.jit
    def gradients(params):
        def loss(params, domain):
            return (made.train(params, made.stats, x, domain=domain)[0] ** 3).sum()

        return [jax.grad(loss)(params, domain) for domain in DOMAINS]

    reached = [{name for name, g in each.items() if g.any()} for each in gradients(made.params)]
    assert reached == [{"scale", "bias"}, {"scale_target", "bias_target"}]
    params = made.params | {"scale_target": jnp.full(6, 2.0)}
    source, target = jax.jit(
        lambda params: [made.train(params, made.stats, x, domain=d)[0] for d in DOMAINS]
    )(params)
    np.testing.assert_allclose(target, 2 * source, rtol=1e-6)


def test_variables_of_batch_norm_are_adapted():
    """The story: a trained layer, a shifted and scaled domain, statistics collected there."""
    source = draw((4, 16, 3), seed=1)
    shift, stretch = jnp.array([3.0, -1.0, 0.5]), jnp.array([0.2, 4.0, 1.0])
    target = source * stretch[None, None] + shift[None, None]
    trained = jaxnorm.linen.BatchNorm(use_running_average=False)
    params = trained.init(jax.random.key(0), source[0])["params"]
    restored = {"mean": source.mean((0, 1)), "var": source.var((0, 1))}
    layer = jaxnorm.linen.AdaBN(domains=DOMAINS, momentum=None)

    def adapt(stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return layer.apply(variables, batch, False, domain="target", mutable=["batch_stats"])[1]

    def infer(stats, x, **call):
        return layer.apply({"params": params, "batch_stats": stats}, x, True, **call)

    @jax.jit
    def story(source, target):
        stats = restored
        for batch in target:
            stats = stats | adapt(stats, batch)["batch_stats"]
        outputs = (
            infer(stats, source),
            infer(restored, target),
            infer(stats, target, domain="target"),
        )
        return stats, outputs

    stats, (on_source, off, on_target) = story(source, target)
    np.testing.assert_allclose(on_source, standardized(source, restored), atol=1e-5)
    assert set(stats) == {"mean", "var", "mean_target", "var_target", "updates_target"}
    chex.assert_trees_all_equal({name: stats[name] for name in restored}, restored)
    # The layer takes the shift and the scale off, as if the domains were one; before it did not.
    np.testing.assert_allclose(on_target.mean((0, 1)), on_source.mean((0, 1)), atol=1e-3)
    assert abs(off - on_source).max() > 1


def test_the_domain_of_a_whole_model():
    """Where a call cannot name it: by an option, or in NNX by a view of the model."""
    x = draw((6, 4)) + 3
    rngs = nnx.Rngs(0)
    layer = jaxnorm.nnx.AdaBN(4, domains=("a", "b"), momentum=0.0, rngs=rngs)
    model = nnx.Sequential(layer, nnx.relu)
    nnx.view(model, domain="b")(x)
    np.testing.assert_allclose(layer.mean_b[...], x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(layer.mean[...], 0)
    linen = jaxnorm.linen.AdaBN(domains=("a", "b"), domain="b", momentum=0.0)
    variables = linen.init(jax.random.key(0), x, False)
    _, new = linen.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean_b"], x.mean(0), rtol=1e-5)
