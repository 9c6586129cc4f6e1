"""What goes where when a model is filled: names, options, and that nothing is shared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tool_models import drawn, drawn_nnx, shapes_of, shapes_of_nnx, values_of

import jaxnorm
from jaxnorm.tools.importing.flax import import_flax
from jaxnorm.tools.importing.names import Stack, Tied, names_of
from jaxnorm.tools.importing.plan import Source, SourceLayer, import_layers
from jaxnorm.tools.importing.presets import PRESETS, torch_defaults
from jaxnorm.tools.importing.torch import export_torch, import_torch

FRAMEWORKS = ("linen", "nnx")
X = jnp.ones((2, 3))


class Block(nn.Module):
    """A dense layer and a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="dense")(x)
        options = torch_defaults("BatchNorm") | dict(use_running_average=True)
        return jaxnorm.linen.BatchNorm(name="norm", **options)(x)


class Net(nn.Module):
    """Two blocks, and a head that a call may leave out."""

    @nn.compact
    def __call__(self, x, head=True):
        x = Block(name="b2")(Block(name="b1")(x))
        return nn.Dense(2, name="head")(x) if head else x


class NNXBlock(nnx.Module):
    """The twin of `Block`."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = jaxnorm.nnx.BatchNorm(3, **torch_defaults("BatchNorm"), rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class NNXNet(nnx.Module):
    """The twin of `Net`."""

    def __init__(self, rngs):
        self.b1, self.b2 = NNXBlock(rngs), NNXBlock(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, head=True):
        x = self.b2(self.b1(x))
        return self.head(x) if head else x


def net(framework):
    return drawn(Net(), X) if framework == "linen" else drawn_nnx(NNXNet)


def arrays_of(model, rename=lambda path: path):
    """Other values for all variables of a model, by their paths."""
    generator = np.random.default_rng(0)
    return {
        rename(path): generator.uniform(1, 2, leaf.shape).astype(np.float32)
        for path, leaf in values_of(model).items()
    }


def alike(target, local):
    """The reader of a source whose layers are like ours."""
    return SourceLayer(dict(local), {role: (role,) for role in local})


def filled(model, arrays, run=lambda model: model(X), **options):
    source = Source("torch", arrays, alike, "/")
    return import_layers(model, source, run, who="test", **options)


def check(model, arrays, named=lambda path: path):
    for path, leaf in values_of(model).items():
        assert (leaf == arrays[named(path)]).all(), path


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_not_named_is_called_alike(framework):
    model = net(framework)
    arrays = arrays_of(model)
    new, report = filled(model, arrays)
    check(new, arrays)
    assert report.fits
    assert report.copied["b1/norm/var"] == "b1/norm/var"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_names_hold_for_all_that_is_below_and_the_longest_path_wins(framework):
    model = net(framework)

    def named(path):
        for ours, theirs in (("b1/norm", "first_norm"), ("b1", "layer1"), ("", "net")):
            if path.startswith(ours):
                return f"{theirs}/{path.removeprefix(ours).strip('/')}".strip("/")
        raise AssertionError

    arrays = arrays_of(model, named)
    names = {"": "net", "b1": "layer1", "b1/norm": "first_norm"}
    check(filled(model, arrays, names=names)[0], arrays, named)
    check(filled(model, arrays, names=lambda path: named(path))[0], arrays, named)


def test_paths_are_whole_names():
    """The path `b1` is no part of `b10`."""
    names = names_of({"b1": "x"}, ["b1/norm", "b10/norm"], ".", "test")
    assert names == {"b1/norm": ("x.norm",), "b10/norm": ("b10.norm",)}
    several = names_of({"layers": ["a", "b"]}, ["layers/norm"], ".", "test")
    assert several == {"layers/norm": (Stack(("a.norm", "b.norm")),)}


class Scanned(nn.Module):
    """Three blocks in one, whose variables are stacked along their second axis."""

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 1, "batch_stats": 1},
            split_rngs={"params": True},
            length=4,
        )
        return step(Block(name="blocks"), x, None)[0]


def test_layers_are_stacked_along_the_axis_that_is_said():
    model = shapes_of(Scanned(), X)
    arrays = {
        f"{name}/{path.removeprefix('blocks/')}": np.full(np.delete(leaf.shape, 1), i, np.float32)
        for i, name in enumerate("abcd")
        for path, leaf in values_of(model).items()
    }
    new, _ = filled(model, arrays, names={"blocks": Stack(tuple("abcd"), axis=1)})
    for path, leaf in values_of(new).items():
        assert (np.moveaxis(np.asarray(leaf), 1, -1) == np.arange(4)).all(), path
    with pytest.raises(ValueError, match="shapes that differ"):
        filled(model, arrays, names={"blocks": tuple("abcd")})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_everything_that_does_not_fit_is_listed_at_once(framework):
    model = net(framework)
    arrays = arrays_of(model)
    del arrays["b1/norm/mean"], arrays["head/bias"]
    arrays |= {"b2/dense/kernel": np.ones((3, 7)), "other/scale": np.ones(3)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        filled(model, arrays, source_options={"b1/norm": dict(epsilon=1e-3)})
    message = str(caught.value)
    for part in (
        "not used (1): 'other/scale' (3,)",
        "not filled (2): 'b1/norm/mean' (from 'b1/norm'), 'head/bias' (from 'head')",
        "differ (1): 'b2/dense/kernel' float32(3, 3) from 'b2/dense/kernel' float64(3, 7)",
        "differ (1): epsilon is 1e-05, the source's 0.001: 'b1/norm'",
    ):
        assert part in message, message

    new, report = filled(model, arrays, partial=True)
    assert not report.fits
    own, got = values_of(model), values_of(new)
    kept = {"b1/norm/mean", "head/bias", "b2/dense/kernel"}
    for path in got:
        assert (got[path] == (own if path in kept else arrays)[path]).all(), path
    text = str(report)
    for part in ("not used:", "not filled:", "of another shape:", "'other/scale' (3,)"):
        assert part in text


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_options_are_the_frameworks_defaults_unless_they_are_told(framework):
    model = net(framework)
    arrays = arrays_of(model)
    mild = {"BatchNorm": dict(epsilon=1e-3)}
    with pytest.raises(ValueError, match=r"epsilon is 1e-05.*'b1/norm', 'b2/norm'\."):
        filled(model, arrays, source_options=mild)
    by_path = mild | {"b1/norm": dict(epsilon=1e-5)}
    with pytest.raises(ValueError, match=r"epsilon is 1e-05.*: 'b2/norm'\."):
        filled(model, arrays, source_options=by_path)
    filled(model, arrays, source_options="same")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_variables_of_layers_that_are_not_called_are_filled_as_they_are(framework):
    model = net(framework)
    arrays = arrays_of(model)
    new, _ = filled(model, arrays, lambda model: model(X, head=False))
    check(new, arrays)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_shared(framework):
    model = net(framework)
    arrays = arrays_of(model)
    before = {path: np.array(leaf) for path, leaf in values_of(model).items()}
    given = {path: leaf.copy() for path, leaf in arrays.items()}
    new, _ = filled(model, arrays, partial=True)
    for leaf in arrays.values():
        leaf[...] = 7
    check(new, given)
    for leaf in values_of(new).values():
        leaf.delete()
    check(model, before)


def test_arrays_stay_where_they_were():
    model = net("linen")
    mesh = Mesh(np.array(jax.devices()[:3]), ("features",))
    place = NamedSharding(mesh, PartitionSpec("features"))
    module, variables = model.unbind()
    variables["batch_stats"] = jax.device_put(variables["batch_stats"], place)
    model = module.bind(variables)
    arrays = arrays_of(model)
    with jax.numpy_dtype_promotion("strict"):
        new, _ = filled(model, arrays)
    assert values_of(new)["b1/norm/mean"].sharding == place
    check(new, arrays)


def test_a_model_of_numpy_arrays_is_filled():
    module, variables = net("linen").unbind()
    model = module.bind(jax.tree.map(np.asarray, variables))
    arrays = arrays_of(model)
    check(filled(model, arrays)[0], arrays)


def test_presets_name_options_of_our_layers():
    """A preset constructs our layer, in each of its frameworks."""
    for presets in PRESETS.values():
        for kind, options in presets.items():
            assert getattr(jaxnorm.linen, kind)(**options).epsilon == options["epsilon"]


# --- Variables under several names, and of no layer

KERNEL = np.arange(9, dtype=np.float32).reshape(3, 3)


class TiedInside(nnx.Module):
    """Two layers with one kernel, and a layer that stands in two places; or one of each alone."""

    def __init__(self, is_tied=True, *, rngs):
        self.a, self.o = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))
        self.first = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
        self.last = nnx.Linear(3, 3, rngs=rngs)
        if is_tied:
            self.o.kernel, self.last = self.a.kernel, self.first[0]
        self.me = self

    def __call__(self, x):
        return self.last(self.first[0](self.o(self.a(x))))


def test_what_is_tied_goes_by_all_its_names():
    model = shapes_of_nnx(TiedInside)
    state = {
        f"{layer}.{name}": leaf
        for layer in ("a", "o", "first.0", "last")
        for name, leaf in (("weight", KERNEL), ("bias", np.ones(3, np.float32)))
    }
    filled, _ = import_torch(model, state, X)
    assert filled.o.kernel is filled.a.kernel
    assert filled.last is filled.first[0]
    back = export_torch(filled, X)
    assert back.keys() == state.keys()
    assert all((back[key] == state[key]).all() for key in state)
    # One of several names does, in the file and in ours.
    once = {key: leaf for key, leaf in state.items() if key not in ("a.weight", "first.0.weight")}
    filled, report = import_torch(model, once, X)
    assert report.fits
    assert (filled.a.kernel[...] == KERNEL.T).all()
    assert export_torch(filled, X, names={"last": "first.0"}).keys() == state.keys() - {
        "last.weight",
        "last.bias",
    }
    # Of one that is not tied both are made.
    apart, report = import_flax(shapes_of_nnx(partial(TiedInside, False)), filled, X)
    assert report.fits
    for layer in (apart.o, apart.last):
        assert (layer.kernel[...] == KERNEL.T).all()


def test_names_say_what_is_tied_in_the_source():
    names = {"": Tied(("wte", "lm_head"))}
    state = {"wte.weight": KERNEL[:2], "wte.bias": KERNEL[0, :2]}
    state |= {key.replace("wte", "lm_head"): leaf.copy() for key, leaf in state.items()}
    model, x = shapes_of_nnx(partial(nnx.Linear, 3, 2)), jnp.ones((1, 3))
    filled, report = import_torch(model, state, x, names=names)
    assert report.copied["kernel"] == "lm_head.weight"
    back = export_torch(filled, x, names=names)
    assert back.keys() == state.keys()
    assert all((back[key] == state[key]).all() for key in state)
    with pytest.raises(ValueError, match=r"from 'lm_head\.bias': differs from 'wte\.bias'"):
        import_torch(model, state | {"lm_head.bias": KERNEL[1, :2]}, x, names=names)


class WithToken(nn.Module):
    """A model with a variable of its own, and a layer that no reader knows."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.zeros, (3,))
        return nn.Embed(2, 3, name="embed")(x) + token[None]


def test_variables_of_unknown_layers_are_named_one_by_one():
    x = jnp.zeros((1,), jnp.int32)
    state = {"cls": np.ones(3, np.float32), "e.weight": np.full((2, 3), 2, np.float32)}
    names = {"token": "cls", "embed/embedding": "e.weight"}
    filled, _ = import_torch(shapes_of(WithToken(), x), state, x, names=names)
    params = jax.tree.map(np.asarray, filled.variables["params"])
    np.testing.assert_array_equal(params["token"], state["cls"])
    np.testing.assert_array_equal(params["embed"]["embedding"], state["e.weight"])
