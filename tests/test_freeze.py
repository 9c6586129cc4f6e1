"""Freezing: frozen statistics and parameters stay bit by bit, and all else trains as before."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from tool_models import branches, image, resnet, vector

import jaxnorm
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.replacing.freeze import decay_mask, freeze, norm_labels, norm_mask

pytestmark = pytest.mark.usefixtures("quick_compile")

BUILDERS = {"resnet": resnet, "branches": branches}
INPUTS = {"resnet": image(), "branches": vector()}
FRAMEWORKS = ("linen", "nnx")
cases = pytest.mark.parametrize("name", BUILDERS)
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


@functools.cache
def built(name, framework):
    return BUILDERS[name](framework)


def given(name, framework):
    """A model of the tests, and an input for it."""
    model = built(name, framework)
    return nnx.clone(model) if framework == "nnx" else model, INPUTS[name]


def arrays_of(model):
    """All numbers of a model by the names on the way, which both frameworks share."""
    known = model_of(model, "test")
    return {
        "/".join(key[1:] if isinstance(model, nn.Module) else key): np.array(leaf)
        for key, leaf in known.arrays.items()
        if known.collection(key) in ("params", "batch_stats")
    }


def statistics_of(model):
    return {k: v for k, v in arrays_of(model).items() if k.endswith(("/mean", "/var"))}


def parameters_of(model):
    return {k: v for k, v in arrays_of(model).items() if not k.endswith(("/mean", "/var"))}


def flat(tree):
    """A tree of labels by the names on the way."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def in_norm(name):
    """Whether a variable of the models of these tests belongs to a norm."""
    return any(part.startswith(("norm", "shared", "after")) for part in name.split("/")) or (
        name.startswith("stem_norm")
    )


def loss_of(out):
    return jnp.mean((out - jnp.ones_like(out)) ** 2)


def trained(model, x, transform=None, steps=1):
    """The model after steps of training, and the output of the last of them."""
    transform = optax.sgd(0.1) if transform is None else transform
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.train()
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                out = model(x)
                return loss_of(out), out

            gradient, out = nnx.grad(loss, has_aux=True)(model)
            optimizer.update(model, gradient)
            return out

        for _ in range(steps):
            out = step(model, optimizer)
        return model, out

    module, variables = model.unbind()

    @jax.jit
    def step(variables, state, key):
        def loss(params):
            out, updated = module.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return loss_of(out), (out, updated)

        gradient, (out, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = transform.update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **updated}, state, out

    state = transform.init(variables["params"])
    for i in range(steps):
        variables, state, out = step(variables, state, jax.random.key(i))
    return module.bind(variables), out


def same(a, b, names=None):
    for name in a.keys() | b.keys() if names is None else names:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def all_moved(a, b):
    assert a
    for name in a:
        assert (a[name] != b[name]).any(), name


@frameworks
@cases
def test_statistics_stay_and_the_rest_trains(name, framework):
    model, x = given(name, framework)
    before = arrays_of(model)
    frozen = freeze(model, x)
    same(arrays_of(frozen.model), before)
    after, out = trained(frozen.model, x)
    same(statistics_of(after), before, statistics_of(model))
    all_moved(parameters_of(after), before)
    same(arrays_of(model), before)
    if name == "branches":  # without dropout
        if framework == "nnx":
            model.eval()
        np.testing.assert_allclose(out, model(x), rtol=1e-5, atol=1e-6)


def test_dropout_stays_on():
    module, variables = freeze(*given("resnet", "linen")).model.unbind()
    call = functools.partial(module.apply, variables, image(), train=True, mutable=["batch_stats"])
    one, other = (call(rngs={"dropout": jax.random.key(seed)})[0] for seed in (0, 1))
    assert (one != other).any()
    frozen = freeze(*given("resnet", "nnx")).model
    frozen.train()
    assert (frozen(image()) != frozen(image())).any()


