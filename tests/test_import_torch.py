"""PyTorch's models, imported, compute what PyTorch computed; exported, they are bit for bit alike.

By default against results that `record_torch.py` recorded; where PyTorch is installed, also live
with fresh random models.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import branches, image, resnet, vector

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.flax import import_flax
from jaxnorm.tools.importing.names import Tied
from jaxnorm.tools.importing.presets import torch_defaults
from jaxnorm.tools.importing.safetensors_file import save_safetensors
from jaxnorm.tools.importing.torch import export_torch, import_torch

FRAMEWORKS = ("linen", "nnx")
RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "torch.npz")

TORCHVISION = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "block1": "layer1.0",
    "block1/norm1": "layer1.0.bn1",
    "block1/norm2": "layer1.0.bn2",
    "block2": "layer2.0",
    "block2/norm1": "layer2.0.bn1",
    "block2/norm2": "layer2.0.bn2",
    "block2/conv3": "layer2.0.downsample.0",
    "block2/norm3": "layer2.0.downsample.1",
    "head": "fc",
}


X = jnp.ones((1, 3))


class Flat(nn.Module):
    """A dense layer behind a flattened image."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


class NNXFlat(nnx.Module):
    """The twin of `Flat`."""

    def __init__(self, rngs):
        self.head = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(x.reshape(x.shape[0], -1))


class Case(NamedTuple):
    """A model of `record_torch.py` in Flax.

    Attributes:
        linen, nnx: make it.
        images: whether PyTorch's input and output have channels first.
        call: arguments of the call in Linen.
        options: of the import.
        exports: whether the export is the state dict that was imported.
    """

    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    images: bool = True
    call: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    exports: bool = True


def convolution(features, window, inputs, kind="Conv", **options):
    """A convolution in both frameworks."""
    linen, module = getattr(nn, kind), getattr(nnx, kind)
    return (
        lambda: linen(features, window, **options),
        lambda rngs: module(inputs, features, window, **options, rngs=rngs),
    )


def norm(kind, features, **options):
    """A norm of ours in both frameworks, with PyTorch's defaults."""
    options = torch_defaults(kind) | dict(use_scale=True, use_bias=True) | options
    if kind == "RMSNorm":
        del options["use_bias"]
    return (
        lambda: getattr(jnn, kind)(**options),
        lambda rngs: getattr(jnx, kind)(features, **options, rngs=rngs),
    )


INFERENCE = {"use_running_average": True}
AXES = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
OF_IMAGE = dict(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))
CONV, CONV_T = (
    convolution(3, (2, 2), 2, padding="VALID"),
    convolution(3, (2,), 2, "ConvTranspose", padding="VALID"),
)


def wrapped(wrapper, layer, **options):
    """A layer of both frameworks inside a wrapper of ours."""
    linen, module = layer
    return (
        lambda: getattr(jnn, wrapper)(linen(), **options),
        lambda rngs: getattr(jnx, wrapper)(module(rngs), **options, rngs=rngs),
    )


DENSE = (lambda: nn.Dense(4), lambda rngs: nnx.Linear(3, 4, rngs=rngs))
INSIDE = dict(names={"layer_instance": ""})
SPECTRAL = dict(call={"update_stats": False}, options=INSIDE, exports=False)

