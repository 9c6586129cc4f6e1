"""Mistakes with weights: at the functions, and at the wrappers of both frameworks.

Rows for the table of `test_errors.py`.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import KEY, Row

import jaxnorm.linen.weights as linen
import jaxnorm.nnx.weights as of_nnx
from jaxnorm.linen.shell import StatsNotMutableError
from jaxnorm.methods.spectral_norm import spectral_norm, spectral_norm_inference
from jaxnorm.methods.weight_norm import weight_norm
from jaxnorm.methods.weight_standardization import (
    scaled_weight_standardization,
    weight_standardization,
)

W = jnp.zeros((5, 3))
X = jnp.zeros((2, 5))


class Net(nn.Module):
    """A wrapper inside a model, so that it has a path."""

    norm: nn.Module

    def __call__(self, x, **call):
        return self.norm(x, **call)


def call_linen(name, layer=None, train=None, **options):
    """Initializes a wrapped layer and, if `train` is given, calls it with nothing mutable."""
    layer = nn.Dense(3) if layer is None else layer
    model = Net(getattr(linen, name)(layer, **options))
    x = jnp.zeros((2, 5, 5, 5)) if isinstance(layer, nn.Conv) else X
    call = {"update_stats": False} if name == "SpectralNorm" else {}
    variables = model.init(KEY, x, **call)
    if train is not None:
        model.apply(variables, x, update_stats=train)


def make_nnx(name, layer=None, **options):
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(5, 3, rngs=rngs) if layer is None else layer
    getattr(of_nnx, name)(layer, rngs=rngs, **options)


def nnx_conv():
    return nnx.Conv(5, 3, (2, 2), rngs=nnx.Rngs(0))


def nnx_layer_norm():
    return nnx.LayerNorm(5, rngs=nnx.Rngs(0))


LINEN = r"^{name} 'norm'"
NNX = r"^{name}\({layer}\)"


def at_wrappers(what, name, error, says, linen_layer=None, nnx_layer=None, **options):
    """The same mistake in both frameworks."""
    shown = {nnx_conv: "Conv", nnx_layer_norm: "LayerNorm"}.get(nnx_layer, "Linear")

    def layer(create):
        return None if create is None else create()

    return [
        Row(
            f"{what}, {name}, linen",
            lambda: call_linen(name, layer(linen_layer), **options),
            error,
            LINEN.format(name=name) + ".*" + says,
        ),
        Row(
            f"{what}, {name}, nnx",
            lambda: make_nnx(name, layer(nnx_layer), **options),
            error,
            NNX.format(name=name, layer=shown) + ".*" + says,
        ),
    ]


FUNCTIONS = (
    ("weight_norm", weight_norm),
    ("weight_standardization", weight_standardization),
    ("scaled_weight_standardization", scaled_weight_standardization),
    ("spectral_norm_inference", lambda w, **options: spectral_norm_inference(w, 1.0, **options)),
)

ROWS = [
    *(
        Row(
            f"integer result, {name}",
            lambda function=function: function(W, dtype=jnp.int32),
            TypeError,
            rf"^{name}: dtype=int32.*jnp\.float32",
        )
        for name, function in FUNCTIONS
    ),
    *(
        Row(
            f"axis out of range, {name}",
            lambda function=function: function(W, axis=2),
            ValueError,
            rf"^{name}: axis=2 is out of range for 2 axes",
        )
        for name, function in FUNCTIONS[:3]
    ),
    *(
        Row(
            f"one weight per output, {name}",
            lambda function=function: function(jnp.zeros((1, 3))),
            ValueError,
            rf"^{name}: .*\(1, 3\) with outputs along \(1,\) has 1 value per output.*which axes",
        )
        for name, function in FUNCTIONS[1:3]
    ),
    Row(
        "scale for other outputs",
        lambda: weight_norm(W, jnp.ones(5)),
        ValueError,
        r"^weight_norm: scale has shape \(5,\).*3 features along axis 1",
    ),
    Row(
        "gain for other outputs",
        lambda: scaled_weight_standardization(W, jnp.ones(5)),
        ValueError,
        r"^scaled_weight_standardization: gain has shape \(5,\).*3 features along axis 1",
    ),
    Row(
        "u for other outputs",
        lambda: spectral_norm(W, jnp.ones(5)),
        ValueError,
        r"^spectral_norm: u has shape \(5,\).*\(5, 3\) has 3 outputs.*normal\(key, \(3,\)\)",
    ),
    Row(
        "spectral norm of a vector",
        lambda: spectral_norm(jnp.zeros(3), jnp.ones(3)),
        ValueError,
        r"^spectral_norm: .*\(3,\) is no matrix.*reshape\(-1, outputs\)",
    ),
    Row(
        "spectral norm of complex numbers",
        lambda: spectral_norm(W.astype(jnp.complex64), jnp.ones(3)),
        TypeError,
        r"^spectral_norm: the weight is complex64\[5, 3\].*real and the imaginary part",
    ),
    Row(
        "no power iteration",
        lambda: spectral_norm(W, jnp.ones(3), n_steps=0),
        ValueError,
        r"^spectral_norm: n_steps=0.*Use n_steps=1",
    ),
    # Wrappers
    *at_wrappers(
        "no power iteration", "SpectralNorm", ValueError, r"n_steps=0.*Use n_steps=1", n_steps=0
    ),
    *at_wrappers(
        "kernel of a convolution",
        "SpectralNorm",
        ValueError,
        r"'.*kernel': has 4 axes, shape \(2, 2, 5, 3\), but error_on_non_matrix=True",
        lambda: nn.Conv(3, (2, 2)),
        nnx_conv,
        error_on_non_matrix=True,
    ),
    *at_wrappers(
        "norms without a place",
        "WeightNorm",
        ValueError,
        r"keep_init=True.*use_scale=False.*Drop one",
        keep_init=True,
        use_scale=False,
    ),
    *at_wrappers(
        "a gain by name",
        "ScaledWeightStandardization",
        TypeError,
        r"gain='relu' is no number.*ACTIVATION_GAINS\['relu'\]",
        gain="relu",
    ),
    *at_wrappers(
        "a bias among the weights",
        "WeightStandardization",
        ValueError,
        r"'.*bias': a weight of shape \(3,\).*has 1 value per output.*variable_filter",
        variable_filter=None,
    )[:1],
    *at_wrappers(
        "a bias among the weights",
        "WeightStandardization",
        ValueError,
        r"'bias': a weight of shape \(3,\).*has 1 value per output.*variable_filter",
        variable_filter=...,
    )[1:],
    *at_wrappers(
        "a filter that matches nothing",
        "WeightNorm",
        ValueError,
        r"no weight to normalize among \['layer_instance/bias', 'layer_instance/kernel'\]"
        r".*variable_filter=\{'kernel'\}",
        variable_filter={"weight"},
    )[:1],
    *at_wrappers(
        "a filter that matches nothing",
        "WeightNorm",
        ValueError,
        r"no weight to normalize among \['bias', 'kernel'\].*nnx\.PathContains\('kernel'\)",
        variable_filter=nnx.PathContains("weight"),
    )[1:],
    *at_wrappers(
        "a layer without a matrix",
        "SpectralNorm",
        ValueError,
        r"no weight to normalize among \['layer_instance/bias', 'layer_instance/scale'\]\. "
        r"Wrap a layer that has one\.",
        nn.LayerNorm,
    )[:1],
    *at_wrappers(
        "a layer without a matrix",
        "SpectralNorm",
        ValueError,
        r"no weight to normalize among \['bias', 'scale'\]\. Wrap a layer that has one\.",
        None,
        nnx_layer_norm,
    )[1:],
    Row(
        "a filter that is a string",
        lambda: call_linen("WeightNorm", variable_filter="kernel"),
        TypeError,
        r"^WeightNorm 'norm': variable_filter='kernel' .*letter.*variable_filter=\{'kernel'\}",
    ),
    Row(
        "training of sigma without mutable statistics",
        lambda: call_linen("SpectralNorm", train=True, collection_name="sn"),
        StatsNotMutableError,
        r"^SpectralNorm 'norm': .*'sn'.*mutable=\['sn'\]",
    ),
]
