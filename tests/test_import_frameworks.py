"""Models of Keras, Haiku and Equinox, imported, compute what these frameworks computed.

By default against results that `record_frameworks.py` recorded; where a framework is installed,
also live with other random values.
"""

import functools
import importlib
import os

import jax
import numpy as np
import pytest
import record_frameworks
from flax import linen as nn
from flax import nnx
from subjects import in_turn
from tool_models import shapes_of, shapes_of_nnx, values_of

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.equinox import equinox_arrays, import_equinox
from jaxnorm.tools.importing.haiku import import_haiku
from jaxnorm.tools.importing.keras import import_keras
from jaxnorm.tools.importing.presets import equinox_defaults, haiku_defaults, keras_defaults

FRAMEWORKS = ("linen", "nnx")
SPATIAL_MEAN = "mean"
"""In the place of a layer."""


def conv(features, size, ndim=2, **options):
    """What both frameworks call a convolution."""
    window = (size,) * ndim
    return dict(features=features, kernel_size=window, padding="VALID") | options


def transposed(features, size, strides, ndim=2, **options):
    return conv(features, size, ndim, strides=(strides,) * ndim, **options)


OF_IMAGE = dict(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))
DEPTHWISE = dict(padding="SAME", feature_group_count=-1)
"""As many groups as inputs."""

