"""PyTorch's models, imported, compute what PyTorch computed; exported, they are bit for bit alike.

By default against results that `record_torch.py` recorded; where PyTorch is installed, also live
with fresh random models. All layers are imported at once, into one model.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import (
    Branches,
    NNXBranches,
    NNXResNet,
    ResNet,
    drawn,
    drawn_nnx,
    image,
    shapes_of,
    shapes_of_nnx,
    vector,
)

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.tools.importing.presets import torch_defaults
from jaxnorm.tools.importing.torch import export_torch, import_torch

pytestmark = pytest.mark.usefixtures("quick_compile")
FRAMEWORKS = ("linen", "nnx")
RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "torch.npz")
X = jnp.ones((1, 3))


# --- Layers


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
        record: its name there, if it is not that of the case.
        images: whether PyTorch's input and output have channels first.
        call: arguments of the call in Linen.
        names: of its layers in PyTorch, where they are not alike.
        channels_first, source: these options of the import, by layer.
        exports: whether the export is the state dict that was imported.
    """

    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    record: str | None = None
    images: bool = True
    call: Mapping[str, Any] = MappingProxyType({})
    names: Mapping[str, str] = MappingProxyType({})
    channels_first: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    source: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
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


def wrapped(wrapper, layer, **options):
    """A layer of both frameworks inside a wrapper of ours."""
    linen, module = layer
    return (
        lambda: getattr(jnn, wrapper)(linen(), **options),
        lambda rngs: getattr(jnx, wrapper)(module(rngs), **options, rngs=rngs),
    )


INFERENCE, TRAINING = ({"use_running_average": frozen} for frozen in (True, False))
AXES = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
OF_IMAGE = dict(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))
DENSE = (lambda: nn.Dense(4), lambda rngs: nnx.Linear(3, 4, rngs=rngs))
CONV, CONV_T = (
    convolution(3, (2, 2), 2, padding="VALID"),
    convolution(3, (2,), 2, "ConvTranspose", padding="VALID"),
)
INSIDE = dict(names={"layer_instance": ""})
SPECTRAL = dict(call={"update_stats": False}, exports=False, **INSIDE)

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
    "flattened": Case(Flat, NNXFlat, names={"head": "1"}, channels_first={"head": (2, 3, 4)}),
    "layer_norm": Case(*norm("LayerNorm", 4), images=False),
    "layer_norm_of_axes": Case(*norm("LayerNorm", (3, 4), **AXES), images=False),
    "layer_norm_of_image": Case(
        *norm("LayerNorm", (3, 4, 2), **OF_IMAGE), channels_first={"": (2, 3, 4)}
    ),
    "group_norm": Case(*norm("GroupNorm", 6, num_groups=2)),
    "rms_norm": Case(*norm("RMSNorm", 4), images=False),
    "batch_norm": Case(*norm("BatchNorm", 3), call=INFERENCE, exports=False),
    "batch_norm_of_all_batches": Case(
        *norm("BatchNorm", 3, momentum=None), call=INFERENCE, source={"": dict(momentum=None)}
    ),
    "instance_norm": Case(
        *norm("InstanceNorm", 3, track_running_stats=True), call=INFERENCE, exports=False
    ),
    "instance_norm_without_statistics": Case(*norm("InstanceNorm", 3)),
    "weight_norm": Case(*wrapped("WeightNorm", CONV), **INSIDE),
    "weight_norm_old": Case(*wrapped("WeightNorm", DENSE), **INSIDE, exports=False),
    "spectral_norm": Case(*wrapped("SpectralNorm", DENSE), **SPECTRAL),
    "spectral_norm_old": Case(*wrapped("SpectralNorm", CONV), **SPECTRAL),
    "spectral_norm_of_transposed": Case(*wrapped("SpectralNorm", CONV_T), **SPECTRAL),
    # Normalized weights are multiplied out for layers without the wrapper.
    **{
        f"plain_{record}": Case(*layer, record, exports=False)
        for record, layer in {
            "weight_norm": CONV,
            "weight_norm_old": DENSE,
            "spectral_norm": DENSE,
            "spectral_norm_of_transposed": CONV_T,
        }.items()
    },
}
EXPORTED = tuple(name for name, case in CASES.items() if case.exports)
TRAINED = tuple(name for name, case in CASES.items() if case.call == INFERENCE)


