"""Folding and calls of layers: calls of a user's own, for training, for other domains, frozen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from test_fold import FRAMEWORKS, LinenPair, NNXPair, arrays_of, bound, out
from tool_models import stir, stirred, vector

import jaxnorm
from jaxnorm.tools.folding.fold import fold
from jaxnorm.tools.replacing.replace import replace
from jaxnorm.tools.replacing.replacements import frozen

pytestmark = pytest.mark.usefixtures("quick_compile")


class ReluDense(nn.Dense):
    """A layer with something behind it, as users write it."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


class ReluNorm(nn.BatchNorm):
    """A norm with something behind it."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


class NNXReluDense(nnx.Linear):
    """The twin of `ReluDense`."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


class NNXReluNorm(nnx.BatchNorm):
    """The twin of `ReluNorm`."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


@pytest.mark.parametrize("of", ["layer", "norm"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_calls_of_users_are_not_folded(framework, of):
    """Whether the example shows what they do or not: statistics as made, and an input of zeros."""
    own, x, rngs = of == "layer", vector(), nnx.Rngs(0)
    if framework == "linen":
        layer = (ReluDense if own else nn.Dense)(3)
        module = LinenPair(layer, (nn.BatchNorm if own else ReluNorm)(use_running_average=True))
        model = module.bind(module.init(jax.random.key(0), x))
    else:
        layer = (NNXReluDense if own else nnx.Linear)(4, 3, rngs=rngs)
        model = NNXPair(layer, (nnx.BatchNorm if own else NNXReluNorm)(3, rngs=rngs))
    name = f"{'NNX' if framework == 'nnx' else ''}Relu{'Dense' if own else 'Norm'}"
    reason = f"{name} has a __call__ of its own, so that it is not known what '{of}' does"
    for example in (x, jnp.zeros_like(x)):
        folded = fold(model, example)
        assert not folded.pairs
        assert dict(folded.left) == {"norm": reason}
        np.testing.assert_array_equal(out(folded.model, x), out(model, x))


class Domains(nn.Module):
    """Norms of the domain of the call, named in three ways."""

    @nn.compact
    def __call__(self, x, domain="a", train=False):
        norm = functools.partial(jaxnorm.linen.AdaBN, domains=("a", "b"))
        x = norm(name="first")(nn.Dense(3, name="x")(x), not train, domain=domain)
        return norm(name="second", domain=domain)(nn.Dense(3, name="y")(x), not train)


def test_a_norm_folded_for_one_domain_serves_no_other_and_no_training():
    x = vector()
    module, variables = bound(Domains(), x).unbind()
    model = module.bind(variables)
    for domain, other in ("ab", "ba"):
        folded = fold(model, x, domain)
        assert set(folded.pairs) == {"first", "second"}
        with pytest.raises(ValueError, match=f"domain='{other}', but it was folded for '{domain}'"):
            folded.model(x, other)
        for norm in ("first", "second"):
            with pytest.raises(ValueError, match=f"for '{domain}'"):
                fold(model, x, domain, only=norm).model(x, other)
        with pytest.raises(ValueError, match="cannot train"):
            folded.model(x, domain, train=True)


def test_nnx_norms_folded_for_one_domain_serve_no_other_and_no_training():
    x, rngs = vector(), nnx.Rngs(0)
    norm = jaxnorm.nnx.AdaBN(3, domains=("a", "b"), rngs=rngs)
    model = NNXPair(nnx.Linear(4, 3, rngs=rngs), norm)
    folded = fold(model, x, domain="b").model
    np.testing.assert_allclose(folded(x, domain="b"), out(model, x, domain="b"), atol=1e-6)
    np.testing.assert_allclose(nnx.view(folded, domain="b")(x), folded(x, domain="b"))
    with pytest.raises(ValueError, match="domain='a', but it was folded for 'b'"):
        folded(x)
    with pytest.raises(ValueError, match="cannot train"):
        folded(x, use_running_average=False, domain="b")
    folded.train()
    with pytest.raises(ValueError, match="cannot train"):
        folded(x, domain="b")


class Trained(nn.Module):
    """A norm that is made for training or for inference."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, name="norm")(
            nn.Dense(3, name="layer")(x)
        )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frozen_norms_are_folded_and_stay_frozen(framework):
    x, rngs = vector(), nnx.Rngs(0)
    if framework == "linen":
        flat = flatten_dict(Trained().init(jax.random.key(0), x, False))
        values = unflatten_dict({path: stirred(path[1:], leaf) for path, leaf in flat.items()})
        model, call = Trained().bind(values), (x, False)
    else:
        pair = NNXPair(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        model, call = stir(pair), (x,)
    frozen_model = replace(model, frozen(), *call).model
    folded = fold(frozen_model, *call)
    assert dict(folded.pairs) == {"norm": "layer"}
    expected = out(model, *call)
    if framework == "linen":
        found = folded.model(x, True)
    else:
        folded.model.train()
        found = folded.model(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class Ways(nn.Module):
    """A model with two ways, of which one goes through a norm."""

    @nn.compact
    def __call__(self, x, way="norm"):
        y = nn.Dense(3, name="other" if way == "other" else "layer")(x)
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        y = jnp.asarray(y) if way == "array" else y
        return {"none": lambda y: y, "tanh": jnp.tanh}.get(way, norm)(y)


def test_another_way_through_a_linen_model_is_an_error_not_a_wrong_result():
    """The twin in NNX is among the mistakes."""
    x = vector()
    module, variables = bound(Ways(), x).unbind()
    other = module.init(jax.random.key(1), x, "other")["params"]["other"]
    params = {**variables["params"], "other": other}
    folded = fold(module.bind({**variables, "params": params}), x)
    assert dict(folded.pairs) == {"norm": "layer"}
    for way in ("none", "tanh"):
        with pytest.raises(ValueError, match="folded layer 'layer': this call does not hand"):
            folded.model(x, way)
    with pytest.raises(ValueError, match="folded norm 'norm': its input does not come straight"):
        folded.model(x, "other")
    left = fold(bound(Ways(), x), x, "array").left["norm"]
    assert left == "its input is used as an array on the way to it: cast it by x.astype(dtype)"


class Tokens(nnx.Module):
    """Integers in; integers, text and nothing out; a norm that its code asks for options."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List(nnx.Linear(4, 4, rngs=rngs) for _ in range(4))
        self.norms = nnx.List(nnx.BatchNorm(4, rngs=rngs) for _ in range(3))
        self.layers[3].kernel = self.layers[2].kernel  # of a layer that the example does not call

    def __call__(self, tokens, shared=False):
        x = self.norms[0](self.layers[0](self.embed(tokens)))
        x = self.norms[1](self.layers[1](x)) / self.norms[1].num_features
        x = self.layers[3](x) if shared else self.norms[2](self.layers[2](x))
        return {"class": x.argmax(-1), "text": "logits", "none": None}


def test_integers_text_and_norms_whose_options_are_read():
    model, tokens = stir(Tokens()), jnp.arange(5)
    folded = fold(model, tokens)
    assert dict(folded.pairs) == {"norms/0": "layers/0"}
    assert "no attribute 'num_features'" in folded.left["norms/1"]
    assert folded.left["norms/2"] == "the kernel of 'layers/2' is also that of 'layers/3'"
    model.eval()
    for shared in (False, True):
        found, expected = folded.model(tokens, shared), model(tokens, shared)
        np.testing.assert_array_equal(found["class"], expected["class"])
        assert found["text"] == "logits"


class Mixed(nn.Module):
    """A layer in other dtypes than its variables and its norm, or what follows in another."""

    dtypes: Any

    @nn.compact
    def __call__(self, x):
        first, last = self.dtypes
        x = nn.Dense(3, dtype=first, name="layer")(x)
        x = nn.BatchNorm(use_running_average=True, dtype=jnp.float32, name="norm")(x)
        return nn.Dense(3, dtype=last)(x)


@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, None), (None, jnp.bfloat16)], ids=str)
def test_the_tolerance_is_that_of_the_dtypes_in_which_is_computed(dtypes):
    x = vector()
    folded = fold(bound(Mixed(dtypes), x), x)
    assert dict(folded.pairs) == {"norm": "layer"}
    assert folded.difference.relative < 0.02


def test_double_precision_with_statistics_in_single(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
    norm = nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64)
    model = bound(LinenPair(nn.Dense(3, param_dtype=jnp.float64), norm), x)
    dtypes = {leaf.dtype.name for leaf in arrays_of(model)}
    assert dtypes == {"float32", "float64"}
    folded = fold(model, x)
    assert dict(folded.pairs) == {"norm": "layer"}
    assert 1e-9 < folded.difference.relative < 1e-6
