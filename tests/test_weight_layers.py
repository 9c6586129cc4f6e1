"""Wrappers that normalize weights, in Linen: against Flax's own, under its transformations, alone.

Where ours differ from Flax's on purpose, a test shows what Flax does, and what ours do.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import errors, nnx, serialization
from flax import linen as nn
from modules import NORMAL, assert_close, covering, draw, label

import jaxnorm.linen.weights as ours
import jaxnorm.nnx.weights as ours_nnx
from jaxnorm.linen.shell import StatsNotMutableError

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
X = draw((2, 3, 3, 2))
WRAPPERS = ("WeightNorm", "SpectralNorm", "WeightStandardization", "ScaledWeightStandardization")
ALL = pytest.mark.parametrize("name", WRAPPERS)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Conv(3, (2, 2))(x)))


LAYERS = {"dense": lambda: nn.Dense(4), "conv": lambda: nn.Conv(4, (2, 2)), "nested": Nested}
# The bias has two axes, and is 0 at the start.
SPECTRAL_LAYERS = LAYERS | {"heads": lambda: nn.DenseGeneral((2, 4))}


def call(name, train=True):
    """Arguments of a call of the wrapper `name`."""
    return {"update_stats": train} if name == "SpectralNorm" else {}


def step(model, variables, **call):
    """Output, changed variables, and gradient by the parameters."""

    def loss(params):
        y, changed = model.apply(
            {**variables, "params": params}, X, mutable=["batch_stats", "sn"], **call
        )
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), (y, changed)

    gradient, (y, changed) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, changed, gradient


def step_both(first, second, variables, **call):
    """A step of two models from the same variables."""
    return jax.jit(lambda v: [step(model, v, **call) for model in (first, second)])(variables)


def init_both(first, second, **call):
    return jax.jit(lambda: [model.init(KEY, X, **call) for model in (first, second)])()


def init(model, x=X, **call):
    return jax.jit(lambda x: model.init(KEY, x, **call))(x)


# Against Flax

WEIGHT_NORM = covering(
    2,
    {
        "layer": tuple(LAYERS),
        "use_scale": (True, False),
        "feature_axes": (-1, None, 0),
        "dtype": (None, jnp.float32, jnp.bfloat16),
        "param_dtype": (jnp.float32, jnp.bfloat16),
        "epsilon": (1e-12, 0.1),
        "variable_filter": (("kernel",), None, ("Dense", "instance")),
        "scale_init": (False, True),
    },
)
SPECTRAL_NORM = covering(
    2,
    {
        "layer": tuple(SPECTRAL_LAYERS),
        "n_steps": (1, 3),
        "epsilon": (1e-12, 0.1),
        "dtype": (None, jnp.float32, jnp.bfloat16),
        "collection_name": ("batch_stats", "sn"),
    },
)


@pytest.mark.parametrize("options", WEIGHT_NORM, ids=label)
def test_weight_norm_is_flaxs(options):
    options = dict(options)
    layer = LAYERS[options.pop("layer")]
    options["scale_init"] = NORMAL if options["scale_init"] else nn.initializers.ones
    flaxs, mine = (cls(layer(), **options) for cls in (nn.WeightNorm, ours.WeightNorm))
    expected, found = init_both(flaxs, mine)
    chex.assert_trees_all_equal_shapes(found, expected)
    if options["dtype"] != jnp.bfloat16 and options["param_dtype"] == jnp.float32:
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        if options["scale_init"] is not NORMAL:
            chex.assert_trees_all_close(found, expected, rtol=1e-6)
    dtypes = [options["param_dtype"], options["dtype"] or jnp.float32]
    assert_close(*step_both(mine, flaxs, found), *dtypes)


@pytest.mark.parametrize("options", SPECTRAL_NORM, ids=label)
def test_training_with_spectral_norm_is_flaxs(options):
    options = dict(options)
    layer = SPECTRAL_LAYERS[options.pop("layer")]
    flaxs, mine = (cls(layer(), **options) for cls in (nn.SpectralNorm, ours.SpectralNorm))
    expected, found = init_both(flaxs, mine, update_stats=True)
    chex.assert_trees_all_equal_shapes(found, expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if left.ndim and options["dtype"] != jnp.bfloat16:  # sigma is another, see below
            chex.assert_trees_all_close(left, right, rtol=1e-5, atol=1e-6)
    mine_now, flaxs_now = step_both(mine, flaxs, found, update_stats=True)
    limit = 0.1 if options["dtype"] == jnp.bfloat16 else 5e-5
    chex.assert_trees_all_equal_shapes_and_dtypes(mine_now, flaxs_now)
    chex.assert_trees_all_close(mine_now, flaxs_now, rtol=limit, atol=limit)


def test_flaxs_arguments_defaults_and_positions():
    for name, (theirs, mine), own in (
        ("WeightNorm", (nn, ours), {"keep_init"}),
        ("SpectralNorm", (nn, ours), set()),
        ("WeightNorm", (nnx, ours_nnx), {"keep_init"}),
        ("SpectralNorm", (nnx, ours_nnx), {"kwargs"}),
    ):
        for method in ("__init__", "__call__"):
            flaxs, found = (
                inspect.signature(getattr(getattr(module, name), method)).parameters
                for module in (theirs, mine)
            )
            assert set(found) - set(flaxs) <= own
            shared = [parameter for parameter in found if parameter in flaxs]
            assert set(shared) == set(flaxs)
            if theirs is nn:
                assert shared == list(flaxs)
            for parameter in flaxs.keys() - {"promote_dtype", "self", "variable_filter"}:
                assert found[parameter].kind == flaxs[parameter].kind
                assert found[parameter].default == flaxs[parameter].default
    kernel = nn.WeightNorm(nn.Dense(1)).variable_filter
    assert ours.WeightNorm(nn.Dense(1)).variable_filter == kernel


# Differences


def test_evaluation_uses_the_stored_sigma():
    """Flax runs a power iteration in evaluation, and its result does not depend on sigma."""
    for cls, expected in ((nn.SpectralNorm, 1), (ours.SpectralNorm, 1 / 4)):
        model = cls(nn.Dense(4, use_bias=False))
        variables = init(model, update_stats=True)
        first = model.apply(variables, X, update_stats=False)
        stats = variables["batch_stats"]
        sigma = "layer_instance/kernel/sigma"
        changed = {**variables, "batch_stats": {**stats, sigma: 4 * stats[sigma]}}
        second = model.apply(changed, X, update_stats=False)
        assert_close(second, first * expected)


@pytest.mark.parametrize("train", [True, False])
def test_evaluation_is_right_from_the_first_moment(train):
    """Flax stores the normalized weight with the sigma, or the u, of another."""
    for cls, right in ((nn.SpectralNorm, False), (ours.SpectralNorm, True)):
        model = cls(nn.Dense(4, use_bias=False), n_steps=30)
        y, variables = jax.jit(lambda x, m=model: m.init_with_output(KEY, x, update_stats=train))(X)
        kernel = variables["params"]["layer_instance"]["kernel"]
        stats = variables["batch_stats"]
        u, sigma = (stats[f"layer_instance/kernel/{name}"] for name in ("u", "sigma"))
        assert np.linalg.norm(kernel, 2) == pytest.approx(1, rel=1e-5)
        stored = bool(abs(jnp.linalg.norm(kernel @ u[0]) - sigma) < 1e-5)
        assert stored == right
        assert_close(model.apply(variables, X, update_stats=False), y)


@pytest.mark.parametrize("feature_axes", [-1, None, (-2, -1)], ids=str)
@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_keep_init_keeps_the_function(layer, feature_axes):
    class Plain(nn.Module):
        layer_instance: nn.Module

        def __call__(self, x):
            return self.layer_instance(x)

    y, expected = Plain(LAYERS[layer]()).init_with_output(KEY, X)
    flaxs = nn.WeightNorm(LAYERS[layer](), feature_axes=feature_axes)
    assert abs(flaxs.init_with_output(KEY, X)[0] - y).max() > 0.1
    mine = ours.WeightNorm(LAYERS[layer](), feature_axes=feature_axes, keep_init=True)
    found, variables = mine.init_with_output(KEY, X)
    assert_close(found, y)
    assert_close(mine.apply(variables, X), y)
    params = dict(variables["params"])
    scale = params.pop("layer_instance/kernel/scale")
    chex.assert_trees_all_equal(params, expected["params"])
    kernel = params["layer_instance"]["kernel"]
    axes = () if feature_axes is None else np.atleast_1d(feature_axes) % kernel.ndim
    others = tuple(a for a in range(kernel.ndim) if a not in axes)
    np.testing.assert_allclose(scale, np.sqrt((np.asarray(kernel) ** 2).sum(others)), rtol=1e-6)


def test_a_scale_of_zero_can_be_trained():
    """Flax stores the kernel times the scale: zeros, which no gradient leaves."""
    for cls, alive in ((nn.WeightNorm, False), (ours.WeightNorm, True)):
        model = cls(nn.Dense(4), scale_init=nn.initializers.zeros)
        params = step(model, init(model))[2]
        assert bool(abs(params["layer_instance/kernel/scale"]).max() > 0) == alive


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_a_stored_weight_keeps_its_dtype(name):
    for module, dtype in ((nn, jnp.float32), (ours, jnp.bfloat16)):
        model = getattr(module, name)(nn.Dense(4, param_dtype=jnp.bfloat16))
        variables = init(model, **call(name))
        assert variables["params"]["layer_instance"]["kernel"].dtype == dtype
        y = jax.eval_shape(lambda v, m=model: m.apply(v, X, **call(name, False)), variables)
        assert y.dtype == jnp.float32
    narrow = ours.SpectralNorm(nn.Dense(4), param_dtype=jnp.bfloat16)
    stats = jax.tree.leaves(step(narrow, init(narrow, update_stats=True), update_stats=True)[1])
    assert {leaf.dtype for leaf in stats} == {jnp.dtype(jnp.float32)}


def test_training_with_immutable_statistics():
    model = ours.SpectralNorm(nn.Dense(4), collection_name="sn")
    variables = init(model, update_stats=False)
    with pytest.raises(errors.ModifyScopeVariableError):
        nn.SpectralNorm(nn.Dense(4), collection_name="sn").apply(variables, X, update_stats=True)
    with pytest.raises(StatsNotMutableError, match=r"mutable=\['sn'\]"):
        model.apply(variables, X, update_stats=True)


def test_nothing_but_the_named_collection_changes():
    """Flax's spectral norm writes the normalized weight back where parameters are mutable."""
    for cls, same in ((nn.SpectralNorm, False), (ours.SpectralNorm, True)):
        model = cls(nn.Dense(4))
        variables = init(model, update_stats=True)
        params = jax.tree.map(lambda p: 2 * p, variables["params"])
        _, changed = model.apply(
            {**variables, "params": params}, X, update_stats=True, mutable=True
        )
        kernels = changed["params"]["layer_instance"]["kernel"], params["layer_instance"]["kernel"]
        assert bool((kernels[0] == kernels[1]).all()) == same


