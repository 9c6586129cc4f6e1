"""The report on a model's norms: numbers against NumPy, singular values against whole matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import lax
from tool_models import branches, image, resnet, stir, vector

import jaxnorm
from jaxnorm.diagnose.norm_groups import statistic_groups
from jaxnorm.diagnose.norms import report_norms
from jaxnorm.diagnose.singular_values import DENSE, Map, singular_range
from jaxnorm.methods import METHODS

pytestmark = pytest.mark.usefixtures("quick_compile")

FRAMEWORKS = ("linen", "nnx")
INFERENCE = {"linen": {"train": False}, "nnx": {}}


def inputs(rng, *shape):
    """Features of different means and deviations."""
    return rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) + rng.normal(size=shape[-1])


@functools.cache
def report_of_branches(framework, by_batch):
    """Made once; that the caller's arrays are left alone is seen on the way."""
    model = branches(framework)
    before = jax.tree.map(np.array, arrays_of(model))
    options = dict(by_batch=by_batch, singular_values=not by_batch)
    seen = report_norms(model, vector(), **INFERENCE[framework], **options)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, arrays_of(model)))
    return seen


def arrays_of(model):
    return nnx.state(model) if isinstance(model, nnx.Module) else model.variables


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rows_of_a_resnet(framework):
    options = dict(singular_values=False) | INFERENCE[framework]
    seen = report_norms(resnet(framework), image(), **options)
    names = [f"{block}/{norm}" for block in ("block1", "block2") for norm in ("norm1", "norm2")]
    assert [row.path for row in seen.rows] == ["stem_norm", *names, "block2/norm3"]
    assert {row.method for row in seen.rows} == {"BatchNorm"}
    assert [row.count for row in seen.rows] == [128] * 3 + [32] * 3
    assert [row.features for row in seen.rows] == [4] * 3 + [6] * 3
    assert {row.normalizes_by for row in seen.rows} == {"stored"}
    assert {row.calls for row in seen.rows} == {1}
    assert seen.nonfinite is None


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rows_of_branches(framework):
    """A row for each layer of a stack, one for a norm that is called twice; by which statistics."""
    by_stored, by_batch = (report_of_branches(framework, by_batch) for by_batch in (False, True))
    layers = [f"layers/norm[{i}]" for i in range(3)]
    for seen, by in ((by_stored, "stored"), (by_batch, "batch")):
        paths = [row.path for row in seen.rows]
        assert paths == ["shared", "after_branch", *layers, "checkpointed/norm"]
        assert [row.calls for row in seen.rows] == [2, 1, 1, 1, 1, 1]
        assert {row.normalizes_by for row in seen.rows} == {by}
    # In inference the map is a factor for each channel: each layer must have read its own.
    arrays = stored_arrays(framework)
    for row in by_stored.rows:
        path, _, index = row.path.rstrip("]").partition("[")
        scale, var = (arrays[(*path.split("/"), name)] for name in ("scale", "var"))
        pick = int(index) if index else ...
        factors = np.abs(scale[pick]) / np.sqrt(var[pick] + 1e-5)
        np.testing.assert_allclose(row.largest, factors.max(), rtol=1e-6)
        np.testing.assert_allclose(row.smallest, factors.min(), rtol=1e-6)


