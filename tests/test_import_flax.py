"""Variables go from Linen to NNX and back, by whatever names and layouts both have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from modules import draw
from tool_models import (
    Branches,
    NNXBranches,
    NNXResNet,
    ResNet,
    drawn,
    drawn_nnx,
    image,
    shapes_of,
    shapes_of_nnx,
    values_of,
    vector,
)

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.flax import import_flax

FRAMEWORKS = ("linen", "nnx")
X = jnp.ones((2, 3))
MODELS = {"resnet": (ResNet, NNXResNet, image), "branches": (Branches, NNXBranches, vector)}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def twins(kind, here, there):
    """A model without values, one with values, and an input."""
    linen, of_nnx, data = MODELS[kind]
    model = shapes_of(linen(), data()) if here == "linen" else shapes_of_nnx(of_nnx)
    other = drawn(linen(), data()) if there == "linen" else drawn_nnx(of_nnx)
    return model, other, data()


@pytest.mark.parametrize("there", FRAMEWORKS)
@pytest.mark.parametrize("here", FRAMEWORKS)
@pytest.mark.parametrize("kind", MODELS)
def test_twins_hold_the_same_values(kind, here, there):
    model, other, x = twins(kind, here, there)
    filled, report = import_flax(model, other, x)
    assert report.fits
    assert not report.dropped + report.notes
    equal(values_of(filled), values_of(other))
    for leaf in values_of(filled).values():
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in values_of(other).values())


@pytest.mark.parametrize("there", FRAMEWORKS)
def test_variables_alone(there):
    model, other, x = twins("resnet", "nnx", there)
    if there == "linen":
        variables = other.variables
    else:
        variables = nnx.to_pure_dict(nnx.state(other, (nnx.Param, nnx.BatchStat)))
    equal(values_of(import_flax(model, variables, x).model), values_of(other))


class Renamed(nnx.Module):
    """Two layers of a sequence, by names of their own."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(4, 3, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(3, rngs=rngs)])

    def __call__(self, x):
        return self.norms[0](self.encoder(x))


def test_names_are_those_of_the_other_model():
    other = drawn(nn.Sequential([nn.Dense(3), nn.LayerNorm()]), vector())
    names = {"encoder": "layers_0", "norms/0": "layers_1"}
    filled, _ = import_flax(shapes_of_nnx(Renamed), other, vector(), names=names)
    np.testing.assert_array_equal(filled.encoder.kernel[...], values_of(other)["layers_0/kernel"])


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


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("here", FRAMEWORKS)
def test_weight_norms(here):
    x, module = vector(), WeightNorms()
    layers = {"weight/layer_instance": "dense", "spectral/layer_instance": "last"}
    if here == "nnx":
        linen = module.bind(jax.jit(module.init)(jax.random.key(0), x))
        of_nnx, _ = import_flax(shapes_of_nnx(NNXWeightNorms), linen, x, names=layers)
    else:
        of_nnx, back = drawn_nnx(NNXWeightNorms), {there: here for here, there in layers.items()}
        linen, _ = import_flax(shapes_of(module, x), of_nnx, x, names=back)
    of_nnx.eval()
    graph, state = nnx.split(of_nnx)
    both = jax.jit(lambda v, state: (module.apply(v, x), nnx.merge(graph, state)(x)))
    np.testing.assert_allclose(*both(linen.variables, state), rtol=1e-5, atol=1e-5)


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
    model, other = shapes_of(Scanned(0), x), drawn(Scanned(1), x)
    filled, _ = import_flax(model, other, x, scans={"dense": (1, 0)})
    for name, leaf in values_of(other).items():
        np.testing.assert_array_equal(np.moveaxis(leaf, 1, 0), values_of(filled)[name])


@pytest.mark.parametrize("here", FRAMEWORKS)
def test_flat_features(here):
    """A norm over two feature axes, whose variables NNX may have flat."""
    x, options = jnp.ones((4, 2, 3)), dict(axis=(1, 2), use_running_average=True)
    linen, make = jnn.BatchNorm(**options), partial(jnx.BatchNorm, 6, **options)
    if here == "linen":
        model, other = shapes_of(linen, x), drawn_nnx(make)
    else:
        model, other = shapes_of_nnx(make), drawn(linen, x)
    found = values_of(import_flax(model, other, x).model)
    for name, leaf in values_of(other).items():
        assert found[name].shape != leaf.shape
        np.testing.assert_array_equal(np.ravel(found[name]), np.ravel(leaf))