@frameworks
def test_affine_is_frozen_alone(framework):
    model, x = given("branches", framework)
    frozen = freeze(model, x, statistics=False, affine=True)
    assert set(frozen.frozen.values()) == {("scale", "bias")}
    after, out = trained(frozen.model, x)
    plain, expected = trained(model, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for name, value in statistics_of(plain).items():
        np.testing.assert_allclose(statistics_of(after)[name], value, rtol=1e-5, atol=1e-6)
    moved, old = parameters_of(after), parameters_of(model)
    same(moved, old, [k for k in moved if in_norm(k)])
    all_moved({k: v for k, v in moved.items() if k.endswith("kernel")}, old)


@frameworks
def test_only_some_are_frozen(framework):
    model, x = given("branches", framework)
    frozen = freeze(model, x, only="*layers*", affine=True)
    assert set(frozen.frozen) == {"layers/norm"}
    after, before = arrays_of(trained(frozen.model, x)[0]), arrays_of(model)
    chosen = [name for name in before if name.startswith("layers/norm/")]
    assert len(chosen) == 4
    same(after, before, chosen)
    all_moved({k: v for k, v in after.items() if in_norm(k) and k not in chosen}, before)


@pytest.mark.parametrize("only", ["block1/*", lambda path: path.startswith("block1/")])
@frameworks
def test_a_choice_is_a_pattern_or_a_function(framework, only):
    mask = flat(norm_mask(*given("resnet", framework), only=only))
    assert {name.rpartition("/")[0] for name, norm in mask.items() if norm} == {
        "block1/norm1",
        "block1/norm2",
    }


def test_an_nnx_model_stays_frozen_whatever_is_done_to_it():
    frozen = freeze(*given("resnet", "nnx")).model
    viewed = nnx.view(frozen, use_running_average=False, deterministic=True)
    copied = nnx.merge(*nnx.split(nnx.clone(viewed)))
    before = statistics_of(frozen)
    copied(image())
    same(statistics_of(copied), before)


@frameworks
@cases
def test_norms_are_found_by_what_they_are(name, framework):
    model, x = given(name, framework)
    mask = flat(norm_mask(model, x))
    params = parameters_of(model)
    assert mask == {name: in_norm(name) for name in params}
    assert flat(norm_labels(model, x)) == {k: "norm" if v else "other" for k, v in mask.items()}
    assert flat(decay_mask(model, x)) == {k: k.endswith("kernel") for k in params}
    assert flat(decay_mask(model, x, biases=True)) == {k: not in_norm(k) for k in params}


@cases
def test_trees_have_the_form_of_parameters(name):
    (linen, x), (twin, _) = given(name, "linen"), given(name, "nnx")
    ours = jax.tree.structure(norm_mask(linen, x))
    assert ours == jax.tree.structure(linen.variables["params"])
    theirs = jax.tree.structure(norm_mask(twin))
    assert theirs == jax.tree.structure(nnx.as_pure(nnx.state(twin, nnx.Param)))


class Misleading(nn.Module):
    """Layers under names that tell nothing, and a layer norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="batch_norm")(x)
        x = jaxnorm.linen.LayerNorm(name="dense")(x)
        return jaxnorm.linen.WeightNorm(nn.Dense(3, name="weighted"))(x)


class MisleadingTwin(nnx.Module):
    def __init__(self, rngs):
        self.batch_norm = nnx.Linear(4, 3, rngs=rngs)
        self.layers = nnx.List([jaxnorm.nnx.LayerNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.batch_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_names_mean_nothing():
    model = Misleading()
    mask = flat(norm_mask(model.bind(model.init(jax.random.key(0), vector())), vector()))
    assert {name for name, norm in mask.items() if norm} == {"dense/scale", "dense/bias"}
    mask = flat(norm_mask(MisleadingTwin(nnx.Rngs(0))))
    assert {name for name, norm in mask.items() if norm} == {"layers/0/scale", "layers/0/bias"}


@frameworks
@pytest.mark.parametrize("form", ["labels", "mask"])
def test_an_optimizer_leaves_norms_alone(framework, form):
    model, x = given("branches", framework)
    if form == "labels":
        groups = {"norm": optax.set_to_zero(), "other": optax.adamw(0.1, weight_decay=0.1)}
        transform = optax.multi_transform(groups, norm_labels(model, x))
    else:
        still = optax.masked(optax.set_to_zero(), norm_mask(model, x, only="shared"))
        transform = optax.chain(optax.adamw(0.1, weight_decay=0.1), still)
    after, before = parameters_of(trained(model, x, transform)[0]), parameters_of(model)
    kept = [k for k in before if (in_norm(k) if form == "labels" else k.startswith("shared"))]
    assert kept
    same(after, before, kept)
    all_moved({k: v for k, v in after.items() if k not in kept}, before)


@frameworks
@pytest.mark.parametrize("biases", [False, True])
def test_weight_decay_is_applied_exactly_where_it_is_said(framework, biases):
    model, x = given("resnet", framework)
    mask = decay_mask(model, x, biases=biases)
    decay_alone = optax.chain(
        optax.set_to_zero(), optax.add_decayed_weights(0.5, mask), optax.scale(-1.0)
    )
    after, before = parameters_of(trained(model, x, decay_alone)[0]), parameters_of(model)
    for name, value in before.items():
        decays = not in_norm(name) and (biases or not name.endswith("bias"))
        np.testing.assert_array_equal(after[name], 0.5 * value if decays else value, err_msg=name)


def test_boxed_parameters_keep_their_boxes():
    boxed = nn.with_partitioning(nn.initializers.ones, ("features",))
    module = nn.Sequential([nn.Dense(3), nn.BatchNorm(True, scale_init=boxed)])
    model = module.bind(module.init(jax.random.key(0), vector()))
    params = model.variables["params"]
    mask = norm_mask(model, vector())
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    still = optax.masked(optax.set_to_zero(), mask)
    updates, _ = still.update(params, still.init(params))
    assert (updates["layers_1"]["scale"].unbox() == 0).all()
    assert (updates["layers_0"]["kernel"] == params["layers_0"]["kernel"]).all()


class Activated(nn.BatchNorm):
    """A user's batch norm that does more."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return nn.relu(super().__call__(x, use_running_average))


def test_a_user_s_norm_stays_what_it_is():
    model = branches("linen", Activated)
    frozen = freeze(model, vector(), affine=True)
    _, out = trained(frozen.model, vector())
    np.testing.assert_allclose(out, model(vector()), rtol=1e-5, atol=1e-6)


@frameworks
def test_what_is_left_has_a_reason(framework):
    if framework == "linen":
        module = nn.Sequential([nn.BatchNorm(True), nn.LayerNorm()])
        model = module.bind(module.init(jax.random.key(0), vector()))
        frozen = freeze(model, vector())
    else:
        rngs = nnx.Rngs(0)
        frozen = freeze(nnx.Sequential(nnx.BatchNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)))
    norm, rows = ("layers_0", "layers_1") if framework == "linen" else ("layers/0", "layers/1")
    assert frozen.frozen == {norm: ("statistics",)}
    assert frozen.left == {rows: "keeps no statistics"}
    words = [line.split() for line in str(frozen).splitlines()]
    assert words == [[norm, "frozen", "statistics"], [rows, "left", "keeps", "no", "statistics"]]


