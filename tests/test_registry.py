"""What the registry, and so the table in the docs, says of a method is what its layer does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from subjects import SUBJECTS

from jaxnorm.methods import METHODS

EACH = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
LAYERS = {subject.method: subject for subject in reversed(SUBJECTS)}  # the first row of a method
ACTIVATIONS = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in LAYERS], ids=lambda method: method.name
)


@ACTIVATIONS
def test_state(method):
    """The names outside brackets are the variables that there always are."""
    subject = LAYERS[method.name]
    said = re.findall(r"\b(?:mean|var|cov|step)\b", re.sub(r"\(.*?\)", "", method.state))
    stats = subject.layer("linen", subject.input()).stats
    assert {name.partition("_")[0] for name in stats} == set(said)


@ACTIVATIONS
def test_mask(method):
    subject = LAYERS[method.name]
    layer = subject.layer("linen", subject.input())

    def train(mask):
        return layer.train(layer.params, layer.stats, subject.input(), mask=mask)

    def shapes(*shape):
        return jax.eval_shape(train, jax.ShapeDtypeStruct(shape, jnp.bool_))

    shapes(*subject.shape[:-1], 1)
    if method.mask == "elements":
        shapes(*subject.shape)
    else:
        assert method.mask == "examples and positions"
        with pytest.raises(ValueError, match="mask"):
            shapes(*subject.shape)


@EACH
def test_weights_have_no_mask_and_only_activations_pool_over_devices(method):
    options = {field.name for field in dataclasses.fields(method.spec)}
    assert method.devices == ("axis_name" in options) == (method.name in LAYERS)
    assert bool(method.mask) == (method.name in LAYERS)