CASES = {
    "conv1d": Case(*convolution(6, (3,), 4, strides=2, padding=1, feature_group_count=2)),
    "conv2d": Case(
        *convolution(
            4,
            (3, 2),
            3,
            strides=(2, 1),
            padding=((2, 2), (1, 1)),
            kernel_dilation=(2, 1),
            use_bias=False,
        )
    ),
    "depthwise": Case(*convolution(6, (3, 3), 3, padding="VALID", feature_group_count=3)),
    "conv3d": Case(*convolution(3, (2, 3, 2), 2, padding=1)),
    "conv_transpose1d": Case(
        *convolution(4, (4,), 3, "ConvTranspose", strides=(2,), padding=((2, 2),))
    ),
    "conv_transpose2d": Case(
        *convolution(
            2,
            (3, 4),
            3,
            "ConvTranspose",
            strides=(2, 2),
            padding=((1, 2), (2, 2)),
            transpose_kernel=True,
        )
    ),
    "conv_transpose3d": Case(
        *convolution(
            3, (2, 2, 2), 2, "ConvTranspose", padding=((2, 2),) * 3, kernel_dilation=(2, 2, 2)
        )
    ),
    "linear": Case(*DENSE),
    "heads": Case(
        lambda: nn.DenseGeneral((2, 4)),
        lambda rngs: nnx.LinearGeneral(6, (2, 4), rngs=rngs),
        images=False,
    ),
    "flattened": Case(
        Flat,
        NNXFlat,
        options=dict(names={"head": "1"}, channels_first={"head": (2, 3, 4)}),
    ),
    "layer_norm": Case(*norm("LayerNorm", 4), images=False),
    "layer_norm_of_axes": Case(*norm("LayerNorm", (3, 4), **AXES), images=False),
    "layer_norm_of_image": Case(
        *norm("LayerNorm", (3, 4, 2), **OF_IMAGE), options=dict(channels_first={"": (2, 3, 4)})
    ),
    "group_norm": Case(*norm("GroupNorm", 6, num_groups=2)),
    "rms_norm": Case(*norm("RMSNorm", 4), images=False),
    "batch_norm": Case(*norm("BatchNorm", 3), call=INFERENCE, exports=False),
    "batch_norm_of_all_batches": Case(
        *norm("BatchNorm", 3, momentum=None),
        call=INFERENCE,
        options=dict(source={"": dict(momentum=None)}),
    ),
    "instance_norm": Case(
        *norm("InstanceNorm", 3, track_running_stats=True), call=INFERENCE, exports=False
    ),
    "instance_norm_without_statistics": Case(*norm("InstanceNorm", 3)),
    "weight_norm": Case(*wrapped("WeightNorm", CONV), options=INSIDE),
    "weight_norm_old": Case(*wrapped("WeightNorm", DENSE), options=INSIDE, exports=False),
    "spectral_norm": Case(*wrapped("SpectralNorm", DENSE), **SPECTRAL),
    "spectral_norm_old": Case(*wrapped("SpectralNorm", CONV), **SPECTRAL),
    "spectral_norm_of_transposed": Case(*wrapped("SpectralNorm", CONV_T), **SPECTRAL),
}
MULTIPLIED = {
    "weight_norm": Case(*CONV, exports=False),
    "weight_norm_old": Case(*DENSE, exports=False),
    "spectral_norm": Case(*DENSE, exports=False),
    "spectral_norm_of_transposed": Case(*CONV_T, exports=False),
}
"""The same weights for layers without the wrapper."""


def recorded(name):
    """What `record_torch.recorded` returned when the file was written."""
    start = f"{name}/"
    return {key.removeprefix(start): RECORDED[key] for key in RECORDED if key.startswith(start)}


def part(arrays, name):
    return {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}


def ours(x, images=True):
    """An array of PyTorch with its channels last."""
    return jnp.asarray(np.moveaxis(x, 1, -1) if images else x)