# Under Flax's transformations


class Block(nn.Module):
    """A wrapper in `setup`, and one in compact."""

    name_of_wrapper: str
    train: bool = True

    def setup(self):
        self.first = getattr(ours, self.name_of_wrapper)(nn.Dense(2))

    @nn.compact
    def __call__(self, x, _=None):
        second = getattr(ours, self.name_of_wrapper)(nn.Dense(3))
        arguments = call(self.name_of_wrapper, self.train)
        y = nn.Dense(2)(second(nn.tanh(self.first(x, **arguments)), **arguments))
        return y, None


def slices(variables, i):
    return jax.tree.map(lambda leaf: leaf[i], variables)


AXES = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}


def run_block(model, variables):
    """Output, changed variables, and gradient by the parameters."""

    def loss(params):
        (y, _), changed = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return (y**2).sum(), (y, changed)

    gradient, (y, changed) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, changed, gradient


CLOSE = dict(rtol=1e-5, atol=1e-5)


@ALL
def test_jit_and_remat_change_nothing(name):
    @jax.jit
    def run(x):
        variables = Block(name).init(KEY, x)
        return [run_block(lift(Block)(name), variables) for lift in (lambda b: b, nn.jit, nn.remat)]

    expected, *lifted = run(X)
    for found in lifted:
        chex.assert_trees_all_close(found, expected, **CLOSE)