# By framework and model: its layers as name in the source, kind, inputs, and options.
MODELS = {
    ("keras", "image"): [
        ("conv", "Conv", 4, conv(6, 3, strides=2, padding="SAME", feature_group_count=2)),
        ("batch", "BatchNorm", 6, keras_defaults("BatchNorm")),
        ("depthwise", "Conv", 6, conv(12, 3, **DEPTHWISE)),
        ("renorm", "BatchRenorm", 12, dict(momentum=0.9, epsilon=1e-4, rmax=np.inf, dmax=np.inf)),
        ("separable/depthwise", "Conv", 12, conv(12, 3, use_bias=False, **DEPTHWISE)),
        ("separable/pointwise", "Conv", 12, conv(5, 1)),
        ("layer", "LayerNorm", 5, keras_defaults("LayerNorm")),
        ("transposed", "ConvTranspose", 5, transposed(4, 3, 2)),
        ("whole", "LayerNorm", (7, 7, 4), dict(epsilon=1e-3, **OF_IMAGE)),
        ("group", "GroupNorm", 4, dict(epsilon=1e-3, num_groups=2)),
        ("instance", "InstanceNorm", 4, keras_defaults("InstanceNorm")),
        ("bare", "BatchNorm", 4, dict(epsilon=1e-3, use_scale=False, use_bias=False)),
        ("rms", "RMSNorm", 4, keras_defaults("RMSNorm")),
        ("dense", "Dense", 4, dict(features=3)),
    ],
    ("keras", "line"): [
        ("conv", "Conv", 4, conv(5, 3, 1, kernel_dilation=2)),
        ("batch", "BatchNorm", 5, dict(epsilon=1e-3)),
        ("transposed", "ConvTranspose", 5, transposed(3, 4, 1, 1, transpose_kernel=True)),
    ],
    ("keras", "volume"): [
        ("conv", "Conv", 4, conv(3, 2, 3, use_bias=False)),
        ("batch", "BatchNorm", 3, dict(epsilon=1e-3)),
        ("transposed", "ConvTranspose", 3, transposed(2, 2, 2, 3, transpose_kernel=True)),
    ],
    ("haiku", "image"): [
        ("conv", "Conv", 4, conv(6, 3, strides=2, padding="SAME", feature_group_count=2)),
        ("batch", "BatchNorm", 6, dict(momentum=0.9, debias=True)),
        ("depthwise", "Conv", 6, conv(12, 3, **DEPTHWISE)),
        ("layer", "LayerNorm", 12, haiku_defaults("LayerNorm")),
        (
            "separable/~/depthwise_conv2_d",
            "Conv",
            12,
            conv(12, 3, use_bias=False, **DEPTHWISE) | dict(kernel_size=(3, 1)),
        ),
        (
            "separable/~/depthwise_conv2_d_1",
            "Conv",
            12,
            conv(12, 3, **DEPTHWISE) | dict(kernel_size=(1, 3)),
        ),
        ("transposed", "ConvTranspose", 12, transposed(4, 3, 2)),
        ("whole", "LayerNorm", (7, 7, 4), dict(epsilon=1e-5, **OF_IMAGE)),
        ("group", "GroupNorm", 4, dict(epsilon=1e-5, num_groups=2)),
        ("instance", "InstanceNorm", 4, haiku_defaults("InstanceNorm")),
        ("bare", "BatchNorm", 4, dict(momentum=0.99, debias=True, use_scale=False, use_bias=False)),
        ("rms", "RMSNorm", 4, haiku_defaults("RMSNorm")),
        (SPATIAL_MEAN, None, None, {}),
        ("mlp/~/linear_0", "Dense", 4, dict(features=5)),
        ("relu", None, None, {}),
        ("mlp/~/linear_1", "Dense", 5, dict(features=3)),
    ],
    ("haiku", "line"): [
        ("conv", "Conv", 4, conv(5, 3, 1, kernel_dilation=2)),
        ("batch", "BatchNorm", 5, dict(momentum=0.9, debias=True)),
        ("transposed", "ConvTranspose", 5, transposed(3, 4, 1, 1, transpose_kernel=True)),
    ],
    ("haiku", "volume"): [
        ("conv", "Conv", 4, conv(3, 2, 3, use_bias=False)),
        ("batch", "BatchNorm", 3, dict(momentum=0.9, debias=True)),
        ("transposed", "ConvTranspose", 3, transposed(2, 2, 2, 3)),
    ],
    ("equinox", "image"): [
        ("layers.0", "Conv", 4, conv(6, 3, strides=2, padding=1, feature_group_count=2)),
        ("layers.1", "BatchNorm", 6, dict(momentum=0.9, debias=True)),
        ("layers.2", "Conv", 6, conv(12, 3, padding=1, feature_group_count=-1)),
        ("layers.3", "BatchNorm", 12, dict(epsilon=1e-4, debias=True)),
        ("layers.4", "ConvTranspose", 12, transposed(4, 3, 2)),
        ("layers.5", "LayerNorm", (7, 7, 4), dict(epsilon=1e-5, **OF_IMAGE)),
        ("layers.6", "GroupNorm", 4, dict(epsilon=1e-5, num_groups=2)),
        ("layers.7", "InstanceNorm", 4, dict(epsilon=1e-3)),
        ("layers.8", "BatchNorm", 4, dict(debias=True, use_scale=False, use_bias=False)),
    ],
    ("equinox", "line"): [
        ("layers.0", "Conv", 4, conv(5, 3, 1, kernel_dilation=2)),
        ("layers.1", "BatchNorm", 5, dict(debias=True)),
        ("layers.2", "ConvTranspose", 5, transposed(3, 4, 1, 1, transpose_kernel=True)),
    ],
    ("equinox", "volume"): [
        ("layers.0", "Conv", 4, conv(3, 2, 3, use_bias=False)),
        ("layers.1", "BatchNorm", 3, dict(debias=True)),
        ("layers.2", "ConvTranspose", 3, transposed(2, 2, 2, 3)),
    ],
    ("equinox", "vector"): [
        ("layers.0", "Dense", 4, dict(features=5)),
        ("layers.1", "BatchNorm", 5, equinox_defaults("BatchNorm")),
        ("layers.2", "LayerNorm", 5, equinox_defaults("LayerNorm")),
        ("layers.3", "RMSNorm", 5, equinox_defaults("RMSNorm")),
        ("layers.4", "Dense", 5, dict(features=3, use_bias=False)),
    ],
}
# What the source's layers had where it is not the default, which arrays do not tell.
SOURCE = {
    ("keras", "image"): {"BatchRenorm": dict(momentum=0.9, epsilon=1e-4)},
    ("haiku", "image"): {
        "BatchNorm": dict(momentum=0.9, debias=True),
        "layer10": dict(momentum=0.99),
    },
    ("haiku", "line"): {"BatchNorm": dict(momentum=0.9, debias=True)},
    ("haiku", "volume"): {"BatchNorm": dict(momentum=0.9, debias=True)},
    ("equinox", "image"): {
        "layer1": dict(momentum=0.9),
        "layer3": dict(epsilon=1e-4),
        "layer7": dict(epsilon=1e-3),
    },
}
TRAINS_OTHERWISE = {("equinox", "vector")}
"""Equinox's `mode="ema"` normalizes by running statistics in training."""
NOT_COUNTED_BY_KERAS = {"layer3/step"}
STATISTICS = ("mean", "var", "updates", "step")
WITHOUT_LAYER = {
    SPATIAL_MEAN: lambda x: x.mean(tuple(range(1, x.ndim - 1))),
    "relu": jax.nn.relu,
}


def rows(key):
    """The layers of a model by their names in Flax, `layer0`, ...; and None for functions."""
    return [(f"layer{i}", *row) for i, row in enumerate(MODELS[key])]


def options_of(options, inputs):
    if options.get("feature_group_count") == -1:
        return options | dict(feature_group_count=inputs)
    return options


