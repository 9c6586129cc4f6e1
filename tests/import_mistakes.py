"""Mistakes with the import from PyTorch and the export. Part of the table of `test_errors.py`."""

import io
import pathlib
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from mistakes import Row

import jaxnorm
from jaxnorm.tools.importing.names import Stack
from jaxnorm.tools.importing.presets import keras_defaults, torch_defaults
from jaxnorm.tools.importing.safetensors_file import save_safetensors
from jaxnorm.tools.importing.torch import export_torch, import_torch


class Pair(nn.Module):
    """A dense layer and a norm."""

    norm: type = jaxnorm.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="dense")(x)
        return self.norm(use_running_average=True, name="norm")(x)


X = jnp.ones((1, 3))


def pair(**options):
    module = Pair(**options)
    return module.bind(jax.eval_shape(module.init, jax.random.key(0), X))


STATE = {
    "dense.weight": np.ones((2, 3), np.float32),
    "dense.bias": np.zeros(2, np.float32),
    "norm.weight": np.ones(2, np.float32),
    "norm.bias": np.zeros(2, np.float32),
    "norm.running_mean": np.zeros(2, np.float32),
    "norm.running_var": np.ones(2, np.float32),
}
GPT_2 = {"fc.weight": np.ones((3, 4), np.float32)}
WRONG = {
    "dense.weight": np.ones((5, 3), np.float32),
    "dense.bias": np.zeros(2, np.int8),
    "norm.weight": np.ones(2, np.float32),
    "bn.bias": np.zeros(7, np.float32),
}


class Image(nn.Module):
    """A norm over whole images, of equal sizes along all axes."""

    axes: tuple = (1, 2)

    @nn.compact
    def __call__(self, x):
        options = dict(reduction_axes=self.axes, feature_axes=self.axes)
        return jaxnorm.linen.LayerNorm(epsilon=1e-5, name="norm", **options)(x)


def image_norm(state, shape, **options):
    module, x = Image(), jnp.ones((1, *shape))
    model = module.bind(jax.eval_shape(module.init, jax.random.key(0), x))
    return import_torch(model, state, x, **options)


def norms(*shape):
    return {"norm.weight": np.ones(shape, np.float32), "norm.bias": np.zeros(shape, np.float32)}


def from_file(name, content=b"", without=(), **others):
    """Imports a file with this content, where some libraries are not installed."""
    with tempfile.TemporaryDirectory() as folder:
        for file, bytes_of_it in {name: content, **others}.items():
            (pathlib.Path(folder) / file).write_bytes(bytes_of_it)
        with mock.patch.dict(sys.modules, dict.fromkeys(without)):
            import_torch(pair(), pathlib.Path(folder) / name, X)


def in_memory(save, *args, **kwargs):
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def torch_archive():
    """What `torch.save` writes begins so: an archive with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


def unreadable_by_torch():
    """The library's part, with a PyTorch that refuses to run what is in a pickle."""
    torch = mock.Mock()
    torch.load.side_effect = pickle.UnpicklingError("Weights only load failed.")
    with mock.patch.dict(sys.modules, {"torch": torch}):
        from_file("model.pt", torch_archive())


class Tied(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = (nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(self.a(x))


def scanned():
    """Three dense layers in one, bound to its variables."""
    step = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return step(nn.Dense(3, name="dense"), x, None)[0]

    arrays = {"kernel": np.ones((3, 3, 3), np.float32), "bias": np.ones((3, 3), np.float32)}
    return Scanned().bind({"params": {"dense": arrays}})


def exported_image(shape, **options):
    module, x = Image(), jnp.ones((1, *shape))
    ones = {"scale": np.ones(shape, np.float32), "bias": np.ones(shape, np.float32)}
    export_torch(module.bind({"params": {"norm": ones}}), x, **options)


def save_without_library():
    with mock.patch.dict(sys.modules, {"safetensors.numpy": None, "safetensors": None}):
        save_safetensors(STATE, "model.safetensors")


def spectral():
    rngs = nnx.Rngs(0)
    export_torch(jaxnorm.nnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs), X)


def two_under_one_name():
    module = nn.Sequential([nn.Dense(3), nn.Dense(3)])
    weights = {"kernel": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)}
    model = module.bind({"params": {"layers_0": weights, "layers_1": weights}})
    export_torch(model, X, names=lambda path: "fc")


