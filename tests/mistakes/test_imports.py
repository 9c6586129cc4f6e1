"""Mistakes with imports from PyTorch and other frameworks, and with exports to PyTorch."""

import io
import pathlib
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.tools import (
    Stack,
    export_torch,
    import_equinox,
    import_flax,
    import_haiku,
    import_keras,
    import_torch,
    keras_defaults,
    save_safetensors,
    torch_defaults,
)
from mistakes import import_error, refused, type_error, value_error, while_tracing, with_values
from mistakes.layers import ones, shaped

X = ones(1, 3)
STATE = {
    "dense.weight": ones(2, 3),
    "dense.bias": ones(2),
    "norm.weight": ones(2),
    "norm.bias": ones(2),
    "norm.running_mean": ones(2),
    "norm.running_var": ones(2),
}
WRONG = {
    "dense.weight": ones(5, 3),
    "dense.bias": np.zeros(2, np.int8),
    "norm.weight": ones(2),
    "bn.bias": ones(7),
}


class Pair(nn.Module):
    """A dense layer and a norm."""

    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="dense")(x)
        return self.norm(use_running_average=True, name="norm")(x)


class Image(nn.Module):
    """A norm over whole images, of equal sizes along all axes."""

    @nn.compact
    def __call__(self, x):
        options = {"reduction_axes": (1, 2), "feature_axes": (1, 2)}
        return jaxnorm.linen.LayerNorm(epsilon=1e-5, name="norm", **options)(x)


