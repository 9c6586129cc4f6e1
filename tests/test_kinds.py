"""Which method a layer is, ours or Flax's, and its options in our words."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from tool_models import shapes_of, shapes_of_nnx

import jaxnorm
from jaxnorm.methods import METHODS
from jaxnorm.methods.spec import Spec
from jaxnorm.tools.adapter.kinds import calls_as_its_kind, keeps_statistics, method_of, spec_of
from jaxnorm.tools.adapter.models import model_of

FRAMEWORKS = ("linen", "nnx")

OPTIONS = {
    "BatchNorm": dict(momentum=0.7, epsilon=1e-3, use_bias=False, axis_name="i"),
    "LayerNorm": dict(epsilon=1e-3, use_scale=False, dtype=jnp.bfloat16),
    "RMSNorm": dict(epsilon=1e-3, param_dtype=jnp.bfloat16),
    "GroupNorm": dict(num_groups=2, epsilon=1e-3, use_bias=False),
    "InstanceNorm": dict(epsilon=1e-3, use_scale=False),
    "BatchRenorm": dict(rmax=2.0, dmax=1.0),
    "AdaBN": dict(domains=("a", "b"), domain="b"),
    "IterNorm": dict(group_size=2, num_groups=None, n_steps=3),
    "DecorrelatedBatchNorm": dict(group_size=2, num_groups=None, epsilon=1e-2),
    "SwitchableNorm": dict(momentum=0.3),
    "IBNa": dict(epsilon=1e-3, momentum=0.4),
    "IBNb": dict(epsilon=1e-3),
}
"""Some options of each norm that are not its defaults."""
FLAX = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
SPECS = {method.name: method.spec for method in METHODS if issubclass(method.spec, Spec)}


def classes_of(name):
    ours = {f: getattr(getattr(jaxnorm, f), name) for f in FRAMEWORKS}
    flax = {"linen": getattr(nn, name), "nnx": getattr(nnx, name)} if name in FLAX else {}
    return [(framework, cls) for each in (ours, flax) for framework, cls in each.items()]


def layer_of(framework, cls, **options):
    return cls(**options) if framework == "linen" else shapes_of_nnx(partial(cls, 4, **options))


@pytest.mark.parametrize("name", SPECS)
def test_a_norm_is_known_with_its_options(name):
    """Of a user's subclass too. Initializers that NNX has dropped are those of the method."""
    options = OPTIONS[name]
    for framework, cls in classes_of(name):
        own = type("Own", (cls,), {})
        for kind in (cls, own):
            layer = layer_of(framework, kind, **options)
            spec = spec_of(layer)
            assert type(spec) is method_of(layer) is SPECS[name]
            assert {key: getattr(spec, key) for key in options} == options
            for field in dataclasses.fields(SPECS[name]):
                here = vars(layer).get(field.name, field.default)
                assert getattr(spec, field.name) is here or getattr(spec, field.name) == here
            assert calls_as_its_kind(layer)
        silent = type("Silent", (cls,), {"__call__": lambda self, x: x})
        assert not calls_as_its_kind(layer_of(framework, silent, **options))


def test_which_norms_keep_statistics():
    keeping = {name for name, spec in SPECS.items() if keeps_statistics(spec(**OPTIONS[name]))}
    assert keeping == {
        *("BatchNorm", "BatchRenorm", "AdaBN", "IterNorm", "DecorrelatedBatchNorm"),
        *("SwitchableNorm", "IBNa"),
    }
    assert keeps_statistics(SPECS["InstanceNorm"](track_running_stats=True))


def test_what_is_no_norm_has_no_method():
    """Layers that normalize weights are none of activations."""
    weights = [method.name for method in METHODS if not issubclass(method.spec, Spec)]
    linear = partial(nnx.Linear, 4, 4)

    def wrapped(name):
        return lambda rngs: getattr(jaxnorm.nnx, name)(linear(rngs=rngs), rngs=rngs)

    others = [
        *(getattr(jaxnorm.linen, name)(nn.Dense(4)) for name in weights),
        *(shapes_of_nnx(wrapped(name)) for name in weights),
        *(nn.Dense(4), shapes_of_nnx(linear), nn.WeightNorm(nn.Dense(4)), None, 3.0),
    ]
    assert len(weights) == 4
    for other in others:
        assert method_of(other) is None
        assert spec_of(other) is None


class LinenNormAndRelu(nn.BatchNorm):
    """A norm of a user's own."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x, use_running_average=True))


class NNXNormAndRelu(nnx.BatchNorm):
    """The same."""

    def __call__(self, x):
        return nnx.relu(super().__call__(x, use_running_average=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_subclass_that_calls_its_base_is_seen_once(framework):
    x = jnp.ones((4, 3))
    if framework == "linen":
        model = shapes_of(LinenNormAndRelu(), x)
    else:
        model = shapes_of_nnx(partial(NNXNormAndRelu, 3))
    (calls,) = model_of(model, "test").layers(lambda model: model(x)).values()
    assert len(calls) == 1
    assert not calls_as_its_kind(calls[0].layer)
