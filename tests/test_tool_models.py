"""Models as the tools see them: watched, run with other arrays, and built anew."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import branches, image, jit_to_run_once, resnet, stir, stirred_variables, vector

import jaxnorm
from jaxnorm.tools.adapter.kinds import method_of
from jaxnorm.tools.adapter.models import model_of

FRAMEWORKS = ("linen", "nnx")
X = vector()
frozen_batch_norm = partial(nn.BatchNorm, use_running_average=True)


class Shift(nn.Module):
    """What stands in the place of norms here: it adds a parameter, by which it is told apart."""

    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", nn.initializers.normal(), x.shape[-1:])
        return x + jnp.broadcast_to(shift, x.shape)


class NNXShift(nnx.Module):
    def __init__(self, features, *, rngs):
        self.shift = nnx.Param(jax.random.normal(rngs.params(), features))

    def __call__(self, x):
        return x + jnp.broadcast_to(self.shift[...], x.shape)


# Models whose layers are in all the places where Flax allows them, by the class of their norms.


class Compact(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm")(nn.Dense(4, name="dense")(x))


class Setup(nn.Module):
    norm: Any

    def setup(self):
        self.several = [self.norm(), nn.Dense(4)]
        self.named = {"a": self.norm()}

    def __call__(self, x):
        for layer in self.several:
            x = layer(x)
        return self.named["a"](x)


class Attributes(nn.Module):
    norm: Any
    parts: Any

    def __call__(self, x):
        return self.norm(self.parts[1](self.parts[0](x)))


class Jitted(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        part = nn.jit(Compact)(self.norm, name="part")
        return part(part(x))


class Encoder(nn.Module):
    """Called by a method of another name, within `__call__` too."""

    norm: Any

    def setup(self):
        self.part = Compact(self.norm)

    def encode(self, x, scale=1.0):
        return scale * self.part(x)

    def __call__(self, x):
        return self.encode(x)


LINEN = {
    "compact": Compact,
    "setup": Setup,
    "attributes": lambda norm: Attributes(norm(), (nn.Dense(4), norm())),
    "sequential": lambda norm: nn.Sequential([nn.Dense(4), norm(), nn.relu, norm()]),
    "jitted": Jitted,
    "a norm alone": lambda norm: norm(),
}


class NNXModule(nnx.Module):
    """Calls the norms that a function finds in it, one after another."""

    def __init__(self, norm, put, norms):
        put(self, norm)
        self.norms = norms

    def __call__(self, x):
        for norm in self.norms(self):
            x = norm(x)
        return x


def nnx_model(put, norms):
    return lambda norm: NNXModule(norm, put, norms)


def in_attributes(model, norm):
    model.a, model.b = norm(), norm()


def in_lists(model, norm):
    model.own = nnx.List([norm(), nnx.relu, nnx.List([norm()])])
    model.plain = nnx.data([norm(), [norm()]])


def in_dicts(model, norm):
    model.own = nnx.Dict(a=norm())
    model.plain = nnx.data({"a": norm(), "b": {"c": norm()}})


def in_tuples(model, norm):
    model.flat = nnx.data((norm(), 3))
    model.deep = nnx.data([(norm(), (norm(), {"a": norm()}))])


def by_two_names(model, norm):
    model.a = norm()
    model.parts = nnx.List([model.a])
    model.pair = nnx.data((model.a, norm()))


@nnx.jit
def called_by_jit(norm, x):
    return norm(x)


NNX = {
    "attributes": nnx_model(in_attributes, lambda m: (m.a, m.b)),
    "lists": nnx_model(in_lists, lambda m: (m.own[0], m.own[2][0], m.plain[0], m.plain[1][0])),
    "dicts": nnx_model(in_dicts, lambda m: (m.own["a"], m.plain["a"], m.plain["b"]["c"])),
    "tuples": nnx_model(
        in_tuples, lambda m: (m.flat[0], m.deep[0][0], m.deep[0][1][0], m.deep[0][1][1]["a"])
    ),
    "two names": nnx_model(by_two_names, lambda m: (m.a, m.parts[0], *m.pair)),
    "jitted": nnx_model(in_attributes, lambda m: (partial(called_by_jit, m.a), m.b)),
    "sequential": lambda norm: nnx.Sequential(norm(), nnx.relu, norm()),
    "a norm alone": lambda norm: norm(),
}
MODELS = [("linen", name) for name in LINEN] + [("nnx", name) for name in NNX]


def made(framework, name, shifts=False):
    """A model with norms, or with shifts in their place."""
    if framework == "linen":
        module = LINEN[name](Shift if shifts else frozen_batch_norm)
        return module.bind(stirred_variables(module, X))
    cls = NNXShift if shifts else nnx.BatchNorm
    return stir(NNX[name](lambda: cls(4, rngs=nnx.Rngs(0))))


def variables_of(model):
    """The variables of a user's model, as he would get at them."""
    if isinstance(model, nn.Module):
        return nn.unbox(model.variables)
    return nnx.to_pure_dict(nnx.state(model))


