"""AdaBN, switchable norm and IBN-Net: values, derivatives, devices and state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_family_oracles import affine, ibn_a, ibn_b, switchable_norm
from flax import nnx, serialization
from modules import FRAMEWORKS, draw, draw_mask

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

MODULES = {"linen": jaxnorm.linen, "nnx": jaxnorm.nnx}
BOTH = pytest.mark.parametrize("framework", MODULES)
IMAGES = (4, 3, 2, 6)
MASKS = {"whole": None, "positions": (4, 3, 2, 1), "elements": IMAGES}
DOMAINS = ("source", "target")


def layer(framework, name, x, **options):
    return FRAMEWORKS[framework](x, getattr(MODULES[framework], name), **options)


def parameters(count, dtype=jnp.float64):
    return [draw((IMAGES[-1],), dtype, seed) for seed in range(1, count + 1)]


def mask_of(kind):
    """With an example of which nothing is valid."""
    return None if MASKS[kind] is None else draw_mask(MASKS[kind]).at[1].set(False)


def numpy(*arrays):
    return [None if a is None else np.asarray(a) for a in arrays]


# The functions against their oracles, with all derivatives

W, V = np.array([0.3, -1.0, 0.8]), np.array([-0.5, 0.4, 1.2])
RUNNING = np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6)


def weights(x):
    return W.astype(x.dtype), V.astype(x.dtype)


def stats(x, first=0):
    return jaxnorm.Stats(*(value[first:].astype(x.dtype) for value in RUNNING))


# Name: (ours, the oracle), of (x, scale, bias, where).
FUNCTIONS = {
    "switchable": (
        lambda x, s, b, m: jaxnorm.switchable_norm(x, *weights(x), s, b, where=m)[0],
        lambda x, s, b, m: switchable_norm(x, W, V, s, b, where=m),
    ),
    "switchable inference": (
        lambda x, s, b, m: jaxnorm.switchable_norm_inference(
            x, stats(x), *weights(x), s, b, where=m
        ),
        lambda x, s, b, m: switchable_norm(x, W, V, s, b, where=m, running=RUNNING),
    ),
    "IBN-a": (
        lambda x, s, b, m: jaxnorm.ibn_a(x, s, b, ratio=0.35, where=m)[0],
        lambda x, s, b, m: ibn_a(x, s, b, size=2, where=m),
    ),
    "IBN-a inference": (
        lambda x, s, b, m: jaxnorm.ibn_a_inference(x, stats(x, first=2), s, b, ratio=0.35, where=m),
        lambda x, s, b, m: ibn_a(x, s, b, size=2, where=m, running=[v[2:] for v in RUNNING]),
    ),
    "IBN-b": (
        lambda x, s, b, m: jaxnorm.ibn_b(x, x, s, b, where=m)[0],
        lambda x, s, b, m: ibn_b(x, x, s, b, where=m),
    ),
}
EACH = pytest.mark.parametrize(("ours", "oracle"), FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.mark.parametrize("kind", MASKS)
@EACH
def test_function_is_what_the_paper_says(x64, quick_compile, ours, oracle, kind):
    x, scale, bias, mask = draw(IMAGES, jnp.float64), *parameters(2), mask_of(kind)
    found = jax.jit(ours)(x, scale, bias, mask)
    expected = oracle(*numpy(x, scale, bias, mask))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    bare = jax.jit(ours)(x, None, None, mask)
    expected = oracle(*numpy(x, None, None, mask))
    np.testing.assert_allclose(bare, expected, rtol=1e-12, atol=1e-12)


@EACH
def test_right_at_large_means(ours, oracle):
    x = draw(IMAGES) + 1.5e4
    expected = oracle(*numpy(np.float64(x), None, None, None))
    # In inference the mean is far from the running one, and so is the result.
    size = max(1, abs(expected).max())
    found = jax.jit(ours)(x, None, None, None)
    np.testing.assert_allclose(found, expected, atol=2e-3 * size)


def plain_switchable(x, w, v, scale, bias, where):
    """Equation 3 in jnp, to be differentiated."""

    def stats(axes):
        count = where.sum(axes, keepdims=True)
        mean = jnp.where(where, x, 0).sum(axes, keepdims=True) / jnp.maximum(count, 1)
        var = jnp.where(where, (x - mean) ** 2, 0).sum(axes, keepdims=True) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, 0), jnp.where(count > 0, var, 1)

    means, variances = zip(*(stats(axes) for axes in ((1, 2), (1, 2, 3), (0, 1, 2))), strict=True)
    mean = sum(share * mean for share, mean in zip(jax.nn.softmax(w), means, strict=True))
    var = sum(share * var for share, var in zip(jax.nn.softmax(v), variances, strict=True))
    scale, bias = (p.reshape(1, 1, 1, -1) for p in (scale, bias))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize("kind", ["whole", "elements"])
def test_derivatives_of_switchable_norm(x64, quick_compile, kind):
    """By everything that is learned, through all three kinds of statistics, to the second order."""
    x = draw((2, 3, 2, 6), jnp.float64)
    where = jnp.ones(x.shape, bool) if kind == "whole" else draw_mask(x.shape)
    arguments = (x, jnp.asarray(W), jnp.asarray(V), *parameters(2))
    along = jax.tree.map(jnp.cos, arguments)

    def everything(function):
        def loss(*arguments):
            return jnp.sin(function(*arguments)).sum()

        every = tuple(range(5))
        gradient = jax.grad(loss, every)
        return (
            jax.jvp(function, arguments, along),
            gradient(*arguments),
            jax.jvp(gradient, arguments, along)[1],
            jax.grad(lambda *a: jax.jvp(loss, a, along)[1], every)(*arguments),
        )

    def ours(*arguments):
        mask = None if kind == "whole" else where
        return jaxnorm.switchable_norm(*arguments, where=mask)[0]

    found = jax.jit(lambda: everything(ours))()
    expected = jax.jit(lambda: everything(functools.partial(plain_switchable, where=where)))()
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["instance", "layer", "batch"])
def test_extremes_of_switchable_norm(kind):
    """With all weight on one kind it is instance, layer or batch norm."""
    logits = jnp.full(3, -jnp.inf).at[kind].set(0.0)
    axes = [(1, 2), (1, 2, 3), (0, 1, 2)][kind]
    x = draw(IMAGES)
    y, seen = jax.jit(jaxnorm.switchable_norm)(x, logits, logits)
    expected, _ = jaxnorm.normalize(x, axes=axes)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    batch = jaxnorm.moments(x, axes=(0, 1, 2))
    chex.assert_trees_all_close(seen, batch, rtol=1e-5, atol=1e-6)


def test_axes_can_stand_anywhere(x64, quick_compile):
    x, scale, bias = draw((2, 3, 4, 5, 6), jnp.float64), *parameters(2)
    scale, bias = (jnp.stack([p, -p, 2 * p]) for p in (scale, bias))
    options = dict(axis=(-1, 1), batch_axis=(0, 3))
    ours = jax.jit(functools.partial(jaxnorm.switchable_norm, **options))
    found, seen = ours(x, W, V, scale, bias)
    expected = switchable_norm(*numpy(x, W, V, scale, bias), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert seen.var.shape == (3, 6)

    x = draw(IMAGES, jnp.float64)
    first = jax.jit(functools.partial(jaxnorm.ibn_a, axis=0, batch_axis=1))
    found, _ = first(jnp.moveaxis(x, -1, 0), scale[0], bias[0])
    expected = ibn_a(*numpy(x, scale[0], bias[0]), size=3)
    np.testing.assert_allclose(jnp.moveaxis(found, 0, -1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["SwitchableNorm", "IBNa", "AdaBN"])
def test_devices_together_are_one(x64, quick_compile, name, kind):
    """Four devices of one example each, of which one has nothing valid."""
    x, mask = draw(IMAGES, jnp.float64), mask_of(kind)
    options = {"param_dtype": jnp.float64, "momentum": 0.5}
    options |= {"domains": DOMAINS} if name == "AdaBN" else {}
    alone, spread = (layer("linen", name, x, axis_name=d, **options) for d in (None, "d"))

    def run(made, x, mask):
        def loss(params, x):
            call = {} if mask is None else {"mask": mask}
            y, new = made.train(params, made.stats, x, **call)
            return jnp.sin(y).sum(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(made.params, x)

    (dparams, dx), (y, new) = jax.jit(lambda: run(alone, x, mask))()
    split = jax.tree.map(lambda leaf: leaf[:, None], (x, mask))
    mapped = jax.vmap(functools.partial(run, spread), axis_name="d")
    (dparams_of_each, dx_of_each), (y_of_each, new_of_each) = jax.jit(lambda: mapped(*split))()
    found = y_of_each.reshape(y.shape), dx_of_each.reshape(x.shape)
    chex.assert_trees_all_close(found, (y, dx), rtol=1e-10, atol=1e-10)
    total = jax.tree.map(lambda leaf: leaf.sum(0), dparams_of_each)
    chex.assert_trees_all_close(total, dparams, rtol=1e-10, atol=1e-10)
    for device in range(4):
        part = jax.tree.map(lambda leaf, device=device: leaf[device], new_of_each)
        chex.assert_trees_all_close(part, new, rtol=1e-10, atol=1e-10)


# The layers

OPTIONS = {
    "AdaBN": {"domains": DOMAINS, "momentum": 0.7},
    "SwitchableNorm": {},
    "IBNa": {"ratio": 0.35},
    "IBNb": {},
}
EACH_LAYER = pytest.mark.parametrize("name", OPTIONS)
VARIABLES = {
    "AdaBN": "bias 6, mean 6, mean_target 6, scale 6, var 6, var_target 6",
    "SwitchableNorm": "bias 6, mean 6, mean_weight 3, scale 6, var 6, var_weight 3",
    "IBNa": "bias 6, mean 4, scale 6, var 4",
    "IBNb": "bias 6, scale 6",
}


@EACH_LAYER
def test_variables_and_results_are_alike_in_both_frameworks(name):
    x = draw(IMAGES)
    first, second = (layer(framework, name, x, **OPTIONS[name]) for framework in MODULES)
    chex.assert_trees_all_equal((first.params, first.stats), (second.params, second.stats))
    found = sorted((first.params | first.stats).items())
    assert ", ".join(f"{key} {leaf.size}" for key, leaf in found) == VARIABLES[name]
    results = [
        (jax.jit(made.train)(made.params, made.stats, x), made.infer(made.params, made.stats, x))
        for made in (first, second)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-6)
    for (_, new), _ in results:
        chex.assert_trees_all_equal_shapes_and_dtypes(new, first.stats)


@EACH_LAYER
def test_initialization_needs_no_mapped_axis_and_moves_nothing(name):
    x = draw(IMAGES)
    made = layer("linen", name, x, axis_name="nowhere", **OPTIONS[name])
    start = {"mean": 0, "var": 1}
    for key, leaf in made.stats.items():
        np.testing.assert_array_equal(leaf, start[key.split("_")[0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@EACH_LAYER
def test_narrow_input_is_rounded_once(name, dtype):
    x = draw(IMAGES, dtype)
    made = layer("linen", name, x, dtype=dtype, **OPTIONS[name])
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        y, _ = jax.jit(made.train)(made.params, made.stats, x)
    wide, _ = jax.jit(made.train)(made.params, made.stats, x.astype(jnp.float32))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=0.01, atol=0.01)


@EACH_LAYER
def test_only_the_input_is_kept(name):
    x = jnp.ones((2, 32, 32, 8), jnp.bfloat16)
    made = layer("linen", name, x, dtype=jnp.bfloat16, **OPTIONS[name])
    _, pull = jax.vjp(jax.jit(lambda x: made.train(made.params, made.stats, x)[0]), x)
    assert 1 <= sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) / x.nbytes <= 1.03


@pytest.mark.parametrize("name", ["SwitchableNorm", "IBNa"])
@BOTH
def test_state_of_the_batch_part(framework, name):
    """Moved by the batch's statistics; used, without a gradient, in inference."""
    x, mask = draw(IMAGES), draw_mask(IMAGES)
    made = layer(framework, name, x, momentum=0.75, **OPTIONS[name])
    train = jax.jit(made.train)
    _, new = train(made.params, made.stats, x, mask=mask)
    batch = jaxnorm.moments(x, (0, 1, 2), where=mask)
    size = new["mean"].size
    np.testing.assert_allclose(new["mean"], 0.25 * batch.mean[-size:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.75 + 0.25 * batch.var[-size:], rtol=1e-5)
    _, same = train(made.params, new, x, mask=jnp.zeros_like(mask))
    chex.assert_trees_all_equal(same, new)
    _, same = jax.jit(functools.partial(made.train, update_stats=False))(made.params, new, x)
    chex.assert_trees_all_equal(same, new)

    infer = jax.jit(made.infer)
    assert abs(infer(made.params, new, x) - infer(made.params, made.stats, x)).max() > 0.05
    by_stats = jax.grad(lambda stats: jnp.sin(infer(made.params, stats, x)).sum())(new)
    assert not any(leaf.any() for leaf in by_stats.values())


@BOTH
def test_ibn_b_normalizes_the_sum(framework):
    x, shortcut = draw(IMAGES), draw(IMAGES, seed=1)
    made = layer(framework, "IBNb", x)
    y, _ = made.train(made.params, made.stats, x, shortcut=shortcut)
    np.testing.assert_allclose(y, ibn_b(*numpy(x, shortcut)), rtol=1e-4, atol=1e-4)
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
    for domain, suffix in (("source", ""), (None, ""), ("target", "_target")):
        call = {} if domain is None else {"domain": domain}
        y, new = jax.jit(made.train, static_argnames="domain")(made.params, made.stats, x, **call)
        moved = {name for name in new if (new[name] != made.stats[name]).any()}
        assert moved == {f"{name}{suffix}" for name in ("mean", "var", "updates")}
        np.testing.assert_allclose(new[f"mean{suffix}"], x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        expected, _ = jaxnorm.batch_norm(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        z = made.infer(made.params, new, x, **call)
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

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, domain):
        return jax.grad(lambda p: (made.train(p, made.stats, x, domain=domain)[0] ** 3).sum())(
            params
        )

    for domain, own in (("source", {"scale", "bias"}), ("target", {"scale_target", "bias_target"})):
        reached = {name for name, g in gradient(made.params, domain).items() if g.any()}
        assert reached == own
    params = made.params | {"scale_target": jnp.full(6, 2.0)}
    source, target = (made.train(params, made.stats, x, domain=d)[0] for d in DOMAINS)
    np.testing.assert_allclose(target, 2 * source, rtol=1e-6)


def test_function_uses_the_statistics_of_the_domain(x64):
    x, (scale, bias) = draw(IMAGES, jnp.float64), parameters(2)
    of_domains = {"a": stats(x), "b": jaxnorm.Stats(stats(x).var, stats(x).var)}
    for domain, (mean, var) in (("a", RUNNING), ("b", (RUNNING[1], RUNNING[1]))):
        found = jaxnorm.adabn(x, of_domains, scale, bias, domain=domain)
        expected = affine((np.asarray(x) - mean) / np.sqrt(var + 1e-5), *numpy(scale, bias))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_batch_norm_is_adapted():
    """The story: a trained layer, a shifted and scaled domain, statistics collected there."""
    source = draw((8, 16, 3), seed=1)
    shift, stretch = jnp.array([3.0, -1.0, 0.5]), jnp.array([0.2, 4.0, 1.0])
    target = source * stretch[None, None] + shift[None, None]
    trained = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=None)
    variables = trained.init(jax.random.key(0), source[0])
    for batch in source:
        variables |= trained.apply(variables, batch, mutable=["batch_stats"])[1]
    saved = serialization.to_bytes(
        {k: v for k, v in variables["batch_stats"].items() if k != "updates"}
    )
    restored = serialization.msgpack_restore(saved)

    layer = jaxnorm.linen.AdaBN(domains=DOMAINS, momentum=None)
    adapted = {"params": variables["params"], "batch_stats": restored}
    on_source = layer.apply(adapted, source[0], True)
    np.testing.assert_allclose(on_source, standardized(source[0], restored), atol=1e-5)
    off = layer.apply(adapted, target[0], True)
    for batch in target:
        _, new = layer.apply(adapted, batch, False, domain="target", mutable=["batch_stats"])
        adapted |= new
    stats = adapted["batch_stats"]
    assert set(stats) == {"mean", "var", "mean_target", "var_target", "updates_target"}
    chex.assert_trees_all_equal({name: stats[name] for name in restored}, restored)
    on_target = layer.apply(adapted, target[0], True, domain="target")
    # The layer takes the shift and the scale off, as if the domains were one; before it did not.
    np.testing.assert_allclose(on_target, on_source, atol=1e-3)
    assert abs(off - on_source).max() > 1


def test_population_statistics_are_exact():
    """Evidence of unequal batches, merged, put into layers: inference on all data in one batch."""
    data = draw((23, 3)) + jnp.array([[1e3, 0.0, -5.0]])
    batches = [data[:2], data[2:13], data[13:14], data[14:]]
    population = jaxnorm.merge(*(jaxnorm.moments(batch, 0) for batch in batches)).stats()
    expected, _ = jaxnorm.batch_norm(data)
    ours = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ours.mean[...], ours.var[...] = population.mean, population.var
    found = {"nnx": ours(data, use_running_average=True)}
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": population.mean, "var": population.var},
    }
    found["linen"] = jaxnorm.linen.BatchNorm().apply(variables, data, use_running_average=True)
    domain = {"mean_target": population.mean, "var_target": population.var}
    variables["batch_stats"] |= domain | {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    found["domain"] = jaxnorm.linen.AdaBN(domains=DOMAINS).apply(
        variables, data, True, domain="target"
    )
    for y in found.values():
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-4)
    averaged = np.mean([batch.var(0) for batch in batches], 0)
    assert abs(averaged / population.var - 1).max() > 0.1, "an average of variances is another"


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