@frameworks
def test_the_caller_s_arrays_are_his(framework):
    model, x = given("resnet", framework)
    before = arrays_of(model)
    frozen = freeze(model, x, affine=True).model
    for leaf in model_of(frozen, "test").arrays.values():
        leaf.delete()
    same(arrays_of(model), before)


class Scaled(nn.Module):
    """A user's layer with a scale, which is no norm."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (1, x.shape[-1]))


class WithAuxiliary(nn.Module):
    """A network with layers that are called in training only."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Scaled(name="scaled")(nn.BatchNorm(not train, name="norm")(x))
        if train or self.is_initializing():
            y = nn.BatchNorm(not train, name="head_norm")(nn.Dense(4, name="head")(x))
            y = nn.LayerNorm(use_bias=False, name="head_rows")(y)
            x = x + nn.Dropout(0.5, deterministic=not train)(y)
        return nn.Dense(3, name="out")(x)


def with_auxiliary():
    module = WithAuxiliary()
    return module.bind(module.init(jax.random.key(0), vector()), rngs={"dropout": KEY})


KEY = jax.random.key(1)
MISSED = r"\['head_norm', 'head_rows'\] have variables like norms"


@pytest.mark.parametrize("tool", [norm_mask, norm_labels, decay_mask])
def test_norms_that_the_call_misses_are_named(tool):
    with pytest.raises(ValueError, match=rf"^{tool.__name__}: {MISSED}.*train=True"):
        tool(with_auxiliary(), vector())