def host(tree):
    """Values of a tree of arrays, of random keys too."""

    def value(leaf):
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(value, tree)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, host(first), host(second))


def call(model):
    return model(X)


def inference(model):
    return model.eval() or model if isinstance(model, nnx.Module) else model


def with_shifts(model, run=call):
    """The model, with shifts built in the place of its norms, and their values by path."""
    adapter = model_of(model, "test")
    arrays, layers, shifts = dict(adapter.arrays), {}, {}
    for number, path in enumerate(sorted(norms_of(adapter, run))):
        for name in ("mean", "var", "scale", "bias"):
            arrays.pop(adapter.key(path, name))
        shifts[path] = jnp.arange(4.0) + 10 * number
        arrays[adapter.place(path, "shift", "params")] = shifts[path]
        is_nnx = isinstance(model, nnx.Module)
        layers[path] = NNXShift(4, rngs=nnx.Rngs(1)) if is_nnx else Shift(parent=None)
    return adapter.rebuilt(arrays, layers), shifts


def norms_of(adapter, run=call):
    return {p: layer for p, layer in adapter.known_layers(run).items() if method_of(layer)}


@pytest.mark.parametrize(("framework", "name"), MODELS)
def test_layers_in_every_place_are_exchanged(framework, name):
    """The model is then the one that is written with the other layers."""
    new, shifts = with_shifts(made(framework, name))
    expected = made(framework, name, shifts=True)
    adapter = model_of(expected, "test")
    given = model_of(new, "test").arrays
    assert set(given) == set(adapter.arrays)
    for path, shift in shifts.items():
        np.testing.assert_array_equal(given[adapter.key(path, "shift")], shift)
    np.testing.assert_allclose(call(new), call(adapter.rebuilt(given)), rtol=1e-6)
    assert not norms_of(model_of(new, "test"))


@pytest.mark.parametrize(("framework", "name"), MODELS)
def test_runs_change_nothing_and_each_has_its_own_hook(framework, name):
    """An inner jit is not served the trace of another run."""
    model = inference(made(framework, name))
    before = host(variables_of(model))
    expected = call(model)
    adapter = model_of(model, "test")

    def hook_of(constant):
        return lambda layer: layer.proceed(layer.x) * 0 + constant

    for constant in (7.0, 8.0):
        out = adapter.run(adapter.arrays, call, hook_of(constant))
        np.testing.assert_array_equal(out, np.full_like(X, constant))
    other = {k: 2 * v for k, v in adapter.arrays.items()}
    out = jax.jit(lambda arrays: adapter.run(arrays, call, lambda layer: layer.proceed(layer.x)))(
        other
    )
    np.testing.assert_allclose(out, call(inference(adapter.rebuilt(other))), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(call(model), expected)
    assert_same(host(variables_of(model)), before)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_failed_run_leaves_nothing_behind(framework):
    model = made(framework, "a norm alone")
    adapter = model_of(model, "test")

    def fails(layer):
        raise KeyError(layer.path)

    with pytest.raises(KeyError):
        adapter.run(adapter.arrays, call, fails)
    assert call(inference(model)).shape == X.shape
    assert list(adapter.layers(call)) == [()]


@pytest.mark.parametrize("outer", FRAMEWORKS)
@pytest.mark.parametrize("inner", FRAMEWORKS)
def test_runs_inside_runs_see_their_own_layers(outer, inner):
    models = {"outer": made(outer, "sequential"), "inner": made(inner, "a norm alone")}
    adapters = {name: model_of(model, "test") for name, model in models.items()}
    seen = []

    def run(name, what):
        def hook(layer):
            seen.append((name, layer.path))
            return layer.proceed(layer.x)

        return adapters[name].run(adapters[name].arrays, what, hook)

    run("outer", call)
    alone = list(seen)
    seen.clear()
    run("outer", lambda model: (run("inner", call), call(model)))
    assert seen == [("inner", ()), *alone]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("make", "x"), [(resnet, image()), (branches, vector())])
