"""`cite`: the right papers for names, classes, functions and models of both frameworks."""

import io
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.methods import METHODS


def cited(*what, **options):
    file = io.StringIO()
    jaxnorm.cite(*what, file=file, **options)
    return re.findall(r"eprint = \{(.*)\}", file.getvalue())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_by_name_function_and_class(method):
    papers = [paper.arxiv for paper in method.papers]
    classes = getattr(jaxnorm.linen, method.name), getattr(jaxnorm.nnx, method.name)
    for what in (method.name, method.function.__name__, method.function, *classes):
        assert cited(what) == papers, what


class Model(nn.Module):
    """Layers of ours and of Flax, one of them in a submodule that only training calls."""

    @nn.compact
    def __call__(self, x, train):
        x = jaxnorm.linen.RMSNorm()(nn.Dense(4)(x))
        if train:
            x = nn.Dropout(0.5, deterministic=False)(nn.LayerNorm()(x))
        return x


def test_a_linen_model_by_what_it_calls():
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert cited(Model(), inputs=(x,), train=False) == ["1910.07467"]
    assert cited(Model(), inputs=(x,), train=True) == ["1607.06450", "1910.07467"]


def test_an_nnx_model_by_what_is_in_it():
    class Subclass(jaxnorm.nnx.GroupNorm):
        pass

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(Subclass(4, 2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    assert cited(model) == ["1502.03167", "1803.08494"]


def test_a_paper_is_cited_once_and_entries_are_whole():
    file = io.StringIO()
    jaxnorm.cite("BatchNorm", jaxnorm.batch_norm, "LayerNorm", file=file)
    entries = file.getvalue().strip().split("\n\n")
    assert [entry.splitlines()[0] for entry in entries] == [
        "@misc{ioffe2015batch,",
        "@misc{ba2016layer,",
    ]
    for entry in entries:
        assert entry.count("{") == entry.count("}")


def test_keys_and_numbers_of_papers_are_distinct():
    papers = {paper for method in METHODS for paper in method.papers}
    for field in ("key", "arxiv", "title"):
        assert len({getattr(paper, field) for paper in papers}) == len(papers), field