def built(case, framework, x):
    """The model of a case with its first variables."""
    if framework == "nnx":
        return case.nnx(nnx.Rngs(0))
    module = case.linen()
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **case.call), x)
    return module.bind(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def called(model, x, **call):
    if isinstance(model, nnx.Module):
        model.eval()
        return model(x)
    return model(x, **call)


def check(case, framework, arrays):
    """Imports what was recorded, and compares results and the way back."""
    x, state = ours(arrays["x"], case.images), part(arrays, "state")
    model = built(case, framework, x)
    call = case.call if framework == "linen" else {}
    filled, report = import_torch(model, state, x, **case.options, **call)
    assert report.fits
    y = called(filled, x, **case.call)
    expected = ours(arrays["y"], case.images)
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    if case.exports:
        options = {key: value for key, value in case.options.items() if key != "source"}
        back = export_torch(filled, x, **options, **call)
        assert back.keys() == state.keys()
        for key, leaf in state.items():
            assert (back[key] == leaf).all(), key
            assert back[key].dtype == leaf.dtype
    return filled


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_imported_layers_compute_what_pytorch_did(name, framework):
    check(CASES[name], framework, recorded(name))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", MULTIPLIED)
def test_normalized_weights_are_multiplied_out_for_plain_layers(name, framework):
    check(MULTIPLIED[name], framework, recorded(name))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("wrapper", ["ScaledWeightStandardization", "SpectralNorm"])
def test_weights_that_are_normalized_otherwise_are_not_mapped(framework, wrapper):
    options = dict(gain=1.0) if wrapper[1] == "c" else {}
    call = {"update_stats": False} if wrapper == "SpectralNorm" else {}
    case = Case(*wrapped(wrapper, DENSE, **options), call=call)
    model = built(case, framework, X)
    state = part(recorded("weight_norm_old"), "state")
    with pytest.raises(ValueError, match=r"not used \(2\): 'weight_g'.*not filled.*'.*/kernel'"):
        import_torch(model, state, X, **INSIDE, **(call if framework == "linen" else {}))


def trained(model, x):
    """The running statistics after one step of training, by PyTorch's names."""
    if isinstance(model, nnx.Module):
        model.train()
        model(x)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    else:
        module, variables = model.unbind()
        _, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        stats = new["batch_stats"]
    names = {"mean": "running_mean", "var": "running_var", "updates": "num_batches_tracked"}
    return {names[name]: np.asarray(leaf) for name, leaf in stats.items()}


TRAINED = ("batch_norm", "batch_norm_of_all_batches", "instance_norm")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_moves_statistics_as_pytorch_did(name, framework):
    arrays = recorded(name)
    model = check(CASES[name], framework, arrays)
    expected = part(arrays, "trained")
    for key, leaf in trained(model, ours(arrays["x"])).items():
        np.testing.assert_allclose(leaf, np.broadcast_to(expected[key], leaf.shape), rtol=1e-5)
        assert (leaf != arrays[f"state/{key}"]).all()


def norm_of(framework, ours):
    if ours:
        return partial(
            (jnn if framework == "linen" else jnx).BatchNorm, **torch_defaults("BatchNorm")
        )
    flax = nn.BatchNorm if framework == "linen" else nnx.BatchNorm
    return partial(flax, **torch_defaults(flax))


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "flax"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_resnet(framework, is_ours):
    arrays = recorded("resnet")
    x, state = ours(arrays["x"]), part(arrays, "state")
    model = resnet(framework, norm_of(framework, is_ours))
    before = jax.tree.map(np.array, export_torch(model, image()))
    filled, report = import_torch(model, state, x, names=TORCHVISION)
    np.testing.assert_allclose(called(filled, x), arrays["y"], rtol=1e-4, atol=1e-5)
    assert len(report.dropped) == 6
    notes = "; ".join(report.notes)
    assert "'block2/conv1'" in notes
    assert ("running_var was 'unbiased'" in notes) != is_ours
    back = export_torch(filled, x, names=TORCHVISION)
    assert {*back} == {key for key in state if "num_batches" not in key}
    assert all((back[key] == state[key]).all() for key in back)
    text = str(report)
    assert "block2/norm3/var" in text
    assert "layer2.0.downsample.1.running_var" in text

    for leaf in jax.tree.leaves(filled.variables if framework == "linen" else nnx.state(filled)):
        leaf.delete()
    after = export_torch(model, image())
    assert all((before[key] == after[key]).all() for key in after)
    assert all((arrays[f"state/{key}"] == state[key]).all() for key in state)


STACKED = {"layers": ("blocks.0", "blocks.1", "blocks.2")}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_layers_of_a_scan_are_stacked(framework):
    model = branches(framework)
    state = export_torch(model, vector(), names=STACKED)
    assert state["blocks.1.dense.weight"].shape == (5, 5)
    shifted = {key: leaf + 1 for key, leaf in state.items()}
    filled, _ = import_torch(model, shifted, vector(), names=STACKED, source="same")
    back = export_torch(filled, vector(), names=STACKED)
    assert back.keys() == shifted.keys()
    assert all((back[key] == shifted[key]).all() for key in back)


def dense(framework, features=2):
    if framework == "nnx":
        return nnx.Linear(3, features, rngs=nnx.Rngs(0))
    module = nn.Dense(features)
    return module.bind(module.init(jax.random.key(0), jnp.ones((1, 3))))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_partial_import_keeps_what_does_not_fit(framework):
    model = dense(framework)
    state = {"fc.weight": np.ones((7, 3), np.float32), "fc.bias": np.ones(2, np.float32)}
    state["other.bias"] = np.zeros(4)
    filled, report = import_torch(model, state, X, names={"": "fc"}, partial=True)
    assert export_torch(filled, X)["bias"].tolist() == [1, 1]
    assert (export_torch(filled, X)["weight"] == export_torch(model, X)["weight"]).all()
    assert report.unused == ("'other.bias' (4,)",)
    assert report.misshaped == ("'kernel' float32(3, 2) from 'fc.weight' float32(3, 7)",)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_scale_stored_minus_1_is_converted(framework):
    make, module = norm("RMSNorm", 3, zero_centered_scale=True)
    model = built(Case(make, module), framework, X)
    state = {"weight": np.array([1.0, 1.5, 0.25], np.float32)}
    filled, _ = import_torch(model, state, X)
    np.testing.assert_allclose(called(filled, X), [[1.0, 1.5, 0.25]], rtol=1e-5)
    assert export_torch(filled, X)["weight"].tolist() == [1.0, 1.5, 0.25]


def test_wider_numbers_are_rounded_and_said():
    state = {"weight": np.full((2, 3), 0.1), "bias": np.zeros(2, ml_dtypes.bfloat16)}
    filled, report = import_torch(dense("linen"), state, X)
    assert export_torch(filled, X)["weight"].tolist() == np.full((2, 3), 0.1, np.float32).tolist()
    assert report.notes == ("float64 of the source was rounded to the model's float32: 'kernel'",)


class WithToken(nn.Module):
    """A model with a variable of its own, and a layer that no reader knows."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.zeros, (3,))
        return nn.Embed(2, 3, name="embed")(x) + token[None]


def test_variables_of_unknown_layers_are_named_one_by_one():
    module, x = WithToken(), jnp.zeros((1,), jnp.int32)
    model = module.bind(module.init(jax.random.key(0), x))
    state = {"cls": np.ones(3, np.float32), "e.weight": np.ones((2, 3), np.float32)}
    filled, _ = import_torch(model, state, x, names={"token": "cls", "embed/embedding": "e.weight"})
    assert filled(x).tolist() == [[2, 2, 2]]


def test_missing_count_is_missing_and_waiting_evidence_is_dropped():
    options = dict(momentum=None, update_every=2)
    make, module = norm("BatchNorm", 3, **options)
    model = built(Case(make, module, call=INFERENCE), "nnx", X)
    model.pending_mean[...] = jnp.ones(3)
    state = part(recorded("batch_norm_of_all_batches"), "state")
    source = {"BatchNorm": dict(momentum=None)}
    filled, _ = import_torch(model, state, X, source=source)
    assert filled.pending_mean[...].tolist() == [0, 0, 0]
    assert filled.updates[...].tolist() == [3, 3, 3]
    del state["num_batches_tracked"]
    with pytest.raises(ValueError, match=r"not filled.*'updates'"):
        import_torch(model, state, X, source=source)


def test_presets_construct_ours_and_flax_layers():
    assert torch_defaults("RMSNorm")["epsilon"] == np.finfo(np.float32).eps
    assert torch_defaults(nn.InstanceNorm) == dict(epsilon=1e-5, use_scale=False, use_bias=False)
    assert torch_defaults(jnx.BatchNorm)["running_var"] == "unbiased"


def test_safetensors_files(tmp_path):
    pytest.importorskip("safetensors")
    model = dense("nnx")
    state = export_torch(model, X)
    state["bias"] = np.array([0.5, -2.0], ml_dtypes.bfloat16)
    save_safetensors(state, tmp_path / "model.safetensors")
    filled, _ = import_torch(model, tmp_path / "model.safetensors", X)
    assert (filled.kernel[...] == model.kernel[...]).all()
    assert filled.bias[...].tolist() == [0.5, -2.0]


KERNEL = np.arange(9, dtype=np.float32).reshape(3, 3)
FILES = {
    "model.npz": lambda path, state: np.savez(path, **state),
    "model.safetensors.index.json": lambda path, state: write_shards(path, state),
}


def write_shards(path, state):
    """One file for each array, and the index of all."""
    file_of = {key: f"{key}.npz" for key in state}
    for key, file in file_of.items():
        np.savez(path.parent / file, **{key: state[key]})
    path.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.mark.parametrize("name", FILES)
def test_files_are_known_by_what_is_in_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    state = {"weight": np.ones((2, 3), np.float32), "bias": np.float32([0.5, -2.0])}
    FILES[name](tmp_path / name, state)
    (tmp_path / name).rename(tmp_path / "model")
    filled, _ = import_torch(dense("nnx"), "~/model", X)
    assert filled(X).tolist() == [[3.5, 1.0]]


def test_live_files_of_pytorch(tmp_path):
    """With dtypes that NumPy has not and parameters that need a gradient; in both of its forms."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones((2, 3), dtype=torch.bfloat16))
    state = {"weight": weight, "bias": torch.tensor([0.5, -2.0])}
    paths = [tmp_path / name for name in ("zip.pt", "old.pth")]
    for path in paths:
        torch.save(state, path, _use_new_zipfile_serialization=path.name == "zip.pt")
    float8 = state | {"bias": state["bias"].to(torch.float8_e5m2)}
    for source in (*paths, float8):
        filled, _ = import_torch(dense("nnx"), source, X)
        assert filled(X).tolist() == [[3.5, 1.0]]
    torch.save({"weight": pathlib.Path("an object")}, paths[0])
    with pytest.raises(ValueError, match=r"^import_torch: PyTorch does not read"):
        import_torch(dense("nnx"), paths[0], X)


class TiedInside(nnx.Module):
    """Two layers with one kernel, and a layer that stands in two places; or one of each alone."""

    def __init__(self, rngs=None, *, is_tied=True):
        rngs = nnx.Rngs(0)
        self.a, self.o = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))
        self.first = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
        self.last = nnx.Linear(3, 3, rngs=rngs)
        if is_tied:
            self.o.kernel, self.last = self.a.kernel, self.first[0]
        self.me = self

    def __call__(self, x):
        return self.last(self.first[0](self.o(self.a(x))))