def test_calls_of_layers(framework, make, x):
    """A layer in a scan is called once, for all it stands for; a shared one as often as called."""
    calls = model_of(make(framework), "test").layers(lambda model: model(x))
    counts = {"/".join(path): len(found) for path, found in calls.items()}
    assert counts.pop("shared", 2) == 2
    assert set(counts.values()) == {1}
    if make is branches:
        names = "first second both after_branch head"
        stacked = {f"{a}/{b}" for a in ("layers", "checkpointed") for b in ("dense", "norm")}
        assert set(counts) == {*names.split(), *stacked}
        assert [one.x.shape for one in calls[("shared",)]] == [(6, 5), (6, 5)]
        (scanned,) = calls[("layers", "norm")]
        assert scanned.values["mean"].shape == (5,)
    else:
        assert len(counts) == 13


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_call_has_its_arguments_by_name_without_the_input(framework):
    """However the model gives them."""
    mask = jnp.ones(X.shape, bool)
    if framework == "linen":
        module = jaxnorm.linen.BatchNorm()
        model = module.bind(stirred_variables(module, X, use_running_average=True))
    else:
        model = jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    adapter = model_of(model, "test")
    for run in (
        lambda m: m(X, True, mask=mask),
        lambda m: m(mask=mask, use_running_average=True, x=X),
    ):
        ((one,),) = adapter.layers(run).values()
        assert set(one.arguments) == {"use_running_average", "mask"}
        assert one.arguments["use_running_average"] is True
        assert one.x.shape == X.shape
        assert set(one.values) == {"scale", "bias", "mean", "var"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_shared_with_what_is_built(framework):
    """Not the random keys either."""
    if framework == "linen":
        module, variables = resnet("linen").unbind()
        keys = {"dropout": jax.random.key(3)}
        model = module.bind(variables, rngs=keys)
    else:
        model, keys = resnet("nnx"), {}
    before = host((variables_of(model), keys))
    new = model_of(model, "test").rebuilt(model_of(model, "test").arrays)
    assert_same(variables_of(new), variables_of(model))
    mine = jax.tree.leaves(variables_of(new))
    if framework == "linen":
        mine += [rng.as_jax_rng() for rng in new.scope.rngs.values()]
    for leaf in mine:
        leaf.delete()
    assert_same(host((variables_of(model), keys)), before)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_models_are_built_inside_a_program(framework):
    """Around random keys that are no part of it, too."""
    model = resnet(framework)
    if framework == "linen":
        module, variables = model.unbind()
        model = module.bind(variables, rngs={"dropout": jax.random.key(3)})
    adapter = model_of(model, "test")
    keys = {k: v for k, v in adapter.arrays.items() if adapter.collection(k).startswith("Rng")}
    assert bool(keys) == (framework == "nnx")
    rest = {k: v for k, v in adapter.arrays.items() if k not in keys}
    fresh = jax.jit(lambda rest: variables_of(adapter.rebuilt(rest | keys)))(rest)
    assert_same(fresh, variables_of(model))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_numpy_arrays_are_copied_and_stay_numpy(framework):
    model = made(framework, "a norm alone")
    if framework == "linen":
        module, variables = model.unbind()
        model = module.bind(jax.device_get(variables))
    else:
        nnx.update(model, jax.device_get(nnx.state(model)))
    before = jax.tree.map(np.array, variables_of(model))
    new = model_of(model, "test").rebuilt(model_of(model, "test").arrays)
    np.testing.assert_allclose(call(inference(new)), call(inference(model)), rtol=1e-6)
    for leaf in jax.tree.leaves(variables_of(new)):
        assert isinstance(leaf, np.ndarray)
        leaf[...] = np.nan
    assert_same(variables_of(model), before)


def test_boxes_stay_around_variables():
    """Their metadata are the user's."""
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "features"))
    module = nn.Sequential([nn.Dense(4, kernel_init=boxed), frozen_batch_norm()])
    model = module.bind(jit_to_run_once(module.init)(jax.random.key(0), X))
    adapter = model_of(model, "test")
    kernel = ("params", "layers_0", "kernel")
    assert isinstance(adapter.arrays[kernel], jax.Array)
    again = adapter.rebuilt({**adapter.arrays, kernel: 2 * adapter.arrays[kernel]})
    for new in (again, with_shifts(model)[0]):
        box = new.variables["params"]["layers_0"]["kernel"]
        assert isinstance(box, nn.Partitioned)
        assert box.names == (None, "features")
    twice = again.variables["params"]["layers_0"]["kernel"].value
    np.testing.assert_array_equal(twice, 2 * adapter.arrays[kernel])
    assert set(adapter.layers(call)[("layers_0",)][0].values) == {"kernel", "bias"}
    optimized = adapter.optimized({key: key for key in adapter.arrays})
    assert optimized["layers_0"]["kernel"].value == kernel


