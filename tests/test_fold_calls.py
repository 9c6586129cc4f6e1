"""Folding and calls of layers: calls of a user's own, for training, for other domains, frozen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from test_fold import FRAMEWORKS, LinenPair, arrays_of, nnx_pair, outs
from tool_models import drawn, drawn_nnx, vector

import jaxnorm
from jaxnorm.tools.folding.fold import fold
from jaxnorm.tools.replacing.replace import replace
from jaxnorm.tools.replacing.replacements import frozen

pytestmark = pytest.mark.usefixtures("quick_compile")


class Domains(nn.Module):
    """Norms of the domain of the call, named in three ways."""

    @nn.compact
    def __call__(self, x, domain="a", train=False):
        norm = functools.partial(jaxnorm.linen.AdaBN, domains=("a", "b"))
        x = norm(name="first")(nn.Dense(3, name="x")(x), not train, domain=domain)
        return norm(name="second", domain=domain)(nn.Dense(3, name="y")(x), not train)


def traced(model, *args, **call):
    """Calls a model for its errors only."""
    run = model
    if isinstance(model, nn.Module):
        module, variables = model.unbind()
        run = functools.partial(module.apply, variables, mutable=["batch_stats"])
    return jax.eval_shape(lambda: run(*args, **call))


@pytest.mark.parametrize(("norm", "domain", "other"), [("first", "a", "b"), ("second", "b", "a")])
def test_a_norm_folded_for_one_domain_serves_no_other_and_no_training(norm, domain, other):
    """Each norm alone, as the first that raises hides the other."""
    x = vector()
    folded = fold(drawn(Domains(), x), x, domain, only=norm)
    assert set(folded.pairs) == {norm}
    with pytest.raises(ValueError, match=f"domain='{other}', but it was folded for '{domain}'"):
        traced(folded.model, x, other)
    with pytest.raises(ValueError, match="cannot train"):
        traced(folded.model, x, domain, train=True)


def test_nnx_norms_folded_for_one_domain_serve_no_other_and_no_training():
    x = vector()
    model = nnx_pair(nnx.Linear, jaxnorm.nnx.AdaBN, domains=("a", "b"))
    folded = fold(model, x, domain="b").model
    assert not model.norm.use_running_average  # only the folded model is in inference
    found, expected = outs([folded, model], x, domain="b")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    (by_view,) = outs([nnx.view(folded, domain="b")], x)
    np.testing.assert_allclose(by_view, found, atol=1e-6)
    with pytest.raises(ValueError, match="domain='a', but it was folded for 'b'"):
        traced(folded, x)
    with pytest.raises(ValueError, match="cannot train"):
        traced(folded, x, use_running_average=False, domain="b")
    folded.train()
    with pytest.raises(ValueError, match="cannot train"):
        traced(folded, x, domain="b")


class Trained(nn.Module):
    """A norm that is made for training or for inference."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, name="norm")(
            nn.Dense(3, name="layer")(x)
        )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frozen_norms_are_folded_and_stay_frozen(framework):
    x = vector()
    if framework == "linen":
        model, call = drawn(Trained(), x, train=False), (x, False)
    else:
        model, call = nnx_pair(nnx.Linear, nnx.BatchNorm), (x,)
    folded = fold(replace(model, frozen(), *call).model, *call)
    assert dict(folded.pairs) == {"norm": "layer"}
    (expected,) = outs([model], *call)
    if framework == "linen":
        module, variables = folded.model.unbind()
        found = jax.jit(lambda variables: module.apply(variables, x, True))(variables)
    else:
        folded.model.train()
        found = nnx.jit(lambda model: model(x))(folded.model)
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
    module, variables = drawn(Ways(), x).unbind()
    other = drawn(Ways(), x, way="other").variables["params"]["other"]
    params = {**variables["params"], "other": other}
    folded = fold(module.bind({**variables, "params": params}), x)
    assert dict(folded.pairs) == {"norm": "layer"}
    for way in ("none", "tanh"):
        with pytest.raises(ValueError, match="folded layer 'layer': this call does not hand"):
            traced(folded.model, x, way)
    with pytest.raises(ValueError, match="folded norm 'norm': its input does not come straight"):
        traced(folded.model, x, "other")
    left = fold(drawn(Ways(), x), x, "array").left["norm"]
    assert left == "its input is used as an array on the way to it: cast it by x.astype(dtype)"


class Tokens(nnx.Module):
    """Integers in; integers, text and nothing out; a norm that its code asks for options."""

    def __init__(self, rngs):
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
    model, tokens = drawn_nnx(Tokens), jnp.arange(5)
    folded = fold(model, tokens)
    assert dict(folded.pairs) == {"norms/0": "layers/0"}
    assert "no attribute 'num_features'" in folded.left["norms/1"]
    assert folded.left["norms/2"] == "the kernel of 'layers/2' is also that of 'layers/3'"

    def classes(model):
        """By two ways through the model. Text is no result of a compiled function."""
        results = [model(tokens, shared) for shared in (False, True)]
        assert [result["text"] for result in results] == ["logits", "logits"]
        return [result["class"] for result in results]

    model.eval()
    found, expected = nnx.jit(lambda *models: [classes(model) for model in models])(
        folded.model, model
    )
    np.testing.assert_array_equal(found, expected)


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
    folded = fold(drawn(Mixed(dtypes), x), x)
    assert dict(folded.pairs) == {"norm": "layer"}
    assert folded.difference.relative < 0.02


def test_double_precision_with_statistics_in_single(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
    norm = nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64)
    model = drawn(LinenPair(nn.Dense(3, param_dtype=jnp.float64), norm), x)
    dtypes = {leaf.dtype.name for leaf in arrays_of(model)}
    assert dtypes == {"float32", "float64"}
    folded = fold(model, x)
    assert dict(folded.pairs) == {"norm": "layer"}
    assert 1e-9 < folded.difference.relative < 1e-6
