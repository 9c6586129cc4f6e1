"""Variables go from Linen to NNX and back, and the models then compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from modules import draw
from tool_models import branches, image, resnet, vector

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.flax import import_flax

FRAMEWORKS = ("linen", "nnx")
MODELS = {
    "resnet": (functools.cache(resnet), image),
    "branches": (functools.cache(branches), vector),
}


def emptied(model):
    """A model whose variables are all zero."""
    if isinstance(model, nnx.Module):
        graph, state, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
        return nnx.merge(graph, jax.tree.map(jnp.zeros_like, state), rest)
    module, variables = model.unbind()
    return module.bind(jax.tree.map(jnp.zeros_like, variables))


def run(model, x):
    if isinstance(model, nnx.Module):
        model.eval()
        return nnx.jit(lambda model, x: model(x))(model, x)
    module, variables = model.unbind()
    return jax.jit(module.apply)(variables, x)


def values(model):
    """All parameters and statistics, by path."""
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        return {"/".join(map(str, path)): v.get_raw_value() for path, v in flat}
    return {"/".join(path[1:]): leaf for path, leaf in flatten_dict(model.variables).items()}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("there", FRAMEWORKS)
@pytest.mark.parametrize("here", FRAMEWORKS)
@pytest.mark.parametrize("name", MODELS)
def test_twins_hold_the_same_values(name, here, there):
    make, data = MODELS[name]
    other, model = make(there), emptied(make(here))
    filled, report = import_flax(model, other, data())
    assert report.fits
    assert not report.dropped + report.notes
    equal(values(filled), values(other))
    assert not any(leaf.any() for leaf in values(model).values())
    if (here, there) == ("nnx", "linen"):
        np.testing.assert_allclose(run(filled, data()), run(other, data()), rtol=1e-5, atol=1e-6)
    for leaf in values(filled).values():
        leaf.delete()
    assert not any(leaf.is_deleted() for m in (model, other) for leaf in values(m).values())


@pytest.mark.parametrize("there", FRAMEWORKS)
def test_variables_alone(there):
    make, _ = MODELS["resnet"]
    other, model = make(there), emptied(make("nnx"))
    if there == "linen":
        variables = other.variables
    else:
        variables = nnx.to_pure_dict(nnx.state(other, (nnx.Param, nnx.BatchStat)))
    filled, _ = import_flax(model, variables, image())
    equal(values(filled), values(other))


def test_names_are_those_of_the_other_model():
    class Renamed(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(4, 3, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(3, rngs=rngs)])

        def __call__(self, x):
            return self.norms[0](self.encoder(x))

    module = nn.Sequential([nn.Dense(3), nn.LayerNorm()])
    other = module.bind(module.init(jax.random.key(0), vector()))
    names = {"encoder": "layers_0", "norms/0": "layers_1"}
    filled, _ = import_flax(Renamed(nnx.Rngs(0)), other, vector(), names=names)
    np.testing.assert_array_equal(filled.encoder.kernel[...], values(other)["layers_0/kernel"])


class WeightNorms(nn.Module):
    """Wrappers, whose variables lie elsewhere in both frameworks."""

    @nn.compact
    def __call__(self, x):
        boxed = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        x = jnn.WeightNorm(nn.Dense(3, name="dense", kernel_init=boxed), name="weight")(x)
        return jnn.SpectralNorm(nn.Dense(2, name="last"), name="spectral")(x, update_stats=False)


class NNXWeightNorms(nnx.Module):
    """The twin of `WeightNorms`."""

    def __init__(self, rngs):
        self.weight = jnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
        self.spectral = jnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.spectral(self.weight(x))


@pytest.mark.parametrize("here", FRAMEWORKS)
def test_weight_norms(here):
    linen = WeightNorms().bind(WeightNorms().init(jax.random.key(0), vector()))
    nnx_model = NNXWeightNorms(nnx.Rngs(1))
    layers = {"weight/layer_instance": "dense", "spectral/layer_instance": "last"}
    if here == "nnx":
        other, (filled, _) = linen, import_flax(nnx_model, linen, vector(), names=layers)
    else:
        back = {there: here for here, there in layers.items()}
        other, (filled, _) = nnx_model, import_flax(linen, nnx_model, vector(), names=back)
    np.testing.assert_allclose(run(filled, vector()), run(other, vector()), rtol=1e-6, atol=1e-6)


class Scanned(nn.Module):
    """Layers stacked along another axis than the first."""

    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return layers(nn.Dense(4, name="dense"), x, None)[0]


def test_scans_along_other_axes():
    x = jnp.ones((2, 4))
    models = [Scanned(i).bind(Scanned(i).init(jax.random.key(i), x)) for i in (0, 1)]
    filled, _ = import_flax(models[0], models[1], x, scans={"dense": (1, 0)})
    np.testing.assert_allclose(run(filled, x), run(models[1], x), rtol=1e-6)


def both_layouts(framework):
    """A norm over two feature axes, whose variables NNX may have flat."""
    options = dict(axis=(1, 2), use_running_average=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), jnp.float32)
    linen = jnn.BatchNorm(**options)
    variables = linen.init(jax.random.key(0), x)
    stirred = jax.tree.map(lambda leaf: leaf + jnp.arange(6.0).reshape(2, 3), variables)
    if framework == "linen":
        return linen.bind(stirred), x
    layer = jnx.BatchNorm(6, rngs=nnx.Rngs(0), **options)
    for name, leaf in {**stirred["params"], **stirred["batch_stats"]}.items():
        getattr(layer, name).set_value(2 * leaf.reshape(-1))
    return layer, x


@pytest.mark.parametrize("here", FRAMEWORKS)
def test_flat_features(here):
    model, x = both_layouts(here)
    other, _ = both_layouts("nnx" if here == "linen" else "linen")
    filled, _ = import_flax(model, other, x)
    np.testing.assert_allclose(run(filled, x), run(other, x), rtol=1e-6)


def linen_norm(**options):
    layer = jnn.BatchNorm(use_running_average=True, **options)
    return layer.bind(layer.init(jax.random.key(0), jnp.ones((2, 3))))


def nnx_norm(cls=jnx.BatchNorm, **options):
    return cls(3, rngs=nnx.Rngs(0), use_running_average=True, **options)


@pytest.mark.parametrize("make", [linen_norm, nnx_norm])
def test_options_are_seen(make):
    with pytest.raises(ValueError, match=r"epsilon is 1e-05, the source's 0\.1"):
        import_flax(nnx_norm(), make(epsilon=0.1), jnp.ones((2, 3)))
    import_flax(nnx_norm(), make(epsilon=0.1), jnp.ones((2, 3)), source="same")
    import_flax(nnx_norm(epsilon=0.1), make(epsilon=0.1), jnp.ones((2, 3)))


def test_bookkeeping_is_taken_or_dropped():
    x = jnp.ones((2, 3))
    many = nnx_norm(momentum=None, update_every=2)
    many.updates.set_value(jnp.full(3, 7, jnp.int32))
    many.pending_batches.set_value(jnp.int32(1))
    taken, _ = import_flax(linen_norm(momentum=None, update_every=2), many, x)
    assert values(taken)["updates"].tolist() == [7, 7, 7]
    assert int(values(taken)["pending_batches"]) == 1
    _, report = import_flax(linen_norm(), many, x, source="same")
    assert {"updates", "pending_batches", "pending_mean"} <= set(report.dropped)
    started, _ = import_flax(nnx_norm(update_every=2), linen_norm(), x)
    assert int(started.pending_batches[...]) == 0


@pytest.mark.parametrize("kind", ["BatchRenorm", "BatchNorm"])
@pytest.mark.parametrize("here", FRAMEWORKS)
def test_the_batch_renorm_that_circulates(here, kind):
    """A tree as sbx, CrossQ and purejaxql store it; inference is by mean, variance and epsilon."""
    x = draw((5, 3))
    mean, var, scale, bias = (draw((3,), seed=seed) for seed in range(1, 5))
    stats = {"mean": mean, "var": var**2, "steps": 120_000, "r_max": 3, "d_max": 5}
    other = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}

    def layer(**options):
        options |= {"use_running_average": True}
        if here == "nnx":
            return getattr(jnx, kind)(3, rngs=nnx.Rngs(0), **options)
        module = getattr(jnn, kind)(**options)
        return module.bind(module.init(jax.random.key(0), x))

    with pytest.raises(ValueError, match=r"epsilon is 1e-05, the source's 0\.001"):
        import_flax(layer(), other, x)
    filled, report = import_flax(layer(epsilon=1e-3), other, x)
    by_hand = [np.float64(array) for array in (x, mean, var**2, scale, bias)]
    expected = (by_hand[0] - by_hand[1]) / np.sqrt(by_hand[2] + 1e-3) * by_hand[3] + by_hand[4]
    np.testing.assert_allclose(filled(x), expected, rtol=1e-5, atol=1e-5)
    renorm = kind == "BatchRenorm"
    assert set(report.dropped) == {"r_max", "d_max"} | (set() if renorm else {"steps"})
    assert ("limits r to 3 and d to 5" in str(report)) == renorm
    if renorm:
        assert values(filled)["step"] == 120_000


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_scale_minus_one(told, stored):
    """Whichever of the two stores it so; said by the layer itself, or by the user."""
    x = jnp.arange(6.0).reshape(2, 3)
    other = nnx_norm(zero_centered_scale=not stored)
    other.scale.set_value(jnp.array([0.5, 1.0, 2.0]))
    model = nnx_norm(zero_centered_scale=stored)
    if told:
        variables = nnx.to_pure_dict(nnx.state(other, (nnx.Param, nnx.BatchStat)))
        source = {"BatchNorm": dict(zero_centered_scale=not stored)}
        filled, _ = import_flax(model, variables, x, source=source)
    else:
        filled, _ = import_flax(model, other, x)
    np.testing.assert_allclose(filled(x), other(x), rtol=1e-6)


def test_how_the_other_model_is_called():
    x = jnp.ones((2, 3))
    module = nn.BatchNorm()
    other = module.bind(module.init(jax.random.key(0), x, use_running_average=True))
    with pytest.raises(ValueError, match="use_running_average"):
        import_flax(nnx_norm(nnx.BatchNorm), other, x)
    _, report = import_flax(
        nnx_norm(nnx.BatchNorm), other, x, call_other=lambda other: other(x, True)
    )
    assert report.fits