def test_random_keys_of_a_bound_module_are_used():
    module = nn.Sequential([nn.Dropout(0.5, deterministic=False), nn.Dense(4)])
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    model = module.bind(variables, rngs={"dropout": jax.random.key(2)})
    adapter = model_of(model, "test")
    expected = module.apply(variables, X, rngs={"dropout": jax.random.key(2)})
    for out in (
        call(adapter.rebuilt(adapter.arrays)),
        adapter.run(adapter.arrays, call, lambda layer: layer.proceed(layer.x)),
    ):
        np.testing.assert_array_equal(out, expected)


def test_other_methods_of_a_module():
    """As they are while nothing is exchanged, and by name after."""
    model = Encoder(frozen_batch_norm)
    model = model.bind(stirred_variables(model, X))
    adapter = model_of(model, "test")

    def encode(model):
        return model.encode(X, scale=3.0)

    assert set(adapter.layers(encode)) == {("part", "dense"), ("part", "norm")}
    np.testing.assert_array_equal(encode(adapter.rebuilt(adapter.arrays)), encode(model))
    new, _ = with_shifts(model, encode)
    module, variables = new.unbind()
    expected = Encoder(Shift).apply(variables, X, scale=3.0, method="encode")
    for out in (
        new.call("encode", X, scale=3.0),
        module.apply(variables, "encode", X, scale=3.0, method="call"),
    ):
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_rewired_module_is_a_part_like_any_other():
    """Of a bigger model, and of one that a tool changes again; variables keep their names."""
    part, _ = with_shifts(made("linen", "compact"))
    part, variables = part.unbind()

    class Bigger(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            return frozen_batch_norm(name="after")(self.part(x))

    module = Bigger(part)
    created = jax.eval_shape(module.init, jax.random.key(0), X)
    params = created["params"]["part"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    after = nn.BatchNorm(True).init(jax.random.key(0), X)
    model = module.bind(
        {
            "params": {"part": variables["params"], "after": after["params"]},
            "batch_stats": {"after": after["batch_stats"]},
        }
    )
    np.testing.assert_allclose(
        call(model), part.apply(variables, X) / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6
    )
    assert set(model_of(model, "test").known_layers(call)) == {("part", "dense"), ("after",)}
    again, shifted = with_shifts(model)
    np.testing.assert_allclose(
        call(again), part.apply(variables, X) + shifted[("after",)][None], rtol=1e-5
    )


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2 * x


class NNXDoubled(nnx.Module):
    def __call__(self, x):
        return 2 * x


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_layers_that_were_exchanged_are_exchanged_again(framework):
    """What stands there last is called, and has the variables that there are."""
    first, _ = with_shifts(made(framework, "a norm alone"))
    doubled = Doubled() if framework == "linen" else NNXDoubled()
    second = model_of(first, "test").rebuilt({}, {(): doubled})
    assert not model_of(second, "test").arrays
    np.testing.assert_array_equal(call(second), 2 * X)