class Chain(nn.Module):
    """The layers of a row of `MODELS`, one after the other."""

    key: tuple[str, str]

    @nn.compact
    def __call__(self, x, train=False):
        for name, source_name, kind, inputs, options in rows(self.key):
            if kind is None:
                x = WITHOUT_LAYER[source_name](x)
                continue
            package = jnn if hasattr(jnn, kind) else nn
            layer = getattr(package, kind)(**options_of(options, inputs), name=name)
            moves = isinstance(layer, jnn.BatchNorm | jnn.BatchRenorm)
            x = layer(x, use_running_average=not train) if moves else layer(x)
        return x


class NNXChain(nnx.Module):
    """The twin of `Chain`."""

    def __init__(self, key, rngs):
        self.key = key
        for name, _, kind, inputs, options in rows(key):
            if kind is None:
                continue
            options = options_of(options, inputs) | dict(rngs=rngs)
            if hasattr(jnx, kind):
                layer = getattr(jnx, kind)(inputs, **options)
            else:
                outputs = options.pop("features")
                kind = "Linear" if kind == "Dense" else kind
                layer = getattr(nnx, kind)(inputs, outputs, **options)
            setattr(self, name, layer)

    def __call__(self, x):
        for name, source_name, kind, *_ in rows(self.key):
            x = WITHOUT_LAYER[source_name](x) if kind is None else getattr(self, name)(x)
        return x


def empty(framework, key, x):
    """A model of shapes."""
    if framework == "nnx":
        return shapes_of_nnx(lambda rngs: NNXChain(key, rngs))
    return shapes_of(Chain(key), x)


def names_of(key):
    """Which layer is which: all that is in a model of Keras lies below `net/`."""
    start = "net/" if key[0] == "keras" else ""
    return {name: f"{start}{row[0]}" for name, *row in rows(key) if row[1] is not None}


def imported(framework, key, arrays, x, **options):
    model = empty(framework, key, x)
    options = dict(names=names_of(key), source=SOURCE.get(key)) | options
    if key[0] == "keras":
        return import_keras(model, arrays, x, **options)
    if key[0] == "haiku":
        state = {name: leaf for name, leaf in arrays.items() if "_ema " in name}
        params = {name: leaf for name, leaf in arrays.items() if name not in state}
        by_module = record_frameworks.by_module
        return import_haiku(model, by_module(params), by_module(state), x, **options)
    if key[1] == "image":
        options["channels_first"] = {"layer5": True}
    return import_equinox(model, arrays, None, x, **options)


def inference(model, x):
    """The output of an NNX model."""
    model.eval()
    return nnx.jit(lambda model, x: model(x))(model, x)


def both(framework, model, x):
    """The outputs in inference and of a step of training, and the statistics after it."""
    if framework == "linen":
        module, variables = model.unbind()

        def run(variables):
            train = functools.partial(module.apply, train=True, mutable=["batch_stats"])
            return module.apply(variables, x), *train(variables, x)

        y, trained_y, new = jax.jit(run)(variables)
        return y, trained_y, values_of(module.bind(new))
    graph, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graph, state)
        model.eval()
        y = model(x)
        model.train()
        return y, model(x), nnx.state(model, nnx.BatchStat)

    y, trained_y, new = jax.jit(run)(state)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(new)}
    return y, trained_y, {name: leaf.get_raw_value() for name, leaf in flat.items()}


def check(framework, key, record):
    """The imported model does what the record says, in inference and in training."""
    model, report = imported(framework, key, record.arrays, record.x)
    assert report.fits
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    y, trained_y, found = both(framework, model, record.x)
    close(y, record.y)
    if key in TRAINS_OTHERWISE:
        return
    close(trained_y, record.trained_y)
    wanted = values_of(imported(framework, key, record.trained, record.x).model)
    assert found.keys() == {name for name in wanted if name.endswith(STATISTICS)}
    for name in found.keys() - NOT_COUNTED_BY_KERAS:
        close(found[name], wanted[name], err_msg=name)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("key", "framework"), in_turn(MODELS, FRAMEWORKS))
def test_recorded_model(key, framework):
    check(framework, key, record_frameworks.load("_".join(key)))


@pytest.mark.parametrize("key", MODELS, ids=" ".join)
def test_both_frameworks_hold_the_same(key):
    record = record_frameworks.load("_".join(key))
    linen, of_nnx = (
        values_of(imported(framework, key, record.arrays, record.x).model)
        for framework in FRAMEWORKS
    )
    assert linen.keys() == of_nnx.keys()
    for name, leaf in linen.items():
        np.testing.assert_array_equal(leaf, of_nnx[name], err_msg=name)


