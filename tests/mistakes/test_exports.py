"""Mistakes with the export to PyTorch."""

import sys
from unittest import mock

from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.tools.importing.safetensors_file import save_safetensors
from jaxnorm.tools.importing.torch import export_torch
from mistakes import import_error, value_error, while_tracing
from mistakes.models import Image, Pair, ones, scanned, shaped

X = ones(1, 3)


@while_tracing
def test_layers_that_pytorch_has_not():
    rngs = nnx.Rngs(0)
    spectral = jaxnorm.nnx.SpectralNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
    with value_error("export_torch: 1 layers … 'layer_instance' (Dense with … kernel/u). Exchange"):
        export_torch(spectral, X)


@while_tracing
def test_names():
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


@while_tracing
def test_layouts_of_channels():
    def export_image(*shape, **options):
        arrays = {"scale": ones(*shape), "bias": ones(*shape)}
        export_torch(Image().bind({"params": {"norm": arrays}}), ones(1, *shape), **options)

    with value_error("export_torch: … (4, 4) of 'norm' … channels_first={'norm': True} or False"):
        export_image(4, 4)
    with value_error("export_torch: channels_first={'norm': (5, 5)} … 12 features … (channels"):
        export_image(4, 3, channels_first={"norm": (5, 5)})


@while_tracing
def test_files():
    with (
        mock.patch.dict(sys.modules, {"safetensors.numpy": None, "safetensors": None}),
        import_error("save_safetensors: … needs safetensors"),
    ):
        save_safetensors({"bias": ones(2)}, "model.safetensors")