def stored_arrays(framework):
    model = branches(framework)
    if framework == "linen":
        flat = flatten_dict(model.variables)
        return {path[1:]: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
    return {
        tuple(map(str, path)): np.asarray(leaf.get_raw_value(), np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    }


LAYERS = [jaxnorm.linen.BatchNorm, nn.BatchNorm, jaxnorm.nnx.BatchNorm, nnx.BatchNorm]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.__module__}")
def test_numbers_are_those_of_numpy(layer, rng):
    x = inputs(rng, 50, 4)
    x[:, 1] = 7.0
    x, mask = jnp.asarray(x, jnp.float32), jnp.asarray(rng.random((50, 1)) < 0.7)
    x = x.at[0].set(jnp.where(mask[0], x[0], 1e6))
    if issubclass(layer, nn.Module):
        model = layer(use_running_average=True)
        variables = model.init(jax.random.key(0), x)
        values = variables["params"] | variables["batch_stats"]
        changes = {"scale": jnp.array([1.0, 1e-5, -0.5, 2.0]), "bias": jnp.array([0.0, 1, -20, 8])}
        changes |= {"mean": values["mean"] + 0.5, "var": values["var"] * 4}
        variables = {
            collection: {name: changes.get(name, leaf) for name, leaf in leaves.items()}
            for collection, leaves in variables.items()
        }
        model = model.bind(variables)
    else:
        model = layer(4, rngs=nnx.Rngs(0))
        model.scale[...] = jnp.array([1.0, 1e-5, -0.5, 2.0])
        model.bias[...] = jnp.array([0.0, 1, -20, 8])
        model.mean[...] += 0.5
        model.var[...] *= 4
    (row,) = report_norms(model, x, mask=mask).rows
    _, count, mean, var = oracles.batch_norm(x, where=mask)
    y = (np.asarray(x, np.float64) - 0.5) / np.sqrt(4 + 1e-5)
    y = (y * [1.0, 1e-5, -0.5, 2.0] + [0, 1, -20, 8])[np.asarray(mask)[:, 0]]
    assert row.count == count[0] < 50
    np.testing.assert_allclose(row.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(row.deviation, np.sqrt(var), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(row.shift, np.abs(mean - 0.5) / np.sqrt(4 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(row.variance_ratio, (var + 1e-5) / (4 + 1e-5), rtol=1e-4)
    np.testing.assert_array_equal(row.collapsed, [False, True, False, False])
    np.testing.assert_array_equal(row.zero_scale, [False, True, False, False])
    np.testing.assert_array_equal(row.never_positive, (y <= 0).all(0))
    assert row.never_positive[2]
    np.testing.assert_allclose(row.saturated, (np.abs(y) > 3).mean(0), rtol=1e-5)
    np.testing.assert_allclose(row.largest, 2 / np.sqrt(4 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(row.smallest, 1e-5 / np.sqrt(4 + 1e-5), rtol=1e-6)
    said = " ".join(row.warnings)
    for word in ("1 of 4 channels: constant", "scale of almost 0", "never above 0", "beyond 3"):
        assert word in said


@pytest.fixture
def rng():
    return np.random.default_rng(0)


BATCH = dict(use_running_average=False)
STORED = dict(use_running_average=True)
JACOBIANS = {
    "batch": (jaxnorm.methods.BatchNorm(), (7, 2, 3), BATCH, 2 * 3),
    "ghost": (jaxnorm.methods.BatchNorm(ghost_batch_size=4), (8, 3), BATCH, 2 * 2 * 3),
    "stored": (jaxnorm.methods.BatchNorm(), (7, 3), STORED, 0),
    "layer": (jaxnorm.methods.LayerNorm(), (3, 5), {}, 2 * 3),
    "rms": (jaxnorm.methods.RMSNorm(), (3, 5), {}, 3),
    "group": (jaxnorm.methods.GroupNorm(num_groups=2), (2, 3, 4), {}, 2 * 4),
    "instance": (jaxnorm.methods.InstanceNorm(), (2, 5, 3), BATCH, 2 * 6),
    "ibn": (jaxnorm.methods.IBNa(), (3, 5, 4), BATCH, 2 * (3 * 2 + 2)),
    "ibn stored": (jaxnorm.methods.IBNa(), (3, 5, 4), STORED, 2 * (3 * 2)),
    "switchable": (jaxnorm.methods.SwitchableNorm(), (3, 4, 2), BATCH, 2),
    "whitening": (jaxnorm.methods.DecorrelatedBatchNorm(num_groups=2), (9, 4), BATCH, 2 * (2 + 3)),
    "whitening stored": (jaxnorm.methods.IterNorm(num_groups=2), (9, 4), STORED, 0),
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_singular_values_are_those_of_the_whole_jacobian(name, rng, x64):
    """All of them, in order: the smallest stands behind those of the removed directions."""
    spec, shape, mode, removed = JACOBIANS[name]
    spec.epsilon = 1e-9
    mode = dict(mode, update_stats=False) if mode else {}
    x = inputs(rng, *shape)
    values = some_values(spec, shape, rng)

    def normalized(x):
        y, _ = spec._transform(values, x, None, x.dtype, name, initializing=False, **mode)
        return y

    matrix = np.asarray(jax.jit(jax.jacobian(normalized))(jnp.asarray(x))).reshape(x.size, -1)
    exact = np.linalg.svd(matrix, compute_uv=False)
    largest, smallest = singular_range(Map(spec, values, x, None, mode), name)
    np.testing.assert_allclose(largest, exact[0], rtol=1e-6)
    np.testing.assert_allclose(smallest, exact[x.size - removed - 1], rtol=1e-5)
    if removed:
        assert exact[x.size - removed] < 1e-4 * smallest


def some_values(spec, shape, rng):
    slots = spec._slots((shape[-1],), False, "test")
    values = {
        name: np.asarray(slot.init(jax.random.key(0), slot.shape, slot.dtype))
        for name, slot in slots.items()
    }
    for name in ("scale", "var"):
        if name in values:
            values[name] = np.exp(rng.normal(size=values[name].shape))
    return values


@pytest.mark.parametrize("masked", [False, True])
def test_singular_values_of_a_large_batch_are_those_of_the_formula(rng, masked):
    """Batch norm in training: scale / sqrt(var + epsilon), in all but two directions a channel."""
    x = inputs(rng, 60, 6)
    assert x.size > DENSE
    scale = np.exp(rng.normal(size=6))
    mask = (rng.random((60, 1)) < 0.7) * rng.uniform(0.2, 1.8, (60, 1)) if masked else None
    spec = jaxnorm.methods.BatchNorm()
    values = {"scale": scale, "bias": scale, "mean": 0 * scale, "var": scale}
    mode = dict(BATCH, update_stats=False)
    largest, smallest = singular_range(Map(spec, values, x, mask, mode), "test")
    _, _, _, var = oracles.batch_norm(x, where=mask)
    factors = scale / np.sqrt(var + 1e-5)
    if masked:
        # Masked elements are carried along: they answer to the others' mean and deviation as well.
        assert largest > factors.max()
        np.testing.assert_allclose(smallest, factors.min(), rtol=1e-2)
    else:
        np.testing.assert_allclose(largest, factors.max(), rtol=1e-3)
        np.testing.assert_allclose(smallest, factors.min(), rtol=1e-3)


def test_singular_values_where_nothing_is_left(rng):
    """Two values of a channel keep nothing but their order; a scale of 0 keeps nothing at all."""
    mode = dict(BATCH, update_stats=False)
    values = {"scale": np.ones(3), "bias": np.ones(3), "mean": np.zeros(3), "var": np.ones(3)}
    spec = jaxnorm.methods.BatchNorm(epsilon=1e-9)
    largest, smallest = singular_range(Map(spec, values, inputs(rng, 2, 3), None, mode), "test")
    assert largest < 1e-3
    assert smallest is None
    values["scale"] = np.zeros(3)
    big = Map(spec, values, inputs(rng, 100, 3), None, mode)
    assert singular_range(big, "test") == (0.0, 0.0)
    values["scale"] = np.full(3, np.nan)
    assert singular_range(big, "test") == (None, None)


def test_groups_of_every_method():
    """Each element lies in one group; a statistic's values are as many as the method says."""
    counts = {
        "BatchNorm": 24, "BatchRenorm": 24, "AdaBN": 24, "DecorrelatedBatchNorm": 24,
        "IterNorm": 24, "LayerNorm": 4, "RMSNorm": 4, "GroupNorm": 12, "InstanceNorm": 6,
        "SwitchableNorm": 6, "IBNb": 6,
    }  # fmt: skip
    options = {"GroupNorm": dict(num_groups=2), "AdaBN": dict(domains=("a",))}
    options |= {name: dict(num_groups=2) for name in ("DecorrelatedBatchNorm", "IterNorm")}
    for name, count in counts.items():
        (method,) = (method for method in METHODS if method.name == name)
        (groups,) = statistic_groups(method.spec(**options.get(name, {})), (4, 6, 4), name)
        assert groups.shape[1] == count, name
        assert sorted(groups.ravel()) == list(range(96)), name
    ibn = statistic_groups(jaxnorm.methods.IBNa(), (4, 6, 4), "IBNa")
    assert [part.shape for part in ibn] == [(8, 6, 1), (2, 24, 1)]
    assert statistic_groups(object(), (2, 3), "unknown") is None


def test_other_methods_have_their_rows(rng):
    x = jnp.asarray(inputs(rng, 6, 5, 4), jnp.float32)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = jaxnorm.nnx.LayerNorm(4, rngs=rngs)
            self.white = jaxnorm.nnx.IterNorm(4, num_groups=2, rngs=rngs)
            self.domains = jaxnorm.nnx.AdaBN(4, domains=("a", "b"), rngs=rngs)
            self.residual = jaxnorm.nnx.IBNb(4, rngs=rngs)
            self.counted = jaxnorm.nnx.BatchNorm(4, momentum=None, rngs=rngs)

        def __call__(self, x):
            y = self.domains(self.white(self.layer(x)), domain="b")
            return self.counted(self.residual(y, x))

    layer, white, domains, residual, counted = report_norms(Model(nnx.Rngs(0)), x).rows
    assert [row.normalizes_by for row in (layer, white, domains, residual, counted)] == [
        "example", "stored", "stored", "example", "stored"
    ]  # fmt: skip
    assert layer.shift is None
    assert white.shift.shape == white.variance_ratio.shape == (4,)
    assert "AdaBN" in domains.method
    assert domains.shift.shape == (4,)
    assert counted.updates == 0
    assert "those of the start" in counted.warnings[-1]
    # IBN-b normalizes the sum with the shortcut.
    assert (residual.deviation > np.asarray(x).std((0, 1))).all()


def test_a_batch_of_few_values_is_named(rng):
    norm = stir(jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    x = jnp.asarray(inputs(rng, 1, 3), jnp.float32)
    (row,) = report_norms(norm, x, by_batch=True, singular_values=False).rows
    assert row.count == 1
    assert any("statistics of 1 values" in sentence for sentence in row.warnings)
    (row,) = report_norms(norm, x, singular_values=False).rows
    assert not any("Normalizes by" in sentence for sentence in row.warnings)


def test_statistics_that_lag_are_named_and_those_of_the_batch_are_not(rng):
    x = jnp.asarray(inputs(rng, 100, 3), jnp.float32)
    norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = x.mean(0), x.var(0)
    (row,) = report_norms(norm, x, singular_values=False).rows
    assert row.warnings == ()
    np.testing.assert_allclose(row.variance_ratio, 1, rtol=1e-4)
    norm.mean[...] += 2 * x.std(0)
    (row,) = report_norms(norm, x, singular_values=False).rows
    assert "half the means are off by 2 deviations" in row.warnings[-1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_first_layer_with_nan_is_named(framework):
    """The variance of a norm in a stack that became NaN, or an input that was."""
    if framework == "linen":
        model = branches("linen")
        module, variables = model.unbind()
        var = variables["batch_stats"]["layers"]["norm"]["var"].at[1, 0].set(-1.0)
        layers = {"norm": variables["batch_stats"]["layers"]["norm"] | {"var": var}}
        stats = variables["batch_stats"] | {"layers": layers}
        model = module.bind(variables | {"batch_stats": stats})
    else:
        model = branches("nnx")
        model.layers.norm.var[...] = model.layers.norm.var[...].at[1, 0].set(-1.0)
    seen = report_norms(model, vector(), singular_values=False, **INFERENCE[framework])
    assert seen.nonfinite == "'layers/norm[1]' is the first to make them, of finite input"
    assert "NaN or infinite values: 'layers/norm[1]'" in str(seen)
    bad = dict((row.path, row.nonfinite) for row in seen.rows)
    assert bad["layers/norm[0]"] == {}
    assert bad["layers/norm[1]"] == {"output": 6}
    assert bad["checkpointed/norm"]["input"] == 30


def test_nan_from_parameters_and_from_outside(rng):
    x = jnp.asarray(inputs(rng, 5, 3), jnp.float32)
    norm = jaxnorm.nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    assert report_norms(norm, x.at[0, 0].set(jnp.inf)).nonfinite == (
        "'(root)' is the first to receive them, from outside the layers"
    )
    norm.bias[...] = jnp.array([0.0, jnp.nan, 0.0])
    seen = report_norms(norm, x)
    assert seen.nonfinite == "'(root)' is the first to make them, of finite input, by its bias"
    assert seen.rows[0].nonfinite == {"output": 5, "bias": 1}
    assert seen.rows[0].largest is None


def test_a_norm_that_pools_over_mapped_axes(rng):
    x = jnp.asarray(inputs(rng, 4, 5, 3), jnp.float32)

    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.vmap(
                jaxnorm.linen.BatchNorm,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name="devices",
            )
            return norm(use_running_average=False, update_stats=False, axis_name="devices")(x)

    model = Mapped()
    (row,) = report_norms(model.bind(model.init(jax.random.key(0), x)), x).rows
    assert row.calls == 4
    assert row.largest is None
    assert "Pools over mapped axes" in row.warnings[-1]
    # All see the statistics of everything.
    mean = np.asarray(x, np.float64).mean((0, 1))
    np.testing.assert_allclose(row.shift, np.abs(mean), rtol=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_table_and_picture(framework):
    seen = report_of_branches(framework, by_batch=False)
    lines = str(seen).splitlines()
    assert max(map(len, lines)) <= 100
    for row in seen.rows:
        assert any(line.startswith(f" {row.path}") for line in lines), row.path
        assert all(sentence.split(".")[0][:60] in str(seen) for sentence in row.warnings)
    figure = seen.picture()
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == [
        row.path for row in seen.rows
    ]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    np.testing.assert_allclose(dots[2].get_ydata(), seen.rows[2].shift)


def test_a_model_without_norms():
    seen = report_norms(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 3)))
    assert seen.rows == ()
    assert str(seen) == "This call of the model runs through no normalization layers."


def test_strict_dtypes_and_bfloat16(rng):
    norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jnp.asarray(inputs(rng, 9, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        (row,) = report_norms(norm, x, by_batch=True).rows
    factors = 1 / np.sqrt(np.asarray(x, np.float64).var(0) + 1e-5)
    np.testing.assert_allclose([row.smallest, row.largest], [factors.min(), factors.max()], 1e-4)


def test_a_norm_in_a_loop_over_time_is_one_row():
    """The layers of a stack are told from the calls of one layer by what the model stores."""
    norm = stir(jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))

    class Recurrent(nnx.Module):
        def __init__(self):
            self.norm = norm

        def __call__(self, x):
            return lax.scan(lambda state, x: (self.norm(state + x), None), x[0], x)[0]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
    (row,) = report_norms(Recurrent(), x, singular_values=False).rows
    assert (row.path, row.calls, row.count) == ("norm", 5, 4)
