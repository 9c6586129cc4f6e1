"""Every method under Flax NNX's own transformations and ways to copy, store and switch a model."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import num_features, state_of, takes_mode
from subjects import EACH_METHOD, drawn

pytestmark = pytest.mark.usefixtures("quick_compile")
LAYERS = 3


def new_layer(subject, seed=0, **options):
    """A layer whose parameters are no two alike."""
    features = num_features(subject.input(), subject.options)
    layer = subject.cls("nnx")(features, rngs=nnx.Rngs(seed), **subject.options | options)
    params = nnx.state(layer, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    values = drawn({f"{i:03}": leaf for i, leaf in enumerate(leaves)}, seed=3 + seed)
    nnx.update(layer, jax.tree.unflatten(structure, values.values()))
    return layer


def assert_close(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def _jitted(layer, x):
    return nnx.jit(lambda layer, x: layer(x))(layer, x), layer


def _merged(layer, x):
    twin = nnx.merge(*nnx.split(layer))
    return twin(x), twin


def _twin(copier):
    def through(layer, x):
        twin, before = copier(layer), state_of(layer)
        y = twin(x)
        chex.assert_trees_all_equal(state_of(layer), before)
        return y, twin

    return through


WAYS = {
    "nnx.jit": _jitted,
    "nnx.split and nnx.merge": _merged,
    "nnx.clone": _twin(nnx.clone),
    "copy.deepcopy": _twin(copy.deepcopy),
    "pickle": _twin(lambda layer: pickle.loads(pickle.dumps(layer))),
}


@EACH_METHOD
def test_a_layer_survives(subject):
    x = subject.input()
    plain = new_layer(subject)
    expected = plain(x), state_of(plain)
    for name, through in WAYS.items():
        y, travelled = through(new_layer(subject), x)
        chex.assert_trees_all_close(
            (y, state_of(travelled)), expected, rtol=1e-5, atol=1e-5, custom_message=name
        )


@EACH_METHOD
def test_gradients_by_parameters_alone(subject):
    x, layer, plain = subject.input(), new_layer(subject), new_layer(subject)

    def loss(layer):
        return (layer(x) ** 3).sum()

    found = nnx.jit(nnx.grad(loss))(layer)
    graph, params, rest = nnx.split(plain, nnx.Param, ...)
    expected = jax.grad(lambda p: loss(nnx.merge(graph, p, rest, copy=True)))(params)
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected))
    assert {*nnx.to_pure_dict(found)} == {*nnx.to_pure_dict(params)}
    plain(x)
    assert_close(state_of(layer), state_of(plain))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


@EACH_METHOD
def test_remat(subject):
    x, layer, plain = subject.input(), new_layer(subject), new_layer(subject)

    def loss(layer):
        return (layer(x) ** 3).sum()

    found, expected = (nnx.grad(f)(m) for f, m in ((nnx.remat(loss), layer), (loss, plain)))
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected))
    assert_close(state_of(layer), state_of(plain))


def stack_of(subject):
    """Layers 0, 1, 2 as one layer with a leading axis."""
    layers = [nnx.split(new_layer(subject, seed=i)) for i in range(LAYERS)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in layers))
    return nnx.merge(layers[0][0], states)


@EACH_METHOD
def test_vmap_over_models(subject):
    xs = jnp.stack([subject.input(seed=i) for i in range(LAYERS)])
    models = stack_of(subject)
    ys = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(models, xs)
    for i in range(LAYERS):
        layer = new_layer(subject, seed=i)
        assert_close(ys[i], layer(xs[i]))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], state_of(models)), state_of(layer))


@EACH_METHOD
def test_vmap_over_data(subject):
    xs = jnp.stack([subject.input(seed=i) for i in range(LAYERS)])
    layer = new_layer(subject)
    if takes_mode(subject.cls("nnx")):
        layer.eval()
    ys = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, xs)
    for y, x in zip(ys, xs, strict=True):
        assert_close(y, layer(x))


@EACH_METHOD
def test_scan_over_layers(subject):
    x, models = subject.input(), stack_of(subject)
    axes = dict(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    y = nnx.scan(lambda x, layer: layer(nnx.tanh(x)), **axes)(x, models)
    expected, states = x, []
    for i in range(LAYERS):
        layer = new_layer(subject, seed=i)
        expected = layer(nnx.tanh(expected))
        states.append(state_of(layer))
    assert_close(y, expected)
    assert_close(state_of(models), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


@EACH_METHOD
def test_training_and_inference(subject):
    """By `train()` and `eval()`, by `nnx.view`, and where there is a choice, by the call."""
    x, other = subject.input(), subject.input(seed=1) * 2
    layer = new_layer(subject)
    layer.train()
    layer(other)
    before = state_of(layer)
    layer.eval()
    inference = layer(x)
    assert_close(state_of(layer), before)
    if not takes_mode(subject.cls("nnx")):
        layer.train()
        assert_close(layer(x), inference)
        return
    view = nnx.view(layer, use_running_average=False)
    twin = nnx.clone(layer)
    assert_close(view(x), twin(x, use_running_average=False))
    layer.train()
    assert_close(layer(x, use_running_average=True), layer(x, use_running_average=True))
    layer.train()
    tracked = bool(before.keys() & {"mean"})
    assert np.allclose(layer(x), inference, atol=1e-3) is not tracked


@EACH_METHOD
def test_metadata_of_parameters(subject):
    layer = new_layer(subject, scale_metadata={"owner": "us"})
    assert layer.scale.owner == "us"
    others = [v for name, v in vars(layer).items() if isinstance(v, nnx.Variable)]
    assert sum("owner" in v.get_metadata() for v in others) == 1


@pytest.mark.parametrize("update", [False, True])
@EACH_METHOD
def test_steps_are_traced_once_for_each_mode(subject, update):
    x, layer = subject.input(), new_layer(subject)

    @nnx.jit
    @chex.assert_max_traces(n=2)
    def call(layer, x):
        return layer(x)

    chex.clear_trace_counter()
    for _ in range(2):
        layer.train()
        call(layer, x)
        call(layer, x + update)
        layer.eval()
        call(layer, x)


@EACH_METHOD
def test_table(subject):
    layer = type(subject.method, (subject.cls("nnx"),), {})(
        num_features(subject.input(), subject.options), rngs=nnx.Rngs(0), **subject.options
    )
    table = nnx.tabulate(layer, subject.input(), console_kwargs={"width": 200})
    assert all(name in table for name in state_of(layer))
