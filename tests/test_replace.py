"""Replacing batch norms: as a model written with the other layers, and back again."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from replaced_models import (
    Activated,
    Masked,
    NNXActivated,
    NNXMasked,
    NNXOwnDefaults,
    NNXStackedLast,
    OwnDefaults,
    StackedLast,
)
from tool_models import branches, image, resnet, vector

import jaxnorm
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.replacing.frozen import frozen_layer
from jaxnorm.tools.replacing.replace import replace
from jaxnorm.tools.replacing.replacements import frozen, ghost, synchronized, to, unsynchronized

FRAMEWORKS = pytest.mark.parametrize("framework", ["linen", "nnx"])
INPUTS = {resnet: image(), branches: vector()}
NORMS = {
    resnet: {
        "stem_norm",
        *("block1/norm1", "block1/norm2"),
        *("block2/norm1", "block2/norm2", "block2/norm3"),
    },
    branches: {"shared", "after_branch", "layers/norm", "checkpointed/norm"},
}
RNGS = {"dropout": jax.random.key(1)}

WAYS = {
    # What to put instead; the layer by which the model would have been written so; the variables
    # that are kept, dropped and new.
    "layer norm": (
        to("LayerNorm"),
        lambda layers: partial(layers.LayerNorm, epsilon=1e-5),
        ({"scale", "bias"}, {"mean", "var"}, set()),
    ),
    "batch renorm": (
        to("BatchRenorm", rmax=2.0, dmax=1.0),
        lambda layers: partial(layers.BatchRenorm, rmax=2.0, dmax=1.0),
        ({"scale", "bias", "mean", "var"}, set(), {"step"}),
    ),
    "whitening": (
        to("IterNorm", num_groups=1, momentum=0.9),
        lambda layers: layers.IterNorm,
        ({"scale", "bias"}, {"mean", "var"}, {"mean", "cov"}),
    ),
}


def written_with(make, framework, norm):
    """The model as its author would have written it with another norm."""
    if framework == "nnx":
        return make(framework, norm)

    def called_with_mode(use_running_average, name):
        module = norm.func if isinstance(norm, partial) else norm
        options = {"use_running_average": use_running_average}
        return norm(name=name, **options if hasattr(module, "use_running_average") else {})

    return make(framework, called_with_mode)


def trained(model, x):
    """Loss, gradients by name, and variables by name after a training call."""
    if isinstance(model, nn.Module):
        module, variables = model.unbind()
        others = {name: tree for name, tree in variables.items() if name != "params"}

        def loss(params):
            y, updated = module.apply(
                {"params": params, **others}, x, train=True, mutable=["batch_stats"], rngs=RNGS
            )
            return (y**2).sum(), updated

        (value, updated), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"]
        )
        return value, flatten_dict(grads), flatten_dict(updated)
    model.train()
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Dropout):
            layer.deterministic = True  # its random numbers are not those of Linen
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def nnx_loss(params):
        inside = nnx.merge(graph, params, others, copy=True)
        y = inside(x)
        return (y**2).sum(), nnx.state(inside, nnx.BatchStat)

    (value, updated), grads = jax.jit(jax.value_and_grad(nnx_loss, has_aux=True))(params)
    return value, by_name(grads), by_name(updated)


def by_name(state):
    return {tuple(map(str, path)): v.get_raw_value() for path, v in nnx.to_flat_state(state)}


def arrays_of(model):
    """All variables but random keys, which are no numbers."""
    arrays = model_of(model, "test").arrays
    return {
        path: leaf
        for path, leaf in arrays.items()
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def inference(model, x):
    if isinstance(model, nn.Module):
        module, variables = model.unbind()
        return jax.jit(module.apply)(variables, x)
    model.eval()
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(x))(state)


def assert_equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance or {"rtol": 0})


@FRAMEWORKS
@pytest.mark.parametrize(
    ("way", "make"),
    [
        ("layer norm", resnet),
        ("batch renorm", branches),
        ("whitening", branches),
    ],
)
@pytest.mark.usefixtures("quick_compile")
def test_is_the_model_written_with_the_other_layers(framework, make, way):
    by, layer, (kept, dropped, new) = WAYS[way]
    model, x = make(framework), INPUTS[make]
    before = jax.tree.map(np.array, arrays_of(model))
    replaced = replace(model, by, x)
    assert {each.path for each in replaced.changed} == NORMS[make]
    assert not replaced.refused
    for each in replaced.changed:
        assert set(each.kept) == kept
        assert set(each.dropped) == dropped
        assert set(each.new) == new
    # Variables: those that are new start as everywhere, all others are as they were.
    written = written_with(make, framework, layer(getattr(jaxnorm, framework)))
    held, arrays = model_of(written, "test"), arrays_of(replaced.model)
    assert arrays.keys() == arrays_of(written).keys()
    for path, value in arrays.items():
        assert value.shape == held.arrays[path].shape
        if path in before and path[-1] not in new:
            np.testing.assert_array_equal(value, before[path])
    # The same in inference, and in training with its gradients.
    written = held.rebuilt(held.arrays | arrays)
    assert_equal(inference(replaced.model, x), inference(written, x))
    assert_equal(trained(replaced.model, x), trained(written, x), rtol=1e-6, atol=1e-6)
    # Nothing was changed, and nothing is shared.
    back = replaced.restored()
    jax.tree.map(lambda leaf: leaf.delete(), arrays_of(replaced.model))
    assert_equal(arrays_of(model), before)
    assert_equal(arrays_of(back), before)
    jax.tree.map(lambda leaf: leaf.delete(), arrays_of(back))
    assert_equal(arrays_of(model), before)


@FRAMEWORKS
@pytest.mark.parametrize(("make", "affine"), [(resnet, False), (branches, True)])
@pytest.mark.usefixtures("quick_compile")
def test_frozen_does_not_move_in_training(framework, make, affine):
    model, x = make(framework), INPUTS[make]
    before = arrays_of(model)
    replaced = replace(model, frozen(affine=affine), x)
    assert {each.path for each in replaced.changed} == NORMS[make]
    assert_equal(inference(replaced.model, x), inference(model, x))
    _, grads, updated = trained(replaced.model, x)
    still = {tuple(path.split("/")) for path in NORMS[make]}
    for path, grad in grads.items():
        assert bool(jnp.any(grad != 0)) == (path[:-1] not in still or not affine), path
    assert updated
    for path, value in updated.items():
        np.testing.assert_array_equal(value, before[path], err_msg=str(path))


@FRAMEWORKS
@pytest.mark.usefixtures("quick_compile")
def test_frozen_survives_modes_and_copies(framework):
    model = replace(resnet(framework), frozen(), image()).model
    expected = inference(resnet(framework), image())
    if framework == "linen":
        module, variables = model.unbind()
        for copy in (module.copy(), module.clone()):
            y, updated = copy.apply(variables, image(), mutable=["batch_stats"])
            assert_equal(y, expected, rtol=1e-5)
            assert_equal(updated["batch_stats"], variables["batch_stats"])
        shapes = jax.eval_shape(module.init, jax.random.key(0), image())
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
        return
    model.train()
    for copy in (
        nnx.clone(model),
        nnx.merge(*nnx.split(model)),
        nnx.view(model, deterministic=True),
    ):
        for _, layer in nnx.iter_modules(copy):
            if isinstance(layer, nnx.Dropout):
                layer.deterministic = True
        np.testing.assert_allclose(copy(image()), expected, rtol=1e-6)
    assert isinstance(model.stem_norm, nnx.BatchNorm)


@FRAMEWORKS
@pytest.mark.usefixtures("quick_compile")
def test_frozen_twice_is_frozen_in_both_ways(framework):
    once = replace(branches(framework), frozen(affine=False), vector()).model
    twice = replace(once, frozen(statistics=False), vector()).model
    _, grads, updated = trained(twice, vector())
    assert_equal(list(updated.values()), list(trained(once, vector())[2].values()))
    assert all((g == 0).all() for path, g in grads.items() if path[-2:] == ("shared", "scale"))


@FRAMEWORKS
@pytest.mark.usefixtures("quick_compile")
def test_the_way_back_after_training(framework):
    """Shared parameters come back as trained, statistics that were dropped as they were."""
    model, x = branches(framework), vector()
    original, outputs = arrays_of(model), inference(model, x)
    for by, old in ((frozen(), set()), (to("LayerNorm"), {"mean", "var"})):
        replaced = replace(model, by, x)
        assert_equal(inference(replaced.restored(), x), outputs)
        held = model_of(replaced.model, "test")
        moved = held.rebuilt({path: leaf + 1 for path, leaf in held.arrays.items()})
        back = arrays_of(replaced.restored(moved))
        assert type(replaced.restored(moved)) is type(model)
        for path, value in original.items():
            expected = value if path[-1] in old else value + 1
            np.testing.assert_array_equal(back[path], expected, err_msg=str(path))
    assert "restored() has the old layers with mean, var as of now" in str(replaced)


@FRAMEWORKS
@pytest.mark.usefixtures("quick_compile")
def test_devices_together_are_one_batch(framework):
    model, x = resnet(framework), image(4)
    parts = x.reshape(2, 2, *x.shape[1:])
    together = replace(model, synchronized("batch"), x)
    alone = replace(together.model, unsynchronized(), x)

    def outputs(model, axis_name):
        def run(x):
            if framework == "linen":
                module, variables = model.unbind()
                return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs=RNGS)[1]
            copy = nnx.clone(model)
            copy.train()
            copy(x)
            return nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

        return jax.jit(jax.vmap(run, axis_name=axis_name))

    pooled = outputs(together.model, "batch")(parts)
    whole = outputs(alone.model, None)(x[None])
    for found, expected in zip(jax.tree.leaves(pooled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, np.repeat(expected, 2, axis=0), rtol=1e-4, atol=1e-5)
    assert alone.changed[0].before == "jaxnorm.BatchNorm(axis_name='batch')"
    assert alone.changed[0].after == "BatchNorm()"


def test_linen_and_nnx_agree():
    linen, twin = resnet("linen"), model_of(resnet("nnx"), "test")
    arrays = {path[1:]: leaf for path, leaf in arrays_of(linen).items()}
    models = (linen, twin.rebuilt(twin.arrays | arrays))
    by = to("GroupNorm", num_groups=2)
    found, expected = (
        inference(replace(model, by, image(), only="block*").model, image()) for model in models
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def masked(framework, **options):
    if framework == "nnx":
        return NNXMasked(nnx.BatchNorm(4, rngs=nnx.Rngs(0), **options))
    module = Masked(nn.BatchNorm(**options))
    x, mask = image_of(4), jnp.ones((2, 3, 4), bool)
    return module.bind(module.init(jax.random.key(0), x, mask), mutable=["batch_stats"])


def image_of(*features):
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, *features)), jnp.float32)


@FRAMEWORKS
@pytest.mark.parametrize("tracks", [False, True])
def test_calls_go_on_as_before(framework, tracks):
    """What the call says reaches a layer that knows it, and is left out for one that does not."""
    x, mask = image_of(4), jnp.ones((2, 3, 4), bool).at[:, 2].set(False)
    by = to("InstanceNorm", track_running_stats=tracks)
    replaced = replace(masked(framework, epsilon=0.1), by, x, mask)
    expected, _ = jaxnorm.instance_norm(x, where=mask, epsilon=0.1)
    model = replaced.model
    if framework == "linen":
        module, variables = model.unbind()
        y, updated = module.apply(variables, x, mask, mutable=["batch_stats"])
        moved = updated.get("batch_stats", {}).get("norm", {}).get("mean", jnp.zeros(4))
    else:
        y = model(x, mask)
        moved = model.norm.mean[...] if tracks else jnp.zeros(4)
    assert_equal(y, expected, rtol=1e-6)
    assert bool(jnp.any(moved != 0)) == tracks


@FRAMEWORKS
def test_ghost_batches(framework):
    x, mask = image_of(4), jnp.ones((2, 3, 4), bool)
    model = replace(masked(framework), ghost(1), x, mask).model
    if framework == "linen":
        module, variables = model.unbind()
        y, _ = module.apply(variables, x, mask, mutable=["batch_stats"])
    else:
        y = model(x, mask)
    expected, _ = jaxnorm.ghost_batches(jaxnorm.batch_norm, 1)(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@FRAMEWORKS
def test_options_carry_over(framework):
    options = dict(epsilon=0.1, momentum=0.5, use_bias=False, axis=1, axis_name="batch")
    x, mask = image_of(4).swapaxes(1, 2), jnp.ones((2, 4, 3), bool)
    model = masked(framework, **options)
    if framework == "linen":
        module = Masked(nn.BatchNorm(**options))
        model = module.bind(module.init(jax.random.key(0), x, mask), mutable=["batch_stats"])
    model_norm = jax.vmap(lambda x: replaces(model, x, mask), axis_name="batch")
    found = []

    def replaces(model, x, mask):
        for by in (to("SwitchableNorm"), to("LayerNorm"), to("GroupNorm", num_groups=2)):
            (change,) = replace(model, by, x, mask).changed
            found.append((change.after, change.kept))
        return x

    model_norm(x[None])
    assert found == [
        (
            "SwitchableNorm(axis=1, momentum=0.5, epsilon=0.1, use_bias=False, axis_name='batch')",
            ("mean", "scale", "var"),
        ),
        (
            "LayerNorm(epsilon=0.1, use_bias=False, reduction_axes=1, feature_axes=1)",
            ("scale",),
        ),
        ("GroupNorm(num_groups=2, epsilon=0.1, use_bias=False, axis=1)", ("scale",)),
    ]


OWN = {"linen": (Activated, OwnDefaults), "nnx": (NNXActivated, NNXOwnDefaults)}


@FRAMEWORKS
def test_a_users_class_with_code_of_its_own_is_left_and_named(framework):
    activated, own_defaults = OWN[framework]
    model = resnet(framework, activated)
    replaced = replace(model, to("LayerNorm"), image())
    assert not replaced.changed
    assert replaced.refused["stem_norm"].startswith(f"{activated.__name__} has a __call__ of its")
    assert str(replaced).startswith("nothing was replaced\nleft: ")
    assert_equal(inference(replaced.model, image()), inference(model, image()))
    replaced = replace(resnet(framework, own_defaults), to("LayerNorm"), image())
    assert {each.after for each in replaced.changed} == {"LayerNorm(epsilon=0.1)"}
    # Frozen it still does what it does.
    model.eval() if framework == "nnx" else None
    still = replace(model, frozen(), image()).model
    assert_equal(inference(still, image()), inference(model, image()))


@FRAMEWORKS
def test_what_does_not_fit_is_left_with_the_reason(framework):
    replaced = replace(resnet(framework), to("GroupNorm", num_groups=3), image())
    assert {each.path for each in replaced.changed} == {f"block2/norm{i}" for i in (1, 2, 3)}
    assert replaced.refused["stem_norm"] == (
        "4 features cannot be split with num_groups=3. Use a divisor of 4: one of [1, 2, 4]."
    )
    assert "left: block1/norm2: 4 features" in str(replaced)
    replaced = replace(branches(framework), to("InstanceNorm"), vector())
    assert set(replaced.refused) == NORMS[branches]
    assert "each value by itself in an input of shape (6, 5)" in replaced.refused["layers/norm"]


def test_an_nnx_layer_that_is_not_called_is_left():
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model.spare = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    replaced = replace(model, ghost(2), jnp.ones((2, 4)))
    assert replaced.refused == {
        "spare": "it is not called in the example call, so its input is not known"
    }


@FRAMEWORKS
def test_layers_stacked_along_another_axis(framework):
    """They keep what they have; where new variables would lie is not guessed."""
    x = vector()
    if framework == "linen":
        model = StackedLast().bind(StackedLast().init(jax.random.key(0), x))
    else:
        model = NNXStackedLast()
    replaced = replace(model, to("LayerNorm"), x)
    assert_equal(inference(replaced.model, x).shape, x.shape)
    assert replaced.changed[0].path == "layers/norm"
    replaced = replace(model, to("BatchRenorm"), x)
    assert replaced.refused["layers/norm"].startswith("BatchRenorm has variables ['step'] besides")


def test_what_users_say_of_variables_stays():
    """Sharding and the like: boxes in Linen, metadata in NNX."""
    x = image_of(4)
    scale_init = nn.with_partitioning(nn.initializers.ones, ("model",))
    module = nn.BatchNorm(use_running_average=True, scale_init=scale_init)
    replaced = replace(module.bind(module.init(jax.random.key(0), x)), to("LayerNorm"), x)
    _, variables = replaced.model.unbind()
    assert nn.get_partition_spec(variables)["params"]["scale"] == jax.P("model")
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0), scale_metadata={"note": "mine"})
    replaced = replace(nnx.Sequential(layer), to("LayerNorm"), x)
    assert replaced.model.layers[0].scale.get_metadata("note") == "mine"


@FRAMEWORKS
def test_the_report_is_a_table(framework):
    replaced = replace(resnet(framework), to("BatchRenorm"), image(), only="block2/norm3")
    lines = str(replaced).splitlines()
    assert lines[0].split() == ["path", "from", "to", "kept", "dropped", "new"]
    assert lines[1].split("  ")[0] == "block2/norm3"
    assert "flax.BatchNorm()" in lines[1]
    assert lines[1].endswith("BatchRenorm()  bias, mean, scale, var  -        step")
    assert lines[2].startswith("way back: restored() has the old layers with all variables")


@FRAMEWORKS
@pytest.mark.usefixtures("quick_compile")
def test_affine_alone_is_frozen_while_statistics_move(framework):
    """Also where the model's code says at each call anew whether this is training."""
    model, x = branches(framework), vector()
    held = model_of(model, "test")
    layers = held.known_layers(lambda model: model(x))
    path = ("shared",)
    still = held.rebuilt(
        held.arrays, {path: frozen_layer(layers[path], statistics=False, affine=True)}
    )
    _, grads, updated = trained(still, x)
    _, all_grads, all_updated = trained(held.rebuilt(held.arrays), x)
    assert_equal(updated, all_updated, rtol=1e-6)
    for key, grad in grads.items():
        if key[-2] == "shared":
            np.testing.assert_array_equal(grad, np.zeros_like(grad))
        else:
            np.testing.assert_allclose(grad, all_grads[key], rtol=1e-5, atol=1e-6)


class SkipsOne(nn.Module):
    """A model that calls its second batch norm in training only."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="first")(x)
        if train or self.is_initializing():
            x = nn.BatchNorm(not train, name="second")(x)
            x = nn.LayerNorm(name="rows")(x)
        return x


def test_batch_norms_that_the_call_misses_are_named():
    model = SkipsOne().bind(SkipsOne().init(jax.random.key(0), vector()))
    replaced = replace(model, to("GroupNorm", num_groups=2), vector())
    assert [change.path for change in replaced.changed] == ["first"]
    assert list(replaced.refused) == ["second"]
    assert "not called in the example call" in replaced.refused["second"]
    replaced = replace(model, to("GroupNorm", num_groups=2), vector(), train=True)
    assert {change.path for change in replaced.changed} == {"first", "second"}


@pytest.mark.parametrize("by", [frozen(), to("GroupNorm", num_groups=1), to("BatchRenorm")])
def test_a_replaced_nnx_model_can_be_pickled(by):
    model = replace(resnet("nnx"), by, image()).model
    model.eval()
    read = pickle.loads(pickle.dumps(model))
    assert type(read.stem_norm) is type(model.stem_norm)
    np.testing.assert_array_equal(read(image()), model(image()))