def test_norms_of_a_training_call_are_found():
    mask = flat(norm_mask(with_auxiliary(), vector(), train=True))
    assert {name.partition("/")[0] for name, norm in mask.items() if norm} == {
        "norm",
        "head_norm",
        "head_rows",
    }


def test_what_the_call_misses_can_be_left_out():
    here = flat(norm_mask(with_auxiliary(), vector(), only="norm"))
    assert {name for name, norm in here.items() if norm} == {"norm/scale", "norm/bias"}
    decays = flat(decay_mask(with_auxiliary(), vector(), train=True, only="*norm"))
    assert {name for name, decay in decays.items() if decay and name.endswith("scale")} == {
        "scaled/scale",
        "head_rows/scale",
    }


def test_norms_that_the_call_misses_are_left():
    frozen = freeze(with_auxiliary(), vector())
    assert set(frozen.frozen) == {"norm"}
    assert set(frozen.left) == {"head_norm", "head_rows"}
    assert all("not called in the example call" in why for why in frozen.left.values())


def test_a_model_that_compiles_its_parts_misses_nothing():
    class Compiled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(Scaled)(name="scaled")(nn.jit(nn.BatchNorm)(True, name="norm")(x))

    model = Compiled().bind(Compiled().init(jax.random.key(0), vector()))
    for _ in range(2):
        mask = flat(norm_mask(model, vector()))
        assert {name for name, norm in mask.items() if norm} == {"norm/scale", "norm/bias"}


def test_trees_are_frozen_where_parameters_are():
    model, x = given("branches", "linen")
    module, variables = model.unbind()
    params = FrozenDict(variables["params"])
    model = module.bind({**variables, "params": params})
    transform = optax.multi_transform(
        {"norm": optax.set_to_zero(), "other": optax.adamw(0.1, mask=decay_mask(model, x))},
        norm_labels(model, x),
    )
    updates, _ = transform.update(params, transform.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(norm_mask(model, x)) == jax.tree.structure(params)


def test_a_norm_without_parameters_is_left():
    rngs = nnx.Rngs(0)
    bare = nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=rngs)
    frozen = freeze(nnx.List([nnx.BatchNorm(4, rngs=rngs), bare]), statistics=False, affine=True)
    assert frozen.frozen == {"0": ("scale", "bias")}
    assert frozen.left == {"1": "has no scale and no bias"}


def test_a_frozen_nnx_model_can_be_pickled():
    frozen = freeze(*given("resnet", "nnx"), affine=True).model
    read = pickle.loads(pickle.dumps(frozen))
    same(arrays_of(read), arrays_of(frozen))
    assert type(read.stem_norm) is type(frozen.stem_norm)
    after, before = arrays_of(trained(read, image())[0]), arrays_of(frozen)
    same(after, before, [name for name in before if in_norm(name)])