# --- Options, and what else a norm keeps


def linen_norm(fill=drawn, **options):
    return fill(jnn.BatchNorm(use_running_average=True, **options), X)


def nnx_norm(fill=drawn_nnx, cls=jnx.BatchNorm, **options):
    return fill(partial(cls, 3, use_running_average=True, **options))


@pytest.mark.parametrize("make", [linen_norm, nnx_norm])
def test_options_are_seen(make):
    model, other = nnx_norm(shapes_of_nnx), make(epsilon=0.1)
    with pytest.raises(ValueError, match=r"epsilon is 1e-05, the source's 0\.1"):
        import_flax(model, other, X)
    import_flax(model, other, X, source="same")
    import_flax(nnx_norm(shapes_of_nnx, epsilon=0.1), other, X)


def test_bookkeeping_is_taken_or_dropped():
    options = dict(momentum=None, update_every=2)
    many = nnx_norm(**options)
    many.updates.set_value(jnp.full(3, 7, jnp.int32))
    many.pending_batches.set_value(jnp.int32(1))
    taken, _ = import_flax(linen_norm(shapes_of, **options), many, X)
    assert values_of(taken)["updates"].tolist() == [7, 7, 7]
    assert int(values_of(taken)["pending_batches"]) == 1
    _, report = import_flax(linen_norm(shapes_of), many, X, source="same")
    assert {"updates", "pending_batches", "pending_mean"} <= set(report.dropped)
    started, _ = import_flax(nnx_norm(shapes_of_nnx, update_every=2), linen_norm(), X)
    assert int(started.pending_batches[...]) == 0


@pytest.mark.parametrize("kind", ["BatchRenorm", "BatchNorm"])
@pytest.mark.parametrize("here", FRAMEWORKS)
def test_the_batch_renorm_that_circulates(here, kind):
    """A tree as sbx, CrossQ and purejaxql store it; inference is by mean, variance and epsilon."""
    mean, var, scale, bias = (draw((3,), seed=seed) for seed in range(1, 5))
    stats = {"mean": mean, "var": var**2}
    limits = {"steps": 120_000, "r_max": 3, "d_max": 5}
    other = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats | limits}

    def layer(**options):
        options |= {"use_running_average": True}
        if here == "nnx":
            return shapes_of_nnx(partial(getattr(jnx, kind), 3, **options))
        return shapes_of(getattr(jnn, kind)(**options), X)

    with pytest.raises(ValueError, match=r"epsilon is 1e-05, the source's 0\.001"):
        import_flax(layer(), other, X)
    filled, report = import_flax(layer(epsilon=1e-3), other, X)
    renorm = kind == "BatchRenorm"
    equal(
        values_of(filled),
        other["params"] | stats | ({"step": np.int32(120_000)} if renorm else {}),
    )
    assert set(report.dropped) == {"r_max", "d_max"} | (set() if renorm else {"steps"})
    assert ("limits r to 3 and d to 5" in str(report)) == renorm


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_scale_minus_one(told, stored):
    """Whichever of the two stores it so; said by the layer itself, or by the user."""
    other = nnx_norm(zero_centered_scale=not stored)
    other.scale.set_value(jnp.array([0.5, 1.0, 2.0]))
    options, source = {}, other
    if told:
        source = nnx.to_pure_dict(nnx.state(other, (nnx.Param, nnx.BatchStat)))
        options = dict(source={"BatchNorm": dict(zero_centered_scale=not stored)})
    model = nnx_norm(shapes_of_nnx, zero_centered_scale=stored)
    filled, _ = import_flax(model, source, X, **options)
    assert filled.scale[...].tolist() == ([-0.5, 0.0, 1.0] if stored else [1.5, 2.0, 3.0])


def test_how_the_other_model_is_called():
    model = nnx_norm(shapes_of_nnx, nnx.BatchNorm)
    other = drawn(nn.BatchNorm(), X, use_running_average=True)
    with pytest.raises(ValueError, match="use_running_average"):
        import_flax(model, other, X)
    _, report = import_flax(model, other, X, call_other=lambda other: other(X, True))
    assert report.fits