class Layers(nn.Module):
    """The models of some cases, each called on its own input."""

    models: Mapping[str, nn.Module]

    def __call__(self, xs):
        return {name: self.models[name](x, **CASES[name].call) for name, x in xs.items()}

    def train(self, xs):
        """A step of training."""
        return {name: self.models[name](x, **TRAINING) for name, x in xs.items()}


class NNXLayers(nnx.Module):
    """The twin of `Layers`."""

    def __init__(self, cases, rngs):
        self.models = nnx.Dict({name: case.nnx(rngs) for name, case in cases.items()})

    def __call__(self, xs):
        return {name: self.models[name](x) for name, x in xs.items()}


def recorded(name):
    """What `record_torch.recorded` returned when the file was written."""
    return part(RECORDED, name)


def part(arrays, name):
    return {k.removeprefix(f"{name}/"): arrays[k] for k in arrays if k.startswith(f"{name}/")}


def ours(x, images=True):
    """An array of PyTorch with its channels last."""
    return jnp.asarray(np.moveaxis(x, 1, -1) if images else x)


def path_of(framework, case, layer=""):
    path = f"models_{case}" if framework == "linen" else f"models/{case}"
    return f"{path}/{layer}" if layer else path


class Imported(NamedTuple):
    """A model of some cases, how it was filled, and with what."""

    model: Any
    xs: dict[str, jax.Array]
    states: dict[str, dict[str, np.ndarray]]
    options: dict[str, Any]


def imported(framework, names, read):
    """The models of cases, filled with what `read` returns by the names of their records."""
    cases = {name: CASES[name] for name in names}
    arrays = {name: read(case.record or name) for name, case in cases.items()}
    xs = {name: ours(arrays[name]["x"], case.images) for name, case in cases.items()}
    states = {name: part(arrays[name], "state") for name in cases}
    if framework == "linen":
        model = shapes_of(Layers({name: case.linen() for name, case in cases.items()}), xs)
    else:
        model = shapes_of_nnx(partial(NNXLayers, cases))
    place = partial(path_of, framework)
    options = dict(
        names={place(name): name for name in names}
        | {
            place(name, layer): f"{name}.{theirs}".rstrip(".")
            for name, case in cases.items()
            for layer, theirs in case.names.items()
        },
        channels_first={
            place(name, layer): shape
            for name, case in cases.items()
            for layer, shape in case.channels_first.items()
        },
    )
    source = {place(name): case.source[""] for name, case in cases.items() if case.source}
    state = {f"{name}.{key}": leaf for name in names for key, leaf in states[name].items()}
    model, report = import_torch(model, state, xs, **options, source=source)
    assert report.fits
    return Imported(model, xs, states, options)


@functools.cache
def results(framework, read):
    """What imported models return in inference, and their norms' statistics after training."""
    model, xs, *_ = imported(framework, tuple(CASES), read)
    of_trained = {name: xs[name] for name in TRAINED}
    if framework == "linen":
        module, variables = model.unbind()

        def run(variables):
            train = partial(module.apply, method=Layers.train, mutable=["batch_stats"])
            stats = train(variables, of_trained)[1]["batch_stats"]
            return module.apply(variables, xs), [stats[path_of("linen", n)] for n in TRAINED]

        ys, stats = jax.jit(run)(variables)
    else:
        graph, state = nnx.split(model)

        def run(state):
            model = nnx.merge(graph, state)
            model.eval()
            ys = model(xs)
            model.train()
            model(of_trained)
            norms = [nnx.state(model.models[name], nnx.BatchStat) for name in TRAINED]
            return ys, [nnx.to_pure_dict(norm) for norm in norms]

        ys, stats = jax.jit(run)(state)
    return ys, dict(zip(TRAINED, stats, strict=True))


def check_result(framework, name, read):
    case = CASES[name]
    y, expected = results(framework, read)[0][name], read(case.record or name)["y"]
    expected = ours(expected, case.images)
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_imported_layers_compute_what_pytorch_did(name, framework):
    check_result(framework, name, recorded)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_moves_statistics_as_pytorch_did(name, framework):
    """Each by a step: none of them stays as it was."""
    arrays = recorded(name)
    ours_of = {"mean": "running_mean", "var": "running_var", "updates": "num_batches_tracked"}
    for role, leaf in results(framework, recorded)[1][name].items():
        expected = np.broadcast_to(arrays[f"trained/{ours_of[role]}"], leaf.shape)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)
        assert (leaf != arrays[f"state/{ours_of[role]}"]).all()