@ALL
def test_one_call_is_one_call(name):
    """For Flax's interceptors, which are shown every method that Flax wraps."""
    model, calls = getattr(ours, name)(nn.Dense(4)), []

    def times_two(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        if not isinstance(context.module, type(model)):
            return y
        calls.append(context.method_name)
        return 2 * y

    @jax.jit
    def run(x):
        variables = model.init(KEY, x, **call(name))
        with nn.intercept_methods(times_two):
            doubled = model.apply(variables, x, **call(name, train=False))
        return doubled, model.apply(variables, x, **call(name, train=False))

    doubled, y = run(X)
    assert calls == ["__call__"]
    chex.assert_trees_all_equal(doubled, 2 * y)


@ALL
def test_scan_and_vmap_are_loops(name):
    scanned = nn.scan(Block, length=2, **AXES)(name)
    mapped = nn.vmap(Block, in_axes=None, axis_size=2, **AXES)(name)

    @jax.jit
    def both(x):
        def one(i, x):
            return Block(name).apply(slices(variables, i), x, mutable=["batch_stats"])

        variables = scanned.init(KEY, x)
        in_turn = scanned.apply(variables, x, mutable=["batch_stats"])
        ((middle, _), first), expected = one(0, x), []
        ((last, _), second) = one(1, middle)
        expected = (last, None), jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
        return (
            in_turn,
            expected,
            mapped.apply(variables, x, mutable=["batch_stats"]),
            [one(i, x) for i in range(2)],
        )

    in_turn, expected, at_once, each = both(X)
    chex.assert_trees_all_close(in_turn, expected, **CLOSE)
    for i in range(2):
        chex.assert_trees_all_close(slices(at_once, i), each[i], **CLOSE)


@ALL
def test_shapes_tables_partitions(name):
    block = Block(name)
    variables = init(block)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(block.init, KEY, X), variables)
    assert "first/layer_instance" in nn.tabulate(block, KEY, console_kwargs={"width": 200})(X)

    wrapper = getattr(ours, name)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed, plain = wrapper(nn.Dense(4, kernel_init=kernel_init)), wrapper(nn.Dense(4))
    variables = jax.jit(lambda: boxed.init(KEY, X, **call(name)))()
    expected = plain.init(KEY, X, **call(name))
    spec = nn.get_partition_spec(variables)["params"]["layer_instance"]["kernel"]
    assert spec == jax.sharding.PartitionSpec(None, "model")
    chex.assert_trees_all_close(renamed(nn.unbox(variables), "/value", ""), expected, rtol=1e-6)


