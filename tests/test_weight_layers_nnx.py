"""Wrappers that normalize weights, in NNX: against Linen's, and as pure functions of their state.

Flax's overwrite the weights of the wrapped layer at each call; ours change none.
"""

import pickle
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import errors, nnx
from flax import linen as nn
from modules import draw, state_of

import jaxnorm.linen.weights as linen
import jaxnorm.nnx.weights as ours

pytestmark = pytest.mark.usefixtures("quick_compile")

WRAPPERS = ("WeightNorm", "SpectralNorm", "WeightStandardization", "ScaledWeightStandardization")
ALL = pytest.mark.parametrize("name", WRAPPERS)
FLAXS = pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
X = draw((5, 3))
CLOSE = dict(rtol=1e-5, atol=1e-5)
KERNEL = ("kernel",)


def make(name, module=ours, rngs=None, layer=None, **options):
    rngs = nnx.Rngs(0) if rngs is None else rngs
    layer = nnx.Linear(3, 3, rngs=rngs) if layer is None else layer
    return getattr(module, name)(layer, rngs=rngs, **options)


def loss(layer, x=X):
    return (layer(x) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum()


def linen_variables(layer):
    """The variables of a wrapped `nnx.Linear` as the Linen wrapper has them."""
    inner = layer.layer_instance
    params = {"layer_instance": {"kernel": inner.kernel[...], "bias": inner.bias[...]}}
    if layer.scales:
        params["layer_instance/kernel/scale"] = layer.scales[KERNEL][...]
    stats = {
        "/".join(("layer_instance", *path)): variable[...]
        for path, variable in (layer.batch_stats or {}).items()
    }
    return {"params": params} | ({"batch_stats": stats} if stats else {})


@pytest.mark.parametrize("train", [True, False])
@ALL
def test_same_as_linen(name, train):
    options = {"gain": 1.7} if name.startswith("Scaled") else {}
    layer = make(name, **options)
    if layer.scales:
        layer.scales[KERNEL][...] = jnp.array([0.5, 1.0, 2.0])
    model = getattr(linen, name)(nn.Dense(3), **options)
    call = {"update_stats": train} if name == "SpectralNorm" else {}
    variables = linen_variables(layer)

    @jax.jit
    def expected(variables):
        def of(params):
            def run(x):
                y, changed = model.apply(
                    {**variables, "params": params}, x, mutable=["batch_stats"], **call
                )
                run.changed = changed
                return y

            return loss(run), run.changed

        return jax.grad(of, has_aux=True)(variables["params"])

    gradient, changed = expected(variables)
    (layer.train if train else layer.eval)()
    found = nnx.jit(nnx.grad(loss))(layer)
    assert ("bias" in found["layer_instance"], "scales" in found) == (True, bool(layer.scales))
    after = linen_variables(layer)
    chex.assert_trees_all_equal(after["params"], variables["params"])
    chex.assert_trees_all_close(after.get("batch_stats", {}), changed.get("batch_stats", {}))
    leaves = found["layer_instance"]["kernel"][...], found["layer_instance"]["bias"][...]
    inner = gradient["layer_instance"]
    chex.assert_trees_all_close(leaves, (inner["kernel"], inner["bias"]), **CLOSE)
    if layer.scales:
        scale = gradient["layer_instance/kernel/scale"]
        chex.assert_trees_all_close(found["scales"][KERNEL][...], scale, **CLOSE)


# Against Flax


def states(name, **options):
    return [nnx.to_flat_state(nnx.state(make(name, m, **options))) for m in (nnx, ours)]


def test_first_state_is_flaxs():
    """Of the newest Flax: `scales` are parameters. u and sigma are a step further."""
    flaxs, mine = (dict(state) for state in states("WeightNorm"))
    assert mine.keys() == flaxs.keys()
    for path, variable in mine.items():
        assert isinstance(variable, nnx.Param)
        chex.assert_trees_all_equal(variable[...], flaxs[path][...])
    flaxs, mine = (dict(state) for state in states("SpectralNorm"))
    assert mine.keys() == flaxs.keys()
    for path, variable in mine.items():
        assert type(variable) is type(flaxs[path])
        chex.assert_trees_all_equal_shapes_and_dtypes(variable[...], flaxs[path][...])
    kernel, u = (flaxs[path][...] for path in flaxs if path[-1] in (KERNEL[0], (*KERNEL, "u")))
    if kernel.ndim < u.ndim or u.shape[0] != 1:
        kernel, u = u, kernel
    u = u @ kernel.T @ kernel
    found = dict(mine)["batch_stats", (*KERNEL, "u")][...]
    chex.assert_trees_all_close(found, u / jnp.linalg.norm(u), rtol=1e-5)


@FLAXS
def test_keys_are_drawn_as_by_flax(name):
    """So layers that are created afterwards start with the same weights."""
    drawn = []
    for module in (nnx, ours):
        rngs = nnx.Rngs(0)
        make(name, module, rngs)
        drawn.append(nnx.Linear(3, 2, rngs=rngs).kernel[...])
    chex.assert_trees_all_equal(*drawn)
    scales = make("WeightNorm", scale_init=nnx.initializers.normal()).scales
    assert abs(scales[KERNEL][...]).max() > 0


@FLAXS
def test_first_training_call_is_flaxs(name):
    flaxs, mine = make(name, nnx), make(name)
    if name == "SpectralNorm":  # whose construction has made a step
        for path, variable in flaxs.batch_stats.items():
            variable[...] = mine.batch_stats[path][...]
    chex.assert_trees_all_close(mine(X), flaxs(X), **CLOSE)


@pytest.mark.parametrize("train", [True, False])
@FLAXS
def test_a_call_changes_no_weight(name, train):
    for module, same in ((nnx, False), (ours, True)):
        layer = make(name, module)
        (layer.train if train else layer.eval)()
        before = layer.layer_instance.kernel[...]
        layer(X)
        assert bool((layer.layer_instance.kernel[...] == before).all()) == same


def test_evaluation_is_right_from_the_first_moment_and_stays():
    for module, steady in ((nnx, False), (ours, True)):
        layer = make("SpectralNorm", module, n_steps=20, update_stats=False)
        kernel = layer.layer_instance.kernel[...]
        expected = X @ (kernel / jnp.linalg.norm(kernel, 2))
        chex.assert_trees_all_close(layer(X), expected, **CLOSE)
        layer.batch_stats[*KERNEL, "sigma"][...] *= 2
        again = layer(X)
        layer.batch_stats[*KERNEL, "sigma"][...] /= 2
        assert bool(jnp.allclose(2 * again, expected, atol=1e-5)) == steady


def test_scales_are_trained():
    layer = make("WeightNorm", keep_init=True)
    chex.assert_trees_all_close(layer(X), layer.layer_instance(X), **CLOSE)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    before = state_of(layer)
    traces = []

    @nnx.jit
    def train(layer, optimizer):
        traces.append(1)
        value, gradient = nnx.value_and_grad(lambda m: ((m(X) - 1) ** 2).mean())(layer)
        optimizer.update(layer, gradient)
        return value

    losses = [train(layer, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert len(traces) == 1
    changes = jax.tree.map(lambda a, b: bool((a != b).any()), before, state_of(layer))
    assert all(jax.tree.leaves(changes))


# Under transformations


@ALL
def test_captured_in_a_closure(name):
    """Where Flax's fails, since it writes."""
    layer = make(name)
    layer.eval()
    expected = jax.vmap(layer.layer_instance)(X).shape
    if name in ("WeightNorm", "SpectralNorm"):
        flaxs = make(name, nnx)
        with pytest.raises(errors.TraceContextError):
            jax.grad(lambda x: loss(flaxs, x))(X)
    chex.assert_trees_all_close(jax.vmap(layer)(X), layer(X), **CLOSE)
    assert layer(X).shape == expected
    gradient = jax.grad(lambda x: loss(layer, x))(X)
    chex.assert_trees_all_close(gradient, nnx.grad(loss, argnums=1)(layer, X), **CLOSE)
    chex.assert_trees_all_close(jax.jit(lambda x: layer(x))(X), layer(X), **CLOSE)


def stack(name):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return make(name, rngs=rngs)

    return create(nnx.Rngs(0))


def one_of(stacked, i):
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state), copy=True)


@ALL
def test_vmap_over_models_and_scan_over_layers(name):
    models = stack(name)
    alone = [one_of(models, i) for i in range(2)]
    y = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    for i, model in enumerate(alone):
        chex.assert_trees_all_close(y[i], model(X), **CLOSE)
        chex.assert_trees_all_close(state_of(one_of(models, i)), state_of(model), **CLOSE)

    axes = dict(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    last = nnx.scan(lambda x, model: nnx.remat(lambda m, x: m(x))(model, x), **axes)(X, models)
    chex.assert_trees_all_close(last, alone[1](alone[0](X)), **CLOSE)


@ALL
def test_copies_and_checkpoints(name, tmp_path):
    layer = make(name)
    layer(X)
    layer.eval()
    y = layer(X)
    copies = {
        "split": nnx.merge(*nnx.split(layer)),
        "clone": nnx.clone(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
    }
    for kind, copied in copies.items():
        chex.assert_trees_all_equal(copied(X), y, custom_message=kind)
    assert nnx.graphdef(make(name)) == nnx.graphdef(make(name))

    state = nnx.state(layer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    fresh = make(name, rngs=nnx.Rngs(1))
    nnx.update(fresh, restored)
    fresh.eval()
    chex.assert_trees_all_equal(fresh(X), y)


def test_modes_of_spectral_norm():
    layer = make("SpectralNorm")

    def moves(**call):
        before = state_of(layer)
        layer(X, **call)
        after = state_of(layer)
        differs = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        return any(jax.tree.leaves(differs))

    assert moves()
    layer.eval()
    assert not moves()
    assert moves(update_stats=True)
    layer.train()
    assert moves()
    assert not moves(update_stats=False)
    frozen = nnx.view(layer, use_running_average=True)
    assert frozen.use_running_average
    assert not layer.use_running_average
    assert make("SpectralNorm", update_stats=False).use_running_average


# The wrapped layer's own state


class Busy(nnx.Module):
    """A layer with nested weights, statistics, random keys and intermediates."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Conv(3, 3, (2,), rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0]

    def __call__(self, x, shift=0.0):
        for layer in (*self.layers, self.tied):
            x = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.sow(nnx.Intermediate, "seen", x)
        return self.drop(self.norm(x)) + shift


@ALL
def test_state_of_the_wrapped_layer_moves(name):
    layer = make(name, layer=Busy(nnx.Rngs(0)))
    assert layer.paths == (("layers", 0, "kernel"), ("layers", 1, "kernel"))
    inner, weights = layer.layer_instance, state_of(layer)["layer_instance"]["layers"]
    count = inner.drop.rngs.count[...]
    first = nnx.jit(lambda m, x: m(x, shift=1.0))(layer, X)
    second = layer(X, shift=1.0)
    assert abs(first - second).max() > 0.1
    assert inner.drop.rngs.count[...] == count + 2
    assert abs(inner.norm.mean[...]).max() > 0
    assert len(inner.seen.get_value()) == 2
    chex.assert_trees_all_equal(state_of(layer)["layer_instance"]["layers"], weights)
    layer.eval()
    chex.assert_trees_all_equal(layer(X), layer(X))


def test_options_reach_the_weights():
    """Each option changes what it says: dtype, steps, axes, filter."""
    wide = make("WeightNorm", layer=nnx.Linear(3, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert wide(X.astype(jnp.bfloat16)).dtype == jnp.float32
    assert wide.layer_instance.kernel[...].dtype == jnp.bfloat16
    whole = make("ScaledWeightStandardization", feature_axes=None, variable_filter=nnx.Param)
    assert {path: s.shape for path, s in whole.scales.items()} == {KERNEL: (), ("bias",): ()}
    assert make("WeightNorm", use_scale=False).scales is None
    narrow = make("SpectralNorm", param_dtype=jnp.bfloat16)
    assert {v.dtype for v in narrow.batch_stats.values()} == {np.dtype(np.float32)}


def test_a_view_freezes_spectral_norm():
    layer = ours.SpectralNorm(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.array, nnx.state(layer))
    nnx.view(layer, update_stats=False)(jnp.ones((1, 2)))
    chex.assert_trees_all_equal(nnx.state(layer), before)
    layer(jnp.ones((1, 2)))
    assert not np.array_equal(layer.batch_stats[("kernel", "u")][...], jax.tree.leaves(before)[-1])