ROWS = [
    # What is given
    Row(
        "import into no model",
        lambda: import_torch({"params": {}}, STATE, X),
        TypeError,
        r"^import_torch: found dict.*import_torch\(model\.bind\(variables\)",
    ),
    Row(
        "import of a module that is no state dict",
        lambda: import_torch(pair(), nn.Dense(2), X),
        TypeError,
        r"^import_torch: the state dict is Dense.*module\.state_dict\(\)",
    ),
    Row(
        "import of a whole checkpoint",
        lambda: import_torch(pair(), {"epoch": 3, "state_dict": OrderedDict(STATE)}, X),
        TypeError,
        r"^import_torch: 'state_dict' is OrderedDict, which is no array.*tensor\.detach\(\)",
    ),
    Row(
        "values that are masked",
        lambda: import_torch(pair(), STATE | {"norm.bias": np.ma.masked_equal([0, 1], 1)}, X),
        TypeError,
        r"^import_torch: 1 of 2 values of 'norm\.bias' are masked.*arrays\['norm\.bias'\]\.filled",
    ),
    Row(
        "bfloat16 as np.savez leaves it",
        lambda: import_torch(pair(), STATE | {"norm.bias": np.zeros(2, "V2")}, X),
        TypeError,
        r"^import_torch: 'norm\.bias' has the dtype \|V2.*\.view\(ml_dtypes\.bfloat16\)",
    ),
    # Files
    Row(
        "file without the library that reads it",
        lambda: from_file(
            "model.safetensors", b"\0" * 8 + b"{", ("safetensors", "safetensors.numpy")
        ),
        ImportError,
        r"^import_torch: .*needs safetensors.*pip install safetensors",
    ),
    Row(
        "file of PyTorch without PyTorch",
        lambda: from_file("model.pt", torch_archive(), ["torch"]),
        ImportError,
        r"^import_torch: .*model\.pt' was written by torch\.save.*pip install torch.*weights_only",
    ),
    Row(
        "old file of PyTorch without PyTorch",
        lambda: from_file("model.pth", pickle.dumps({}), ["torch"]),
        ImportError,
        r"^import_torch: .*model\.pth' was written by torch\.save",
    ),
    Row(
        "file of PyTorch with code in it",
        unreadable_by_torch,
        ValueError,
        r"^import_torch: PyTorch does not read .*model\.pt' without.*module\.state_dict\(\)",
    ),
    Row(
        "damaged safetensors file",
        lambda: from_file("model.safetensors", b"\x08" + b"\0" * 7 + b"{broken}"),
        ValueError,
        r"^import_torch: safetensors cannot read .*model\.safetensors'",
    ),
    Row(
        "file that is not there",
        lambda: import_torch(pair(), "~/no such model.pt", X),
        FileNotFoundError,
        r"^import_torch: there is no file '/.*no such model\.pt'",
    ),
    Row(
        "directory",
        lambda: import_torch(pair(), pathlib.Path(__file__).parent / "recorded", X),
        ValueError,
        r"^import_torch: .*recorded' is a directory, with the files \[.*torch\.npz'.*\.index\.json",
    ),
    Row(
        "file of another kind",
        lambda: from_file("model.h5", b"\x89HDF"),
        ValueError,
        r"^import_torch: .*model\.h5' is none of \.safetensors,.*give arrays by name",
    ),
    Row(
        "npz file of objects",
        lambda: from_file("model.npz", in_memory(np.savez, a=np.array([{}], object))),
        ValueError,
        r"^import_torch: .*model\.npz' cannot be read without running code.*np\.savez",
    ),
    Row(
        "index of nothing",
        lambda: from_file("model.index.json", b"{}"),
        ValueError,
        r"^import_torch: .*index\.json' does not say which file.*weight_map",
    ),
    Row(
        "index of arrays that are not there",
        lambda: from_file(
            "model.index.json",
            b'{"weight_map": {"a.weight": "shard"}}',
            shard=in_memory(np.savez, b=np.ones(2)),
        ),
        ValueError,
        r"^import_torch: .*index\.json' names \['a\.weight'\].*anew",
    ),
    # Shapes
    *(
        Row(
            f"weight of a {name} that lies as in GPT-2",
            lambda layer=layer: import_torch(layer, GPT_2, X, names={"": "fc"}),
            ValueError,
            r"^import_torch: shapes that differ \(1\): 'kernel' .*, which fits transposed\. .*"
            r"\{\*\*arrays, \*\*\{key: arrays\[key\]\.T for key in \['fc\.weight'\]\}\}",
        )
        for name, layer in (
            ("dense layer", nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))),
            ("head", nnx.LinearGeneral(3, (2, 2), use_bias=False, rngs=nnx.Rngs(0))),
        )
    ),
    *(
        Row(
            f"{method} with vectors of other shapes",
            lambda state=state: import_torch(Tied().a, state, X),
            ValueError,
            r"^import_torch: keys of the source that were not used \([23]\).*not filled \(1\): 'k",
        )
        for method, state in (
            # One length for each input, as `dim=1` has it.
            ("weight norm", {"weight_g": np.ones((1, 3)), "weight_v": np.ones((3, 3))}),
            (
                "spectral norm",
                {"weight_orig": np.ones((3, 3)), "weight_u": np.ones(2), "weight_v": np.ones(3)},
            ),
        )
    ),
    Row(
        "weight of three layers for one",
        lambda: import_torch(scanned(), {"dense.weight": np.ones((3, 3, 3), np.float32)}, X),
        ValueError,
        r"^import_torch: .*not used \(1\): 'dense\.weight' \(3, 3, 3\); .*not filled \(2\)",
    ),
    Row(
        "two arrays for one that is tied",
        lambda: import_torch(
            Tied(), {"a.weight": np.ones((3, 3), np.float32), "b.weight": np.eye(3, dtype="f")}, X
        ),
        ValueError,
        r"^import_torch: .*refused \(1\): 'b/kernel' from 'b\.weight': differs from 'a\.weight'",
        with_values=True,
    ),
    Row(
        "file without the library that writes it",
        save_without_library,
        ImportError,
        r"^save_safetensors: .*needs safetensors",
    ),
    # Everything that does not fit, at once
    Row(
        "import of what does not fit",
        lambda: import_torch(pair(norm=nn.BatchNorm), WRONG, X),
        ValueError,
        r"^import_torch: keys of the source that were not used \(1\): 'bn\.bias' \(7,\); "
        r"variables that were not filled \(3\): .*'norm/mean' \(from 'norm'\).*; "
        r"shapes that differ \(1\): 'dense/kernel' float32\(3, 2\) from 'dense\.weight' "
        r"float32\(3, 5\); arrays that are refused \(1\): 'dense/bias' .*; "
        r"options that differ \(1\): momentum is 0\.99, the source's 0\.9: "
        r"'norm'\. .*names=.*partial=True.*torch_defaults\('BatchNorm'\).*source='same'",
    ),
    Row(
        "numbers of another kind",
        lambda: import_torch(pair(norm=nn.BatchNorm), WRONG, X),
        ValueError,
        r"'dense/bias' float32\(2,\) from 'dense\.bias' int8: numbers of another kind",
    ),
    Row(
        "partial import of layers with other options",
        lambda: import_torch(pair(), WRONG, X, partial=True),
        ValueError,
        r"^import_torch: options that differ \(2\): momentum is 0\.99, the source's 0\.9: 'norm', "
        r"running_var is 'biased', the source's 'unbiased': 'norm'\. Construct",
    ),
    Row(
        "stack of layers of different shapes",
        lambda: import_torch(
            pair(),
            {"a.weight": np.ones((2, 3)), "b.weight": np.ones((2, 4))},
            X,
            names={"dense": Stack(("a", "b"), axis=1)},
            source="same",
        ),
        ValueError,
        r"from 'a\.weight', 'b\.weight' of 2 float64\(3, 2\), \(4, 2\)",
    ),
    Row(
        "order of feature axes that shapes do not tell",
        lambda: image_norm(norms(4, 4), (4, 4)),
        ValueError,
        r"^import_torch: layouts that are not said \(1\): 'norm': its features \(4, 4\).*"
        r"channels_first=\{'norm': True\} or False",
    ),
    Row(
        "features that fit with channels first",
        lambda: image_norm(norms(3, 4), (4, 3)),
        ValueError,
        r"shapes that differ.*layouts that are not said.*channels_first=\{'norm': True\}",
    ),
    *(
        Row(
            f"image that no flattened input has, {shape}",
            lambda shape=shape: import_torch(pair(), STATE, X, channels_first={"dense": shape}),
            ValueError,
            r"^import_torch: channels_first=\{'dense': .*3 inputs.*\(channels, height, width\)",
        )
        for shape in (True, (2, 2))
    ),
    # Names
    Row(
        "names that are a list",
        lambda: import_torch(pair(), STATE, X, names=["dense"]),
        TypeError,
        r"^import_torch: names=\['dense'\] is neither a mapping nor a function.*names=\{",
    ),
    *(
        Row(
            f"a name that is {kind}",
            lambda names=names: import_torch(pair(), STATE, X, names=names),
            TypeError,
            r"^import_torch: names gives (3|None), which is no name.*\('layers\.0\.bn'",
        )
        for kind, names in (("a number", {"dense": 3}), ("nothing", lambda path: None))
    ),
    Row(
        "names of layers that are not there",
        lambda: import_torch(pair(), STATE, X, names={"densee": "dense", "norm": "norm"}),
        ValueError,
        r"^import_torch: names names \['densee'\].*'dense', 'norm'",
    ),
    Row(
        "layouts of layers that are not there",
        lambda: export_torch(pair(), X, channels_first={"head": (1, 3)}),
        ValueError,
        r"^export_torch: channels_first names \['head'\]",
    ),
    # Options
    *(
        Row(
            f"options of the source that are {kind}",
            lambda source=source: import_torch(pair(), STATE, X, source=source),
            TypeError,
            r"^import_torch: source=.*says no options.*source='same'",
        )
        for kind, source in (("text", "torchvision"), ("not sorted by layer", {"epsilon": 1e-3}))
    ),
    Row(
        "options of a kind that is not there",
        lambda: import_torch(pair(), STATE, X, source={"BatchNorm2d": dict(epsilon=1e-3)}),
        ValueError,
        r"^import_torch: source names 'BatchNorm2d'.*'norm': 'BatchNorm'",
    ),
    Row(
        "options that a layer has not",
        lambda: import_torch(pair(), STATE, X, source={"norm": dict(eps=1e-3)}),
        ValueError,
        r"^import_torch: source=\{'norm': \.\.\.\} has options \['eps'\].*'epsilon'",
    ),
    Row(
        "defaults of a layer that is not known",
        lambda: torch_defaults("BatchNorm2d"),
        ValueError,
        r"^torch_defaults: knows no 'BatchNorm2d'.*torch_defaults\('BatchNorm'\)",
    ),
    Row(
        "defaults of a class that is not known",
        lambda: keras_defaults(nn.Dense),
        ValueError,
        r"^keras_defaults: knows no 'Dense'",
    ),
    # Export
    Row(
        "export of a layer that PyTorch has not",
        spectral,
        ValueError,
        r"^export_torch: 1 layers have no counterpart: 'layer_instance' \(Dense with bias, "
        r"kernel, kernel/sigma, kernel/u\)\. Exchange",
    ),
    *(
        Row(
            f"export of three layers under {kind}",
            lambda name=name: export_torch(scanned(), X, names={"dense": name}),
            ValueError,
            r"^export_torch: '(bias|kernel)' of 'dense' is \(3.*, of which names=.*makes.*names=\{",
        )
        for kind, name in (("one name", "fc"), ("two names", ("a", "b")))
    ),
    Row(
        "export of features whose order shapes do not tell",
        lambda: exported_image((4, 4)),
        ValueError,
        r"^export_torch: the features \(4, 4\) of 'norm'.*channels_first=\{'norm': True\} or False",
    ),
    Row(
        "export of features of another image",
        lambda: exported_image((4, 3), channels_first={"norm": (5, 5)}),
        ValueError,
        r"^export_torch: channels_first=\{'norm': \(5, 5\)\}.*12 features.*\(channels, height",
    ),
    Row(
        "export of two layers under one name",
        two_under_one_name,
        ValueError,
        r"^export_torch: 'fc\.(bias|weight)' would hold two.*'layers_1'.*names=\{",
    ),
]