def renamed(variables, old, new):
    """With other names of what stands beside the layer."""
    return {
        collection: {name.replace(old, new): leaf for name, leaf in beside.items()}
        for collection, beside in variables.items()
    }


@ALL
def test_checkpoints_of_boxed_and_of_plain_weights(name):
    """Names are Flax's, which has the box among them; all load, also those without it."""
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = getattr(ours, name)(nn.Dense(4, kernel_init=kernel_init))

    @jax.jit
    def run(x):
        boxed = model.init(KEY, x, **call(name))
        former, bare = renamed(boxed, "/value", ""), nn.unbox(boxed)
        plain = renamed(bare, "/value", "")
        found = []
        for variables in (boxed, former, bare, plain):
            y, changed = model.apply(variables, x, **call(name), mutable=["batch_stats"])
            same = jax.tree.structure(changed.get("batch_stats", {}))
            assert same == jax.tree.structure(variables.get("batch_stats", {}))
            found.append((y, renamed(changed, "/value", "")))
        return boxed, found

    variables, (expected, *others) = run(X)
    for found in others:
        chex.assert_trees_all_equal(found, expected)
    if name == "WeightNorm":
        flaxs = nn.WeightNorm(nn.Dense(4, kernel_init=kernel_init))
        chex.assert_trees_all_close(variables, flaxs.init(KEY, X), rtol=1e-6)
        assert_close(flaxs.apply(variables, X), expected[0])


def test_flaxs_spectral_norm_takes_no_boxed_kernels():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    with pytest.raises(AttributeError, match="no attribute 'key'"):
        nn.SpectralNorm(nn.Dense(4, kernel_init=kernel_init)).init(KEY, X, update_stats=True)


@ALL
def test_training_compiles_once(name):
    model = getattr(ours, name)(LAYERS["conv"]())
    variables = init(model, **call(name))
    traces = []

    @jax.jit
    def train(variables):
        traces.append(1)

        def loss(params):
            y, changed = model.apply(
                {**variables, "params": params}, X, mutable=["batch_stats"], **call(name)
            )
            return ((y - 1) ** 2).mean(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient)
        return {"params": params, **changed}, loss(params)[0]

    losses = []
    for _ in range(5):
        variables, loss = train(variables)
        losses.append(float(loss))
    assert len(traces) == 1
    assert losses[-1] < losses[0]


@ALL
def test_checkpoints(name, tmp_path):
    model = getattr(ours, name)(nn.Dense(4))
    variables, other = (
        jax.jit(lambda key: model.init(key, X, **call(name)))(jax.random.key(i)) for i in range(2)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", other)
    chex.assert_trees_all_equal(restored, variables)
    chex.assert_trees_all_equal(
        serialization.from_bytes(other, serialization.to_bytes(variables)), variables
    )


def test_a_layer_called_twice():
    class Shared(nn.Module):
        cls: type

        @nn.compact
        def __call__(self, x):
            layer = self.cls(nn.Dense(2))
            return layer(nn.tanh(layer(x)))

    flaxs, mine = (Shared(cls) for cls in (nn.WeightNorm, ours.WeightNorm))
    variables = init(mine)
    chex.assert_trees_all_close(variables, init(flaxs), rtol=1e-6)
    assert_close(*step_both(mine, flaxs, variables))


def test_weight_norm_starts_as_flaxs_for_any_scale():
    options = {"scale_init": nn.initializers.constant(2.0)}
    flaxs, found = (
        jax.jit(library.WeightNorm(nn.Dense(4), **options).init)(KEY, X) for library in (nn, ours)
    )
    chex.assert_trees_all_close(found, flaxs, rtol=1e-6)
