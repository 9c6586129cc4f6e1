"""Mistakes with the normalization of weights: at functions, and at wrappers of both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm import (
    scaled_weight_standardization,
    spectral_norm,
    spectral_norm_inference,
    weight_norm,
    weight_standardization,
)
from mistakes import refused, type_error, value_error, while_tracing
from mistakes.layers import Net, ones, zeros

W = zeros(5, 3)
ONES = ones(3)


def linen(name, layer=None, train=None, **options):
    """Initializes a wrapped layer and, if `train` is given, calls it with nothing mutable."""
    layer = nn.Dense(3) if layer is None else layer
    model = Net(getattr(jaxnorm.linen, name)(layer, **options))
    x = zeros(2, 5, 5, 5) if isinstance(layer, nn.Conv) else zeros(2, 5)
    call = {"update_stats": False} if name == "SpectralNorm" else {}
    variables = model.init(jax.random.key(0), x, **call)
    if train is not None:
        model.apply(variables, x, update_stats=train)


def of_nnx(name, kind=nnx.Linear, *sizes, **options):
    rngs = nnx.Rngs(0)
    layer = kind(*sizes or (5, 3), rngs=rngs)
    getattr(jaxnorm.nnx, name)(layer, rngs=rngs, **options)


def at_wrappers(name, error, says, **options):
    """The same mistake in both frameworks."""
    for who, call in ((f"{name} 'norm'", linen), (f"{name}(Linear)", of_nnx)):
        with refused(error, f"{who} … {says}"):
            call(name, **options)


@while_tracing
def test_functions():
    standardizations = (weight_standardization, scaled_weight_standardization)
    for function in (weight_norm, *standardizations):
        name = function.__name__
        with type_error(f"{name}: dtype=int32 … jnp.float32"):
            function(W, dtype=jnp.int32)
        with value_error(f"{name}: axis=2 is out of range for 2 axes"):
            function(W, axis=2)
    for function in standardizations:
        with value_error(f"{function.__name__}: … (1, 3) … has 1 value per output … which axes"):
            function(W[:1])
    with value_error("weight_norm: scale has shape (5,) … 3 features along axis 1"):
        weight_norm(W, ones(5))
    with value_error("scaled_weight_standardization: gain has shape (5,) … 3 features … axis 1"):
        scaled_weight_standardization(W, ones(5))

    with type_error("spectral_norm_inference: dtype=int32 … jnp.float32"):
        spectral_norm_inference(W, 1.0, dtype=jnp.int32)
    with value_error("spectral_norm: u has shape (5,) … (5, 3) has 3 outputs … normal(key, (3,))"):
        spectral_norm(W, ones(5))
    with value_error("spectral_norm: … (3,) is no matrix … reshape(-1, outputs)"):
        spectral_norm(W[0], ONES)
    with type_error("spectral_norm: the weight is complex64[5, 3] … real and the imaginary part"):
        spectral_norm(W.astype(np.complex64), ONES)
    with value_error("spectral_norm: n_steps=0 … Use n_steps=1"):
        spectral_norm(W, ONES, n_steps=0)
    with type_error("SpectralNorm 'norm': n_steps=1.5 must be an integer … n_steps=1"):
        linen("SpectralNorm", n_steps=1.5)


@while_tracing
def test_wrappers():
    at_wrappers("SpectralNorm", ValueError, "n_steps=0 … Use n_steps=1", n_steps=0)
    says = "keep_init=True … use_scale=False … Drop one"
    at_wrappers("WeightNorm", ValueError, says, keep_init=True, use_scale=False)
    says = "gain='relu' is no number … ACTIVATION_GAINS['relu']"
    at_wrappers("ScaledWeightStandardization", TypeError, says, gain="relu")
    with refused(
        jaxnorm.linen.StatsNotMutableError, "SpectralNorm 'norm': … 'sn' … mutable=['sn']"
    ):
        linen("SpectralNorm", train=True, collection_name="sn")


@while_tracing
def test_wrappers_that_find_no_matrix():
    says = "kernel': has 4 axes, shape (2, 2, 5, 3), but error_on_non_matrix=True"
    with value_error(f"SpectralNorm 'norm' … ' … {says}"):
        linen("SpectralNorm", nn.Conv(3, (2, 2)), error_on_non_matrix=True)
    with value_error(f"SpectralNorm(Conv) … '{says}"):
        of_nnx("SpectralNorm", nnx.Conv, 5, 3, (2, 2), error_on_non_matrix=True)
    says = "Wrap a layer that has one."
    with value_error(
        "SpectralNorm 'norm' … no weight to normalize among "
        f"['layer_instance/bias', 'layer_instance/scale']. {says}"
    ):
        linen("SpectralNorm", nn.LayerNorm())
    with value_error(
        f"SpectralNorm(LayerNorm) … no weight to normalize among ['bias', 'scale']. {says}"
    ):
        of_nnx("SpectralNorm", nnx.LayerNorm, 5)

    # Filters of variables.
    says = "bias': a weight of shape (3,) … has 1 value per output … variable_filter"
    with value_error(f"WeightStandardization 'norm' … ' … {says}"):
        linen("WeightStandardization", variable_filter=None)
    with value_error(f"WeightStandardization(Linear) … '{says}"):
        of_nnx("WeightStandardization", variable_filter=...)
    with value_error(
        "WeightNorm 'norm' … no weight to normalize among "
        "['layer_instance/bias', 'layer_instance/kernel'] … variable_filter={'kernel'}"
    ):
        linen("WeightNorm", variable_filter={"weight"})
    with value_error("WeightNorm(Linear) … among ['bias', 'kernel'] … PathContains('kernel')"):
        of_nnx("WeightNorm", variable_filter=nnx.PathContains("weight"))
    with type_error("WeightNorm 'norm': variable_filter='kernel' … variable_filter={'kernel'}"):
        linen("WeightNorm", variable_filter="kernel")
