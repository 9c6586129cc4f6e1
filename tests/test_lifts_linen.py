"""Every method under Flax Linen's own transformations: a lifted layer is the layer it lifts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from modules import takes_mode
from subjects import EACH_METHOD, drawn

pytestmark = pytest.mark.usefixtures("quick_compile")
LAYERS = 3


def training(subject):
    """Options by which a layer is in training without being told so at the call."""
    mode = {"use_running_average": False} if takes_mode(subject.cls("linen")) else {}
    return subject.options | mode


def layer_of(subject, **options):
    return subject.cls("linen")(**training(subject) | options)


def variables_of(model, x):
    """First variables, with parameters of which no two are alike."""
    variables = jax.jit(model.init)(jax.random.key(0), x)
    leaves, structure = jax.tree.flatten(variables.get("params", {}))
    params = drawn({f"{i:03}": leaf for i, leaf in enumerate(leaves)})
    return {**variables, "params": jax.tree.unflatten(structure, params.values())}


def step(model, variables, x):
    """Result, new state and gradients of one training step."""
    stats = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, new = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
            return (y**3).sum(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    gradients, (y, new) = run(variables["params"], x)
    return y, new.get("batch_stats", {}), gradients


def of_layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_close(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def one_after_another(subject, stacked, x):
    """The same as a scan over layers, by plain calls: results and states."""
    layer, states = layer_of(subject), []
    for i in range(LAYERS):
        x, new = layer.apply(of_layer(stacked, i), x, mutable=["batch_stats"])
        states.append(new.get("batch_stats", {}))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@EACH_METHOD
def test_scan_over_layers(subject):
    x = subject.input()
    scanned = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=LAYERS,
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(layer_of(subject, name="norm"), x, None)[0]

    variables = variables_of(Stack(), x)
    y, new, _ = step(Stack(), variables, x)
    stacked = {collection: tree["norm"] for collection, tree in variables.items()}
    expected, states = one_after_another(subject, stacked, x)
    assert_close((y, new.get("norm", {})), (expected, states))


@EACH_METHOD
def test_vmap_over_layers(subject):
    x = jnp.stack([subject.input(seed=i) for i in range(LAYERS)])
    mapped = nn.vmap(
        subject.cls("linen"),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(**training(subject))
    variables = variables_of(mapped, x)
    y, new, _ = step(mapped, variables, x)
    for i in range(LAYERS):
        found = y[i], of_layer(new, i)
        assert_close(found, step(layer_of(subject), of_layer(variables, i), x[i])[:2])


@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
@EACH_METHOD
def test_remat_and_jit(subject, lift):
    x = subject.input()
    lifted = lift(subject.cls("linen"))(**training(subject))
    variables = variables_of(layer_of(subject), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables_of(lifted, x), variables)
    assert_close(step(lifted, variables, x), step(layer_of(subject), variables, x))


@EACH_METHOD
def test_an_instance_called_twice(subject):
    """Both calls use the same parameters, and the second starts from the state of the first."""

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = layer_of(subject, name="norm")
            return norm(nn.tanh(norm(x)) + 1)

    x = subject.input()
    variables = variables_of(Shared(), x)
    y, new, _ = step(Shared(), variables, x)
    layer, own = layer_of(subject), {name: tree["norm"] for name, tree in variables.items()}
    middle, between = layer.apply(own, x, mutable=["batch_stats"])
    expected, after = layer.apply({**own, **between}, nn.tanh(middle) + 1, mutable=["batch_stats"])
    assert_close((y, new.get("norm", {})), (expected, after.get("batch_stats", {})))


@EACH_METHOD
def test_partitioned_parameters(subject):
    x = subject.input()
    names = ("model",) * (2 if "feature_axes" in subject.options else 1)
    init = nn.with_partitioning(nn.initializers.normal(), names)
    layer = layer_of(subject, scale_init=init)
    variables = layer.init(jax.random.key(0), x)
    assert variables["params"]["scale"].names == names
    found, expected = (
        layer.apply(each, x, mutable=["batch_stats"]) for each in (variables, nn.unbox(variables))
    )
    chex.assert_trees_all_equal(found, expected)


@EACH_METHOD
def test_table_and_shapes_without_values(subject):
    x, layer = subject.input(), layer_of(subject)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, layer.init(jax.random.key(0), x))
    table = layer.tabulate(jax.random.key(0), x, console_kwargs={"width": 200})
    assert subject.method in table
    for names in shapes.values():
        assert all(name in table for name in names)


@EACH_METHOD
def test_one_call_is_one_call(subject):
    """For Flax's interceptors, which are shown every method that Flax wraps, and for captures."""
    x, layer, calls = subject.input(), layer_of(subject), []
    variables = variables_of(layer, x)

    def times_two(next_function, args, kwargs, context):
        calls.append(context.method_name)
        return jax.tree.map(lambda leaf: 2 * leaf, next_function(*args, **kwargs))

    @jax.jit
    def run(x):
        options = dict(mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        expected, new = layer.apply(variables, x, **options)
        with nn.intercept_methods(times_two):
            return expected, new, layer.apply(variables, x, mutable=["batch_stats"])

    y, new, (doubled, after) = run(x)
    assert calls == ["__call__"]
    assert {*new.pop("intermediates")} == {"__call__"}
    chex.assert_trees_all_equal((doubled, after), (2 * y, new))


@EACH_METHOD
def test_inside_setup_and_with_a_name(subject):
    class Model(nn.Module):
        def setup(self):
            self.norm = layer_of(subject)

        def __call__(self, x):
            return self.norm(x)

    x = subject.input()
    variables = variables_of(Model(), x)
    assert {*variables} <= {"params", "batch_stats"}
    own = {name: tree["norm"] for name, tree in variables.items()}
    y, _ = layer_of(subject).apply(own, x, mutable=["batch_stats"])
    np.testing.assert_allclose(step(Model(), variables, x)[0], y, rtol=1e-5, atol=1e-5)