def check_export(framework, read):
    model, xs, states, options = imported(framework, EXPORTED, read)
    back = export_torch(model, xs, **options)
    expected = {f"{n}.{key}": leaf for n, state in states.items() for key, leaf in state.items()}
    assert back.keys() == expected.keys()
    for key, leaf in expected.items():
        assert (back[key] == leaf).all(), key
        assert back[key].dtype == leaf.dtype


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_was_imported_is_exported_bit_for_bit(framework):
    check_export(framework, recorded)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_live(framework):
    pytest.importorskip("torch")
    record_torch = pytest.importorskip("record_torch")
    live = functools.cache(partial(record_torch.recorded, seed=1))
    for name in CASES:
        check_result(framework, name, live)
    check_export(framework, live)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("wrapper", ["ScaledWeightStandardization", "SpectralNorm"])
def test_weights_that_are_normalized_otherwise_are_not_mapped(framework, wrapper):
    linen, module = wrapped(wrapper, DENSE, **(dict(gain=1.0) if wrapper[1] == "c" else {}))
    call = {"update_stats": False} if (framework, wrapper) == ("linen", "SpectralNorm") else {}
    model = shapes_of(linen(), X, **call) if framework == "linen" else shapes_of_nnx(module)
    state = part(recorded("weight_norm_old"), "state")
    with pytest.raises(ValueError, match=r"not used \(2\): 'weight_g'.*not filled.*'.*/kernel'"):
        import_torch(model, state, X, **INSIDE, **call)


# --- Whole models

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


@pytest.mark.parametrize(("framework", "is_ours"), [("linen", True), ("nnx", False)])
def test_resnet(framework, is_ours):
    arrays = recorded("resnet")
    x, state = ours(arrays["x"]), part(arrays, "state")
    if framework == "linen":
        model = drawn(ResNet(partial(jnn.BatchNorm, **torch_defaults("BatchNorm"))), x)
    else:
        make = partial(nnx.BatchNorm, **torch_defaults(nnx.BatchNorm))
        model = drawn_nnx(partial(NNXResNet, make))
    filled, report = import_torch(model, state, x, names=TORCHVISION)
    if framework == "linen":
        module, variables = filled.unbind()
        y = jax.jit(module.apply)(variables, x)
    else:
        filled.eval()
        y = nnx.jit(lambda model, x: model(x))(filled, x)
    np.testing.assert_allclose(y, arrays["y"], rtol=1e-4, atol=1e-5)
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


def test_live_pytorch_loads_what_was_exported():
    torch = pytest.importorskip("torch")
    record_torch = pytest.importorskip("record_torch")
    x = image()
    model, module = drawn(ResNet(), x), record_torch.ResNet()
    exported = export_torch(model, x, names=TORCHVISION)
    module.load_state_dict({key: torch.from_numpy(leaf) for key, leaf in exported.items()})
    with torch.no_grad():
        y = module.eval()(torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy()))
    np.testing.assert_allclose(model(x), y.numpy(), rtol=1e-4, atol=1e-5)


STACKED = {"layers": ("blocks.0", "blocks.1", "blocks.2")}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_layers_of_a_scan_are_stacked(framework):
    x = vector()
    model = drawn(Branches(), x) if framework == "linen" else drawn_nnx(NNXBranches)
    state = export_torch(model, x, names=STACKED)
    assert state["blocks.1.dense.weight"].shape == (5, 5)
    shifted = {key: leaf + 1 for key, leaf in state.items()}
    filled, _ = import_torch(model, shifted, x, names=STACKED, source="same")
    back = export_torch(filled, x, names=STACKED)
    assert back.keys() == shifted.keys()
    assert all((back[key] == shifted[key]).all() for key in back)


# --- Variables of all kinds


def test_a_scale_stored_minus_1_is_converted():
    options = torch_defaults("RMSNorm") | dict(zero_centered_scale=True)
    model = shapes_of_nnx(partial(jnx.RMSNorm, 3, **options))
    state = {"weight": np.array([1.0, 1.5, 0.25], np.float32)}
    filled, _ = import_torch(model, state, X)
    assert filled.scale[...].tolist() == [0.0, 0.5, -0.75]
    assert export_torch(filled, X)["weight"].tolist() == [1.0, 1.5, 0.25]


def test_missing_count_is_missing_and_waiting_evidence_is_dropped():
    _, make = norm("BatchNorm", 3, momentum=None, update_every=2)
    model = drawn_nnx(make)
    assert model.pending_mean[...].any()
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