@pytest.mark.parametrize("key", MODELS, ids=" ".join)
def test_live_model(key):
    """Other values than those that were recorded."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    pytest.importorskip(key[0])
    record, _ = record_frameworks.RECORDERS[key[0]]
    for framework in FRAMEWORKS:
        check(framework, key, record(key[1], seed=1))


def test_live_keras_model_tells_its_options():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    record, keras_model = record_frameworks.recorded_and_model_of_keras("image")
    filled, report = imported("nnx", ("keras", "image"), keras_model, record.x, source=None)
    assert report.fits
    with jax.numpy_rank_promotion("allow"):
        wanted = np.asarray(keras_model(record.x, training=False))
    np.testing.assert_allclose(inference(filled, record.x), wanted, rtol=2e-4, atol=2e-4)


def test_live_equinox_module_tells_its_options():
    pytest.importorskip("equinox")
    key = ("equinox", "image")
    record, (module, state) = record_frameworks.recorded_and_model_of_equinox("image")
    options = dict(names=names_of(key), channels_first={"layer5": True})
    filled, _ = import_equinox(empty("nnx", key, record.x), module, state, record.x, **options)
    np.testing.assert_allclose(inference(filled, record.x), record.y, rtol=2e-4, atol=2e-4)


def test_statistics_before_the_first_batch():
    """Equinox's `mode="ema"` then has none; by a count of 0 nothing is divided."""
    eqx = pytest.importorskip("equinox")
    for mode, names in (("ema", set()), ("batch", {"mean", "var", "updates"})):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode=mode)
        arrays = equinox_arrays(norm, state)
        assert arrays.keys() == {"weight", "bias"} | names
        assert all(np.isfinite(leaf).all() for leaf in arrays.values())


def keras_norm(**others):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    arrays = {f"bn/{name}": np.full(2, i + 2, np.float32) for i, name in enumerate(names)}
    return arrays | {f"bn/{name}": np.float32(leaf) for name, leaf in others.items()}


X = np.ones((3, 2), np.float32)


def test_renorm_of_two_momenta_is_not_swallowed():
    """What training goes by is not what inference goes by: only one of the two has a place."""
    arrays = keras_norm(moving_stddev=[2, 2], renorm_mean=[9, 9], renorm_stddev=[2, 2])
    target = shapes_of_nnx(functools.partial(jnx.BatchRenorm, 2, epsilon=1e-3))
    with pytest.raises(ValueError, match=r"not used \(3\).*moving_stddev.*'bn/renorm_mean' \(2,\)"):
        import_keras(target, arrays, X, names={"": "bn"})
    filled, report = import_keras(target, arrays, X, names={"": "bn"}, partial=True)
    assert len(report.unused) == 3
    assert filled.mean[...].tolist() == [4, 4]
    assert "Keras counts no steps" in str(report)


def test_attention_and_other_dense_layers_of_several_axes():
    """What others keep in two axes, Flax keeps in three."""
    kernel, bias = np.arange(24, dtype=np.float32).reshape(4, 6), np.arange(6, dtype=np.float32)
    x = np.ones((1, 4), np.float32)
    target = shapes_of_nnx(functools.partial(nnx.LinearGeneral, 4, (2, 3)))
    names = {"": "query"}
    for filled, _ in (
        import_keras(target, {"query": {"kernel": kernel, "bias": bias}}, x, names=names),
        import_haiku(target, {"query": {"w": kernel, "b": bias}}, {}, x, names=names),
        import_equinox(
            target, {"query.weight": kernel.T, "query.bias": bias}, None, x, names=names
        ),
    ):
        np.testing.assert_array_equal(filled.kernel[...], kernel.reshape(4, 2, 3))
        np.testing.assert_array_equal(filled.bias[...], bias.reshape(2, 3))


def test_dense_layer_behind_a_flattened_image():
    weight = np.arange(24, dtype=np.float32).reshape(2, 12)
    image = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    target = shapes_of_nnx(functools.partial(nnx.Linear, 12, 2, use_bias=False))
    options = dict(names={"": "head"}, channels_first={"": (3, 2, 2)})
    arrays = {"head.weight": weight}
    filled, _ = import_equinox(target, arrays, None, image.reshape(1, -1), **options)
    wanted = np.moveaxis(image, -1, 0).reshape(1, -1) @ weight.T
    np.testing.assert_array_equal(image.reshape(1, -1) @ np.asarray(filled.kernel[...]), wanted)


def test_doors_load_no_framework():
    for name in ("keras", "haiku", "equinox"):
        source = importlib.import_module(f"jaxnorm.tools.importing.{name}").__file__
        with open(source) as file:
            assert f"import {name}\n" not in file.read()