def test_what_is_tied_goes_by_all_its_names():
    state = {
        f"{layer}.{name}": leaf
        for layer in ("a", "o", "first.0", "last")
        for name, leaf in (("weight", KERNEL), ("bias", np.ones(3, np.float32)))
    }
    filled, _ = import_torch(TiedInside(), state, X)
    assert filled.o.kernel is filled.a.kernel
    assert filled.last is filled.first[0]
    back = export_torch(filled, X)
    assert back.keys() == state.keys()
    assert all((back[key] == state[key]).all() for key in state)
    # One of several names does, in the file and in ours.
    once = {key: leaf for key, leaf in state.items() if key not in ("a.weight", "first.0.weight")}
    filled, report = import_torch(TiedInside(), once, X)
    assert report.fits
    assert (filled.a.kernel[...] == KERNEL.T).all()
    assert export_torch(filled, X, names={"last": "first.0"}).keys() == state.keys() - {
        "last.weight",
        "last.bias",
    }
    # Of one that is not tied both are made.
    apart, report = import_flax(TiedInside(is_tied=False), filled, X)
    assert report.fits
    assert (apart.o.kernel[...] == KERNEL.T).all()
    assert (apart.last(X) == filled.last(X)).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_names_say_what_is_tied_in_the_source(framework):
    names = {"": Tied(("wte", "lm_head"))}
    state = {"wte.weight": KERNEL[:2], "wte.bias": KERNEL[0, :2]}
    state |= {key.replace("wte", "lm_head"): leaf.copy() for key, leaf in state.items()}
    filled, report = import_torch(dense(framework), state, X, names=names)
    assert report.copied["kernel"] == "lm_head.weight"
    back = export_torch(filled, X, names=names)
    assert back.keys() == state.keys()
    assert all((back[key] == state[key]).all() for key in state)
    with pytest.raises(ValueError, match=r"from 'lm_head\.bias': differs from 'wte\.bias'"):
        import_torch(dense(framework), state | {"lm_head.bias": KERNEL[1, :2]}, X, names=names)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_live(name, framework):
    pytest.importorskip("torch")
    record_torch = pytest.importorskip("record_torch")
    check(CASES[name], framework, record_torch.recorded(name, seed=1))


def test_live_pytorch_loads_what_was_exported():
    torch = pytest.importorskip("torch")
    record_torch = pytest.importorskip("record_torch")
    model, x = resnet("linen"), image()
    module = record_torch.ResNet()
    exported = export_torch(model, x, names=TORCHVISION)
    module.load_state_dict({key: torch.from_numpy(leaf) for key, leaf in exported.items()})
    with torch.no_grad():
        y = module.eval()(torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy()))
    np.testing.assert_allclose(model(x), y.numpy(), rtol=1e-4, atol=1e-5)