class Tied(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = (nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(self.a(x))


class Scanned(nn.Module):
    """Three dense layers in one."""

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return step(nn.Dense(3, name="dense"), x, None)[0]


def scanned():
    arrays = {"kernel": ones(3, 3, 3), "bias": ones(3, 3)}
    return Scanned().bind({"params": {"dense": arrays}})


def pair(**options):
    return shaped(Pair(**options), X)


def norm():
    return shaped(jaxnorm.linen.BatchNorm(use_running_average=True), X)


def import_pair(state=STATE, **options):
    import_torch(pair(), state, X, **options)


@while_tracing
def test_state_dicts():
    with type_error("import_torch: found dict … import_torch(model.bind(variables)"):
        import_torch({"params": {}}, STATE, X)
    with type_error("import_torch: the state dict is Dense … module.state_dict()"):
        import_pair(nn.Dense(2))
    with type_error("import_torch: 'state_dict' is OrderedDict, … no array … tensor.detach()"):
        import_pair({"epoch": 3, "state_dict": OrderedDict(STATE)})
    with type_error("import_torch: 1 of 2 values of 'norm.bias' are masked … ['norm.bias'].filled"):
        import_pair(STATE | {"norm.bias": np.ma.masked_equal([0, 1], 1)})
    # As `np.savez` leaves bfloat16.
    with type_error("import_torch: 'norm.bias' has the dtype |V2 … .view(ml_dtypes.bfloat16)"):
        import_pair(STATE | {"norm.bias": np.zeros(2, "V2")})


def from_file(name, content=b"", without=(), **others):
    """Imports a file with this content, where some libraries are not installed."""
    with tempfile.TemporaryDirectory() as folder:
        for file, bytes_of_it in {name: content, **others}.items():
            (pathlib.Path(folder) / file).write_bytes(bytes_of_it)
        with mock.patch.dict(sys.modules, dict.fromkeys(without)):
            import_pair(pathlib.Path(folder) / name)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def torch_archive():
    """What `torch.save` writes begins so: an archive with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


@while_tracing
def test_files():
    with import_error("import_torch: … needs safetensors … pip install safetensors"):
        from_file("model.safetensors", b"\0" * 8 + b"{", ["safetensors", "safetensors.numpy"])
    with value_error("import_torch: safetensors cannot read … model.safetensors'"):
        from_file("model.safetensors", b"\x08" + b"\0" * 7 + b"{broken}")
    with import_error("import_torch: … model.pt' … torch.save … pip install torch … weights_only"):
        from_file("model.pt", torch_archive(), ["torch"])
    with import_error("import_torch: … model.pth' was written by torch.save"):
        from_file("model.pth", pickle.dumps({}), ["torch"])
    # A PyTorch that refuses to run what is in a pickle.
    torch = mock.Mock()
    torch.load.side_effect = pickle.UnpicklingError("Weights only load failed.")
    with (
        mock.patch.dict(sys.modules, {"torch": torch}),
        value_error("import_torch: PyTorch does not read … model.pt' … module.state_dict()"),
    ):
        from_file("model.pt", torch_archive())

    with refused(FileNotFoundError, "import_torch: there is no file '/ … no such model.pt'"):
        import_pair("~/no such model.pt")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "torch.npz").touch()
        with value_error("import_torch: … is a directory, … ['…torch.npz'] … .index.json"):
            import_pair(pathlib.Path(folder))
    with value_error("import_torch: … model.h5' is none of .safetensors, … give arrays by name"):
        from_file("model.h5", b"\x89HDF")
    with value_error("import_torch: … model.npz' cannot be read without running code … np.savez"):
        from_file("model.npz", npz(a=np.array([{}], object)))
    with value_error("import_torch: … index.json' does not say which file … weight_map"):
        from_file("model.index.json", b"{}")
    with value_error("import_torch: … index.json' names ['a.weight'] … anew"):
        index = b'{"weight_map": {"a.weight": "shard"}}'
        from_file("model.index.json", index, shard=npz(b=ones(2)))


@while_tracing
def test_everything_that_does_not_fit_at_once():
    with value_error(
        "import_torch: keys of the source that were not used (1): 'bn.bias' (7,); "
        "variables that were not filled (3): … 'norm/mean' (from 'norm') …; "
        "shapes that differ (1): 'dense/kernel' float32(3, 2) from 'dense.weight' float32(3, 5); "
        "arrays that are refused (1): 'dense/bias' float32(2,) from 'dense.bias' int8: "
        "numbers of another kind …; "
        "options that differ (1): momentum is 0.99, the source's 0.9: 'norm'. … "
        "names= … partial=True … torch_defaults('BatchNorm') … source='same'"
    ):
        import_torch(pair(norm=nn.BatchNorm), WRONG, X)
    with value_error(
        "import_torch: options that differ (2): momentum is 0.99, the source's 0.9: 'norm', "
        "running_var is 'biased', the source's 'unbiased': 'norm'. Construct"
    ):
        import_pair(WRONG, partial=True)
    with value_error(
        "import_keras: … not used (1): 'betta' (3,) … not filled (2): 'bias' … 'var' … "
        "shapes that differ (1): 'scale' float32(3,) from 'gamma' float32(2,) … "
        "options that differ (1): epsilon is 1e-05, the source's 0.001 … keras_defaults('Batch"
    ):
        import_keras(norm(), {"gamma": ones(2), "betta": ones(3), "moving_mean": ones(3)}, X)

    # As in GPT-2, which keeps kernels the other way around.
    options = {"use_bias": False, "rngs": nnx.Rngs(0)}
    for layer in (nnx.Linear(3, 4, **options), nnx.LinearGeneral(3, (2, 2), **options)):
        with value_error(
            "import_torch: shapes that differ (1): 'kernel' …, which fits transposed. … "
            "{**arrays, **{key: arrays[key].T for key in ['fc.weight']}}"
        ):
            import_torch(layer, {"fc.weight": ones(3, 4)}, X, names={"": "fc"})
    # Weight norm with one length for each input, as `dim=1` has it; spectral norm of other sizes.
    for count, state in (
        (2, {"weight_g": ones(1, 3), "weight_v": ones(3, 3)}),
        (3, {"weight_orig": ones(3, 3), "weight_u": ones(2), "weight_v": ones(3)}),
    ):
        with value_error(f"import_torch: … not used ({count}) … not filled (1): 'k"):
            import_torch(Tied().a, state, X)
    with value_error("import_torch: … not used (1): 'dense.weight' (3, 3, 3); … not filled (2)"):
        import_torch(scanned(), {"dense.weight": ones(3, 3, 3)}, X)
    with value_error("import_torch: … from 'a.weight', 'b.weight' of 2 float32(3, 2), (4, 2)"):
        stack = Stack(("a", "b"), axis=1)
        state = {"a.weight": ones(2, 3), "b.weight": ones(2, 4)}
        import_pair(state, names={"dense": stack}, source="same")


@with_values
def test_two_arrays_for_one_that_is_tied():
    with value_error("import_torch: … 'b/kernel' from 'b.weight': differs from 'a.weight'"):
        import_torch(Tied(), {"a.weight": ones(3, 3), "b.weight": np.eye(3, dtype="f")}, X)


def import_image(features, example):
    state = {"norm.weight": ones(*features), "norm.bias": ones(*features)}
    x = ones(1, *example)
    import_torch(shaped(Image(), x), state, x)


@while_tracing
def test_layouts_of_channels():
    says = "channels_first={'norm': True} or False"
    with value_error(f"import_torch: layouts … (1): 'norm': its features (4, 4) … {says}"):
        import_image((4, 4), (4, 4))
    with value_error(f"import_torch: shapes that differ … layouts that are not said … {says}"):
        import_image((3, 4), (4, 3))
    for shape in (True, (2, 2)):
        with value_error("import_torch: channels_first={'dense': … 3 inputs … (channels, height"):
            import_pair(channels_first={"dense": shape})
    axes = {"reduction_axes": (1, 2), "feature_axes": (1, 2)}
    layer, image = jaxnorm.linen.LayerNorm(epsilon=1e-5, **axes), ones(1, 3, 3)
    with value_error("import_equinox: … features (3, 3) … channels_first={'': True}"):
        state = {"weight": ones(3, 3), "bias": ones(3, 3)}
        import_equinox(shaped(layer, image), state, None, image)
    with value_error("import_equinox: channels_first={'': (3, 2, 2)} … 3 inputs … (channels"):
        dense = shaped(nn.Dense(2, use_bias=False), X)
        import_equinox(dense, {"weight": ones(2, 3)}, None, X, channels_first={"": (3, 2, 2)})


@while_tracing
def test_names_and_options():
    with type_error("import_torch: names=['dense'] is neither a mapping nor a function … names={"):
        import_pair(names=["dense"])
    for given, names in ((3, {"dense": 3}), (None, lambda path: None)):
        with type_error(f"import_torch: names gives {given}, which is no name … ('layers.0.bn'"):
            import_pair(names=names)
    with value_error("import_torch: names names ['densee'] … 'dense', 'norm'"):
        import_pair(names={"densee": "dense", "norm": "norm"})
    with value_error("import_flax: scans names ['layers'], where the model has nothing"):
        import_flax(norm(), {"params": {}}, X, scans={"layers": (0, 1)})

    for source in ("torchvision", {"epsilon": 1e-3}):
        with type_error("import_torch: source= … says no options … source='same'"):
            import_pair(source=source)
    with value_error("import_torch: source names 'BatchNorm2d' … 'norm': 'BatchNorm'"):
        import_pair(source={"BatchNorm2d": {"epsilon": 1e-3}})
    with value_error("import_torch: source={'norm': ...} has options ['eps'] … 'epsilon'"):
        import_pair(source={"norm": {"eps": 1e-3}})
    with value_error("import_haiku: source={'BatchNorm': ...} … ['decay_rate'] … 'momentum'"):
        options = {"names": {"": "bn"}, "source": {"BatchNorm": {"decay_rate": 0.9}}}
        import_haiku(norm(), {"bn": {"scale": ones(3)}}, {}, X, **options)
    with value_error("torch_defaults: knows no 'BatchNorm2d' … torch_defaults('BatchNorm')"):
        torch_defaults("BatchNorm2d")
    with value_error("keras_defaults: knows no 'Dense'"):
        keras_defaults(nn.Dense)


class SameNames:
    """A model of Keras, two layers of which have one name."""

    class Variable:
        path = "d/kernel"

        def __array__(self, dtype=None, copy=None):
            return ones(3)

    variables = (Variable(), Variable())

    def _flatten_layers(self):
        return []


@while_tracing
def test_variables():
    with type_error("import_keras: found ndarray, … arrays by name … v.path: np.asarray(v)"):
        import_keras(norm(), ones(3), X)
    with type_error("import_keras: 'gamma' is list, which is no array"):
        import_keras(norm(), {"gamma": [ones(3), "a"]}, X)
    endless = {}
    endless["bn"] = endless
    with type_error("import_keras: the mapping at ['bn'] contains itself"):
        import_keras(norm(), endless, X)
    with type_error("import_haiku: found NoneType … hk.transform_with_state … state=None"):
        import_haiku(norm(), None, None, X)
    with type_error("import_haiku: 'scale' is str, which is no array"):
        import_haiku(norm(), {"bn": {"scale": "ones"}}, {}, X)
    with type_error("import_equinox: found ndarray … equinox_arrays(module, state)"):
        import_equinox(norm(), ones(3), None, X)
    with type_error("import_flax: found list … model.bind(variables) … nnx.to_pure_dict"):
        import_flax(norm(), [ones(3)], X)
    with value_error("import_flax: the Linen module BatchNorm has no variables … bind(variables)"):
        import_flax(norm(), nn.BatchNorm(), X)

    one = ones(3)
    with value_error("import_keras: 'd/kernel' … [0] (3,) and variables[1] (3,) … Rename one"):
        import_keras(norm(), SameNames(), X)
    with value_error("import_keras: 'a/b' …['a/b'] … variables['a']['b'] … Rename one"):
        import_keras(norm(), {"a/b": one, "a": {"b": one}}, X)
    with value_error("import_haiku: … params['bn']['scale'] … state['bn']['scale'] … Rename one"):
        import_haiku(norm(), {"bn": {"scale": one}}, {"bn": {"scale": one}}, X)
    with value_error("import_flax: 'a' … 'params/a' … 'batch_stats/a' … Rename one"):
        import_flax(norm(), {"params": {"a": one}, "batch_stats": {"a": one}}, X)


@while_tracing
def test_exports():
    rngs = nnx.Rngs(0)
    spectral = jaxnorm.nnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
    with value_error("export_torch: 1 layers … 'layer_instance' (Dense with … kernel/u). Exchange"):
        export_torch(spectral, X)

    # One name for three layers, and two.
    for name in ("fc", ("a", "b")):
        with value_error("export_torch: '…' of 'dense' is (3 …, of which names= … makes … names={"):
            export_torch(scanned(), X, names={"dense": name})
    weights = {"kernel": ones(3, 3), "bias": ones(3)}
    two = nn.Sequential([nn.Dense(3), nn.Dense(3)])
    two = two.bind({"params": {"layers_0": weights, "layers_1": weights}})
    with value_error("export_torch: 'fc.… would hold two … 'layers_1' … names={"):
        export_torch(two, X, names=lambda path: "fc")
    with value_error("export_torch: channels_first names ['head']"):
        export_torch(shaped(Pair(), X), X, channels_first={"head": (1, 3)})

    def export_image(*shape, **options):
        arrays = {"scale": ones(*shape), "bias": ones(*shape)}
        export_torch(Image().bind({"params": {"norm": arrays}}), ones(1, *shape), **options)

    with value_error("export_torch: … (4, 4) of 'norm' … channels_first={'norm': True} or False"):
        export_image(4, 4)
    with value_error("export_torch: channels_first={'norm': (5, 5)} … 12 features … (channels"):
        export_image(4, 3, channels_first={"norm": (5, 5)})

    with (
        mock.patch.dict(sys.modules, {"safetensors.numpy": None, "safetensors": None}),
        import_error("save_safetensors: … needs safetensors"),
    ):
        save_safetensors({"bias": ones(2)}, "model.safetensors")
